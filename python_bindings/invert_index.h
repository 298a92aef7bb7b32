// The inverted index that backward passes sum over, and what its CPU and CUDA bindings share.
#pragma once
#include <tuple>

#include "check.h"
#include "hotkernels/invert_index.h"

namespace hotkernels {

constexpr const char* kInvertIndex = "invert_index";

// index [..., L] -> start [..., num_tokens + 1], slots [..., L]. _C_cpu defines it for the CPU, _C_cuda for GPUs.
std::tuple<Tensor, Tensor> invert_index(const Tensor& index, int64_t num_tokens);

// Points a contract at the inverse of its index, which the returned tensors own.
template <class Contract>
[[nodiscard]] std::tuple<Tensor, Tensor> take_inverse(Contract& p, const Tensor& index, int64_t num_tokens) {
  std::tuple<Tensor, Tensor> inverse = invert_index(index, num_tokens);
  p.start = std::get<0>(inverse).template const_data_ptr<int64_t>();
  p.slots = std::get<1>(inverse).template const_data_ptr<int64_t>();
  return inverse;
}

// A checked call: its results, allocated, and the native contract. Index values are not checked.
struct InvertIndexCall {
  Tensor start, slots;
  InvertIndex p{};

  InvertIndexCall(const Tensor& index, int64_t num_tokens) {
    HK_CHECK(index.dim() >= 1, kInvertIndex, "index", "[..., L]", shape_of(index));
    std::vector<int64_t> sizes = sizes_of(index);
    check_tensor(index, index, kInvertIndex, "index", ScalarType::Long, sizes);
    HK_CHECK(num_tokens >= 0, kInvertIndex, "num_tokens", "at least 0", num_tokens);
    p.G = 1, p.L = sizes.back(), p.N = num_tokens;
    for (size_t d = 0; d + 1 < sizes.size(); ++d) p.G *= sizes[d];
    slots = allocate(index, sizes);
    sizes.back() = num_tokens + 1;
    start = allocate(index, sizes);
    p.index = index.const_data_ptr<int64_t>();
    p.start = start.mutable_data_ptr<int64_t>(), p.slots = slots.mutable_data_ptr<int64_t>();
  }
};

}  // namespace hotkernels
