// gather_tokens on NVIDIA GPUs: the checks of the CPU binding, then one launch on PyTorch's current stream.
#include "cuda.h"
#include "gather_tokens.h"

namespace hotkernels {
namespace {

Tensor gather_tokens_fwd(const Tensor& x, const Tensor& index, const std::optional<Tensor>& pos) {
  const DeviceGuard guard(x.get_device_index());
  const GatherTokensCall call(x, index, pos);
  check_launch(gather_tokens_fwd_cuda(call.p, current_stream(x.get_device_index())), kGatherTokens);
  return call.out;
}

}  // namespace
}  // namespace hotkernels

STABLE_TORCH_LIBRARY_IMPL(hotkernels, CUDA, m) { m.impl("gather_tokens_fwd", TORCH_BOX(&hotkernels::gather_tokens_fwd)); }
