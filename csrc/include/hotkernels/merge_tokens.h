// out[b, m] = sum_i w_i x_i / (sum_i w_i + eps) over the tokens i with assignment[b, i] = m; an empty cluster gives 0.
#pragma once
#include "hotkernels/common.h"
#include "hotkernels/cuda.h"

namespace hotkernels {

struct MergeTokens {
  int64_t B, N, M, C;
  const void* x;              // [B, N, C], last dim contiguous
  int64_t x_stride_b, x_stride_n;
  const int64_t* assignment;  // [B, N] contiguous, in [-1, M)
  const void* weight;         // [B, N] contiguous, of x's type, or null = 1
  double eps;
  DType dtype;
  void* out;                  // [B, M, C] contiguous, of x's type
  void* mean;                 // out before rounding, in total's type; forward: null if not wanted or if x has that type
  void* total;                // [B, M] sum_i w_i + eps: float64 if x is, else float32; 0 where that has no
                              // reciprocal, and the cluster counts as empty

  // Backward only.
  const void* grad_out;       // [B, M, C] contiguous; total is read too, and mean if grad_weight is wanted
  void* grad_x;               // [B, N, C] contiguous
  void* grad_weight;          // [B, N] contiguous, or null

  // Forward on GPUs only.
  const int64_t* start;       // [B, M + 1] and
  const int64_t* slots;       // [B, N]: the inverted assignment (invert_index.h), or null if N <= kMaxSortedInBlock
};

// Sums the weights of samples [begin, end) into total.
HK_CPU_KERNEL(void merge_tokens_total(const MergeTokens& p, int64_t begin, int64_t end))
// Bytes of scratch that merge_tokens_fwd needs for so many channels, 64-byte aligned.
HK_CPU_KERNEL(int64_t merge_tokens_scratch(const MergeTokens& p, int64_t channels))
// Averages channels [c_begin, c_end) of sample b, tokens in ascending order.
HK_CPU_KERNEL(void merge_tokens_fwd(const MergeTokens& p, int64_t b, int64_t c_begin, int64_t c_end, void* scratch))
// Gradients of tokens [begin, end) of the B * N tokens.
HK_CPU_KERNEL(void merge_tokens_bwd(const MergeTokens& p, int64_t begin, int64_t end))

// The same for all of it on `stream`, total included. An assignment outside [0, M) counts as none: no caller has
// checked the values.
CudaError merge_tokens_fwd_cuda(const MergeTokens& p, CudaStream stream);
CudaError merge_tokens_bwd_cuda(const MergeTokens& p, CudaStream stream);

}  // namespace hotkernels
