// Clustering many tokens: each keeps a sorted list of its nearest, which answers the later questions exactly.
//
//   density   k nearest: the head of the list.
//   delta     nearest denser token: the first denser one in the list. All tokens outside are at least as far.
//   assign    nearest kept token: the first kept one, if it is nearer than the end of the list.
// Tokens whose list has no answer (local peaks, a few per cent) are multiplied once more, in the same tiles: with the
// denser tokens, which for a peak are few, or with the kept ones.
// Which of several equally far tokens a list keeps at its end depends on the order of insertion, but no answer does.
#pragma once
#include "dpc_knn_sample.h"

namespace hotkernels::HK_ISA {
namespace {

constexpr int64_t kGroup = 64;  // distances compared with the end of a list at once
static_assert(kBlock % kGroup == 0 && kListMin % W == 0);

// Inserts (d, id) into one vector of an ascending list; (d, id) becomes what falls off its end.
inline void vector_insert(vf& distance, vi& neighbour, vf& d, vi& id) {
  const vf here = distance, before = shift_in(here, d);
  const vi id_here = neighbour, id_before = shift_in(id_here, id);
  const vf last = splat(here[W - 1]);
  distance = vmin(here, vmax(before, d));
  neighbour = here <= d ? id_here : before <= d ? id : id_before;
  id = last <= d ? id : splat(id_here[W - 1]);
  d = vmax(last, d);
}

void list_insert(float* distance, int32_t* neighbour, int64_t list, vf d, vi id) {
  for (int64_t e = list - W; e > 0; e -= W) {  // entry e becomes min(old e, max(old e - 1, d))
    const vf here = load(distance + e), before = load(distance + e - 1);
    const vi id_here = load(neighbour + e), id_before = load(neighbour + e - 1);
    store(distance + e, vmin(here, vmax(before, d)));
    store(neighbour + e, here <= d ? id_here : before <= d ? id : id_before);
  }
  vf here = load(distance);
  vi id_here = load(neighbour);
  vector_insert(here, id_here, d, id);
  store(distance, here);
  store(neighbour, id_here);
}

// Dot products of tokens [i_begin, i_end) with [j_begin, j_end) become squared distances.
void tile_distances(const Sample& s, Part& part, int64_t i_begin, int64_t i_end, int64_t j_begin, int64_t j_end) {
  vf far = splat(part.farthest);
  for (int64_t i = i_begin; i < i_end; ++i) {
    float* row = part.tile + (i - i_begin) * kBlock - j_begin;
    for (int64_t j = std::max(j_begin, i / W * W); j < j_end; j += W) {
      uint32_t cancelled;
      vf d = squared_distance(s.norm[i], load(s.norm + j), load(row + j), cancelled);
      if (j <= i) cancelled &= ~uint32_t{1} << (i - j);  // up to the diagonal nothing is used
      if (cancelled) d = without_cancellation(s, d, cancelled, i, [&](int l) { return j + l; });
      far = vmax(far, d < splat(kInf) ? d : vf{});
      store(row + j, d);
    }
  }
  part.farthest = reduce_max(far);
}

void transpose_tile(float* tile) {
  for (int64_t i = 0; i < kBlock; i += W) {
    for (int64_t j = i; j < kBlock; j += W) {
      vf right[W], below[W];
#pragma GCC unroll 16
      for (int l = 0; l < W; ++l) right[l] = load(tile + (i + l) * kBlock + j);
      transpose<float>(right);
#pragma GCC unroll 16
      for (int l = 0; l < W; ++l) below[l] = load(tile + (j + l) * kBlock + i);
#pragma GCC unroll 16
      for (int l = 0; l < W; ++l) store(tile + (j + l) * kBlock + i, right[l]);
      if (i == j) continue;
      transpose<float>(below);
#pragma GCC unroll 16
      for (int l = 0; l < W; ++l) store(tile + (i + l) * kBlock + j, below[l]);
    }
  }
}

// Offers tokens [j_begin, j_end) of a tile of distances to the list of each token i: those after i or, with kBackward,
// those before it. Those nearest in the order of tokens come first: they often are near.
template <bool kBackward>
void offer_rows(const Sample& s, Part& part, int64_t i_begin, int64_t i_end, int64_t j_begin, int64_t j_end) {
  constexpr int V = kListMin / W;  // the head of the list is kept in registers
  for (int64_t i = i_begin; i < i_end; ++i) {
    const float* row = part.tile + (i - i_begin) * kBlock - j_begin;
    float* distance = part.distance + i * s.list;
    int32_t* neighbour = part.neighbour + i * s.list;
    vf head[V];
    vi id[V];
    for (int v = 0; v < V; ++v) head[v] = load(distance + v * W), id[v] = load(neighbour + v * W);
    float worst = distance[s.list - 1];
    const int64_t begin = kBackward ? j_begin : std::max(j_begin, i + 1), end = kBackward ? std::min(j_end, i) : j_end;
    const int64_t first = begin - (begin - j_begin) % kGroup, groups = (end - first + kGroup - 1) / kGroup;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t j = first + (kBackward ? groups - 1 - g : g) * kGroup;
      uint64_t nearer = 0;
      for (int64_t l = 0; l < kGroup; l += W) {
        nearer |= static_cast<uint64_t>(less_bits(load(row + j + l), splat(worst))) << l;
      }
      if (begin > j) nearer &= ~uint64_t{0} << (begin - j);
      if (end < j + kGroup) nearer &= ~(~uint64_t{0} << (end - j));
      if (nearer == 0) continue;
      while (nearer) {
        const int l = kBackward ? 63 - __builtin_clzll(nearer) : __builtin_ctzll(nearer);
        nearer &= (kBackward ? uint64_t{1} << l : nearer) - 1;
        vf d = splat(row[j + l]);
        vi token = splat(static_cast<int32_t>(j + l));
        for (int v = 0; v < V; ++v) vector_insert(head[v], id[v], d, token);
        if (s.list > kListMin) list_insert(distance + kListMin, neighbour + kListMin, s.list - kListMin, d, token);
      }
      worst = s.list > kListMin ? distance[s.list - 1] : head[V - 1][W - 1];
    }
    for (int v = 0; v < V; ++v) store(distance + v * W, head[v]), store(neighbour + v * W, id[v]);
  }
}

void find_neighbours(const DpcKnn& p, Sample& s, const Runner& runner) {
  const int64_t blocks = (s.n + kBlock - 1) / kBlock;
  s.each_part(runner, [&](int64_t q) {
    Part& part = s.part[q];
    part.farthest = 0;
    std::fill(part.distance, part.distance + s.n * s.list, kInf);
    std::fill(part.neighbour, part.neighbour + s.n * s.list, -1);
    // The more tiles a column of tiles has, the later it comes: dealt out from the last one on, to and fro.
    for (int64_t round = (blocks - 1) / s.parts; round >= 0; --round) {
      const int64_t jb = blocks - 1 - round * s.parts - (round % 2 ? s.parts - 1 - q : q);
      if (jb < 0) continue;
      for (int64_t ib = jb; ib >= 0; --ib) {
        const int64_t i0 = ib * kBlock, i1 = std::min(s.n, i0 + kBlock);
        const int64_t j0 = jb * kBlock, j1 = std::min(s.n, j0 + kBlock);
        tile_dots(s.panels, i0, i1, s.panels, j0, j1, p.C, ib == jb, part.tile, kBlock);
        tile_distances(s, part, i0, i1, j0, j1);
        offer_rows<false>(s, part, i0, i1, j0, j1);
        transpose_tile(part.tile);
        offer_rows<true>(s, part, j0, j1, i0, i1);
      }
    }
  });
  // Merges the lists of the other parts into those of part 0; then r.
  const int64_t k = std::min(p.k, s.n);
  const float denominator = static_cast<float>(k) * static_cast<float>(p.C);
  s.each_part(runner, [&](int64_t q) {
    for (int64_t i = q; i < s.n; i += s.parts) {
      float* distance = s.part[0].distance + i * s.list;
      int32_t* neighbour = s.part[0].neighbour + i * s.list;
      for (int64_t other = 1; other < s.parts; ++other) {
        const float* from = s.part[other].distance + i * s.list;
        const int32_t* from_id = s.part[other].neighbour + i * s.list;
        for (int64_t e = 0; e < s.list && from[e] < distance[s.list - 1]; ++e) {
          list_insert(distance, neighbour, s.list, splat(from[e]), splat(from_id[e]));
        }
      }
      double sum = 0;  // the token itself is its nearest, at distance 0
      for (int64_t e = 0; e < k - 1; ++e) sum += distance[e];
      s.r[i] = static_cast<float>(sum) / denominator;
    }
  });
}

// Copies tokens into one panel, bits unchanged; the rest of the panel is padding.
void gather_panel(const DpcKnn& p, const Sample& s, const int32_t* tokens, int64_t count, float* panel, float* norm) {
  for (int64_t l = 0; l < P; ++l) {
    if (l < count) {
      const int64_t t = tokens[l];
      const float* from = s.panels + t / P * P * p.C + t % P;
      for (int64_t c = 0; c < p.C; ++c) panel[c * P + l] = from[c * P];
      norm[l] = s.norm[t];
    } else {
      for (int64_t c = 0; c < p.C; ++c) panel[c * P + l] = 0;
      norm[l] = kInf;
    }
  }
}

// Tokens in panels of their own, in the order given.
void gather_panels(const DpcKnn& p, Sample& s, const Runner& runner, const int32_t* tokens, int64_t count) {
  s.each_part(runner, [&](int64_t q) {
    for (int64_t m = q * P; m < count; m += s.parts * P) {
      gather_panel(p, s, tokens + m, std::min<int64_t>(P, count - m), s.gathered + m * p.C, s.gathered_norm + m);
    }
  });
}

// For each pending token, finds the nearest among the first stop(token) gathered ones; stop must not decrease along
// `pending`. accept(token, squared distance, place among the gathered) is called once per pending token.
template <class Stop, class Accept>
void second_search(const DpcKnn& p, Sample& s, const Runner& runner, const int32_t* gathered, const int32_t* pending,
                   int64_t count, const Stop& stop, const Accept& accept) {
  s.each_part(runner, [&](int64_t q) {
    Part& part = s.part[q];
    for (int64_t first = q * P; first < count; first += s.parts * P) {
      const int64_t lanes = std::min<int64_t>(P, count - first);
      gather_panel(p, s, pending + first, lanes, part.panel, part.panel_norm);
      alignas(64) int32_t stops[P] = {};
      for (int64_t l = 0; l < lanes; ++l) stops[l] = static_cast<int32_t>(stop(pending[first + l]));
      vf best[3];
      vi where[3];
      for (int v = 0; v < 3; ++v) best[v] = splat(kInf), where[v] = splat(int32_t{-1});
      for (int64_t i0 = 0; i0 < stops[lanes - 1]; i0 += kBlock) {
        const int64_t i1 = std::min<int64_t>(stops[lanes - 1], i0 + kBlock);
        tile_dots(s.gathered, i0, i1, part.panel, 0, P, p.C, false, part.tile, P);
        for (int64_t i = i0; i < i1; ++i) {
          const vi here = splat(static_cast<int32_t>(i));
          for (int v = 0; v < 3; ++v) {
            const vf dots = load(part.tile + (i - i0) * P + v * W);
            uint32_t cancelled;
            vf d = squared_distance(s.gathered_norm[i], load(part.panel_norm + v * W), dots, cancelled);
            if (cancelled) {
              const int32_t* tokens = pending + first + v * W;
              d = without_cancellation(s, d, cancelled, gathered[i], [&](int l) { return tokens[l]; });
            }
            d = here < load(stops + v * W) ? d : splat(kInf);
            where[v] = d < best[v] ? here : where[v];
            best[v] = vmin(best[v], d);
          }
        }
      }
      for (int64_t l = 0; l < lanes; ++l) accept(pending[first + l], best[l / W][l % W], where[l / W][l % W]);
    }
  });
}

// The tokens without an answer are few and dense, so few ranks come before theirs: the search ends early.
void list_delta(const DpcKnn& p, Sample& s, const Runner& runner) {
  int64_t pending = 0;
  for (int64_t rank = 0; rank < s.n; ++rank) {
    const int32_t i = s.order[rank].token;
    const float* distance = s.part[0].distance + i * s.list;
    const int32_t* neighbour = s.part[0].neighbour + i * s.list;
    int64_t e = 0;
    while (e < s.list && neighbour[e] >= 0 && s.rank[neighbour[e]] > rank) ++e;
    if (e < s.list && neighbour[e] >= 0) {
      s.delta2[i] = distance[e];
    } else {
      s.delta2[i] = kInf;
      if (rank > 0) s.pending[pending++] = i;
    }
  }
  // As many ranks at a time as `gathered` holds; pending tokens are in order of rank.
  const int32_t* first = s.pending;
  const int32_t* const last = s.pending + pending;
  for (int64_t begin = 0; first < last; begin += s.gathered_max) {
    while (first < last && s.rank[*first] <= begin) ++first;
    if (first == last) break;
    const int64_t count = std::min<int64_t>(s.gathered_max, s.rank[last[-1]] - begin);
    for (int64_t e = 0; e < count; ++e) s.nearest[e] = s.order[begin + e].token;
    gather_panels(p, s, runner, s.nearest, count);
    second_search(
        p, s, runner, s.nearest, first, last - first,
        [&](int32_t i) { return std::min<int64_t>(count, s.rank[i] - begin); },
        [&](int32_t i, float d, int32_t) { s.delta2[i] = std::min(s.delta2[i], d); });
  }
}

void list_assign(const DpcKnn& p, Sample& s, const Runner& runner) {
  int64_t pending = 0;
  for (int64_t i = 0; i < s.n; ++i) {
    if (s.slot[i] >= 0) continue;
    const float* distance = s.part[0].distance + i * s.list;
    const int32_t* neighbour = s.part[0].neighbour + i * s.list;
    int32_t best = -1;
    float best_distance = distance[s.list - 1];  // only strictly nearer: an equal one may have fallen off the list
    for (int64_t e = 0; e < s.list && distance[e] < distance[s.list - 1]; ++e) {
      if (best >= 0 && distance[e] > best_distance) break;
      const int32_t slot = s.slot[neighbour[e]];
      if (slot >= 0 && (best < 0 || slot < best)) best = slot, best_distance = distance[e];
    }
    if (best >= 0) s.nearest[i] = best; else s.pending[pending++] = static_cast<int32_t>(i);
  }
  if (pending == 0) return;
  gather_panels(p, s, runner, s.kept, s.kept_count);
  second_search(
      p, s, runner, s.kept, s.pending, pending, [&](int32_t) { return s.kept_count; },
      [&](int32_t i, float, int32_t m) { s.nearest[i] = m; });
}

}  // namespace
}  // namespace hotkernels::HK_ISA
