// invert_index on the CPU, shared among torch's threads by rows.
#include "invert_index.h"

#include "hotkernels/invert_index.h"

namespace hotkernels {

std::tuple<Tensor, Tensor> invert_index(const Tensor& index, int64_t num_tokens) {
  constexpr const char* kOp = "invert_index";
  HK_CHECK(index.is_cpu() && index.scalar_type() == ScalarType::Long && index.dim() >= 1 && index.is_contiguous(), kOp,
           "index", "a contiguous int64 CPU tensor [..., L]",
           torch::headeronly::toString(index.scalar_type()) << " " << shape_of(index));
  HK_CHECK(num_tokens >= 0, kOp, "num_tokens", "at least 0", num_tokens);
  check_index_range(index, num_tokens, kOp, "index");
  std::vector<int64_t> shape;
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < index.dim(); ++d) shape.push_back(index.size(d)), rows *= index.size(d);
  const int64_t L = index.size(index.dim() - 1);
  shape.push_back(num_tokens + 1);
  Tensor start = torch::stable::new_empty(index, shape);
  shape.back() = L;
  Tensor slots = torch::stable::new_empty(index, shape);
  const int64_t* from = index.const_data_ptr<int64_t>();
  int64_t *to_start = start.mutable_data_ptr<int64_t>(), *to_slots = slots.mutable_data_ptr<int64_t>();
  const auto kernel = HK_CPU_DISPATCH(isa(), invert_index);
  parallel(rows, [&](int64_t begin, int64_t end) { kernel(from, L, num_tokens, to_start, to_slots, begin, end); });
  return {start, slots};
}

}  // namespace hotkernels

STABLE_TORCH_LIBRARY_IMPL(hotkernels, CPU, m) { m.impl("invert_index", TORCH_BOX(&hotkernels::invert_index)); }
