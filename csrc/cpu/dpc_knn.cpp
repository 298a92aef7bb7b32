// DPC-kNN of one sample in one pass over its distances; N x N of them are held only of few tokens, in cache.
//
// Tokens are centred and packed into panels; only tiles on and above the diagonal are multiplied, and each squared
// distance d2 = (|x_i|^2 + |x_j|^2) - 2 <x_i, x_j> serves tokens i and j: the same number for both. The few that
// cancellation leaves without bits are summed from differences.
//
// In the order of dpc_knn_fwd, below:
//   dpc_knn_sample.h   scratch; which tokens are valid; centring and packing
//   dpc_knn_small.h    density, delta and assignment from distances that stay in cache
//   dpc_knn_large.h    the same from lists of neighbours
//   here               ranks by density, scores, selection
#include "dpc_knn_large.h"
#include "dpc_knn_small.h"

namespace hotkernels::HK_ISA {
namespace {

void rank_by_density(const DpcKnn& p, int64_t b, Sample& s) {
  for (int64_t i = 0; i < s.n; ++i) {
    s.density[i] = std::exp(-static_cast<double>(s.r[i]));
    if (p.noise) s.density[i] += static_cast<double>(p.noise[b * p.N + s.position[i]]);
    const auto [key, tie] = dpc::density_key(s.r[i], s.density[i], p.noise != nullptr, p.seed, s.position[i]);
    s.order[i] = {key, tie, static_cast<int32_t>(i)};
  }
  std::sort(s.order, s.order + s.n);
  for (int64_t i = 0; i < s.n; ++i) s.rank[s.order[i].token] = static_cast<int32_t>(i);
}

// Fills kept and slot: the best tokens by score, then those of `keep`; ascending if ordered.
void select(const DpcKnn& p, int64_t b, Sample& s) {
  std::fill(s.slot, s.slot + s.n, -1);
  const int64_t* keep = p.keep ? p.keep + b * p.keep_stride_b : nullptr;
  const auto token_at = [&](int64_t position) -> int64_t {
    const int32_t* found = std::lower_bound(s.position, s.position + s.n, static_cast<int32_t>(position), kAscending);
    return found < s.position + s.n && *found == position ? found - s.position : -1;
  };
  for (int64_t e = 0; e < p.num_keep; ++e) {
    const int64_t t = token_at(keep[e]);
    if (t >= 0) s.slot[t] = 0;
  }
  int64_t candidates = 0;
  for (int64_t i = 0; i < s.n; ++i) {
    if (s.slot[i] >= 0) continue;
    const auto density = [&] { return s.density[i]; };
    const uint64_t key = dpc::score_key(s.r[i], p.noise != nullptr, density, s.delta2[i], p.C);
    s.candidates[candidates++] = {key, static_cast<int32_t>(i)};
  }
  const int64_t best = std::min(p.M - p.num_keep, candidates);
  std::nth_element(s.candidates, s.candidates + best, s.candidates + candidates);
  std::sort(s.candidates, s.candidates + best);
  s.kept_count = 0;
  for (int64_t m = 0; m < best; ++m) s.kept[s.kept_count++] = s.candidates[m].token;
  for (int64_t e = 0; e < p.num_keep; ++e) {
    const int64_t t = token_at(keep[e]);
    if (t >= 0 && s.slot[t] == 0) s.kept[s.kept_count++] = static_cast<int32_t>(t), s.slot[t] = -1;  // once
  }
  if (p.ordered) std::sort(s.kept, s.kept + s.kept_count, kAscending);
  for (int64_t m = 0; m < s.kept_count; ++m) s.slot[s.kept[m]] = static_cast<int32_t>(m);
}

}  // namespace

int64_t dpc_knn_scratch(const DpcKnn& p, int32_t threads) {
  int64_t bytes = 0;
  Sample(p, 0, threads, nullptr, &bytes);
  return bytes;
}

void dpc_knn_fwd(const DpcKnn& p, int64_t b, void* scratch, const Runner& runner) {
  Sample s(p, b, runner.threads, scratch);
  find_valid(p, b, s);
  const bool dense = s.n <= kDense && p.k <= kDenseK;
  if (dense) {
    dense_distances(p, b, s, runner);
    dense_densities(p, s, runner, std::make_integer_sequence<int, kDenseK>());
  } else {
    pack(p, b, s, 0, p.C, runner);
    find_neighbours(p, s, runner);
  }
  rank_by_density(p, b, s);
  float farthest = 0;
  if (dense) dense_delta(s, runner); else list_delta(p, s, runner);
  for (int64_t q = 0; q < s.parts; ++q) farthest = std::max(farthest, s.part[q].farthest);
  if (s.n > 0) s.delta2[s.order[0].token] = farthest;
  select(p, b, s);

  float *density = p.density + b * p.N, *delta = p.delta + b * p.N, *score = p.score + b * p.N;
  std::fill(density, density + p.N, 0.0f);
  std::fill(delta, delta + p.N, 0.0f);
  std::fill(score, score + p.N, 0.0f);
  for (int64_t i = 0; i < s.n; ++i) {
    const int64_t at = s.position[i];
    density[at] = static_cast<float>(s.density[i]);
    delta[at] = std::sqrt(s.delta2[i] / static_cast<float>(p.C));
    score[at] = density[at] * delta[at];
  }
  int64_t* index = p.index + b * p.M;
  for (int64_t m = 0; m < p.M; ++m) index[m] = m < s.kept_count ? s.position[s.kept[m]] : -1;
  if (!p.assign) return;
  int64_t* assignment = p.assignment + b * p.N;
  std::fill(assignment, assignment + p.N, -1);
  if (s.kept_count == 0) return;
  if (dense) dense_assign(s, runner); else list_assign(p, s, runner);
  for (int64_t i = 0; i < s.n; ++i) assignment[s.position[i]] = s.slot[i] >= 0 ? s.slot[i] : s.nearest[i];
}

}  // namespace hotkernels::HK_ISA
