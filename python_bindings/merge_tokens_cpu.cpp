// merge_tokens on the CPU: checks, allocates, shares samples and channels (forward) or tokens (backward) among threads.
#include "check.h"
#include "hotkernels/merge_tokens.h"

#include <algorithm>
#include <tuple>

namespace hotkernels {
namespace {

constexpr const char* kOp = "merge_tokens";
constexpr int64_t kChannels = 128;  // channels per task: 512 bytes of a row, enough for the prefetcher to follow
constexpr int64_t kGrain = 64;      // tokens per task at least

struct Inputs {
  Tensor x;
  MergeTokens p{};

  Inputs(const Tensor& given, const Tensor& assignment, int64_t num_clusters, const std::optional<Tensor>& weight)
      : x(given) {
    HK_CHECK(given.dim() == 3, kOp, "x", "[B, N, C]", shape_of(given));
    HK_CHECK(num_clusters >= 1, kOp, "num_clusters", "at least 1", num_clusters);
    p.B = x.size(0), p.N = x.size(1), p.M = num_clusters, p.C = x.size(2);
    p.dtype = dtype_of(x, kOp, "x");
    HK_CHECK(assignment.is_cpu() && assignment.scalar_type() == ScalarType::Long && assignment.is_contiguous() &&
                 assignment.dim() == 2 && assignment.size(0) == p.B && assignment.size(1) == p.N,
             kOp, "assignment", "a contiguous int64 CPU tensor [" << p.B << ", " << p.N << "]",
             torch::headeronly::toString(assignment.scalar_type()) << " " << shape_of(assignment));
    check_index_range(assignment, p.M, kOp, "assignment");
    p.assignment = assignment.const_data_ptr<int64_t>();
    if (weight) {
      HK_CHECK(weight->is_cpu() && weight->scalar_type() == x.scalar_type() && weight->is_contiguous() &&
                   weight->dim() == 2 && weight->size(0) == p.B && weight->size(1) == p.N,
               kOp, "weight", "a contiguous CPU tensor [" << p.B << ", " << p.N << "] of x's dtype",
               torch::headeronly::toString(weight->scalar_type()) << " " << shape_of(*weight));
      p.weight = weight->const_data_ptr();
    }
    if (p.C > 1 && x.stride(2) != 1) x = torch::stable::contiguous(x);
    p.x = x.const_data_ptr();
    p.x_stride_b = x.stride(0), p.x_stride_n = x.stride(1);
  }
};

// What sums are kept in.
ScalarType compute_type(DType dtype) { return dtype == DType::f64 ? ScalarType::Double : ScalarType::Float; }

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& assignment, int64_t num_clusters,
                                           const std::optional<Tensor>& weight, double eps, bool need_mean) {
  Inputs in(x, assignment, num_clusters, weight);
  MergeTokens& p = in.p;
  Tensor out = torch::stable::new_empty(x, {p.B, p.M, p.C});
  Tensor total = torch::stable::new_empty(x, {p.B, p.M}, compute_type(p.dtype));
  p.eps = eps, p.out = out.mutable_data_ptr(), p.total = total.mutable_data_ptr();
  const bool half = p.dtype == DType::f16 || p.dtype == DType::bf16;
  const bool keep_mean = half && need_mean;
  Tensor mean = torch::stable::new_empty(x, {keep_mean ? p.B : 0, p.M, p.C}, compute_type(p.dtype));
  if (keep_mean) p.mean = mean.mutable_data_ptr();

  const Isa set = isa();
  const auto sum_weights = HK_CPU_DISPATCH(set, merge_tokens_total);
  const auto kernel = HK_CPU_DISPATCH(set, merge_tokens_fwd);
  parallel(p.B, [&](int64_t begin, int64_t end) { sum_weights(p, begin, end); });
  const int64_t chunks = (p.C + kChannels - 1) / kChannels;
  parallel(p.B * chunks, [&](int64_t begin, int64_t end) {
    Tensor scratch = torch::stable::new_empty(x, {half ? p.M * std::min(p.C, kChannels) : 0}, ScalarType::Float);
    for (int64_t t = begin; t < end; ++t) {
      const int64_t c = t % chunks * kChannels;
      kernel(p, t / chunks, c, std::min(p.C, c + kChannels), scratch.mutable_data_ptr<float>());
    }
  });
  return {out, total, mean};
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad_out, const Tensor& mean, const Tensor& total, const Tensor& x,
                                    const Tensor& assignment, const std::optional<Tensor>& weight, bool need_weight) {
  HK_CHECK(mean.dim() == 3, kOp, "mean", "[B, M, C]", shape_of(mean));
  Inputs in(x, assignment, mean.size(1), weight);
  MergeTokens& p = in.p;
  const auto check = [&](const Tensor& t, const char* arg, ScalarType type, bool rank3) {
    HK_CHECK(t.is_cpu() && t.scalar_type() == type && t.is_contiguous() && t.dim() == (rank3 ? 3 : 2) &&
                 t.size(0) == p.B && t.size(1) == p.M && (!rank3 || t.size(2) == p.C),
             kOp, arg, "as merge_tokens_fwd returned it", torch::headeronly::toString(t.scalar_type()) << " " << shape_of(t));
  };
  const Tensor grad = torch::stable::contiguous(grad_out);
  check(grad, "grad_out", x.scalar_type(), true);
  check(mean, "mean", compute_type(p.dtype), true);
  check(total, "total", compute_type(p.dtype), false);
  Tensor grad_x = torch::stable::new_empty(x, {p.B, p.N, p.C});
  Tensor grad_weight = torch::stable::new_empty(x, {p.B, need_weight ? p.N : 0});
  p.grad_out = grad.const_data_ptr();
  p.mean = const_cast<void*>(mean.const_data_ptr()), p.total = const_cast<void*>(total.const_data_ptr());
  p.grad_x = grad_x.mutable_data_ptr();
  p.grad_weight = need_weight ? grad_weight.mutable_data_ptr() : nullptr;
  const auto kernel = HK_CPU_DISPATCH(isa(), merge_tokens_bwd);
  torch::stable::parallel_for(0, p.B * p.N, kGrain, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  return {grad_x, grad_weight};
}

}  // namespace
}  // namespace hotkernels

STABLE_TORCH_LIBRARY_IMPL(hotkernels, CPU, m) {
  m.impl("merge_tokens_fwd", TORCH_BOX(&hotkernels::forward));
  m.impl("merge_tokens_bwd", TORCH_BOX(&hotkernels::backward));
}
