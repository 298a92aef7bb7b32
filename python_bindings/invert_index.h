// The inverted index that backward passes sum over, and what its CPU and CUDA bindings share.
#pragma once
#include <tuple>

#include "check.h"
#include "hotkernels/invert_index.h"

namespace hotkernels {

constexpr const char* kInvertIndex = "invert_index";

// index [..., L] -> start [..., num_tokens + 1], slots [..., L]. On the CPU in the one library, on GPUs in the other.
std::tuple<Tensor, Tensor> invert_index(const Tensor& index, int64_t num_tokens);

// A checked call: its results, allocated, and the native contract. Index values are not looked at.
struct InvertIndexCall {
  Tensor start, slots;
  InvertIndex p{};

  InvertIndexCall(const Tensor& index, int64_t num_tokens) {
    HK_CHECK(index.scalar_type() == ScalarType::Long && index.dim() >= 1 && index.is_contiguous(), kInvertIndex,
             "index", "a contiguous int64 tensor [..., L]",
             torch::headeronly::toString(index.scalar_type()) << " " << shape_of(index));
    HK_CHECK(num_tokens >= 0, kInvertIndex, "num_tokens", "at least 0", num_tokens);
    std::vector<int64_t> shape;
    p.G = 1, p.L = index.size(index.dim() - 1), p.N = num_tokens;
    for (int64_t d = 0; d + 1 < index.dim(); ++d) shape.push_back(index.size(d)), p.G *= index.size(d);
    shape.push_back(num_tokens + 1);
    start = allocate(index, shape);
    shape.back() = p.L;
    slots = allocate(index, shape);
    p.index = index.const_data_ptr<int64_t>();
    p.start = start.mutable_data_ptr<int64_t>(), p.slots = slots.mutable_data_ptr<int64_t>();
  }
};

}  // namespace hotkernels
