// out[b, m] = x[b, index[b, m]] (+ pos[m]): chosen tokens copied out, in the same pass as their position embedding.
#pragma once
#include "hotkernels/common.h"
#include "hotkernels/cuda.h"

namespace hotkernels {

// A token is R rows of C contiguous elements (HoT: R = joints). Strides in elements.
struct GatherTokens {
  int64_t B, N, M, R, C;
  const void* x;         // [B, N, R, C], last dim contiguous
  int64_t x_stride_b, x_stride_n, x_stride_r;
  const int64_t* index;  // [B, M] contiguous, in [-1, N)
  const void* pos;       // [M, C] contiguous, of x's type, or null
  void* out;             // [B, M, R, C] contiguous
  DType dtype;           // of x and pos; read only if pos is set
  int64_t item_size;     // bytes per element
};

// Gathers tokens [begin, end) of the B * M output tokens.
HK_CPU_KERNEL(void gather_tokens_fwd(const GatherTokens& p, int64_t begin, int64_t end))
// Gathers all of them on `stream`. An index outside [0, N) counts as absent: no caller has checked the values.
CudaError gather_tokens_fwd_cuda(const GatherTokens& p, CudaStream stream);

// grad_x[b, n] = sum of grad_out[b, m] over the m with index[b, m] = n, in ascending m.
struct GatherTokensGrad {
  int64_t B, N, M, R, C;
  const void* grad_out;  // [B, M, R, C], last dim contiguous
  int64_t grad_stride_b, grad_stride_m, grad_stride_r;
  void* grad_x;          // [B, N, R, C] contiguous
  DType dtype;
  const int64_t* index;  // [B, M] contiguous
  const int64_t* start;  // [B, N + 1] and
  const int64_t* slots;  // [B, M]: the inverted index (invert_index.h); on a GPU null if M <= kMaxSortedInBlock
};

// Sums tokens [begin, end) of the B * N tokens.
HK_CPU_KERNEL(void gather_tokens_bwd(const GatherTokensGrad& p, int64_t begin, int64_t end))
// Sums all of them on `stream`; an index outside [0, N) counts as absent.
CudaError gather_tokens_bwd_cuda(const GatherTokensGrad& p, CudaStream stream);

}  // namespace hotkernels
