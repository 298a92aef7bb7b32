// How attention packs its matrices as operands of products (register_tile.h): as numbers, or as pairs of bfloat16.
//
// Where a product sums over a matrix's columns, its rows are packed "along": a row's operands lie one after the other.
// Where it sums over the rows, they are packed "across": an operand holds the values of `deep` rows in one column. For
// numbers both are alike.
#pragma once
#include "element.h"
#include "register_tile.h"

namespace hotkernels::HK_ISA {
namespace {

// out[0 .. D) = x[0 .. D) * scale, then zeros up to whole vectors.
template <class E>
inline void pack_row(const typename E::Stored* x, int64_t D, typename E::Compute scale, typename E::Compute* out) {
  for (int64_t d = 0; d < D; d += kLanes<E>) store(out + d, load_up_to<E>(x + d, D - d) * scale);
}

template <class E, class O>
struct Packing {
  using S = typename E::Stored;
  using T = typename E::Compute;
  using vec = Vec<E>;
  static constexpr int64_t deep = 1;  // elements in an operand

  // Loads a register of operands from a row with `left` elements left, zeros after them; put stores one.
  static vec take(const S* x, int64_t left) { return load_up_to<E>(x, left); }
  static void put(O* to, vec operands, T scale) { store(to, operands * scale); }

  // Packs one row of D elements; across as row n of its matrix.
  static void along(const S* x, int64_t D, O* row) { pack_row<E>(x, D, T{1}, row); }
  static void across(const S* x, int64_t D, T scale, int64_t n, O* rows, int64_t stride) {
    pack_row<E>(x, D, scale, rows + n * stride);
  }

  // Registers of computed values to memory: one along a row, or `deep` rows across.
  static void put_along(O* to, vec x) { store(to, x); }
  static void put_across(O* to, const vec (&x)[1]) { store(to, x[0]); }
};

#if HK_BF16_PAIRS && defined(__AVX512F__)
template <>
struct Packing<BF16, Pair> {  // ignores `scale`, which would round the operands again: the product is scaled
  static constexpr int64_t deep = 2;

  static vf take(const uint16_t* x, int64_t left) {
    return (vf)_mm512_maskz_loadu_epi16(left < 2 * W ? (1u << left) - 1u : ~0u, x);
  }
  static void put(Pair* to, vf operands, float) { store(to, (vu)operands); }

  static void along(const uint16_t* x, int64_t D, Pair* row) {
    for (int64_t d = 0; d < D; d += 2 * W) store(row + d / 2, (vu)take(x + d, D - d));
  }
  static void across(const uint16_t* x, int64_t D, float, int64_t n, Pair* rows, int64_t stride) {
    Pair* row = rows + n / 2 * stride;
    for (int64_t d = 0; d < D; d += W) {
      const vu upper = (vu)load_up_to<BF16>(x + d, D - d);
      store(row + d, n % 2 ? load(row + d) | upper : upper >> 16);
    }
  }

  static void put_along(Pair* to, vf x) {
    __m256i rounded;
    asm("vcvtneps2bf16 %1, %0" : "=v"(rounded) : "v"(x));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), rounded);
  }
  static void put_across(Pair* to, const vf (&x)[2]) {
    __m512i rounded;  // x[0] in the lower half, x[1] in the upper
    asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(rounded) : "v"(x[0]), "v"(x[1]));
    const __m512i places = (__m512i)(vu{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} * 0x10001u + 0x100000u);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(places, rounded));
  }
};
#endif

}  // namespace
}  // namespace hotkernels::HK_ISA
