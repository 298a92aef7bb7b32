// Clustering few tokens: all distances stay in cache, and every step reads them again.
#pragma once
#include "dpc_knn_sample.h"

namespace hotkernels::HK_ISA {
namespace {

// Dot products of columns [j0, j1) become squared distances, in both triangles of the matrix.
void mirror_distances(Sample& s, int64_t j0, int64_t j1) {
  const int64_t side = round_up(s.n, P);
  for (int64_t j = j0; j < j1; j += W) {
    for (int64_t i0 = 0; i0 <= j; i0 += W) {
      vf block[W];
#pragma GCC unroll 16
      for (int l = 0; l < W; ++l) {
        uint32_t cancelled;
        block[l] = squared_distance(s.norm[i0 + l], load(s.norm + j), load(s.dense + (i0 + l) * side + j), cancelled);
        if (j == i0) cancelled &= ~(uint32_t{1} << l);
        if (cancelled && i0 + l < s.n) {
          block[l] = without_cancellation(s, block[l], cancelled, i0 + l, [&](int lane) { return j + lane; });
        }
        store(s.dense + (i0 + l) * side + j, block[l]);
      }
      if (j == i0) {  // the rest of this block on the diagonal is its own mirror image
        for (int64_t l = 0; l < W; ++l) s.dense[(i0 + l) * side + i0 + l] = 0;
        continue;
      }
      transpose<float>(block);
#pragma GCC unroll 16
      for (int l = 0; l < W; ++l) store(s.dense + (j + l) * side + i0, block[l]);
    }
  }
}

// Tiles on and above the diagonal: kDenseChannels at a time, and within these a panel of columns at a time.
void dense_distances(const DpcKnn& p, int64_t b, Sample& s, const Runner& runner) {
  const int64_t side = round_up(s.n, P);
  for (int64_t begin = 0; begin < p.C; begin += kDenseChannels) {
    const int64_t end = std::min(p.C, begin + kDenseChannels);
    pack(p, b, s, begin, end, runner);
    s.each_part(runner, [&](int64_t q) {
      for (int64_t first = q * P; first < s.n; first += s.parts * P) {
        const int64_t stop = std::min(s.n, first + P);
        tile_dots(s.panels, 0, stop, s.panels, first, stop, end - begin, true, s.dense + first, side, begin > 0);
        if (end == p.C) mirror_distances(s, first, stop);
      }
    });
  }
}

// r of W tokens at once: the matrix is symmetric, so lane l reads down column j + l.
template <int K>
inline void dense_density(const Sample& s, int64_t j, int64_t side, float denominator) {
  vf nearest[K];
#pragma GCC unroll 16
  for (int e = 0; e < K; ++e) nearest[e] = splat(kInf);
  for (int64_t i = 0; i < s.n; ++i) {
    vf d = load(s.dense + i * side + j);
#pragma GCC unroll 16
    for (int e = 0; e < K; ++e) {
      const vf nearer = vmin(nearest[e], d);
      d = vmax(nearest[e], d);
      nearest[e] = nearer;
    }
  }
  vf sum{};
#pragma GCC unroll 16
  for (int e = 0; e < K; ++e) sum += nearest[e];
  store(s.r + j, sum / denominator);
}

// Calls body(part, j) for every W tokens j .. j + W - 1, shared among the parts.
template <class Body>
void dense_columns(Sample& s, const Runner& runner, const Body& body) {
  s.each_part(runner, [&](int64_t q) {
    for (int64_t j = q * W; j < s.n; j += s.parts * W) body(s.part[q], j);
  });
}

template <int... K>
void dense_densities(const DpcKnn& p, Sample& s, const Runner& runner, std::integer_sequence<int, K...>) {
  const int64_t side = round_up(s.n, P), k = std::min(p.k, s.n);
  const float denominator = static_cast<float>(k) * static_cast<float>(p.C);
  dense_columns(s, runner, [&](Part&, int64_t j) {
    ((k == K + 1 ? dense_density<K + 1>(s, j, side, denominator) : void()), ...);
  });
}

// delta2 of every token: the nearest of smaller rank; and each part's largest squared distance.
void dense_delta(Sample& s, const Runner& runner) {
  const int64_t side = round_up(s.n, P);
  for (int64_t q = 0; q < s.parts; ++q) s.part[q].farthest = 0;
  dense_columns(s, runner, [&](Part& part, int64_t j) {
    const vi rank = load(s.rank + j);
    vf nearest = splat(kInf), far{};
    for (int64_t i = 0; i < s.n; ++i) {
      const vf d = load(s.dense + i * side + j);
      nearest = vmin(nearest, splat(s.rank[i]) < rank ? d : splat(kInf));
      far = vmax(far, d);
    }
    store(s.delta2 + j, nearest);
    for (int64_t l = 0; l < std::min<int64_t>(W, s.n - j); ++l) part.farthest = std::max(part.farthest, far[l]);
  });
}

void dense_assign(Sample& s, const Runner& runner) {
  const int64_t side = round_up(s.n, P);
  dense_columns(s, runner, [&](Part&, int64_t j) {
    vf best = splat(kInf);
    vi where = splat(int32_t{0});
    for (int64_t m = 0; m < s.kept_count; ++m) {
      const vf d = load(s.dense + s.kept[m] * side + j);
      where = d < best ? splat(static_cast<int32_t>(m)) : where;
      best = vmin(best, d);
    }
    for (int64_t l = 0; l < std::min<int64_t>(W, s.n - j); ++l) s.nearest[j + l] = where[l];
  });
}

}  // namespace
}  // namespace hotkernels::HK_ISA
