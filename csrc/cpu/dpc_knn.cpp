// DPC-kNN of one sample in one pass over its distances, without an N x N matrix.
//
// Tokens are centred and packed into panels (tile_dots.h); only tiles on and above the diagonal are multiplied, and
// each squared distance d2 = (|x_i|^2 + |x_j|^2) - 2 <x_i, x_j> is offered to tokens i and j: the same number for both.
// Up to kDense tokens, the distances stay in cache and every later step reads them again. Beyond, each token keeps a
// sorted list of its nearest neighbours, and that list answers the later questions exactly:
//   density   k nearest: the head of the list.
//   delta     nearest denser token: the first denser one in the list. All tokens outside are at least as far.
//   assign    nearest kept token: the first kept one, if it is nearer than the end of the list.
// Tokens whose list has no answer (local peaks, a few per cent) are multiplied once more, in the same tiles, with the
// denser tokens, which for a peak are few, or with the kept ones.
// Which of several equally far tokens a list keeps at its end depends on the order of insertion, but no answer does.
#include "hotkernels/dpc_knn.h"

#include <algorithm>
#include <cmath>

#include "element.h"
#include "scratch.h"
#include "tile_dots.h"

namespace hotkernels::HK_ISA {
namespace {

constexpr int64_t kDense = 384;     // 384^2 floats are 0.6 MB: they fit the second-level cache
constexpr int64_t kDenseChannels = 256;  // packed at a time for those: 384 x 256 floats, 0.4 MB, beside them there
constexpr int64_t kBlock = 192;     // tokens per side of a tile of distances; a multiple of P on every instruction set
constexpr int64_t kListMin = 16;    // neighbours kept per token: fewer leave more tokens to the second search
constexpr int64_t kGroup = 64;      // distances compared with the end of a list at once
constexpr float kInf = __builtin_inff();
static_assert(kBlock % P == 0 && kBlock % kGroup == 0 && kDense % P == 0 && W % R == 0);

// Of a type of this file, so that what the compiler makes of std's algorithms stays in it, a copy per instruction set.
constexpr auto kAscending = [](auto a, auto b) { return a < b; };

struct Rank {  // densest first: by key, then tie, then token
  uint64_t key, tie;
  int32_t token;
  bool operator<(const Rank& o) const {
    return key != o.key ? key < o.key : tie != o.tie ? tie < o.tie : token < o.token;
  }
};

struct Candidate {  // best first
  double log_score;
  int32_t token;
  bool operator<(const Candidate& o) const {
    return log_score != o.log_score ? log_score > o.log_score : token < o.token;
  }
};

// What one thread needs for itself.
struct Part {
  float* row;          // [kDense] distances of one token, where k is large
  float* tile;         // [kBlock, kBlock] dot products, then squared distances
  float* distance;     // [N, list] squared distances, ascending
  int32_t* neighbour;  // [N, list]
  float* panel;        // [C, P] tokens of a second search
  float* panel_norm;   // [P]
  float farthest;      // largest squared distance seen
};

// Scratch of one sample. Tokens are numbered 0 .. n-1 among the valid ones. Np: N rounded up to whole panels.
struct Sample {
  int64_t n, list, kept_count;
  int32_t* position;       // [N] where in the sample a token stands
  float* pivot;            // [C]
  float *row, *third;      // [C]
  float* panels;           // [Np / P, C, P]; up to kDense tokens, kDenseChannels of the C at a time
  float* norm;             // [Np]
  float* r;                // [Np] mean of the k smallest squared distances
  int32_t* rank;           // [Np] 0 = densest
  float* delta2;           // [Np] squared distance to the nearest denser token
  double* density;         // [N] exp(-r) + noise; float32 would round noise of 1e-6 to a few steps
  Rank* order;             // [N]
  Candidate* candidates;   // [N]
  int32_t* kept;           // [M] chosen tokens, in the order of index
  int32_t* slot;           // [Np] place of a token in index, or -1
  int32_t* nearest;        // [N] place in index of the nearest kept token
  int32_t* pending;        // [N] tokens that need a second search
  int64_t gathered_max;    // tokens that fit in:
  float* gathered;         // [gathered_max / P, C, P] what a second search looks through
  float* gathered_norm;    // [gathered_max]
  float* dense;            // [kDense, kDense]
  int64_t parts;
  Part* part;

