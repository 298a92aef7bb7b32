// The matrix product that fits in registers: R rows times V vectors of columns, accumulated over the depth.
//
// Its operands are numbers or, where the processor has AVX512-BF16, pairs of bfloat16, neighbours along the depth: one
// instruction adds both products to a float, rounding after each and flushing denormals to 0; twice as many products
// per second (on a Zen 5).
#pragma once
#include "simd.h"

namespace hotkernels::HK_ISA {
namespace {

constexpr int kMaxVectors = W == 16 ? 4 : 3;  // of columns; AVX-512 has 32 registers, the others 16
constexpr int64_t kMaxDepth = 128;  // products added up one by one; longer sums are sums of such sums, which round less

// Rows per register tile of V vectors: R * V accumulators + V columns + 1 broadcast fit the register file.
constexpr int tile_rows(int vectors) { return W == 16 ? (vectors == 4 ? 6 : 8) : 4; }

struct [[gnu::may_alias]] Pair {
  uint32_t bits;  // the first one in the lower half
};
template <>
struct Simd<Pair> : Simd<uint32_t> {};
inline Simd<Pair>::vec splat(Pair x) { return splat(x.bits); }

template <class V>
inline V multiply_add(V sum, V a, V b) { return sum + a * b; }
#if HK_BF16_PAIRS && defined(__AVX512F__)
inline vf multiply_add(vf sum, Simd<Pair>::vec a, Simd<Pair>::vec b) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
}
#endif

// t[r][0 .. V) (+)= sum over c < depth of a(r, c) * b[c * b_stride + 0 .. V), in vectors of T, for r < R.
// a(r, c) is a[c * a_stride + r] if `by_column`, else a[r * a_stride + c]. O: the operands.
template <int R, int V, bool by_column, class O, class T>
inline void register_tile(const O* a, int64_t a_stride, const O* b, int64_t b_stride, int64_t depth, T* t,
                          int64_t t_stride, bool add) {
  using vec = typename Simd<T>::vec;
  constexpr int lanes = Simd<T>::lanes;
  vec acc[R][V] = {};
  for (int64_t c = 0; c < depth; ++c) {
    typename Simd<O>::vec cols[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) cols[v] = load(b + c * b_stride + v * lanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const auto row = splat(by_column ? a[c * a_stride + r] : a[r * a_stride + c]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] = multiply_add(acc[r][v], row, cols[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      T* out = t + r * t_stride + v * lanes;
      store(out, add ? load(out) + acc[r][v] : acc[r][v]);
    }
  }
}

template <int V, bool by_column, class O, class T>
inline void register_tile_rows(const O* a, int64_t a_stride, const O* b, int64_t b_stride, int64_t rows, int64_t depth,
                               T* t, int64_t t_stride, bool add) {
  const auto at = [&](int64_t r) { return a + (by_column ? r : r * a_stride); };
  constexpr int R = tile_rows(V);
  int64_t r = 0;
  for (; r + R <= rows; r += R) {
    register_tile<R, V, by_column>(at(r), a_stride, b, b_stride, depth, t + r * t_stride, t_stride, add);
  }
  for (; r + 2 <= rows; r += 2) {
    register_tile<2, V, by_column>(at(r), a_stride, b, b_stride, depth, t + r * t_stride, t_stride, add);
  }
  if (r < rows) register_tile<1, V, by_column>(at(r), a_stride, b, b_stride, depth, t + r * t_stride, t_stride, add);
}

// t[r][0 .. vectors) (+)= sum_c a(r, c) * b[c][0 .. vectors) for any number of rows and vectors of columns.
template <bool by_column, class O, class T>
inline void multiply(const O* a, int64_t a_stride, const O* b, int64_t b_stride, int64_t rows, int64_t vectors,
                     int64_t depth, T* t, int64_t t_stride, bool add) {
  constexpr int lanes = Simd<T>::lanes;
  for (; depth > kMaxDepth; depth -= kMaxDepth, add = true) {
    multiply<by_column>(a, a_stride, b, b_stride, rows, vectors, kMaxDepth, t, t_stride, add);
    a += by_column ? kMaxDepth * a_stride : kMaxDepth, b += kMaxDepth * b_stride;
  }
  for (int64_t v = 0; v < vectors;) {
    const int64_t left = vectors - v;
    const O* cols = b + v * lanes;
    T* out = t + v * lanes;
    if (kMaxVectors == 4 && left % 3 != 0 && left >= 4) {
      register_tile_rows<kMaxVectors, by_column>(a, a_stride, cols, b_stride, rows, depth, out, t_stride, add);
      v += kMaxVectors;
    } else if (left >= 3) {
      register_tile_rows<3, by_column>(a, a_stride, cols, b_stride, rows, depth, out, t_stride, add);
      v += 3;
    } else if (left == 2) {
      register_tile_rows<2, by_column>(a, a_stride, cols, b_stride, rows, depth, out, t_stride, add);
      v += 2;
    } else {
      register_tile_rows<1, by_column>(a, a_stride, cols, b_stride, rows, depth, out, t_stride, add);
      v += 1;
    }
  }
}

}  // namespace
}  // namespace hotkernels::HK_ISA
