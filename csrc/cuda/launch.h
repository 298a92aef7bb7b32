// How kernels are launched: grids for any number of samples, and one form of the call.
#pragma once
#include <cuda_runtime.h>

#include <climits>
#include <cstdint>

namespace hotkernels {

inline unsigned blocks_for(int64_t work, unsigned per_block) {
  return static_cast<unsigned>((work + per_block - 1) / per_block);
}

// The smallest power of two that is at least `count`, up to `most`: how many threads share `count` packs.
inline unsigned lanes_for(int64_t count, unsigned most) {
  unsigned lanes = 1;
  while (lanes < count && lanes < most) lanes *= 2;
  return lanes;
}

// A property of the current device, but at least `least`: if the runtime does not answer, the next launch says why.
inline int device_attribute(cudaDeviceAttr attribute, int least) {
  int device = 0, value = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, device);
  return error == cudaSuccess && value > least ? value : least;
}

// In whole vectors: of three ints that are known to be aligned, nvcc 13.0 reads four.
template <class... P, class... A>
cudaError_t launch_kernel(void (*kernel)(P...), dim3 grid, dim3 block, int64_t shared_bytes, cudaStream_t stream,
                          const A&... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = static_cast<size_t>((shared_bytes + 15) / 16 * 16);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

// Calls launch(first, count) for runs of samples with count * per_sample < 2^31, the most blocks of a grid: kernels
// count what one launch covers in 32 bits. per_sample must be less than 2^31.
template <class Launch>
inline cudaError_t launch_in_runs(int64_t samples, int64_t per_sample, const Launch& launch) {
  const int64_t run = per_sample > 0 ? INT_MAX / per_sample : INT_MAX;
  for (int64_t first = 0; first < samples; first += run) {
    const cudaError_t error = launch(first, samples - first < run ? samples - first : run);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace hotkernels
