// What the CPU and the CUDA binding of gather_tokens share: checks, the view of a token as rows, filled-in contracts.
#pragma once
#include "check.h"
#include "hotkernels/gather_tokens.h"

namespace hotkernels {

constexpr const char* kGatherTokens = "gather_tokens";

// A token's trailing dims seen as R rows of C contiguous elements; copied only where strides do not allow it.
struct Rows {
  Tensor tensor;
  int64_t R = 1, C = 1, stride_r = 0;

  Rows(const Tensor& t, const char* arg) : tensor(t) {
    HK_CHECK(t.dim() >= 3, kGatherTokens, arg, "[B, tokens, ..., C]", shape_of(t));
    if (fold()) return;
    tensor = torch::stable::contiguous(t);
    fold();
  }

 private:
  // Whether the strides allow it; the stride of a dim of size 1 means nothing.
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
      HK_CHECK(false, kGatherTokens, "x", "floating, integer or bool", name_of(t.scalar_type()));
  }
  return 0;
}

// A checked forward call: its result, allocated, and the native contract. Index values are not checked.
struct GatherTokensCall {
  Rows rows;
  Tensor out;
  GatherTokens p{};

  GatherTokensCall(const Tensor& x, const Tensor& index, const std::optional<Tensor>& pos) : rows(x, "x") {
    check_tensor(index, x, kGatherTokens, "index", ScalarType::Long, {x.size(0), -1});
    p.B = x.size(0), p.N = x.size(1), p.M = index.size(1), p.R = rows.R, p.C = rows.C;
    p.x = rows.tensor.const_data_ptr();
    p.x_stride_b = rows.tensor.stride(0), p.x_stride_n = rows.tensor.stride(1), p.x_stride_r = rows.stride_r;
    p.index = index.const_data_ptr<int64_t>();
    p.item_size = item_size(x);
    if (pos) {
      p.dtype = dtype_of(x, kGatherTokens, "x");
      check_tensor(*pos, x, kGatherTokens, "pos", x.scalar_type(), {p.M, p.C});
      p.pos = pos->const_data_ptr();
    }
    std::vector<int64_t> sizes = sizes_of(x);
    sizes[1] = p.M;
    out = allocate(x, sizes);
    p.out = out.mutable_data_ptr();
  }
};

// A checked backward call, but for the inverted index.
struct GatherTokensGradCall {
  Rows rows;
  Tensor grad_x;
  GatherTokensGrad p{};

  GatherTokensGradCall(const Tensor& grad_out, const Tensor& index, int64_t num_tokens)
      : rows(grad_out, "grad_out") {
    check_tensor(index, grad_out, kGatherTokens, "index", ScalarType::Long, {grad_out.size(0), grad_out.size(1)});
    HK_CHECK(num_tokens >= 0, kGatherTokens, "num_tokens", "at least 0", num_tokens);
    std::vector<int64_t> sizes = sizes_of(grad_out);
    sizes[1] = num_tokens;
    grad_x = allocate(grad_out, sizes);
    p.B = grad_out.size(0), p.N = num_tokens, p.M = index.size(1), p.R = rows.R, p.C = rows.C;
    p.grad_out = rows.tensor.const_data_ptr(), p.dtype = dtype_of(grad_out, kGatherTokens, "grad_out");
    p.grad_stride_b = rows.tensor.stride(0), p.grad_stride_m = rows.tensor.stride(1), p.grad_stride_r = rows.stride_r;
    p.grad_x = grad_x.mutable_data_ptr();
    p.index = index.const_data_ptr<int64_t>();
  }
};

}  // namespace hotkernels
