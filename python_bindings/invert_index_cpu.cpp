// invert_index on the CPU, shared among torch's threads by rows.
#include "invert_index.h"

namespace hotkernels {

std::tuple<Tensor, Tensor> invert_index(const Tensor& index, int64_t num_tokens) {
  const InvertIndexCall call(index, num_tokens);
  check_index_range(index, num_tokens, kInvertIndex, "index");
  const auto kernel = HK_CPU_DISPATCH(isa(), invert_index);
  parallel(call.p.G, 1, [&](int64_t begin, int64_t end) { kernel(call.p, begin, end); });
  return {call.start, call.slots};
}

}  // namespace hotkernels

STABLE_TORCH_LIBRARY_IMPL(hotkernels, CPU, m) { m.impl("invert_index", TORCH_BOX(&hotkernels::invert_index)); }
