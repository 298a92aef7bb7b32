// One float vector type per instruction set, as GCC/Clang vector extensions: kernels are written once, for any width W.
// Included by CPU kernels only, inside namespace hotkernels::HK_ISA; nothing here may have external linkage.
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "hotkernels/common.h"

namespace hotkernels::HK_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

// Vectors of T as wide as a register, and the same unaligned and free to alias: what a load or store goes through.
template <class T>
struct Simd {
  static constexpr int lanes = 4 * W / static_cast<int>(sizeof(T));
  typedef T vec __attribute__((vector_size(4 * W)));
  typedef T mem __attribute__((vector_size(4 * W), aligned(sizeof(T)), may_alias));
};
typedef Simd<float>::vec vf;
typedef Simd<int32_t>::vec vi;

template <class T>
inline typename Simd<T>::vec load(const T* p) { return *reinterpret_cast<const typename Simd<T>::mem*>(p); }
template <class T>
inline void store(T* p, typename Simd<T>::vec v) { *reinterpret_cast<typename Simd<T>::mem*>(p) = v; }
template <class T>
inline typename Simd<T>::vec splat(T x) { return x - typename Simd<T>::vec{}; }  // x - 0 folds away, 0 + x does not
template <class V>
inline V vmin(V a, V b) { return a < b ? a : b; }
template <class V>
inline V vmax(V a, V b) { return a > b ? a : b; }

// Bit l is set where a[l] < b[l].
inline uint32_t less_bits(vf a, vf b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LT_OQ);
#elif defined(__AVX__)
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)(a < b)));
#elif defined(__SSE__)
  return static_cast<uint32_t>(_mm_movemask_ps((__m128)(a < b)));
#else
  uint32_t bits = 0;
  for (int l = 0; l < W; ++l) bits |= static_cast<uint32_t>(a[l] < b[l]) << l;
  return bits;
#endif
}

// The lanes of x and y, numbered on from x's, that L names.
template <int... L, class V>
inline V shuffle(V x, V y) {
#if defined(__clang__)
  return __builtin_shufflevector(x, y, L...);
#else  // which GCC has from 12 on
  using Lanes = decltype(x == y);
  return __builtin_shuffle(x, y, Lanes{L...});
#endif
}

template <int S, class V, int... L>
inline void transpose_step(V* v, std::integer_sequence<int, L...>) {
  constexpr int n = sizeof...(L);
#pragma GCC unroll 16
  for (int a = 0; a < n; ++a) {
    if (a & S) continue;
    const V x = v[a], y = v[a + S];
    v[a] = shuffle<(L & S ? n + L - S : L)...>(x, y);
    v[a + S] = shuffle<(L & S ? n + L : L + S)...>(x, y);
  }
}

// v[a][b] becomes v[b][a]: off-diagonal blocks change places, at every scale.
template <class T>
inline void transpose(typename Simd<T>::vec (&v)[Simd<T>::lanes]) {
  constexpr int n = Simd<T>::lanes;
  constexpr auto lanes = std::make_integer_sequence<int, n>();
  transpose_step<1>(v, lanes);
  if constexpr (n > 2) transpose_step<2>(v, lanes);
  if constexpr (n > 4) transpose_step<4>(v, lanes);
  if constexpr (n > 8) transpose_step<8>(v, lanes);
}

template <int S, class V, int... L>
inline void fold_step(V* v, std::integer_sequence<int, L...>) {
  constexpr int n = sizeof...(L);
#pragma GCC unroll 16
  for (int a = 0; a < n; a += 2 * S) {
    const V x = v[a], y = v[a + S];
    v[a] = shuffle<(L & S ? n + L - S : L)...>(x, y) + shuffle<(L & S ? n + L : L + S)...>(x, y);
  }
}

// Lane l of the result is the sum over the lanes of v[l].
template <class T>
inline typename Simd<T>::vec sums_across(typename Simd<T>::vec (&v)[Simd<T>::lanes]) {
  constexpr int n = Simd<T>::lanes;
  constexpr auto lanes = std::make_integer_sequence<int, n>();
  fold_step<1>(v, lanes);
  if constexpr (n > 2) fold_step<2>(v, lanes);
  if constexpr (n > 4) fold_step<4>(v, lanes);
  if constexpr (n > 8) fold_step<8>(v, lanes);
  return v[0];
}

template <class V, int... L>
inline V shift_lanes(V v, V first, std::integer_sequence<int, L...>) {
  return shuffle<(W - 1 + L)...>(first, v);
}

// first[W - 1], v[0], .. v[W - 2].
template <class V>
inline V shift_in(V v, V first) {
#if defined(__AVX512F__)
  return (V)_mm512_alignr_epi32((__m512i)v, (__m512i)first, W - 1);  // GCC 12 takes a slower permutation
#else
  return shift_lanes(v, first, std::make_integer_sequence<int, W>());
#endif
}

inline float reduce_max(vf v) {
  float m = v[0];
  for (int l = 1; l < W; ++l) m = m < v[l] ? v[l] : m;
  return m;
}

// Half types as bits, of one value (F float, U uint32_t) or of a vector. Rounded to the nearest, ties to even, as
// PyTorch does; NaN stays NaN.
template <class F, class U>
inline F from_bf16(U h) { return bits_as<F>(h << 16); }

template <class F, class U>
inline U to_bf16(F x) {
  const U u = bits_as<U>(x);
  return x == x ? (u + 0x7fffu + ((u >> 16) & 1u)) >> 16 : U{} + 0x7fc0u;
}

// Subnormals become 0.5 and their value, then lose 0.5: in no step are they subnormal floats, which may be flushed.
template <class F, class U>
inline F from_f16(U h) {
  const U magnitude = h & 0x7fffu, shifted = magnitude << 13;
  const U subnormal = bits_as<U>(bits_as<F>(magnitude + bits_as<uint32_t>(0.5f)) - 0.5f);
  const U finite = magnitude < 0x400u ? subnormal : shifted + (112u << 23);
  return bits_as<F>((magnitude < 0x7c00u ? finite : shifted | 0x7f800000u) | (h & 0x8000u) << 16);
}

// Subnormals are rounded by the float adder: adding 0.5 aligns the mantissa.
template <class F, class U>
inline U to_f16(F x) {
  const U sign = (bits_as<U>(x) >> 16) & 0x8000u, u = bits_as<U>(x) & 0x7fffffffu;
  const F a = bits_as<F>(u);
  const U normal = (u + 0xfffu + ((u >> 13) & 1u) - (112u << 23)) >> 13;
  const U subnormal = bits_as<U>(a + 0.5f) - bits_as<uint32_t>(0.5f);
  const U magnitude = a < 0x1p-14f ? subnormal : normal;
  const U inf_or_nan = a == a ? U{} + 0x7c00u : U{} + 0x7e00u;
  return sign | (a < 65520.0f ? magnitude : inf_or_nan);
}

}  // namespace
}  // namespace hotkernels::HK_ISA
