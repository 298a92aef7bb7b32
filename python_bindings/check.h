// What every binding needs around a kernel: the one error form, element types, the runner over torch's threads.
#pragma once
#include <sys/mman.h>
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

// PyTorch's, from 2.13 on; null before.
extern "C" __attribute__((weak, visibility("default"))) const char* torch_exception_get_what_without_backtrace();

namespace hotkernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Which instruction set the CPU kernels run on: the widest the machine has, unless HOTKERNELS_ISA names another.
Isa isa();

inline std::vector<int64_t> sizes_of(const Tensor& t) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < t.dim(); ++d) sizes.push_back(t.size(d));
  return sizes;
}

// For error messages: shapes, where -1 is any size; dtypes by Python's names; devices.
inline std::string shape_of(const std::vector<int64_t>& sizes) {
  std::string text;
  for (const int64_t size : sizes) text += (text.empty() ? "" : ", ") + (size < 0 ? "any" : std::to_string(size));
  return "[" + text + "]";
}
inline std::string shape_of(const Tensor& t) { return shape_of(sizes_of(t)); }

inline const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Double: return "float64";
    case ScalarType::Long: return "int64";
    case ScalarType::Int: return "int32";
    case ScalarType::Bool: return "bool";
    default: return torch::headeronly::toString(type);
  }
}

inline std::string device_of(const Tensor& t) {
  return t.is_cpu() ? "the CPU" : "GPU " + std::to_string(t.get_device_index());
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
    default: HK_CHECK(false, op, arg, "float32, float16, bfloat16 or float64", name_of(t.scalar_type()));
  }
  return DType::f32;
}

// The type in which sums over such elements are kept.
inline ScalarType compute_type(DType dtype) { return dtype == DType::f64 ? ScalarType::Double : ScalarType::Float; }

// Checks that a tensor is contiguous, of this type and these sizes (-1: any), and on the device of `beside`.
inline void check_tensor(const Tensor& t, const Tensor& beside, const char* op, const char* arg, ScalarType type,
                         const std::vector<int64_t>& sizes) {
  bool fits = t.is_contiguous() && t.scalar_type() == type && t.device() == beside.device();
  fits = fits && t.dim() == static_cast<int64_t>(sizes.size());
  for (int64_t d = 0; fits && d < t.dim(); ++d) fits = sizes[d] < 0 || t.size(d) == sizes[d];
  HK_CHECK(fits, op, arg,
           "a contiguous " << name_of(type) << " tensor " << shape_of(sizes) << " on " << device_of(beside),
           (t.is_contiguous() ? "a contiguous " : "a strided ")
               << name_of(t.scalar_type()) << " tensor " << shape_of(t) << " on " << device_of(t));
}

// What a call of PyTorch returns. On failure, rethrows with PyTorch's message where available (2.13+).
template <class Call>
auto with_message(const Call& call) {
  try {
    return call();
  } catch (const std::runtime_error&) {
    if (torch_exception_get_what_without_backtrace == nullptr) throw;
    throw std::runtime_error(torch_exception_get_what_without_backtrace());
  }
}

// Asks for huge pages behind a CPU tensor that fills some, as NumPy does. What is larger than glibc's malloc keeps is
// mapped anew in every call, and to get that page by page takes several times as long as to write to it.
inline void use_huge_pages(const Tensor& t) {
  constexpr uintptr_t kKept = 32 << 20, kPage = 2 << 20;
  const auto begin = reinterpret_cast<uintptr_t>(t.const_data_ptr()), end = begin + t.numel() * t.element_size();
  const uintptr_t first = (begin + kPage - 1) & ~(kPage - 1), last = end & ~(kPage - 1);
  if (end - begin > kKept) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
}

// An uninitialised tensor.
template <class... Type>
Tensor allocate(const Tensor& like, const std::vector<int64_t>& shape, Type... type) {
  Tensor made = with_message([&] { return torch::stable::new_empty(like, shape, type...); });
  if (made.is_cpu()) use_huge_pages(made);
  return made;
}

// Memory for a CPU kernel, 64-byte aligned.
struct Scratch {
  Tensor memory;
  void* data;

  Scratch(const Tensor& like, int64_t bytes)
      : memory(allocate(like, {bytes + 63}, ScalarType::Byte)),
        data(reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory.mutable_data_ptr()) + 63) & ~uintptr_t{63})) {}
};

// Index values lie in [-1, size): -1 is "no token here".
inline void check_index_range(const Tensor& index, int64_t size, const char* op, const char* arg) {
  const int64_t* p = index.const_data_ptr<int64_t>();
  for (int64_t i = 0, count = index.numel(); i < count; ++i) {
    HK_CHECK(p[i] >= -1 && p[i] < size, op, arg, "-1 or in [0, " << size << ")", p[i]);
  }
}

// Runs body(begin, end) over [0, count) on torch's threads, each with at least `grain` of it.
template <class Body>
inline void parallel(int64_t count, int64_t grain, const Body& body) {
  with_message([&] { torch::stable::parallel_for(0, count, grain, body); });
}

inline Runner torch_runner() {
  return {[](int64_t count, void (*task)(void*, int64_t, int64_t), void* state) {
            parallel(count, 1, [&](int64_t begin, int64_t end) { task(state, begin, end); });
          },
          static_cast<int32_t>(torch::stable::get_num_threads())};
}

}  // namespace hotkernels
