// CUDA's stream and error code as plain types, so that a contract can be read without a CUDA toolkit.
#pragma once

struct CUstream_st;

namespace hotkernels {

using CudaStream = CUstream_st*;  // cudaStream_t
using CudaError = int;            // cudaError_t; 0 is success

}  // namespace hotkernels
