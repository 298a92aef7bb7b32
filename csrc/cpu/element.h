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
