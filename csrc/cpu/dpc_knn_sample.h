// Clustering one sample on a CPU: scratch, and tokens centred and packed into the panels of tile_dots.h.
#pragma once
#include <algorithm>
#include <cmath>

#include "element.h"
#include "hotkernels/dpc_knn.h"
#include "hotkernels/shared/dpc_knn_order.h"
#include "scratch.h"
#include "tile_dots.h"

namespace hotkernels::HK_ISA {
namespace {

// Up to so many tokens, and neighbours per density, all distances of a sample are held: 816^2 floats are 2.7 MB, a
// core's share of caches. Up to 1,024 that is faster than lists, 1,280 no longer (Zen 4: 1 MB, and 32 MB shared).
constexpr int64_t kDense = 816, kDenseK = 16;
constexpr int64_t kDenseChannels = 256;  // packed at a time then: 816 x 256 floats are 0.8 MB
constexpr int64_t kBlock = 192;          // tokens per side of a tile of distances beyond
constexpr int64_t kListMin = 16;         // kept per token beyond: fewer leave more to the second search
constexpr float kInf = __builtin_inff();
static_assert(kBlock % P == 0 && kDense % P == 0 && W % R == 0);

// A lambda has a type of its own in every object file, and so have std's algorithms on it: a copy per instruction set.
constexpr auto kAscending = [](auto a, auto b) { return a < b; };

struct Rank {  // densest first
  uint64_t key, tie;  // of dpc::density_key
  int32_t token;
  bool operator<(const Rank& o) const { return key != o.key ? key < o.key : tie < o.tie; }
};

struct Candidate {  // best first
  uint64_t key;  // of dpc::score_key
  int32_t token;
  bool operator<(const Candidate& o) const { return key != o.key ? key < o.key : token < o.token; }
};

// What one thread needs for itself.
struct Part {
  float* tile;         // [kBlock, kBlock] dot products, then squared distances
  float* distance;     // [N, list] squared distances, ascending
  int32_t* neighbour;  // [N, list]
  float* panel;        // [C, P] tokens of a second search
  float* panel_norm;   // [P]
  float farthest;      // largest squared distance seen
};

// Scratch of one sample. Tokens are numbered 0 .. n-1 among the valid ones. Np: N rounded up to whole panels.
struct Sample {
  const DpcKnn* call;
  int64_t b;  // which sample of the call
  int64_t n, list, kept_count;
  int32_t* position;       // [N] where in the sample a token stands
  float* pivot;            // [C]
  float *row, *third;      // [C]
  float* panels;           // [Np / P, C, P]; where all distances are held, kDenseChannels of the C at a time
  float* norm;             // [Np]
  float* r;                // [Np] mean of the k smallest squared distances
  int32_t* rank;           // [Np] 0 = densest
  float* delta2;           // [Np] squared distance to the nearest denser token
  double* density;         // [N] exp(-r) + noise
  Rank* order;             // [N]
  Candidate* candidates;   // [N]
  int32_t* kept;           // [M] chosen tokens, in the order of index
  int32_t* slot;           // [Np] place of a token in index, or -1; while they are chosen, 0 for those of `keep`
  int32_t* nearest;        // [N] place in index of the nearest kept token; before that, tokens to gather
  int32_t* pending;        // [N] tokens that need a second search
  int64_t gathered_max;    // tokens that fit in:
  float* gathered;         // [gathered_max / P, C, P] what a second search looks through
  float* gathered_norm;    // [gathered_max]
  float* dense;            // [kDense, kDense] squared distances, if k is at most kDenseK
  int64_t parts;
  Part* part;

