// Attention over keys chosen by an index, read in place: out = softmax(scale * q k^T + bias) v over each query's slots.
#pragma once
#include "hotkernels/common.h"

namespace hotkernels {

// [B, J, H, N, D] with any strides (in elements, 0 = broadcast) and a contiguous last dim.
struct HeadsView {
  void* data;
  int64_t stride_b, stride_j, stride_h, stride_n;
};

struct Attention {
  int64_t B, J, H, Nq, Nk, D;
  int64_t S;                // slots of a query: Nk without an index, else the index's last dim
  DType dtype;              // of query, key, value, out and their gradients; "compute" is float32, float64 for f64
  bool bf16_pairs;          // multiply bfloat16 with AVX512-BF16, which the processor has; not for keys per query
  HeadsView query, key, value, out;
  const int64_t* index;     // null = dense; values in [-1, Nk); slots contiguous
  bool index_per_query;     // else one set of keys per b: index_stride_j and _h are 0
  int64_t index_stride_b, index_stride_j, index_stride_h, index_stride_q;
  const void* bias;         // [B, J, H, Nq, S] compute, any strides; or null
  int64_t bias_stride_b, bias_stride_j, bias_stride_h, bias_stride_q, bias_stride_s;
  const void* key_bias;     // [B, J, Nk] compute, any strides; or null
  int64_t key_bias_stride_b, key_bias_stride_j, key_bias_stride_n;
  double scale;
  void* lse;                // [B, J, H, Nq] compute, contiguous: log sum exp of the logits, -inf for an empty query

  // Backward only. Gradients that are null are not computed.
  HeadsView grad_out, grad_key, grad_value;
  HeadsView grad_query;
  const void* grad_lse;     // [B, J, H, Nq] compute, contiguous; or null
  void* grad_bias;          // [B, J, H, Nq, S] compute, contiguous; or null
  void* grad_key_bias;      // [B, J, H, Nk] compute, contiguous, still to be summed over H; or null
  // The gradient of a query or bias without batch dims is summed over the batch, in an order that does not depend on
  // threads: the B * J sequences are cut into `parts` runs, none empty, each with sums of its own. 0 = nothing to sum.
  int64_t parts;
  void* grad_query_parts;   // [parts, H, Nq, D] compute, instead of grad_query; or null
  void* grad_bias_parts;    // [parts, H, Nq, S] compute, instead of grad_bias; or null
  // With an index: its inverse (invert_index.h) over the entries of each set or (b, j, h), [.., Nk + 1] and
  // [.., Nq * S or S], with the strides below. Null with a set: grad_key and grad_value are those of its S slots,
  // unspecified for absent ones.
  const int64_t *start, *slots;
  int64_t start_stride_b, start_stride_j, start_stride_h, slots_stride_b, slots_stride_j, slots_stride_h;
  void* pairs;              // index_per_query only: scratch [B, J, Nq, S, H, 2] compute, for (p, grad_logit) of a slot
};

// Dense, or one set of keys per b. Work items are the B * J * H pairs of sequence and head; backward with
// `parts` counts parts * H items instead. Scratch here and below is 64-byte aligned.
HK_CPU_KERNEL(int64_t attention_scratch(const Attention& p, bool backward))
HK_CPU_KERNEL(void attention_fwd(const Attention& p, int64_t begin, int64_t end, void* scratch))
HK_CPU_KERNEL(void attention_bwd(const Attention& p, int64_t begin, int64_t end, void* scratch))

// Keys per query. Work items: B * J * Nq queries; for bwd_keys, B * J * Nk keys, after all queries are done.
HK_CPU_KERNEL(int64_t attention_per_query_scratch(const Attention& p))
HK_CPU_KERNEL(void attention_per_query_fwd(const Attention& p, int64_t begin, int64_t end, void* scratch))
HK_CPU_KERNEL(void attention_per_query_bwd_queries(const Attention& p, int64_t begin, int64_t end, void* scratch))
HK_CPU_KERNEL(void attention_per_query_bwd_keys(const Attention& p, int64_t begin, int64_t end, void* scratch))

}  // namespace hotkernels
