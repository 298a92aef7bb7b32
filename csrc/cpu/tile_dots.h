// Dot products between packed tokens, one register tile at a time: where clustering spends its time.
//
// Tokens are packed into panels of P tokens, channel-major: panel[c * P + lane]. Both operands of a product come from
// such panels and every pair is summed over the channels in the same order, so <x_i, x_j> and <x_j, x_i> are the same
// bits, and a token's squared norm computed the same way is bitwise <x_i, x_i>.
#pragma once
#include <algorithm>

#include "register_tile.h"

namespace hotkernels::HK_ISA {
namespace {

constexpr int P = 3 * W;                  // tokens per panel: three vectors of columns
constexpr int R = tile_rows(3);           // rows per register tile
constexpr int64_t kChannelBlock = 128;    // channels per pass: a panel's 128 x 48 floats (24 KB) stay in L1

// t[i - i_begin][j - j_begin] = <a_i, b_j>. i_begin and j_begin are multiples of P; rows are written in groups of R and
// columns in groups of W, so t needs room for round_up(i_end - i_begin, R) rows of round_up(j_end - j_begin, W).
// With `upper` (a and b are the same tokens) only j >= i is computed, in whole vectors. With `more`, t holds the
// products over earlier channels, and those over these C are added.
inline void tile_dots(const float* a, int64_t i_begin, int64_t i_end, const float* b, int64_t j_begin, int64_t j_end,
                      int64_t C, bool upper, float* t, int64_t t_stride, bool more = false) {
  for (int64_t c = 0; c < C; c += kChannelBlock) {
    const int64_t channels = std::min(kChannelBlock, C - c);
    const bool add = more || c > 0;
    for (int64_t j = j_begin; j < j_end; j += P) {
      const float* panel_b = b + j * C + c * P;
      const int64_t vectors = std::min<int64_t>(3, (j_end - j + W - 1) / W);
      const int64_t i_stop = upper ? std::min(j + P, i_end) : i_end;
      for (int64_t i = i_begin; i < i_stop; i += R) {
        const float* panel_a = a + i / P * P * C + c * P + i % P;
        const int64_t skip = upper && i > j ? (i - j) / W : 0;
        float* out = t + (i - i_begin) * t_stride + (j - j_begin) + skip * W;
        const float* cols = panel_b + skip * W;
        switch (vectors - skip) {
          case 3: register_tile<R, 3, true>(panel_a, P, cols, P, channels, out, t_stride, add); break;
          case 2: register_tile<R, 2, true>(panel_a, P, cols, P, channels, out, t_stride, add); break;
          case 1: register_tile<R, 1, true>(panel_a, P, cols, P, channels, out, t_stride, add); break;
          default: break;  // the whole register tile lies below the diagonal
        }
      }
    }
  }
}

// norm[lane] = <x, x> of each token of one panel, in the order of tile_dots: x's distance to itself is exactly 0.
inline void panel_norms(const float* panel, int64_t C, float* norm, bool more) {
  vf total[3] = {};
  for (int v = 0; more && v < 3; ++v) total[v] = load(norm + v * W);
  for (int64_t c = 0; c < C; c += kChannelBlock) {
    const int64_t stop = std::min(C, c + kChannelBlock);
    vf acc[3] = {};
    for (int64_t e = c; e < stop; ++e) {
#pragma GCC unroll 3
      for (int v = 0; v < 3; ++v) {
        const vf x = load(panel + e * P + v * W);
        acc[v] += x * x;
      }
    }
#pragma GCC unroll 3
    for (int v = 0; v < 3; ++v) total[v] += acc[v];
  }
  for (int v = 0; v < 3; ++v) store(norm + v * W, total[v]);
}

}  // namespace
}  // namespace hotkernels::HK_ISA
