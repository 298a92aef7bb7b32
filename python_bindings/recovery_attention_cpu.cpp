// recovery_attention on the CPU: gathered_attention's core without an index, with a query that may have no batch.
#include "gathered_attention.h"

namespace hotkernels {
namespace {

constexpr const char* kOp = "recovery_attention";

std::tuple<Tensor, Tensor> forward(const Tensor& query, const Tensor& key, const Tensor& value,
                                   const std::optional<Tensor>& key_bias, double scale) {
  return attention_forward({kOp, query, key, value, std::nullopt, std::nullopt, key_bias, scale});
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_out, const Tensor& query, const Tensor& key,
                                            const Tensor& value, const Tensor& out, const Tensor& lse,
                                            const std::optional<Tensor>& key_bias, double scale) {
  AttentionGrads g = attention_backward({kOp, query, key, value, std::nullopt, std::nullopt, key_bias, scale}, grad_out,
                                        std::nullopt, out, lse, std::nullopt, std::nullopt, false, false);
  return {g.query, g.key, g.value};
}

}  // namespace
}  // namespace hotkernels

STABLE_TORCH_LIBRARY_IMPL(hotkernels, CPU, m) {
  m.impl("recovery_attention_fwd", TORCH_BOX(&hotkernels::forward));
  m.impl("recovery_attention_bwd", TORCH_BOX(&hotkernels::backward));
}
