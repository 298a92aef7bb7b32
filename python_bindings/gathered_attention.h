// What gathered_attention and recovery_attention share between torch and the attention core: checks, views, gradients.
#pragma once
#include <tuple>

#include "check.h"
#include "hotkernels/gathered_attention.h"

namespace hotkernels {

struct AttentionArgs {
  const char* op;
  Tensor query, key, value;  // [*batch, H, N, D], or a query [H, Nq, D] for all sequences
  std::optional<Tensor> index, bias, key_bias;
  double scale;
};

struct AttentionGrads {
  Tensor query, key, value, bias, key_bias;  // the last two empty where not wanted
};

// out [*batch, H, Nq, D], stored [B, Nq, (J,) H, D]; lse [*batch, H, Nq].
std::tuple<Tensor, Tensor> attention_forward(const AttentionArgs& args);

// With `packed`, a contiguous [B, N, (J,) 3, H, D], the gradients of query, key and value go there.
AttentionGrads attention_backward(const AttentionArgs& args, const Tensor& grad_out,
                                  const std::optional<Tensor>& grad_lse, const Tensor& out, const Tensor& lse,
                                  const std::optional<Tensor>& start, const std::optional<Tensor>& slots,
                                  bool need_bias, bool need_key_bias, Tensor* packed = nullptr);

}  // namespace hotkernels
