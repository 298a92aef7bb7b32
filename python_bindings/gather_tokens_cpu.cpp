// gather_tokens on the CPU: checks, allocates, shares the tokens among torch's threads.
#include "gather_tokens.h"
#include "invert_index.h"

namespace hotkernels {
namespace {

constexpr int64_t kGrain = 32;  // tokens per task at least

Tensor forward(const Tensor& x, const Tensor& index, const std::optional<Tensor>& pos) {
  const GatherTokensCall call(x, index, pos);
  check_index_range(index, call.p.N, kGatherTokens, "index");
  const auto kernel = HK_CPU_DISPATCH(isa(), gather_tokens_fwd);
  const int64_t tokens = call.out.numel() == 0 ? 0 : call.p.B * call.p.M;  // C = 0 leaves no memory to point at
  parallel(tokens, kGrain, [&](int64_t begin, int64_t end) { kernel(call.p, begin, end); });
  return call.out;
}

Tensor backward(const Tensor& grad_out, const Tensor& index, int64_t num_tokens) {
  GatherTokensGradCall call(grad_out, index, num_tokens);
  GatherTokensGrad& p = call.p;
  const auto inverse = take_inverse(p, index, num_tokens);
  const auto sum = HK_CPU_DISPATCH(isa(), gather_tokens_bwd);
  const int64_t tokens = call.grad_x.numel() == 0 ? 0 : p.B * p.N;
  parallel(tokens, kGrain, [&](int64_t begin, int64_t end) { sum(p, begin, end); });
  return call.grad_x;
}

}  // namespace
}  // namespace hotkernels

STABLE_TORCH_LIBRARY_IMPL(hotkernels, CPU, m) {
  m.impl("gather_tokens_fwd", TORCH_BOX(&hotkernels::forward));
  m.impl("gather_tokens_bwd", TORCH_BOX(&hotkernels::backward));
}
