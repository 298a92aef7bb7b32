// What the CPU and the CUDA binding of gather_tokens share: checks, the view of a token as rows, filled-in contracts.
#pragma once
#include "check.h"
#include "hotkernels/gather_tokens.h"

namespace hotkernels {

constexpr const char* kGatherTokens = "gather_tokens";

// index [B, M], which must lie beside x.
inline void check_gather_index(const Tensor& index, const Tensor& x) {
  HK_CHECK(index.device() == x.device() && index.scalar_type() == ScalarType::Long && index.dim() == 2 &&
               index.size(0) == x.size(0) && index.is_contiguous(),
           kGatherTokens, "index", "a contiguous int64 tensor [B = " << x.size(0) << ", M] on x's device",
           torch::headeronly::toString(index.scalar_type()) << " " << shape_of(index));
}

// A token's trailing dims seen as R rows of C contiguous elements; copied only where they cannot be.
struct Rows {
  Tensor tensor;
  int64_t R = 1, C = 1, stride_r = 0;

  explicit Rows(const Tensor& t) : tensor(t) {
    HK_CHECK(t.dim() >= 3, kGatherTokens, "x", "[B, N, ..., C]", shape_of(t));
    if (fold()) return;
    tensor = torch::stable::contiguous(t);
    fold();
  }

 private:
  // Whether the strides allow it. That of a dim of size 1 means nothing.
  bool fold() {
    const int64_t last = tensor.dim() - 1;
    R = 1, C = stride_r = tensor.size(last);
    bool fits = C <= 1 || tensor.stride(last) == 1;
    for (int64_t d = last - 1; d >= 2; --d) {
      if (tensor.size(d) == 1) continue;
      if (R == 1) stride_r = tensor.stride(d);
      fits = fits && tensor.stride(d) == stride_r * R;
      R *= tensor.size(d);
    }
    return fits;
  }
};

inline int64_t item_size(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Bool: case ScalarType::Byte: case ScalarType::Char: return 1;
    case ScalarType::Half: case ScalarType::BFloat16: case ScalarType::Short: return 2;
    case ScalarType::Float: case ScalarType::Int: return 4;
    case ScalarType::Double: case ScalarType::Long: return 8;
    default:
      HK_CHECK(false, kGatherTokens, "x", "floating, integer or bool", torch::headeronly::toString(t.scalar_type()));
  }
  return 0;
}

// A checked forward call: its result, allocated, and the native contract. Index values are not looked at.
struct GatherTokensCall {
  Rows rows;
  Tensor out;
  GatherTokens p{};

  GatherTokensCall(const Tensor& x, const Tensor& index, const std::optional<Tensor>& pos) : rows(x) {
    check_gather_index(index, x);
    p.B = x.size(0), p.N = x.size(1), p.M = index.size(1), p.R = rows.R, p.C = rows.C;
    p.x = rows.tensor.const_data_ptr();
    p.x_stride_b = rows.tensor.stride(0), p.x_stride_n = rows.tensor.stride(1), p.x_stride_r = rows.stride_r;
    p.index = index.const_data_ptr<int64_t>();
    p.item_size = item_size(x);
    if (pos) {
      p.dtype = dtype_of(x, kGatherTokens, "x");
      HK_CHECK(pos->device() == x.device() && pos->scalar_type() == x.scalar_type() && pos->is_contiguous() &&
                   pos->dim() == 2 && pos->size(0) == p.M && pos->size(1) == p.C,
               kGatherTokens, "pos", "a contiguous tensor [" << p.M << ", " << p.C << "] of x's dtype on x's device",
               torch::headeronly::toString(pos->scalar_type()) << " " << shape_of(*pos));
      p.pos = pos->const_data_ptr();
    }
    std::vector<int64_t> shape{p.B, p.M};
    for (int64_t d = 2; d < x.dim(); ++d) shape.push_back(x.size(d));
    out = allocate(x, shape);
    p.out = out.mutable_data_ptr();
  }
};

// A checked backward call, but for the inverted index.
struct GatherTokensGradCall {
  Rows rows;
  Tensor grad_x;
  GatherTokensGrad p{};

  GatherTokensGradCall(const Tensor& grad_out, const Tensor& index, int64_t num_tokens) : rows(grad_out) {
    check_gather_index(index, grad_out);
    HK_CHECK(index.size(1) == grad_out.size(1), kGatherTokens, "grad_out", "[B, M = " << index.size(1) << ", ..., C]",
             shape_of(grad_out));
    HK_CHECK(num_tokens >= 0, kGatherTokens, "num_tokens", "at least 0", num_tokens);
    std::vector<int64_t> shape{grad_out.size(0), num_tokens};
    for (int64_t d = 2; d < grad_out.dim(); ++d) shape.push_back(grad_out.size(d));
    grad_x = allocate(grad_out, shape);
    p.B = grad_out.size(0), p.N = num_tokens, p.M = index.size(1), p.R = rows.R, p.C = rows.C;
    p.grad_out = rows.tensor.const_data_ptr(), p.dtype = dtype_of(grad_out, kGatherTokens, "grad_out");
    p.grad_stride_b = rows.tensor.stride(0), p.grad_stride_m = rows.tensor.stride(1), p.grad_stride_r = rows.stride_r;
    p.grad_x = grad_x.mutable_data_ptr();
    p.index = index.const_data_ptr<int64_t>();
  }
};

}  // namespace hotkernels
