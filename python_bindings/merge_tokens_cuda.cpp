// merge_tokens on NVIDIA GPUs: the checks of the CPU binding, then one launch on PyTorch's current stream.
#include "cuda.h"
#include "invert_index.h"
#include "merge_tokens.h"

namespace hotkernels {
namespace {

void check_sizes(const MergeTokens& p) {
  check_32_bits(p.N, kMergeTokens, "x", "tokens per sample");
  check_32_bits(p.M, kMergeTokens, "num_clusters", "clusters per sample");
  check_32_bits(p.C, kMergeTokens, "x", "channels");
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& assignment, int64_t num_clusters,
                                           const std::optional<Tensor>& weight, double eps, bool need_mean) {
  const DeviceGuard guard(x.get_device_index());
  MergeTokensCall call(x, assignment, num_clusters, weight, eps, need_mean);
  check_sizes(call.p);
  std::tuple<Tensor, Tensor> inverse;
  if (call.p.N > kMaxSortedInBlock) inverse = take_inverse(call.p, assignment, num_clusters);
  check_launch(merge_tokens_fwd_cuda(call.p, current_stream(x.get_device_index())), kMergeTokens);
  return {call.out, call.total, call.mean};
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad_out, const std::optional<Tensor>& mean, const Tensor& total,
                                    const Tensor& x, const Tensor& assignment, const std::optional<Tensor>& weight,
                                    bool need_weight) {
  const DeviceGuard guard(x.get_device_index());
  const MergeTokensGradCall call(grad_out, mean, total, x, assignment, weight, need_weight);
  check_sizes(call.p);
  check_launch(merge_tokens_bwd_cuda(call.p, current_stream(x.get_device_index())), kMergeTokens);
  return {call.grad_x, call.grad_weight};
}

}  // namespace
}  // namespace hotkernels

STABLE_TORCH_LIBRARY_IMPL(hotkernels, CUDA, m) {
  m.impl("merge_tokens_fwd", TORCH_BOX(&hotkernels::forward));
  m.impl("merge_tokens_bwd", TORCH_BOX(&hotkernels::backward));
}