  Sample(const DpcKnn& p, int64_t parts, void* scratch, int64_t* bytes = nullptr) : parts(parts) {
    Arena a{reinterpret_cast<uintptr_t>(scratch)};
    const int64_t np = round_up(p.N, P);
    const bool large = p.N > kDense;
    list = std::max(kListMin, round_up(p.k - 1, W));
    position = a.take<int32_t>(p.N);
    pivot = a.take<float>(p.C);
    row = a.take<float>(p.C);
    third = a.take<float>(p.C);
    panels = a.take<float>(np * (large ? p.C : std::min(p.C, kDenseChannels)));
    norm = a.take<float>(np);
    r = a.take<float>(np);
    rank = a.take<int32_t>(np);
    delta2 = a.take<float>(np);
    density = a.take<double>(p.N);
    order = a.take<Rank>(p.N);
    candidates = a.take<Candidate>(p.N);
    kept = a.take<int32_t>(p.M);
    slot = a.take<int32_t>(np);
    nearest = a.take<int32_t>(p.N);
    pending = a.take<int32_t>(p.N);
    const int64_t side = std::min(np, kDense);
    dense = a.take<float>(side * side);
    part = a.take<Part>(parts);
    gathered_max = large ? std::max(p.assign ? round_up(p.M, P) : 0, round_up(p.N / 4, P)) : 0;
    gathered = a.take<float>(gathered_max * p.C);
    gathered_norm = a.take<float>(gathered_max);
    for (int64_t q = 0; q < parts; ++q) {
      Part here{};
      here.row = a.take<float>(kDense);
      if (large) {
        here.tile = a.take<float>(kBlock * kBlock);
        here.distance = a.take<float>(p.N * list);
        here.neighbour = a.take<int32_t>(p.N * list);
        here.panel = a.take<float>(p.C * P);
        here.panel_norm = a.take<float>(P);
      }
      if (scratch == nullptr) continue;
      part[q] = here;
    }
    if (bytes) *bytes = static_cast<int64_t>(a.next);
  }

