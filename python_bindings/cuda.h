// What every CUDA binding needs: the stream PyTorch is working on, and launch errors in the one error form.
#pragma once
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/shim_utils.h>

#include "check.h"
#include "hotkernels/cuda.h"

namespace hotkernels {

using torch::stable::accelerator::DeviceGuard;

inline CudaStream current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<CudaStream>(stream);
}

// Kernels count in 32 bits within one sample; samples and addresses in 64.
inline void check_32_bits(int64_t size, const char* op, const char* arg, const char* what) {
  HK_CHECK(size < 1 << 30, op, arg, "of fewer than 2^30 " << what << " on a GPU", size);
}

// Python sees a RuntimeError: the caller's arguments were right, the GPU refused. Clears the error for later calls.
inline void check_launch(CudaError error, const char* op) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(std::string(op) + ": launch must be accepted by the GPU, got " +
                           cudaGetErrorString(static_cast<cudaError_t>(error)));
}

}  // namespace hotkernels
