// Element types as CUDA kernels see them: packs of them that one load moves, and what they are computed in.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "hotkernels/common.h"

namespace hotkernels {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kPackBytes = 16;  // the widest load of one thread

template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T value[V];
};

// Half types are computed in float32 and rounded once, as on the CPU.
template <class T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ inline float get(float x) { return x; }
__device__ inline double get(double x) { return x; }
__device__ inline float get(__half x) { return __half2float(x); }
__device__ inline float get(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ inline T put(Compute<T> x) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else {
    return x;
  }
}

// Calls body(T{}) for the element type of a tensor; an op that takes no float64 need not compile kernels for it.
template <bool kFloat64 = true, class Body>
inline auto with_element(DType dtype, const Body& body) {
  if constexpr (kFloat64) {
    if (dtype == DType::f64) return body(double{});
  }
  switch (dtype) {
    case DType::f16: return body(__half{});
    case DType::bf16: return body(__nv_bfloat16{});
    default: return body(float{});
  }
}

inline bool aligned(const void* pointer, int bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

}  // namespace hotkernels
