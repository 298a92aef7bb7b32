// The inverted index that backward passes sum over.
#pragma once
#include <tuple>

#include "check.h"

namespace hotkernels {

// index [..., L] in [-1, num_tokens) -> start [..., num_tokens + 1], slots [..., L]. On the CPU.
std::tuple<Tensor, Tensor> invert_index(const Tensor& index, int64_t num_tokens);

}  // namespace hotkernels
