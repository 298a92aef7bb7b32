// CUDA's 16-bit types, as far as kernels use them: stored as bits, converted to and from float32.
#pragma once
#include <cstring>

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __half2float(__half h) {
  _Float16 value;
  std::memcpy(&value, &h, 2);
  return value;
}
inline __half __float2half_rn(float x) {
  const auto value = static_cast<_Float16>(x);
  __half h;
  std::memcpy(&h, &value, 2);
  return h;
}
inline float __bfloat162float(__nv_bfloat16 h) { return __uint_as_float(unsigned{h.bits} << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const unsigned u = __float_as_uint(x);
  return {static_cast<uint16_t>(std::isnan(x) ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
inline __half __float2half(float x) { return __float2half_rn(x); }
inline __nv_bfloat16 __float2bfloat16(float x) { return __float2bfloat16_rn(x); }
