// Element types as kernels see them: what is stored, what it is computed in, and how to go from one to the other.
#pragma once
#include "simd.h"

namespace hotkernels::HK_ISA {
namespace {

struct F32 {
  using Stored = float;
  using Compute = float;
  static Compute get(Stored x) { return x; }
  static Stored put(Compute x) { return x; }
};
struct F64 {
  using Stored = double;
  using Compute = double;
  static Compute get(Stored x) { return x; }
  static Stored put(Compute x) { return x; }
};
struct F16 {
  using Stored = uint16_t;
  using Compute = float;
  static Compute get(Stored x) { return from_f16(x); }
  static Stored put(Compute x) { return to_f16(x); }
};
struct BF16 {
  using Stored = uint16_t;
  using Compute = float;
  static Compute get(Stored x) { return from_bf16(x); }
  static Stored put(Compute x) { return to_bf16(x); }
};

// A register of compute values out of stored ones, and back.
template <class E>
using Vec = typename Simd<typename E::Compute>::vec;

template <class E>
constexpr int kLanes = Simd<typename E::Compute>::lanes;

template <class E>
inline Vec<E> load_as(const typename E::Stored* p) {
  if constexpr (sizeof(typename E::Stored) == sizeof(typename E::Compute)) {
    return load(p);
  } else {
    Vec<E> v;
    for (int l = 0; l < kLanes<E>; ++l) v[l] = E::get(p[l]);
    return v;
  }
}

template <class E>
inline void store_as(typename E::Stored* p, Vec<E> v) {
  if constexpr (sizeof(typename E::Stored) == sizeof(typename E::Compute)) {
    store(p, v);
  } else {
    for (int l = 0; l < kLanes<E>; ++l) p[l] = E::put(v[l]);
  }
}

// The first `count` < lanes values; the rest is 0 and not read.
template <class E>
inline Vec<E> load_some_as(const typename E::Stored* p, int64_t count) {
  typename E::Compute buffer[kLanes<E>] = {};
  for (int64_t l = 0; l < count; ++l) buffer[l] = E::get(p[l]);
  return load(buffer);
}

template <class E>
inline void store_some_as(typename E::Stored* p, Vec<E> v, int64_t count) {
  typename E::Compute buffer[kLanes<E>];
  store(buffer, v);
  for (int64_t l = 0; l < count; ++l) p[l] = E::put(buffer[l]);
}

// Calls body(Element{}) for the element type of a tensor.
template <class Body>
inline void with_element(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::f32: return body(F32{});
    case DType::f64: return body(F64{});
    case DType::f16: return body(F16{});
    case DType::bf16: return body(BF16{});
  }
}

}  // namespace
}  // namespace hotkernels::HK_ISA
