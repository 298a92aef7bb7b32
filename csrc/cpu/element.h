// Element types as kernels see them: what is stored, what it is computed in, and how to go from one to the other.
#pragma once
#include <type_traits>

#include "simd.h"

namespace hotkernels::HK_ISA {
namespace {

struct F32 {
  using Stored = float;
  using Compute = float;
  static Compute get(Stored x) { return x; }
  static Stored put(Compute x) { return x; }
};
struct F64 {
  using Stored = double;
  using Compute = double;
  static Compute get(Stored x) { return x; }
  static Stored put(Compute x) { return x; }
};
struct F16 {
  using Stored = uint16_t;
  using Compute = float;
  static Compute get(Stored x) { return from_f16<float, uint32_t>(x); }
  static Stored put(Compute x) { return static_cast<Stored>(to_f16<float, uint32_t>(x)); }
};
struct BF16 {
  using Stored = uint16_t;
  using Compute = float;
  static Compute get(Stored x) { return from_bf16<float, uint32_t>(x); }
  static Stored put(Compute x) { return static_cast<Stored>(to_bf16<float, uint32_t>(x)); }
};

// A register of compute values out of stored ones, and back.
template <class E>
using Vec = typename Simd<typename E::Compute>::vec;

template <class E>
constexpr int kLanes = Simd<typename E::Compute>::lanes;

// W half-type values in memory, and 32-bit patterns to work on.
typedef uint16_t halves __attribute__((vector_size(2 * W)));
typedef uint16_t halves_mem __attribute__((vector_size(2 * W), aligned(2), may_alias));
typedef Simd<uint32_t>::vec vu;

template <class E>
inline vf widen(halves h) {
  if constexpr (std::is_same_v<E, BF16>) return from_bf16<vf>(__builtin_convertvector(h, vu));
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps((__m256i)h);
#elif defined(__F16C__)
  return (vf)_mm256_cvtph_ps((__m128i)h);
#else
  return from_f16<vf>(__builtin_convertvector(h, vu));
#endif
}

template <class E>
inline halves narrow(vf v) {
  if constexpr (std::is_same_v<E, BF16>) return __builtin_convertvector(to_bf16<vf, vu>(v), halves);
#if defined(__AVX512F__)
  return (halves)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
  return (halves)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
  return __builtin_convertvector(to_f16<vf, vu>(v), halves);
#endif
}

template <class E>
constexpr bool kIsHalf = sizeof(typename E::Stored) < sizeof(typename E::Compute);

template <class E>
inline Vec<E> load_as(const typename E::Stored* p) {
  if constexpr (kIsHalf<E>) return widen<E>(*reinterpret_cast<const halves_mem*>(p)); else return load(p);
}

template <class E>
inline void store_as(typename E::Stored* p, Vec<E> v) {
  if constexpr (kIsHalf<E>) *reinterpret_cast<halves_mem*>(p) = narrow<E>(v); else store(p, v);
}

// A mask of the first `count` < lanes values; what is masked is neither read nor written.
#if defined(__AVX512F__)
inline __mmask16 first_lanes(int64_t count) { return static_cast<__mmask16>((1u << count) - 1u); }
#elif defined(__AVX2__)
inline __m256i first_lanes(int64_t count) {
  static constexpr int32_t kOnesThenZeros[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kOnesThenZeros + 8 - count));
}
#endif

// The first `count` < lanes values; the rest is 0 and not read.
template <class E>
inline Vec<E> load_some_as(const typename E::Stored* p, int64_t count) {
#if defined(__AVX512F__)
  if constexpr (kIsHalf<E>) return widen<E>((halves)_mm256_maskz_loadu_epi16(first_lanes(count), p));
  else if constexpr (kLanes<E> == W) return (vf)_mm512_maskz_loadu_ps(first_lanes(count), p);
  else return (Vec<E>)_mm512_maskz_loadu_pd(static_cast<__mmask8>(first_lanes(count)), p);
#else
#if defined(__AVX2__)
  if constexpr (kLanes<E> < W) return (Vec<E>)_mm256_maskload_pd(p, first_lanes(2 * count));
  else if constexpr (!kIsHalf<E>) return (vf)_mm256_maskload_ps(p, first_lanes(count));
#endif
  std::conditional_t<kIsHalf<E>, halves, Vec<E>> v{};
#pragma GCC unroll 8
  for (int l = 0; l < kLanes<E>; ++l) {  // in registers: what is stored in parts cannot be loaded at once
    if (l < count) v[l] = p[l];
  }
  if constexpr (kIsHalf<E>) return widen<E>(v); else return v;
#endif
}

template <class E>
inline void store_some_as(typename E::Stored* p, Vec<E> v, int64_t count) {
#if defined(__AVX512F__)
  if constexpr (kIsHalf<E>) _mm256_mask_storeu_epi16(p, first_lanes(count), (__m256i)narrow<E>(v));
  else if constexpr (kLanes<E> == W) _mm512_mask_storeu_ps(p, first_lanes(count), (__m512)v);
  else _mm512_mask_storeu_pd(p, static_cast<__mmask8>(first_lanes(count)), (__m512d)v);
#else
#if defined(__AVX2__)
  if constexpr (kLanes<E> < W) return _mm256_maskstore_pd(p, first_lanes(2 * count), (__m256d)v);
  else if constexpr (!kIsHalf<E>) return _mm256_maskstore_ps(p, first_lanes(count), (__m256)v);
#endif
  std::conditional_t<kIsHalf<E>, halves, Vec<E>> stored;
  if constexpr (kIsHalf<E>) stored = narrow<E>(v); else stored = v;
#pragma GCC unroll 8
  for (int l = 0; l < kLanes<E>; ++l) {
    if (l < count) p[l] = stored[l];
  }
#endif
}

// The first `left` values, however many those are; zeros after them.
template <class E>
inline Vec<E> load_up_to(const typename E::Stored* p, int64_t left) {
  return left < kLanes<E> ? load_some_as<E>(p, left) : load_as<E>(p);
}

// Calls step(c, count) for every vector of a row of `size` values: it starts at c; count says how many there are of it.
struct Whole {};
template <class E, class Step>
inline void each_vector(int64_t size, const Step& step) {
  int64_t c = 0;
  for (; c + kLanes<E> <= size; c += kLanes<E>) step(c, Whole{});
  if (c < size) step(c, size - c);
}

// What such a step loads and stores.
template <class E>
inline Vec<E> load_as(const typename E::Stored* p, Whole) { return load_as<E>(p); }
template <class E>
inline Vec<E> load_as(const typename E::Stored* p, int64_t count) { return load_some_as<E>(p, count); }
template <class E>
inline void store_as(typename E::Stored* p, Vec<E> v, Whole) { store_as<E>(p, v); }
template <class E>
inline void store_as(typename E::Stored* p, Vec<E> v, int64_t count) { store_some_as<E>(p, v, count); }

// The element that the sums of another are: float, or double for double.
template <class E>
using SumOf = std::conditional_t<std::is_same_v<typename E::Compute, double>, F64, F32>;

// Calls body(Element{}) for the element type of a tensor.
template <class Body>
inline void with_element(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::f32: return body(F32{});
    case DType::f64: return body(F64{});
    case DType::f16: return body(F16{});
    case DType::bf16: return body(BF16{});
  }
}

}  // namespace
}  // namespace hotkernels::HK_ISA
