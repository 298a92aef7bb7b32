// gather_tokens on the CPU: checks, allocates, shares the tokens among torch's threads.
#include "check.h"
#include "hotkernels/gather_tokens.h"

namespace hotkernels {
namespace {

constexpr const char* kOp = "gather_tokens";
constexpr int64_t kGrain = 32;  // tokens per task at least

void check_index(const Tensor& index, int64_t B) {
  HK_CHECK(index.is_cpu() && index.scalar_type() == ScalarType::Long && index.dim() == 2 && index.size(0) == B &&
               index.is_contiguous(),
           kOp, "index", "a contiguous int64 CPU tensor [B = " << B << ", M]",
           torch::headeronly::toString(index.scalar_type()) << " " << shape_of(index));
}

// A token's trailing dims seen as R rows of C contiguous elements; copied only where they cannot be.
struct Rows {
  Tensor tensor;
  int64_t R = 1, C = 1, stride_r = 0;

  explicit Rows(const Tensor& t) : tensor(t) {
    HK_CHECK(t.dim() >= 3, kOp, "x", "[B, N, ..., C]", shape_of(t));
    if (!fits()) tensor = torch::stable::contiguous(t);
    const int64_t last = tensor.dim() - 1;
    C = tensor.size(last);
    for (int64_t d = 2; d < last; ++d) R *= tensor.size(d);
    stride_r = last > 2 ? tensor.stride(last - 1) : C;
  }

 private:
  bool fits() const {
    const int64_t last = tensor.dim() - 1;
    if (tensor.size(last) > 1 && tensor.stride(last) != 1) return false;
    for (int64_t d = 2; d + 1 < last; ++d) {
      if (tensor.size(d) > 1 && tensor.stride(d) != tensor.stride(d + 1) * tensor.size(d + 1)) return false;
    }
    return true;
  }
};

int64_t item_size(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Bool: case ScalarType::Byte: case ScalarType::Char: return 1;
    case ScalarType::Half: case ScalarType::BFloat16: case ScalarType::Short: return 2;
    case ScalarType::Float: case ScalarType::Int: return 4;
    case ScalarType::Double: case ScalarType::Long: return 8;
    default: HK_CHECK(false, kOp, "x", "floating, integer or bool", torch::headeronly::toString(t.scalar_type()));
  }
  return 0;
}

Tensor forward(const Tensor& x, const Tensor& index, const std::optional<Tensor>& pos) {
  const Rows rows(x);
  const int64_t B = x.size(0), N = x.size(1);
  check_index(index, B);
  check_index_range(index, N, kOp, "index");
  std::vector<int64_t> shape{B, index.size(1)};
  for (int64_t d = 2; d < x.dim(); ++d) shape.push_back(x.size(d));
  Tensor out = torch::stable::new_empty(x, shape);

  GatherTokens p{};
  p.B = B, p.N = N, p.M = index.size(1), p.R = rows.R, p.C = rows.C;
  p.x = rows.tensor.const_data_ptr();
  p.x_stride_b = rows.tensor.stride(0), p.x_stride_n = rows.tensor.stride(1), p.x_stride_r = rows.stride_r;
  p.index = index.const_data_ptr<int64_t>();
  p.item_size = item_size(x);
  if (pos) {
    p.dtype = dtype_of(x, kOp, "x");
    HK_CHECK(pos->is_cpu() && pos->scalar_type() == x.scalar_type() && pos->is_contiguous() && pos->dim() == 2 &&
                 pos->size(0) == p.M && pos->size(1) == p.C,
             kOp, "pos", "a contiguous CPU tensor [" << p.M << ", " << p.C << "] of x's dtype",
             torch::headeronly::toString(pos->scalar_type()) << " " << shape_of(*pos));
    p.pos = pos->const_data_ptr();
  }
  p.out = out.mutable_data_ptr();
  const auto kernel = HK_CPU_DISPATCH(isa(), gather_tokens_fwd);
  torch::stable::parallel_for(0, p.B * p.M, kGrain, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  return out;
}

Tensor backward(const Tensor& grad_out, const Tensor& index, int64_t num_tokens) {
  const Rows rows(grad_out);
  check_index(index, grad_out.size(0));
  check_index_range(index, num_tokens, kOp, "index");
  HK_CHECK(index.size(1) == grad_out.size(1), kOp, "grad_out", "[B, M = " << index.size(1) << ", ..., C]",
           shape_of(grad_out));
  std::vector<int64_t> shape{grad_out.size(0), num_tokens};
  for (int64_t d = 2; d < grad_out.dim(); ++d) shape.push_back(grad_out.size(d));
  Tensor grad_x = torch::stable::new_empty(grad_out, shape);

  GatherTokensGrad p{};
  p.B = grad_out.size(0), p.N = num_tokens, p.M = index.size(1), p.R = rows.R, p.C = rows.C;
  p.grad_out = rows.tensor.const_data_ptr(), p.dtype = dtype_of(grad_out, kOp, "grad_out");
  p.grad_stride_b = rows.tensor.stride(0), p.grad_stride_m = rows.tensor.stride(1), p.grad_stride_r = rows.stride_r;
  p.index = index.const_data_ptr<int64_t>();
  p.grad_x = grad_x.mutable_data_ptr();
  Tensor start = torch::stable::new_empty(index, {p.B, p.N + 1});
  Tensor slots = torch::stable::new_empty(index, {p.B, p.M});
  p.start = start.mutable_data_ptr<int64_t>();
  p.slots = slots.mutable_data_ptr<int64_t>();
  const Isa set = isa();
  const auto invert = HK_CPU_DISPATCH(set, gather_tokens_invert);
  const auto sum = HK_CPU_DISPATCH(set, gather_tokens_bwd);
  parallel(p.B, [&](int64_t begin, int64_t end) { invert(p, begin, end); });
  torch::stable::parallel_for(0, p.B * p.N, kGrain, [&](int64_t begin, int64_t end) { sum(p, begin, end); });
  return grad_x;
}

}  // namespace
}  // namespace hotkernels

STABLE_TORCH_LIBRARY_IMPL(hotkernels, CPU, m) {
  m.impl("gather_tokens_fwd", TORCH_BOX(&hotkernels::forward));
  m.impl("gather_tokens_bwd", TORCH_BOX(&hotkernels::backward));
}