  // Calls body(part index) once for every part, in parallel where the runner is.
  template <class Body>
  void each_part(const Runner& runner, const Body& body) {
    runner.run(
        parts,
        [](void* state, int64_t begin, int64_t end) {
          for (int64_t q = begin; q < end; ++q) (*static_cast<const Body*>(state))(q);
        },
        const_cast<void*>(static_cast<const void*>(&body)));
  }
};

// ---- 1. centre and pack -------------------------------------------------------------------------------------------

float median(float a, float b, float c) {
  const float low = a < b ? a : b, high = a < b ? b : a;
  return c < low ? low : c > high ? high : c;
}

// Finds the valid tokens and the pivot. A token counts if the mask has it, its noise is a number, and its squared norm
// is at most kNormLimit.
// The pivot is what is subtracted from all: of each channel, the median of three tokens. A mean would do as well, were
// it not for outliers: one of n that is A away moves the mean by A / n, and squared distances between all others would
// be rounded as if they were that long. Not the first and the last token, which often are special.
void find_valid(const DpcKnn& p, int64_t b, Sample& s) {
  s.n = 0;
  for (int64_t i = 0; i < p.N; ++i) {
    if (p.mask && !p.mask[b * p.N + i]) continue;
    if (p.noise && std::isnan(p.noise[b * p.N + i])) continue;
    load_row(p.x, p.dtype, b * p.x_stride_b + i * p.x_stride_n, p.x_stride_c, p.C, s.row);
    float square = 0;
#pragma omp simd reduction(+ : square)
    for (int64_t c = 0; c < p.C; ++c) square += s.row[c] * s.row[c];
    if (square <= kNormLimit) s.position[s.n++] = static_cast<int32_t>(i);
  }
  if (s.n == 0) return;
  float* const rows[] = {s.pivot, s.row, s.third};
  for (int64_t t = 0; t < 3; ++t) {
    const int64_t token = s.n / 6 + t * (s.n / 3);
    load_row(p.x, p.dtype, b * p.x_stride_b + s.position[token] * p.x_stride_n, p.x_stride_c, p.C, rows[t]);
  }
  for (int64_t c = 0; c < p.C; ++c) s.pivot[c] = median(s.pivot[c], s.row[c], s.third[c]);
}

// Channels [begin, end) of P tokens, centred and transposed, and their share of the norms.
template <class E>
void pack_panel(const DpcKnn& p, int64_t b, const Sample& s, int64_t first, int64_t begin, int64_t end) {
  const auto* x = static_cast<const typename E::Stored*>(p.x) + b * p.x_stride_b;
  float* panel = s.panels + first * (end - begin);
  for (int64_t lane = 0; lane < P; lane += W) {
    for (int64_t c = begin; c < end; c += W) {
      const int64_t channels = std::min<int64_t>(W, end - c);
      const bool whole = channels == W && p.x_stride_c == 1;
      vf block[W];
#pragma GCC unroll 16
      for (int l = 0; l < W; ++l) {
        const int64_t i = first + lane + l;
        block[l] = vf{};
        if (i >= s.n) continue;
        const auto* from = x + s.position[i] * p.x_stride_n + c * p.x_stride_c;
        if (whole) {
          block[l] = load_as<E>(from) - load(s.pivot + c);
        } else {
          float row[W] = {};
          for (int64_t e = 0; e < channels; ++e) row[e] = E::get(from[e * p.x_stride_c]) - s.pivot[c + e];
          block[l] = load(row);
        }
      }
      transpose<float>(block);
      for (int64_t l = 0; l < channels; ++l) store(panel + (c - begin + l) * P + lane, block[l]);
    }
  }
  panel_norms(panel, end - begin, s.norm + first, begin > 0);
  if (end < p.C) return;
  for (int64_t i = std::max(first, s.n); i < first + P; ++i) s.norm[i] = kInf;  // padding is infinitely far
}

void pack(const DpcKnn& p, int64_t b, Sample& s, int64_t begin, int64_t end, const Runner& runner) {
  s.each_part(runner, [&](int64_t q) {
    for (int64_t first = q * P; first < s.n; first += s.parts * P) {
      switch (p.dtype) {
        case DType::f16: pack_panel<F16>(p, b, s, first, begin, end); break;
        case DType::bf16: pack_panel<BF16>(p, b, s, first, begin, end); break;
        default: pack_panel<F32>(p, b, s, first, begin, end); break;
      }
    }
  });
}

inline vf squared_distance(float norm_i, vf norm_j, vf dot) {
  return vmax((splat(norm_i) + norm_j) - 2.0f * dot, vf{});
}

// ---- 2a. few tokens: all distances in cache -------------------------------------------------------------------------

// Dot products of columns [j0, j1) become squared distances, written as their mirror image too.
void mirror_distances(Sample& s, int64_t j0, int64_t j1) {
  const int64_t side = round_up(s.n, P);
  for (int64_t j = j0; j < j1; j += W) {
    for (int64_t i0 = 0; i0 <= j; i0 += W) {
      vf block[W];
#pragma GCC unroll 16
      for (int l = 0; l < W; ++l) {
        block[l] = squared_distance(s.norm[i0 + l], load(s.norm + j), load(s.dense + (i0 + l) * side + j));
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

// Tiles on and above the diagonal, some channels at a time and for each a panel of columns at a time.
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
#pragma GCC unroll 8
  for (int e = 0; e < K; ++e) nearest[e] = splat(kInf);
  for (int64_t i = 0; i < s.n; ++i) {
    vf d = load(s.dense + i * side + j);
#pragma GCC unroll 8
    for (int e = 0; e < K; ++e) {
      const vf nearer = vmin(nearest[e], d);
      d = vmax(nearest[e], d);
      nearest[e] = nearer;
    }
  }
  vf sum{};
#pragma GCC unroll 8
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

void dense_densities(const DpcKnn& p, Sample& s, const Runner& runner) {
  const int64_t side = round_up(s.n, P), k = std::min(p.k, s.n);
  const float denominator = static_cast<float>(k) * static_cast<float>(p.C);
  dense_columns(s, runner, [&](Part& part, int64_t j) {
    switch (k) {
      case 1: return dense_density<1>(s, j, side, denominator);
      case 2: return dense_density<2>(s, j, side, denominator);
      case 3: return dense_density<3>(s, j, side, denominator);
      case 4: return dense_density<4>(s, j, side, denominator);
      case 5: return dense_density<5>(s, j, side, denominator);
      case 6: return dense_density<6>(s, j, side, denominator);
      case 7: return dense_density<7>(s, j, side, denominator);
      case 8: return dense_density<8>(s, j, side, denominator);
      default: break;
    }
    float* row = part.row;
    for (int64_t i = j; i < std::min(j + W, s.n); ++i) {
      std::copy(s.dense + i * side, s.dense + i * side + s.n, row);
      std::partial_sort(row, row + k, row + s.n, kAscending);
      double sum = 0;  // of as many terms as there are tokens
      for (int64_t e = 0; e < k; ++e) sum += row[e];
      s.r[i] = static_cast<float>(sum) / denominator;
    }
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

// ---- 2b. many tokens: neighbour lists -------------------------------------------------------------------------------

// One vector of an ascending list takes in (d, id) and hands on, in their place, what falls off its end.
inline void take_in(vf& distance, vi& neighbour, vf& d, vi& id) {
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
  take_in(here, id_here, d, id);
  store(distance, here);
  store(neighbour, id_here);
}

// Dot products of tokens [i_begin, i_end) with [j_begin, j_end) become squared distances.
void tile_distances(const Sample& s, Part& part, int64_t i_begin, int64_t i_end, int64_t j_begin, int64_t j_end) {
  vf far = splat(part.farthest);
  for (int64_t i = i_begin; i < i_end; ++i) {
    float* row = part.tile + (i - i_begin) * kBlock - j_begin;
    for (int64_t j = std::max(j_begin, i / W * W); j < j_end; j += W) {
      const vf d = squared_distance(s.norm[i], load(s.norm + j), load(row + j));
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

// Offers the tokens [j_begin, j_end) of a tile of distances, if they come after token i, to the list of each i; with
// kBackward, if they come before it. The nearest in the order of tokens are offered first: they often are near.
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
        for (int v = 0; v < V; ++v) take_in(head[v], id[v], d, token);
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
    for (int64_t jb = q; jb < blocks; jb += s.parts) {
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
  // The lists of part 0 take in those of the others; then r.
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

// For every pending token: the nearest of the gathered ones before `stop` of it, which is the larger, the later the
// token is pending. accept(token, squared distance, place among the gathered) is called once per pending token.
template <class Stop, class Accept>
void second_search(const DpcKnn& p, Sample& s, const Runner& runner, const int32_t* pending, int64_t count,
                   const Stop& stop, const Accept& accept) {
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
            vf d = squared_distance(s.gathered_norm[i], load(part.panel_norm + v * W), dots);
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

// The tokens without an answer are few and dense: a search through the tokens by rank soon comes to an end.
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
  // As many ranks at a time as fit; those that are pending are in the order of rank.
  const int32_t* first = s.pending;
  const int32_t* const last = s.pending + pending;
  for (int64_t begin = 0; first < last; begin += s.gathered_max) {
    while (first < last && s.rank[*first] <= begin) ++first;
    if (first == last) break;
    const int64_t count = std::min<int64_t>(s.gathered_max, s.rank[last[-1]] - begin);
    for (int64_t e = 0; e < count; ++e) s.nearest[e] = s.order[begin + e].token;
    gather_panels(p, s, runner, s.nearest, count);
    second_search(
        p, s, runner, first, last - first, [&](int32_t i) { return std::min<int64_t>(count, s.rank[i] - begin); },
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
      p, s, runner, s.pending, pending, [&](int32_t) { return s.kept_count; },
      [&](int32_t i, float, int32_t m) { s.nearest[i] = m; });
}

// ---- 3-5. order, score, selection -----------------------------------------------------------------------------------

inline uint32_t mix32(uint32_t h) {  // finaliser of MurmurHash3: every input bit reaches every output bit
  h = (h ^ (h >> 16)) * 0x85ebca6bu;
  h = (h ^ (h >> 13)) * 0xc2b2ae35u;
  return h ^ (h >> 16);
}

inline uint32_t ascending_bits(float x) {  // unsigned integers in the order of the floats
  const uint32_t u = bits_as<uint32_t>(x + 0.0f);
  return u >> 31 ? ~u : u | 0x80000000u;
}

inline uint64_t descending_bits(double x) {  // the larger, the smaller
  const uint64_t u = bits_as<uint64_t>(x + 0.0);
  return u >> 63 ? u : ~(u | uint64_t{1} << 63);
}

void rank_by_density(const DpcKnn& p, int64_t b, Sample& s) {
  const uint32_t seed = mix32(static_cast<uint32_t>(p.seed) ^ mix32(static_cast<uint32_t>(p.seed >> 32)));
  for (int64_t i = 0; i < s.n; ++i) {
    s.density[i] = std::exp(-static_cast<double>(s.r[i]));
    const uint64_t r = ascending_bits(s.r[i]);
    const uint64_t hash = mix32(static_cast<uint32_t>(s.position[i]) + seed);
    if (p.noise) s.density[i] += static_cast<double>(p.noise[b * p.N + s.position[i]]);
    s.order[i] = {p.noise ? descending_bits(s.density[i]) : r, r << 32 | hash, static_cast<int32_t>(i)};
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
    const double log_density = !p.noise             ? -static_cast<double>(s.r[i])
                               : s.density[i] > 0 ? std::log(s.density[i])
                                                  : -HUGE_VAL;
    const double log_delta = 0.5 * std::log(static_cast<double>(s.delta2[i]) / static_cast<double>(p.C));
    // Infinite noise on a token at distance 0 makes NaN, which a sort must not see.
    const double log_score = log_density + log_delta;
    s.candidates[candidates++] = {log_score < HUGE_VAL ? log_score : HUGE_VAL, static_cast<int32_t>(i)};
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
  Sample(p, threads, nullptr, &bytes);
  return bytes;
}

void dpc_knn_fwd(const DpcKnn& p, int64_t b, void* scratch, const Runner& runner) {
  Sample s(p, runner.threads, scratch);
  find_valid(p, b, s);
  const bool dense = s.n <= kDense;
  if (dense) {
    dense_distances(p, b, s, runner);
    dense_densities(p, s, runner);
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
