// dpc_knn of many tokens (dpc_knn_large.h): scores, the best of a sample, their places in `index`.
#pragma once
#include <climits>

#include "block_sort.h"
#include "dpc_knn_large_plan.h"

namespace hotkernels::dpc::large {

constexpr int kPlaceRows = 32;  // chosen tokens whose places one block finds

__global__ void __launch_bounds__(kTile) score_kernel(const Plan s) {
  const DpcKnn& p = s.p;
  const Token t = this_token(s);
  if (!t.there) return;
  const unsigned found = s.delta2[t.at];
  const float inverse = scale_of(s, t.b).inverse;
  const float delta2 = __uint_as_float(found == __float_as_uint(kInf) ? s.farthest[t.b] : found) * inverse * inverse;
  const int64_t at = t.b * p.N + s.position[t.at];
  const float density = p.density[at], delta = sqrtf(delta2 / static_cast<float>(p.C));
  p.delta[at] = delta;
  p.score[at] = density * delta;
  s.score[t.at] = score_key(s.r[t.at], p.noise ? p.noise + at : nullptr, delta2, p.C);
}

constexpr int kByteValues = 256;

// What the threads of choose_kernel share.
struct ChooseShared {
  int sums[kWarp];          // of scan_block
  int counts[kByteValues];  // candidates with each value of a byte of their score
  int value, taken, have;   // the byte of the last of the best; how many with it are among the best, and in all
};

__device__ inline Scan scan_all(int value, ChooseShared& shared) {
  __syncthreads();
  return scan_block(value, shared.sums);
}

// The token that entry e of `keep` names, or -1.
__device__ inline int kept_token(const Plan& s, int64_t b, int64_t e) {
  const int64_t position = keep_position(s.p, b, e);
  return position < 0 ? -1 : s.token_at[b * s.p.N + position];
}

// Records for each token of `keep` the first entry that names it. All other tokens are candidates.
__device__ inline void mark_kept(const Plan& s, int64_t b) {
  for (int64_t e = threadIdx.x; e < s.p.num_keep; e += kSortThreads) {
    const int token = kept_token(s, b, e);
    if (token >= 0) atomicMin(&s.kept_by[b * s.T + token], static_cast<int32_t>(e));
  }
}

// Finds the `ties` best candidates by radix selection: all before the score that it returns and, of those with that
// score, the first `ties`, which it updates.
__device__ inline uint64_t last_of_best(const Plan& s, int64_t b, int& ties, ChooseShared& shared) {
  const int n = s.count[b], thread = static_cast<int>(threadIdx.x);
  const int32_t* kept_by = s.kept_by + b * s.T;
  const uint64_t* score = s.score + b * s.T;
  uint64_t last = 0;
  for (int shift = 56; shift >= 0; shift -= 8) {
    __syncthreads();
    if (thread < kByteValues) shared.counts[thread] = 0;
    __syncthreads();
    for (int i0 = 0; i0 < n; i0 += kSortThreads) {
      const int i = i0 + thread;
      int value = -1;
      // Shifted twice: by 64 at once is undefined.
      if (i < n && kept_by[i] == INT_MAX && score[i] >> shift >> 8 == last >> shift >> 8) {
        value = static_cast<int>(score[i] >> shift & 255);
      }
      const unsigned same = __match_any_sync(kAllLanes, value);
      if (value >= 0 && same >> lane_id() == 1) atomicAdd(&shared.counts[value], __popc(same));
    }
    __syncthreads();
    const int here = thread < kByteValues ? shared.counts[thread] : 0;
    const int before = scan_all(here, shared).before;
    if (before < ties && ties <= before + here) {
      shared.value = thread, shared.taken = ties - before, shared.have = here;
    }
    __syncthreads();
    last |= static_cast<uint64_t>(shared.value) << shift;
    ties = shared.taken;
    if (ties == shared.have) return last | ((uint64_t{1} << shift) - 1);  // all of these: no need to tell them apart
  }
  return last;
}

// Appends the tokens of `keep` to the `best` that were chosen; returns how many there are.
__device__ inline int append_kept(const Plan& s, int64_t b, int best, ChooseShared& shared) {
  const int64_t share = (s.p.num_keep + kSortThreads - 1) / kSortThreads;
  const int64_t begin = min(s.p.num_keep, threadIdx.x * share), end = min(s.p.num_keep, begin + share);
  const int32_t* kept_by = s.kept_by + b * s.T;
  int kept = 0;
  for (int64_t e = begin; e < end; ++e) {
    const int token = kept_token(s, b, e);
    kept += token >= 0 && kept_by[token] == e;
  }
  const Scan places = scan_all(kept, shared);
  int place = best + places.before;
  for (int64_t e = begin; e < end; ++e) {
    const int token = kept_token(s, b, e);
    if (token >= 0 && kept_by[token] == e) s.chosen[b * s.p.M + place++] = token;
  }
  return places.total;
}

// The M best of a sample: the score of the last of them, then all up to it by position; after them the tokens of
// `keep`. A block per sample.
__global__ void __launch_bounds__(kSortThreads, 1) choose_kernel(const Plan s) {
  ChooseShared& shared = *reinterpret_cast<ChooseShared*>(ptx::shared_memory());
  const DpcKnn& p = s.p;
  const int64_t b = blockIdx.x;
  const int n = s.count[b], thread = static_cast<int>(threadIdx.x);
  const int32_t* kept_by = s.kept_by + b * s.T;
  const uint64_t* score = s.score + b * s.T;
  mark_kept(s, b);
  __syncthreads();

  const int share = (n + kSortThreads - 1) / kSortThreads, begin = min(n, thread * share), end = min(n, begin + share);
  int mine = 0;
  for (int i = begin; i < end; ++i) mine += kept_by[i] == INT_MAX;
  const int candidates = scan_all(mine, shared).total;
  const int best = static_cast<int>(min(p.M - p.num_keep, int64_t{candidates}));
  uint64_t last = best == 0 ? 0 : kNotACandidate;  // all scores before it are chosen, and `ties` tokens that have it
  int ties = 0;
  if (0 < best && best < candidates) ties = best, last = last_of_best(s, b, ties, shared);

  int before = 0, equal = 0;
  for (int i = begin; i < end; ++i) {
    if (kept_by[i] == INT_MAX) before += score[i] < last, equal += score[i] == last;
  }
  int room = ties - scan_all(equal, shared).before;  // for this thread's ties: they go to the lower positions
  int at = scan_all(before + max(0, min(equal, room)), shared).before;
  for (int i = begin; i < end; ++i) {
    if (kept_by[i] != INT_MAX || score[i] > last || (score[i] == last && room-- <= 0)) continue;
    s.chosen[b * p.M + at] = i;
    s.chosen_score[b * p.M + at++] = score[i];
  }
  const int kept = append_kept(s, b, best, shared);
  if (thread == 0) s.chosen_count[2 * b] = best, s.chosen_count[2 * b + 1] = best + kept;
}

// Places in `index`: by score or, if ordered, by position, found by counting the tokens before. A lane per chosen
// token; the warps share the tokens that it is compared with.
__global__ void __launch_bounds__(256) place_kernel(const Plan s, int slices) {
  constexpr int kWarps = 256 / kWarp;
  int* partial = reinterpret_cast<int*>(ptx::shared_memory());  // [kWarps, kPlaceRows]
  const DpcKnn& p = s.p;
  const int64_t b = blockIdx.x / slices, e = int64_t{blockIdx.x % slices} * kPlaceRows + lane_id();
  const int best = s.chosen_count[2 * b], all = s.chosen_count[2 * b + 1], others = p.ordered ? all : best;
  const int32_t* chosen = s.chosen + b * p.M;
  const uint64_t* score = s.chosen_score + b * p.M;
  int before = 0;
  if (e < others) {
    const int token = chosen[e];
    const int begin = static_cast<int>(int64_t{others} * warp_id() / kWarps);
    const int end = static_cast<int>(int64_t{others} * (warp_id() + 1) / kWarps);
    if (p.ordered) {
#pragma unroll 4
      for (int o = begin; o < end; ++o) before += chosen[o] < token;
    } else {
      const uint64_t own = score[e];
#pragma unroll 4
      for (int o = begin; o < end; ++o) before += score[o] < own || (score[o] == own && o < e);  // o: by position
    }
  }
  partial[warp_id() * kPlaceRows + lane_id()] = before;
  __syncthreads();
  if (warp_id() > 0 || e >= p.M) return;
  if (e >= all) {
    p.index[b * p.M + e] = -1;
    return;
  }
  int place = e < others ? 0 : static_cast<int>(e);
  if (e < others) {
    for (int w = 0; w < kWarps; ++w) place += partial[w * kPlaceRows + lane_id()];
  }
  const int token = chosen[e];
  p.index[b * p.M + place] = s.position[b * s.T + token];
  s.kept[b * p.M + place] = token;
  s.slot[b * s.T + token] = place;
}

}  // namespace hotkernels::dpc::large
