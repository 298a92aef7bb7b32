// What the CPU and the CUDA binding of merge_tokens share: checks, results, the filled-in contract.
#pragma once
#include "check.h"
#include "hotkernels/merge_tokens.h"

namespace hotkernels {

constexpr const char* kMergeTokens = "merge_tokens";

// Checked inputs of both directions. Assignment values are not checked.
struct MergeTokensInputs {
  Tensor x;
  MergeTokens p{};

  MergeTokensInputs(const Tensor& given, const Tensor& assignment, int64_t num_clusters,
                    const std::optional<Tensor>& weight)
      : x(given) {
    HK_CHECK(given.dim() == 3, kMergeTokens, "x", "[B, N, C]", shape_of(given));
    HK_CHECK(num_clusters >= 1, kMergeTokens, "num_clusters", "at least 1", num_clusters);
    p.B = x.size(0), p.N = x.size(1), p.M = num_clusters, p.C = x.size(2);
    p.dtype = dtype_of(x, kMergeTokens, "x");
    check_tensor(assignment, x, kMergeTokens, "assignment", ScalarType::Long, {p.B, p.N});
    p.assignment = assignment.const_data_ptr<int64_t>();
    if (weight) {
      check_tensor(*weight, x, kMergeTokens, "weight", x.scalar_type(), {p.B, p.N});
      p.weight = weight->const_data_ptr();
    }
    if (p.C > 1 && x.stride(2) != 1) x = torch::stable::contiguous(x);
    p.x = x.const_data_ptr();
    p.x_stride_b = x.stride(0), p.x_stride_n = x.stride(1);
  }

  bool half() const { return p.dtype == DType::f16 || p.dtype == DType::bf16; }
};

struct MergeTokensCall : MergeTokensInputs {
  Tensor out, total, mean;

  MergeTokensCall(const Tensor& given, const Tensor& assignment, int64_t num_clusters,
                  const std::optional<Tensor>& weight, double eps, bool need_mean)
      : MergeTokensInputs(given, assignment, num_clusters, weight) {
    const bool keep_mean = half() && need_mean;
    out = allocate(x, {p.B, p.M, p.C});
    total = allocate(x, {p.B, p.M}, compute_type(p.dtype));
    mean = allocate(x, {keep_mean ? p.B : 0, p.M, p.C}, compute_type(p.dtype));
    p.eps = eps, p.out = out.mutable_data_ptr(), p.total = total.mutable_data_ptr();
    if (keep_mean) p.mean = mean.mutable_data_ptr();
  }
};

struct MergeTokensGradCall : MergeTokensInputs {
  Tensor grad_out, grad_x, grad_weight;

  MergeTokensGradCall(const Tensor& grad, const std::optional<Tensor>& mean, const Tensor& total, const Tensor& given,
                      const Tensor& assignment, const std::optional<Tensor>& weight, bool need_weight)
      : MergeTokensInputs(given, assignment, clusters_of(total), weight), grad_out(torch::stable::contiguous(grad)) {
    const ScalarType compute = compute_type(p.dtype);
    check_tensor(grad_out, x, kMergeTokens, "grad_out", x.scalar_type(), {p.B, p.M, p.C});
    check_tensor(total, x, kMergeTokens, "total", compute, {p.B, p.M});
    HK_CHECK(mean || !need_weight, kMergeTokens, "mean", "given, for the gradient of weight", "None");
    if (mean) {
      check_tensor(*mean, x, kMergeTokens, "mean", compute, {p.B, p.M, p.C});
      p.mean = const_cast<void*>(mean->const_data_ptr());
    }
    grad_x = allocate(x, {p.B, p.N, p.C});
    grad_weight = allocate(x, {p.B, need_weight ? p.N : 0});
    p.grad_out = grad_out.const_data_ptr();
    p.total = const_cast<void*>(total.const_data_ptr());
    p.grad_x = grad_x.mutable_data_ptr();
    p.grad_weight = need_weight ? grad_weight.mutable_data_ptr() : nullptr;
  }

 private:
  static int64_t clusters_of(const Tensor& total) {
    HK_CHECK(total.dim() == 2, kMergeTokens, "total", "[B, M]", shape_of(total));
    return total.size(1);
  }
};

}  // namespace hotkernels
