// dpc_knn on the CPU: checks, allocates, shares samples or the tiles of one sample among torch's threads.
#include "check.h"
#include "hotkernels/dpc_knn.h"

#include <tuple>

namespace hotkernels {
namespace {

constexpr const char* kOp = "dpc_knn";

void check_optional(const std::optional<Tensor>& t, const char* arg, ScalarType type, const char* type_name, int64_t rows,
                    int64_t columns) {
  if (!t) return;
  HK_CHECK(t->is_cpu() && t->scalar_type() == type && t->is_contiguous() && t->dim() == 2 && t->size(0) == rows &&
               t->size(1) == columns,
           kOp, arg, "a contiguous " << type_name << " CPU tensor [" << rows << ", " << columns << "]",
           torch::headeronly::toString(t->scalar_type()) << " " << shape_of(*t));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> dpc_knn(const Tensor& x, int64_t num_clusters, int64_t k,
                                                           const std::optional<Tensor>& mask,
                                                           const std::optional<Tensor>& keep,
                                                           const std::optional<Tensor>& noise, int64_t seed, bool assign,
                                                           bool ordered) {
  HK_CHECK(x.dim() == 3, kOp, "x", "[B, N, C]", shape_of(x));
  const int64_t B = x.size(0), N = x.size(1), C = x.size(2), M = num_clusters;
  const DType dtype = dtype_of(x, kOp, "x");
  HK_CHECK(dtype != DType::f64, kOp, "x", "float32, float16 or bfloat16", "float64");
  HK_CHECK(C >= 1 && N >= 1 && N < (int64_t{1} << 31), kOp, "x", "[B, N, C] with 1 <= N < 2^31 and C >= 1", shape_of(x));
  HK_CHECK(1 <= M && M <= N, kOp, "num_clusters", "in [1, N = " << N << "]", M);
  HK_CHECK(1 <= k && k <= N, kOp, "k", "in [1, N = " << N << "]", k);
  check_optional(mask, "mask", ScalarType::Bool, "bool", B, N);
  check_optional(noise, "noise", ScalarType::Float, "float32", B, N);
  if (keep) {
    HK_CHECK(keep->dim() == 2 && (keep->size(0) == B || keep->size(0) == 1), kOp, "keep",
             "[B or 1, K] with B = " << B, shape_of(*keep));
    HK_CHECK(keep->size(1) <= M, kOp, "keep", "at most num_clusters = " << M << " positions", keep->size(1));
    check_optional(keep, "keep", ScalarType::Long, "int64", keep->size(0), keep->size(1));
    check_index_range(*keep, N, kOp, "keep");
  }

  Tensor index = torch::stable::new_empty(x, {B, M}, ScalarType::Long);
  Tensor assignment = torch::stable::new_empty(x, {B, assign ? N : 0}, ScalarType::Long);
  Tensor density = torch::stable::new_empty(x, {B, N}, ScalarType::Float);
  Tensor delta = torch::stable::new_empty(x, {B, N}, ScalarType::Float);
  Tensor score = torch::stable::new_empty(x, {B, N}, ScalarType::Float);

  DpcKnn p{};
  p.B = B, p.N = N, p.C = C, p.M = M, p.k = k;
  p.x = x.const_data_ptr(), p.dtype = dtype;
  p.x_stride_b = x.stride(0), p.x_stride_n = x.stride(1), p.x_stride_c = x.stride(2);
  p.mask = mask ? mask->const_data_ptr<bool>() : nullptr;
  p.noise = noise ? noise->const_data_ptr<float>() : nullptr;
  if (keep) {
    p.keep = keep->const_data_ptr<int64_t>();
    p.num_keep = keep->size(1);
    p.keep_stride_b = keep->size(0) == B ? p.num_keep : 0;
  }
  p.seed = seed, p.assign = assign, p.ordered = ordered;
  p.index = index.mutable_data_ptr<int64_t>();
  p.assignment = assignment.mutable_data_ptr<int64_t>();
  p.density = density.mutable_data_ptr<float>();
  p.delta = delta.mutable_data_ptr<float>();
  p.score = score.mutable_data_ptr<float>();

  const Isa set = isa();
  const auto scratch_fn = HK_CPU_DISPATCH(set, dpc_knn_scratch);
  const auto fwd = HK_CPU_DISPATCH(set, dpc_knn_fwd);
  const auto scratch_for = [&](int32_t threads) {
    return torch::stable::new_empty(x, {scratch_fn(p, threads) + 64}, ScalarType::Byte);
  };
  const auto aligned = [](Tensor& t) {
    return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(t.mutable_data_ptr()) + 63) & ~uintptr_t{63});
  };

  const Runner runner = torch_runner();
  if (B >= runner.threads) {  // samples share nothing: the cheapest cut
    parallel(B, [&](int64_t begin, int64_t end) {
      Tensor scratch = scratch_for(1);
      for (int64_t b = begin; b < end; ++b) fwd(p, b, aligned(scratch), kSerial);
    });
  } else if (B > 0) {
    Tensor scratch = scratch_for(runner.threads);
    for (int64_t b = 0; b < B; ++b) fwd(p, b, aligned(scratch), runner);
  }
  return {index, assignment, density, delta, score};
}

}  // namespace
}  // namespace hotkernels

STABLE_TORCH_LIBRARY_IMPL(hotkernels, CPU, m) { m.impl("dpc_knn_fwd", TORCH_BOX(&hotkernels::dpc_knn)); }
