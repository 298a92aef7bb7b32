// gather_tokens on NVIDIA GPUs: the checks of the CPU binding, then one launch on PyTorch's current stream.
#include "cuda.h"
#include "gather_tokens.h"
#include "invert_index.h"

namespace hotkernels {
namespace {

void check_sizes(int64_t N, int64_t M, const Rows& rows, const char* arg) {
  check_32_bits(N, kGatherTokens, arg, "tokens per sample");
  check_32_bits(M, kGatherTokens, "index", "places per sample");
  check_32_bits(rows.R * rows.C, kGatherTokens, arg, "elements per token");
}

Tensor forward(const Tensor& x, const Tensor& index, const std::optional<Tensor>& pos) {
  const DeviceGuard guard(x.get_device_index());
  const GatherTokensCall call(x, index, pos);
  check_sizes(call.p.N, call.p.M, call.rows, "x");
  check_launch(gather_tokens_fwd_cuda(call.p, current_stream(x.get_device_index())), kGatherTokens);
  return call.out;
}

Tensor backward(const Tensor& grad_out, const Tensor& index, int64_t num_tokens) {
  const DeviceGuard guard(grad_out.get_device_index());
  GatherTokensGradCall call(grad_out, index, num_tokens);
  check_sizes(call.p.N, call.p.M, call.rows, "grad_out");
  std::tuple<Tensor, Tensor> inverse;
  if (call.p.M > kMaxSortedInBlock) inverse = take_inverse(call.p, index, num_tokens);
  check_launch(gather_tokens_bwd_cuda(call.p, current_stream(grad_out.get_device_index())), kGatherTokens);
  return call.grad_x;
}

}  // namespace
}  // namespace hotkernels

STABLE_TORCH_LIBRARY_IMPL(hotkernels, CUDA, m) {
  m.impl("gather_tokens_fwd", TORCH_BOX(&hotkernels::forward));
  m.impl("gather_tokens_bwd", TORCH_BOX(&hotkernels::backward));
}
