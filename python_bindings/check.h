// What every binding needs around a kernel: the one error form, element types, the runner over torch's threads.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "hotkernels/common.h"

// PyTorch's, from 2.13 on.
extern "C" __attribute__((weak, visibility("default"))) const char* torch_exception_get_what_without_backtrace();

namespace hotkernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Which instruction set the CPU kernels run on: the widest the machine has, unless HOTKERNELS_ISA names another.
Isa isa();

inline std::string shape_of(const Tensor& t) {
  std::ostringstream text;
  text << "[";
  for (int64_t d = 0; d < t.dim(); ++d) text << (d ? ", " : "") << t.size(d);
  text << "]";
  return text.str();
}

// Throws what Python sees as a ValueError: "<op>: <arg> must be <expected>, got <actual>".
#define HK_CHECK(condition, op, arg, expected, actual)                              \
  do {                                                                              \
    if (!(condition)) {                                                             \
      std::ostringstream text;                                                      \
      text << (op) << ": " << (arg) << " must be " << expected << ", got " << actual; \
      throw std::invalid_argument(text.str());                                      \
    }                                                                               \
  } while (false)

inline DType dtype_of(const Tensor& t, const char* op, const char* arg) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Half: return DType::f16;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Double: return DType::f64;
    default: HK_CHECK(false, op, arg, "float32, float16, bfloat16 or float64", torch::headeronly::toString(t.scalar_type()));
  }
  return DType::f32;
}

// An uninitialised tensor. Where there is no memory for it, the error is in PyTorch's words, if it tells them.
template <class... Type>
Tensor allocate(const Tensor& like, const std::vector<int64_t>& shape, Type... type) {
  try {
    return torch::stable::new_empty(like, shape, type...);
  } catch (const std::runtime_error&) {
    if (torch_exception_get_what_without_backtrace == nullptr) throw;
    throw std::runtime_error(torch_exception_get_what_without_backtrace());
  }
}

// Index values lie in [-1, size): -1 is "no token here".
inline void check_index_range(const Tensor& index, int64_t size, const char* op, const char* arg) {
  const int64_t* p = index.const_data_ptr<int64_t>();
  for (int64_t i = 0, count = index.numel(); i < count; ++i) {
    HK_CHECK(p[i] >= -1 && p[i] < size, op, arg, "-1 or in [0, " << size << ")", p[i]);
  }
}

// Runs body(begin, end) over [0, count) on torch's threads.
template <class Body>
inline void parallel(int64_t count, const Body& body) {
  torch::stable::parallel_for(0, count, 1, body);
}

inline Runner torch_runner() {
  return {[](int64_t count, void (*task)(void*, int64_t, int64_t), void* state) {
            parallel(count, [&](int64_t begin, int64_t end) { task(state, begin, end); });
          },
          static_cast<int32_t>(torch::stable::get_num_threads())};
}

}  // namespace hotkernels
