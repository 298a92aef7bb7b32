// merge_tokens and its backward. Tokens are read once, in order, and added to their cluster's row: no sort, no atomics,
// and one fixed order of summation per cluster however the work is shared.
#include "hotkernels/merge_tokens.h"

#include <cmath>

#include "element.h"
#include "scratch.h"

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
        if (std::isinf(Sum{1} / total[m])) total[m] = 0;  // too small to have a reciprocal
      }
    }
  });
}

namespace {

// Whether a token of this cluster counts, of clusters with these totals.
template <class Sum>
bool counts(int64_t cluster, const Sum* total) {
  return cluster >= 0 && total[cluster] != 0;
}

struct Scratch {
  int64_t* left;  // [M] tokens of each cluster still to come
  bool* begun;    // [M] whether a token was added to the cluster's sums
  float* sums;    // [M, channels], of half types

  Scratch(const MergeTokens& p, int64_t channels, void* scratch, int64_t* bytes = nullptr) {
    const bool half = p.dtype == DType::f16 || p.dtype == DType::bf16;
    Arena a{reinterpret_cast<uintptr_t>(scratch)};
    left = a.take<int64_t>(p.M), begun = a.take<bool>(p.M), sums = a.take<float>(half ? p.M * channels : 0);
    if (bytes) *bytes = static_cast<int64_t>(a.next);
  }
};

}  // namespace

int64_t merge_tokens_scratch(const MergeTokens& p, int64_t channels) {
  int64_t bytes = 0;
  Scratch(p, channels, nullptr, &bytes);
  return bytes;
}

void merge_tokens_fwd(const MergeTokens& p, int64_t b, int64_t c_begin, int64_t c_end, void* scratch) {
  const int64_t* assignment = p.assignment + b * p.N;
  const int64_t channels = c_end - c_begin, out_row = b * p.M * p.C + c_begin;
  const Scratch s(p, channels, scratch);
  memset(s.left, 0, static_cast<size_t>(p.M) * sizeof *s.left);
  memset(s.begun, 0, static_cast<size_t>(p.M));
  with_element(p.dtype, [&](auto element) {
    using E = decltype(element);
    using T = typename E::Stored;
    using Sum = typename E::Compute;
    constexpr bool in_place = sizeof(T) == sizeof(Sum);
    const T* weight = static_cast<const T*>(p.weight);
    T* out = static_cast<T*>(p.out) + out_row;
    const Sum* total = static_cast<const Sum*>(p.total) + b * p.M;
    // Nothing of a token is added whose cluster counts as empty: not 0 times NaN.
    const auto cluster_of = [&](int64_t n) { return counts(assignment[n], total) ? assignment[n] : -1; };
    for (int64_t n = 0; n < p.N; ++n) {
      if (const int64_t m = cluster_of(n); m >= 0) ++s.left[m];
    }
    const auto sums_of = [&](int64_t m) {
      if constexpr (in_place) return out + m * p.C; else return s.sums + m * channels;
    };
    for (int64_t m = 0; m < p.M; ++m) {
      if (s.left[m] == 0 || !in_place) memset(sums_of(m), 0, static_cast<size_t>(channels) * sizeof(Sum));
    }
    for (int64_t n = 0; n < p.N; ++n) {
      const int64_t m = cluster_of(n);
      if (m < 0) continue;
      const T* __restrict x = static_cast<const T*>(p.x) + b * p.x_stride_b + n * p.x_stride_n + c_begin;
      const Sum w = weight ? E::get(weight[b * p.N + n]) : Sum{1}, scale = Sum{1} / total[m];
      Sum* __restrict sum = sums_of(m);
      const auto add = [&](auto first, auto last) {
        each_vector<E>(channels, [&](int64_t c, auto count) {
          Vec<E> value = w * load_as<E>(x + c, count);
          if (!first) value += load_as<SumOf<E>>(sum + c, count);
          store_as<SumOf<E>>(sum + c, last ? value * scale : value, count);
        });
      };
      constexpr std::true_type yes;
      constexpr std::false_type no;
      if constexpr (in_place) {  // no passes before and after: a cluster's first token sets, its last divides
        const bool first = !s.begun[m], last = --s.left[m] == 0;
        s.begun[m] = true;
        if (first) last ? add(yes, yes) : add(yes, no); else last ? add(no, yes) : add(no, no);
      } else {
        add(no, no);
      }
    }
    for (int64_t m = 0; m < p.M && !in_place; ++m) {
      const Sum scale = total[m] == 0 ? Sum{0} : Sum{1} / total[m];
      Sum* mean_row = p.mean ? static_cast<Sum*>(p.mean) + out_row + m * p.C : nullptr;
      each_vector<E>(channels, [&](int64_t c, auto count) {
        const Vec<E> mean = load_as<SumOf<E>>(sums_of(m) + c, count) * scale;
        if (mean_row) store_as<SumOf<E>>(mean_row + c, mean, count);
        store_as<E>(out + m * p.C + c, mean, count);
      });
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
      const Sum* total = static_cast<const Sum*>(p.total) + b * p.M;
      if (!counts(p.assignment[n], total)) {
        for (int64_t c = 0; c < p.C; ++c) grad_x[c] = 0;  // not memset, which takes no null pointer where C = 0
        if (grad_weight) grad_weight[n] = 0;
        continue;
      }
      const int64_t m = b * p.M + p.assignment[n];
      const Sum scale = Sum{1} / total[p.assignment[n]];
      const Sum w = weight ? E::get(weight[n]) : Sum{1};
      const T* __restrict grad = static_cast<const T*>(p.grad_out) + m * p.C;
      if (!grad_weight) {
        each_vector<E>(p.C, [&](int64_t c, auto count) {
          store_as<E>(grad_x + c, load_as<E>(grad + c, count) * (w * scale), count);
        });
        continue;
      }
      // d out / d w = (x - out) / total, with out as it was before rounding
      const T* __restrict x = static_cast<const T*>(p.x) + b * p.x_stride_b + n % p.N * p.x_stride_n;
      const Sum* __restrict mean = static_cast<const Sum*>(p.mean) + m * p.C;
      Vec<E> sums{};
      each_vector<E>(p.C, [&](int64_t c, auto count) {
        const Vec<E> g = load_as<E>(grad + c, count);
        store_as<E>(grad_x + c, g * (w * scale), count);
        sums += g * (load_as<E>(x + c, count) - load_as<SumOf<E>>(mean + c, count));
      });
      Sum sum = 0;
      for (int l = 0; l < kLanes<E>; ++l) sum += sums[l];
      grad_weight[n] = E::put(sum * scale);
    }
  });
}

}  // namespace hotkernels::HK_ISA
