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
  torch::stable::parallel_for(0, tokens, kGrain,
                              [&](int64_t begin, int64_t end) { kernel(call.p, begin, end); });
  return call.out;
}

Tensor backward(const Tensor& grad_out, const Tensor& index, int64_t num_tokens) {
  const Rows rows(grad_out);
  check_gather_index(index, grad_out);
  HK_CHECK(index.size(1) == grad_out.size(1), kGatherTokens, "grad_out", "[B, M = " << index.size(1) << ", ..., C]",
           shape_of(grad_out));
  std::vector<int64_t> shape{grad_out.size(0), num_tokens};
  for (int64_t d = 2; d < grad_out.dim(); ++d) shape.push_back(grad_out.size(d));
  Tensor grad_x = torch::stable::new_empty(grad_out, shape);

  GatherTokensGrad p{};
  p.B = grad_out.size(0), p.N = num_tokens, p.M = index.size(1), p.R = rows.R, p.C = rows.C;
  p.grad_out = rows.tensor.const_data_ptr(), p.dtype = dtype_of(grad_out, kGatherTokens, "grad_out");
  p.grad_stride_b = rows.tensor.stride(0), p.grad_stride_m = rows.tensor.stride(1), p.grad_stride_r = rows.stride_r;
  p.grad_x = grad_x.mutable_data_ptr();
  const auto [start, slots] = invert_index(index, num_tokens);
  p.start = start.const_data_ptr<int64_t>(), p.slots = slots.const_data_ptr<int64_t>();
  const auto sum = HK_CPU_DISPATCH(isa(), gather_tokens_bwd);
  const int64_t tokens = grad_x.numel() == 0 ? 0 : p.B * p.N;
  torch::stable::parallel_for(0, tokens, kGrain, [&](int64_t begin, int64_t end) { sum(p, begin, end); });
  return grad_x;
}

}  // namespace
}  // namespace hotkernels

STABLE_TORCH_LIBRARY_IMPL(hotkernels, CPU, m) {
  m.impl("gather_tokens_fwd", TORCH_BOX(&hotkernels::forward));
  m.impl("gather_tokens_bwd", TORCH_BOX(&hotkernels::backward));
}
