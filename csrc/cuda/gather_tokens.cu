// gather_tokens: a group of threads per output token, each copying (and adding to) the widest packs that are aligned.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "hotkernels/gather_tokens.h"

namespace hotkernels {
namespace {

constexpr int kThreads = 256;
constexpr int kPackBytes = 16;  // the widest load of one thread

template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T value[V];
};

template <class T>
__device__ T add(T a, T b) {
  return a + b;
}
// Half types are added in float32 and rounded once, as on the CPU.
template <>
__device__ __half add(__half a, __half b) {
  return __float2half_rn(__half2float(a) + __half2float(b));
}
template <>
__device__ __nv_bfloat16 add(__nv_bfloat16 a, __nv_bfloat16 b) {
  return __float2bfloat16_rn(__bfloat162float(a) + __bfloat162float(b));
}

// blockDim = (threads per token, tokens per block). R rows of `packs` packs of V elements; pos may be null.
template <class T, int V, bool kAddPos>
__global__ void __launch_bounds__(kThreads) gather_tokens_fwd_kernel(GatherTokens p, int64_t R, int64_t packs) {
  using P = Pack<T, V>;
  const int64_t step = int64_t{gridDim.x} * blockDim.y;
  for (int64_t t = int64_t{blockIdx.x} * blockDim.y + threadIdx.y; t < p.B * p.M; t += step) {
    const int64_t b = t / p.M, n = p.index[t];
    const bool there = n >= 0 && n < p.N;
    const T* token = static_cast<const T*>(p.x) + (there ? b * p.x_stride_b + n * p.x_stride_n : 0);
    const P* pos = static_cast<const P*>(p.pos) + (t - b * p.M) * packs;
    for (int64_t r = 0; r < R; ++r) {
      const P* from = reinterpret_cast<const P*>(token + r * p.x_stride_r);
      P* to = static_cast<P*>(p.out) + (t * R + r) * packs;
      for (int64_t i = threadIdx.x; i < packs; i += blockDim.x) {
        P pack = there ? from[i] : P{};
        if constexpr (kAddPos) {
          const P other = pos[i];
          if (there) {
#pragma unroll
            for (int v = 0; v < V; ++v) pack.value[v] = add(pack.value[v], other.value[v]);
          } else {
            pack = other;
          }
        }
        to[i] = pack;
      }
    }
  }
}

template <class T, int V, bool kAddPos>
cudaError_t launch(const GatherTokens& p, int64_t R, int64_t C, cudaStream_t stream) {
  const int64_t packs = C / V, tokens = p.B * p.M;
  unsigned lanes = 1;
  while (lanes < packs && lanes < kThreads) lanes *= 2;
  cudaLaunchConfig_t config{};
  config.blockDim = dim3(lanes, kThreads / lanes);
  const int64_t blocks = (tokens + config.blockDim.y - 1) / config.blockDim.y;
  config.gridDim = dim3(static_cast<unsigned>(blocks < INT32_MAX ? blocks : INT32_MAX));
  config.stream = stream;
  return cudaLaunchKernelEx(&config, gather_tokens_fwd_kernel<T, V, kAddPos>, p, R, packs);
}

template <class T, bool kAddPos>
cudaError_t launch_widest(const GatherTokens& p, cudaStream_t stream) {
  constexpr int V = kPackBytes / sizeof(T);
  const bool whole = !kAddPos && p.x_stride_r == p.C;  // a token is one run; pos repeats per row
  const int64_t R = whole ? 1 : p.R, C = whole ? p.R * p.C : p.C;
  const auto wide = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % kPackBytes == 0; };
  const bool packed = wide(p.x) && wide(p.out) && wide(p.pos) && C % V == 0 && p.x_stride_b % V == 0 &&
                      p.x_stride_n % V == 0 && (R == 1 || p.x_stride_r % V == 0);
  return packed ? launch<T, V, kAddPos>(p, R, C, stream) : launch<T, 1, kAddPos>(p, R, C, stream);
}

}  // namespace

CudaError gather_tokens_fwd_cuda(const GatherTokens& p, CudaStream stream) {
  if (p.B * p.M * p.R * p.C == 0) return cudaSuccess;
  if (p.pos != nullptr) {
    switch (p.dtype) {
      case DType::f32: return launch_widest<float, true>(p, stream);
      case DType::f16: return launch_widest<__half, true>(p, stream);
      case DType::bf16: return launch_widest<__nv_bfloat16, true>(p, stream);
      case DType::f64: return launch_widest<double, true>(p, stream);
    }
  }
  switch (p.item_size) {  // a copy needs to know no more than the size
    case 1: return launch_widest<uint8_t, false>(p, stream);
    case 2: return launch_widest<uint16_t, false>(p, stream);
    case 4: return launch_widest<uint32_t, false>(p, stream);
    case 8: return launch_widest<uint64_t, false>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace hotkernels
