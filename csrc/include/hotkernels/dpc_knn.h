// Density-peak clustering (DPC-kNN) of each sample of x [B, N, C]: the M tokens that stand for all N.
// The definition, step by step, is the docstring of hotkernels.dpc_knn; how a kernel gets there: csrc/cpu/dpc_knn.cpp.
#pragma once
#include "hotkernels/common.h"
#include "hotkernels/cuda.h"

namespace hotkernels {

// A token is valid only if its squared norm is at most this: then no sum of squared distances over up to 2^31 tokens
// overflows. NaN and inf fail it too.
constexpr float kNormLimit = 0x1p93f;

struct DpcKnn {
  int64_t B, N, C;       // samples, tokens, channels
  int64_t M, k;          // tokens to keep, neighbours per density (the token itself included)
  const void* x;         // [B, N, C], any strides (in elements)
  DType dtype;           // f32, f16, bf16
  int64_t x_stride_b, x_stride_n, x_stride_c;
  const bool* mask;      // [B, N] contiguous, true = valid; or null
  const int64_t* keep;   // [B or 1, num_keep] positions that are always kept, -1 = none; or null
  int64_t num_keep, keep_stride_b;
  const float* noise;    // [B, N] contiguous, added to the density; or null
  int64_t seed;          // of the hash that orders equal densities
  bool assign, ordered;
  int64_t* index;        // [B, M]
  int64_t* assignment;   // [B, N], unused unless assign
  float *density, *delta, *score;  // [B, N]
};

// Bytes of scratch that one call of dpc_knn_fwd needs: O(N (k + C)), and at most 2.7 MB of distances. 64-byte aligned.
HK_CPU_KERNEL(int64_t dpc_knn_scratch(const DpcKnn& p, int32_t threads))

// Clusters sample b.
HK_CPU_KERNEL(void dpc_knn_fwd(const DpcKnn& p, int64_t b, void* scratch, const Runner& runner))

// Bytes of device memory that dpc_knn_fwd_cuda needs on the current device: O(N (k + C)) per sample, never N x N beyond
// the few hundred tokens that are clustered in one go. 256-byte aligned.
int64_t dpc_knn_scratch_cuda(const DpcKnn& p);

// Clusters all samples on `stream`. Before distances are taken, a pivot (per channel, the median of three tokens) is
// subtracted from the tokens, and the rest is rounded to 11 bits: float16 after scaling by a power of two. Coordinates
// below 2^-27 of a sample's largest keep fewer bits: they are rounded to 2^-38 of it. A `keep` outside [-1, N) counts
// as -1.
CudaError dpc_knn_fwd_cuda(const DpcKnn& p, void* scratch, CudaStream stream);

}  // namespace hotkernels
