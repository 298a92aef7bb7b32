// merge_tokens and its backward. Tokens are read once, in order, and added to their cluster's row: no sort, no atomics,
// and one fixed order of summation per cluster however the work is shared.
#include "hotkernels/merge_tokens.h"

#include <cmath>

#include "element.h"

namespace hotkernels::HK_ISA {

void merge_tokens_total(const MergeTokens& p, int64_t begin, int64_t end) {
  with_element(p.dtype, [&](auto element) {
    using E = decltype(element);
    using Sum = typename E::Compute;
    const auto* weight = static_cast<const typename E::Stored*>(p.weight);
    for (int64_t b = begin; b < end; ++b) {
      Sum* total = static_cast<Sum*>(p.total) + b * p.M;
      for (int64_t m = 0; m < p.M; ++m) total[m] = 0;
      for (int64_t n = b * p.N; n < (b + 1) * p.N; ++n) {
        if (p.assignment[n] >= 0) total[p.assignment[n]] += weight ? E::get(weight[n]) : Sum{1};
      }
      for (int64_t m = 0; m < p.M; ++m) {
        total[m] += static_cast<Sum>(p.eps);
        // A total of 0, or one so small that it has no reciprocal: such a cluster counts as empty.
        if (std::isinf(Sum{1} / total[m])) total[m] = static_cast<Sum>(INFINITY);
      }
    }
  });
}

void merge_tokens_fwd(const MergeTokens& p, int64_t b, int64_t c_begin, int64_t c_end, float* scratch) {
  with_element(p.dtype, [&](auto element) {
    using E = decltype(element);
    using T = typename E::Stored;
    using Sum = typename E::Compute;
    const T* weight = static_cast<const T*>(p.weight);
    const Sum* total = static_cast<const Sum*>(p.total) + b * p.M;
    const int64_t* assignment = p.assignment + b * p.N;
    const int64_t count = c_end - c_begin;
    T* out = static_cast<T*>(p.out) + b * p.M * p.C + c_begin;
    constexpr bool in_place = sizeof(T) == sizeof(Sum);
    Sum* sums = in_place ? reinterpret_cast<Sum*>(out) : reinterpret_cast<Sum*>(scratch);
    const int64_t stride = in_place ? p.C : count;
    for (int64_t m = 0; m < p.M; ++m) memset(sums + m * stride, 0, static_cast<size_t>(count) * sizeof(Sum));
    for (int64_t n = 0; n < p.N; ++n) {
      if (assignment[n] < 0) continue;
      const Sum w = weight ? E::get(weight[b * p.N + n]) : Sum{1};
      const T* __restrict x = static_cast<const T*>(p.x) + b * p.x_stride_b + n * p.x_stride_n + c_begin;
      Sum* __restrict sum = sums + assignment[n] * stride;
      for (int64_t c = 0; c < count; ++c) sum[c] += w * E::get(x[c]);
    }
    for (int64_t m = 0; m < p.M; ++m) {
      const Sum scale = Sum{1} / total[m];
      for (int64_t c = 0; c < count; ++c) {
        const Sum mean = sums[m * stride + c] * scale;
        if (!in_place && p.mean) static_cast<Sum*>(p.mean)[(b * p.M + m) * p.C + c_begin + c] = mean;
        out[m * p.C + c] = E::put(mean);
      }
    }
  });
}

void merge_tokens_bwd(const MergeTokens& p, int64_t begin, int64_t end) {
  with_element(p.dtype, [&](auto element) {
    using E = decltype(element);
    using T = typename E::Stored;
    using Sum = typename E::Compute;
    const T* weight = static_cast<const T*>(p.weight);
    T* grad_weight = static_cast<T*>(p.grad_weight);
    for (int64_t n = begin; n < end; ++n) {
      const int64_t b = n / p.N;
      T* __restrict grad_x = static_cast<T*>(p.grad_x) + n * p.C;
      if (p.assignment[n] < 0) {
        for (int64_t c = 0; c < p.C; ++c) grad_x[c] = 0;  // not memset, which takes no null pointer where C = 0
        if (grad_weight) grad_weight[n] = 0;
        continue;
      }
      const int64_t m = b * p.M + p.assignment[n];
      const Sum scale = Sum{1} / static_cast<const Sum*>(p.total)[m];
      const Sum w = weight ? E::get(weight[n]) : Sum{1};
      const T* __restrict grad = static_cast<const T*>(p.grad_out) + m * p.C;
      for (int64_t c = 0; c < p.C; ++c) grad_x[c] = E::put(E::get(grad[c]) * (w * scale));
      if (!grad_weight) continue;
      // d out / d w = (x - out) / total, with out as it was before rounding
      const T* __restrict x = static_cast<const T*>(p.x) + b * p.x_stride_b + n % p.N * p.x_stride_n;
      const Sum* __restrict mean = static_cast<const Sum*>(p.mean) + m * p.C;
      Sum sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t c = 0; c < p.C; ++c) sum += E::get(grad[c]) * (E::get(x[c]) - mean[c]);
      grad_weight[n] = E::put(sum * scale);
    }
  });
}

}  // namespace hotkernels::HK_ISA
