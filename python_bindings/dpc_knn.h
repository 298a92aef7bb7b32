// What the CPU and the CUDA binding of dpc_knn share: checks, allocated results, the filled-in contract.
#pragma once
#include <tuple>

#include "check.h"
#include "hotkernels/dpc_knn.h"

namespace hotkernels {

constexpr const char* kDpcKnn = "dpc_knn";

// index, assignment, density, delta, score.
using Peaks = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// A checked call: its results, allocated, and the native contract. Values of `keep` are not checked.
struct DpcKnnCall {
  Tensor index, assignment, density, delta, score;
  DpcKnn p{};

  DpcKnnCall(const Tensor& x, int64_t num_clusters, int64_t k, const std::optional<Tensor>& mask,
             const std::optional<Tensor>& keep, const std::optional<Tensor>& noise, int64_t seed, bool assign,
             bool ordered) {
    HK_CHECK(x.dim() == 3, kDpcKnn, "x", "[B, N, C]", shape_of(x));
    const int64_t B = x.size(0), N = x.size(1), C = x.size(2), M = num_clusters;
    p.dtype = dtype_of(x, kDpcKnn, "x");
    HK_CHECK(p.dtype != DType::f64, kDpcKnn, "x", "float32, float16 or bfloat16", "float64");
    HK_CHECK(C >= 1 && N >= 1 && N < (int64_t{1} << 31), kDpcKnn, "x", "[B, N, C] with 1 <= N < 2^31 and C >= 1",
             shape_of(x));
    HK_CHECK(1 <= M && M <= N, kDpcKnn, "num_clusters", "in [1, N = " << N << "]", M);
    HK_CHECK(1 <= k && k <= N, kDpcKnn, "k", "in [1, N = " << N << "]", k);
    if (mask) check_tensor(*mask, x, kDpcKnn, "mask", ScalarType::Bool, {B, N});
    if (noise) check_tensor(*noise, x, kDpcKnn, "noise", ScalarType::Float, {B, N});
    if (keep) {
      HK_CHECK(keep->dim() == 2 && (keep->size(0) == B || keep->size(0) == 1), kDpcKnn, "keep",
               "[B or 1, K] with B = " << B, shape_of(*keep));
      HK_CHECK(keep->size(1) <= M, kDpcKnn, "keep", "at most num_clusters = " << M << " positions", keep->size(1));
      check_tensor(*keep, x, kDpcKnn, "keep", ScalarType::Long, sizes_of(*keep));
    }

    index = allocate(x, {B, M}, ScalarType::Long);
    assignment = allocate(x, {B, assign ? N : 0}, ScalarType::Long);
    density = allocate(x, {B, N}, ScalarType::Float);
    delta = allocate(x, {B, N}, ScalarType::Float);
    score = allocate(x, {B, N}, ScalarType::Float);

    p.B = B, p.N = N, p.C = C, p.M = M, p.k = k;
    p.x = x.const_data_ptr();
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
  }

  Peaks results() const { return {index, assignment, density, delta, score}; }
};

}  // namespace hotkernels
