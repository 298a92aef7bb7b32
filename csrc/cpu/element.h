// Element types as kernels see them: what is stored, what it is computed in, and how to go from one to the other.
#pragma once
#include <type_traits>

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

// W half-type values in memory, and 32-bit patterns to work on.
typedef uint16_t halves __attribute__((vector_size(2 * W)));
typedef uint16_t halves_mem __attribute__((vector_size(2 * W), aligned(2), may_alias));
typedef Simd<uint32_t>::vec vu;

template <class E>
inline Vec<E> load_as(const typename E::Stored* p) {
  if constexpr (sizeof(typename E::Stored) == sizeof(typename E::Compute)) {
    return load(p);
  } else if constexpr (std::is_same_v<E, BF16>) {
    return (vf)(__builtin_convertvector(*reinterpret_cast<const halves_mem*>(p), vu) << 16);
  } else {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    vf v;
    for (int l = 0; l < W; ++l) v[l] = from_f16(p[l]);
    return v;
#endif
  }
}

template <class E>
inline void store_as(typename E::Stored* p, Vec<E> v) {
  if constexpr (sizeof(typename E::Stored) == sizeof(typename E::Compute)) {
    store(p, v);
  } else if constexpr (std::is_same_v<E, BF16>) {  // as to_bf16
    const vu u = (vu)v;
    const vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    *reinterpret_cast<halves_mem*>(p) = __builtin_convertvector(v == v ? rounded : vu{} + 0x7fc0u, halves);
  } else {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int l = 0; l < W; ++l) p[l] = to_f16(v[l]);
#endif
  }
}

// The first `count` < lanes values; the rest is 0 and not read.
template <class E>
inline Vec<E> load_some_as(const typename E::Stored* p, int64_t count) {
  typename E::Compute buffer[kLanes<E>] = {};
  for (int64_t l = 0; l < count; ++l) buffer[l] = E::get(p[l]);
  return load(buffer);
}

// The first `left` values, however many those are; zeros after them.
template <class E>
inline Vec<E> load_up_to(const typename E::Stored* p, int64_t left) {
  return left < kLanes<E> ? load_some_as<E>(p, left) : load_as<E>(p);
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