  Sample(const DpcKnn& p, int64_t b, int64_t parts, void* scratch, int64_t* bytes = nullptr)
      : call(&p), b(b), parts(parts) {
    Arena a{reinterpret_cast<uintptr_t>(scratch)};
    const int64_t np = round_up(p.N, P);
    const bool large = p.N > kDense || p.k > kDenseK;
    if (large) this->parts = parts = std::min(parts, (p.N + kBlock - 1) / kBlock);  // each has lists of all tokens
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
    const int64_t side = p.k > kDenseK ? 0 : std::min(np, kDense);
    dense = a.take<float>(side * side);
    part = a.take<Part>(parts);
    gathered_max = large ? std::max(p.assign ? round_up(p.M, P) : 0, round_up(p.N / 4, P)) : 0;
    gathered = a.take<float>(gathered_max * p.C);
    gathered_norm = a.take<float>(gathered_max);
    for (int64_t q = 0; q < parts; ++q) {
      Part here{};
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

// Calls body(Element{}) for the element type of tokens, which are never float64.
template <class Body>
inline void with_float_element(DType dtype, const Body& body) {
  with_element(dtype, [&](auto element) {
    if constexpr (std::is_same_v<typename decltype(element)::Compute, float>) body(element);
  });
}

// out[c] = channel c of the token at a position of sample b.
void load_token(const DpcKnn& p, int64_t b, int64_t position, float* out) {
  with_float_element(p.dtype, [&](auto element) {
    using E = decltype(element);
    const auto* x = static_cast<const typename E::Stored*>(p.x) + b * p.x_stride_b + position * p.x_stride_n;
    if (p.x_stride_c == 1) {
      each_vector<E>(p.C, [&](int64_t c, auto count) { store_as<F32>(out + c, load_as<E>(x + c, count), count); });
    } else {
      for (int64_t c = 0; c < p.C; ++c) out[c] = E::get(x[c * p.x_stride_c]);
    }
  });
}

// Finds the valid tokens and the pivot (dpc_knn_order.h). A token is valid if the mask has it, its noise is a number,
// and its squared norm is at most kNormLimit.
void find_valid(const DpcKnn& p, int64_t b, Sample& s) {
  s.n = 0;
  for (int64_t i = 0; i < p.N; ++i) {
    if (p.mask && !p.mask[b * p.N + i]) continue;
    if (p.noise && std::isnan(p.noise[b * p.N + i])) continue;
    load_token(p, b, i, s.row);
    float square = 0;
#pragma omp simd reduction(+ : square)
    for (int64_t c = 0; c < p.C; ++c) square += s.row[c] * s.row[c];
    if (square <= kNormLimit) s.position[s.n++] = static_cast<int32_t>(i);
  }
  if (s.n == 0) return;
  float* const rows[] = {s.pivot, s.row, s.third};
  for (int t = 0; t < 3; ++t) {
    load_token(p, b, s.position[dpc::pivot_token(static_cast<int>(s.n), t)], rows[t]);
  }
  for (int64_t c = 0; c < p.C; ++c) s.pivot[c] = dpc::median(s.pivot[c], s.row[c], s.third[c]);
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
      with_float_element(p.dtype, [&](auto element) { pack_panel<decltype(element)>(p, b, s, first, begin, end); });
    }
  });
}

// |x_i - x_j|^2 from the differences of two tokens as they were given; the same number for (j, i), and for any strides.
float distance_by_differences(const Sample& s, int64_t i, int64_t j) {
  const DpcKnn& p = *s.call;
  float total = 0;
  with_float_element(p.dtype, [&](auto element) {
    using E = decltype(element);
    const auto* x = static_cast<const typename E::Stored*>(p.x) + s.b * p.x_stride_b;
    const auto *xi = x + s.position[i] * p.x_stride_n, *xj = x + s.position[j] * p.x_stride_n;
    const auto channels = [&](const auto* token, int64_t c) {  // W, or what is left of them and zeros
      const int64_t left = std::min<int64_t>(W, p.C - c);
      if (p.x_stride_c == 1) return load_up_to<E>(token + c, left);
      vf some{};
      for (int64_t l = 0; l < left; ++l) some[l] = E::get(token[(c + l) * p.x_stride_c]);
      return some;
    };
    vf even{}, odd{};
    for (int64_t c = 0; c < p.C; c += 2 * W) {
      const vf d = channels(xi, c) - channels(xj, c);
      even += d * d;
      if (c + W >= p.C) continue;
      const vf e = channels(xi, c + W) - channels(xj, c + W);
      odd += e * e;
    }
    even += odd;
    for (int l = 0; l < W; ++l) total += even[l];
  });
  return total;
}

// Where two tokens are this much nearer to each other than to the pivot, cancellation leaves products too few bits.
constexpr float kCancelled = 1.0f / 256;

// The squared distances from a token of norm_i to W others by products; those of the lanes in `cancelled` are no good.
inline vf squared_distance(float norm_i, vf norm_j, vf dot, uint32_t& cancelled) {
  const vf norms = splat(norm_i) + norm_j, d = vmax(norms - 2.0f * dot, vf{});
  cancelled = less_bits(d, kCancelled * norms);
  return d;
}

// What replaces those: token(l) is the other one of lane l.
template <class Token>
__attribute__((noinline)) vf without_cancellation(const Sample& s, vf d, uint32_t cancelled, int64_t i,
                                                  const Token& token) {
  for (; cancelled; cancelled &= cancelled - 1) {
    const int l = __builtin_ctz(cancelled);
    d[l] = token(l) == i ? 0.0f : distance_by_differences(s, i, token(l));
  }
  return d;
}

}  // namespace
}  // namespace hotkernels::HK_ISA
