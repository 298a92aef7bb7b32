// PTX's instructions on numbers: types, comparison, arithmetic, bits, conversion. A register holds bits: arguments and
// results are 64 of them, of which an instruction takes as many as its types have.
#pragma once
#include <algorithm>
#include <bit>
#include <cfenv>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "emulation.h"

namespace ptx {

using hk_emulation::fail;
using Bits = uint64_t;

// Types: the number that bits stand for.
template <class Number, class Unsigned>
struct Type {
  using N = Number;
  using U = Unsigned;
  static constexpr int bytes = sizeof(U);
  static N number(Bits x) { return std::bit_cast<N>(static_cast<U>(x)); }
  static Bits bits(N x) { return std::bit_cast<U>(x); }
};
struct s8 : Type<int8_t, uint8_t> {};
struct u8 : Type<uint8_t, uint8_t> {};
struct b8 : u8 {};
struct s16 : Type<int16_t, uint16_t> {};
struct u16 : Type<uint16_t, uint16_t> {};
struct b16 : u16 {};
struct s32 : Type<int32_t, uint32_t> {};
struct u32 : Type<uint32_t, uint32_t> {};
struct b32 : u32 {};
struct s64 : Type<int64_t, uint64_t> {};
struct u64 : Type<uint64_t, uint64_t> {};
struct b64 : u64 {};
struct f32 : Type<float, uint32_t> {};
struct f64 : Type<double, uint64_t> {};
struct f16 : Type<_Float16, uint16_t> {};
struct bf16 {
  using N = float;
  static constexpr int bytes = 2;
  static N number(Bits x) { return std::bit_cast<float>(static_cast<uint32_t>(x) << 16); }
  static Bits bits(N x) {
    const auto u = std::bit_cast<uint32_t>(x);
    return std::isnan(x) ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16 & 0xffff;
  }
};
struct tf32 {
  using N = float;
  static N number(Bits x) { return std::bit_cast<float>(static_cast<uint32_t>(x) & ~0x1fffu); }  // the rest is ignored
  static Bits bits(N x) {  // to the nearest, ties away from zero
    const auto u = std::bit_cast<uint32_t>(x);
    return std::isfinite(x) ? (u + 0x1000) & ~0x1fffu : std::isnan(x) ? 0x7fffffff : u;
  }
};
struct pred {
  static bool number(Bits x) { return x & 1; }
};
struct f16x2;
struct bf16x2;

inline float flushed(float x) { return std::abs(x) < std::numeric_limits<float>::min() ? std::copysign(0.f, x) : x; }
template <class T>
using Wide = std::conditional_t<
    std::same_as<T, s32>, s64,
    std::conditional_t<std::same_as<T, u32>, u64, std::conditional_t<std::same_as<T, s16>, s32, u32>>>;

// Comparison.
#define PTX_COMPARE(name, ordered, unordered)                          \
  template <class T>                                                   \
  Bits setp_##name(Bits x, Bits y) {                                   \
    const auto a = T::number(x), b = T::number(y);                     \
    return a != a || b != b ? unordered : (ordered);                   \
  }
PTX_COMPARE(eq, a == b, 0)
PTX_COMPARE(ne, a != b, 0)
PTX_COMPARE(lt, a < b, 0)
PTX_COMPARE(le, a <= b, 0)
PTX_COMPARE(gt, a > b, 0)
PTX_COMPARE(ge, a >= b, 0)
PTX_COMPARE(equ, a == b, 1)
PTX_COMPARE(neu, a != b, 1)
PTX_COMPARE(ltu, a < b, 1)
PTX_COMPARE(leu, a <= b, 1)
PTX_COMPARE(gtu, a > b, 1)
PTX_COMPARE(geu, a >= b, 1)
PTX_COMPARE(num, 1, 0)
PTX_COMPARE(nan, 0, 1)

// Arithmetic. Integers wrap.
#define PTX_BINARY(name, result)                                     \
  template <class T>                                                 \
  Bits name(Bits x, Bits y) {                                        \
    const auto a = T::number(x), b = T::number(y);                   \
    return result;                                                   \
  }
template <class T>
constexpr bool is_float = std::is_floating_point_v<typename T::N> || std::same_as<T, f16>;
template <class T>
Bits add(Bits x, Bits y) {
  if constexpr (is_float<T>) return T::bits(T::number(x) + T::number(y));
  else return static_cast<typename T::U>(x + y);
}
template <class T>
Bits sub(Bits x, Bits y) {
  if constexpr (is_float<T>) return T::bits(T::number(x) - T::number(y));
  else return static_cast<typename T::U>(x - y);
}
PTX_BINARY(mul, T::bits(a * b))
PTX_BINARY(mul_wide, Wide<T>::bits(typename Wide<T>::N{a} * typename Wide<T>::N{b}))
template <class T>
Bits mul_lo(Bits x, Bits y) {
  return static_cast<typename T::U>(x * y);
}
template <class T>
Bits mul_hi(Bits x, Bits y) {
  using W = std::conditional_t<std::is_signed_v<typename T::N>, __int128, unsigned __int128>;
  return T::bits(static_cast<typename T::N>(static_cast<W>(T::number(x)) * T::number(y) >> (8 * T::bytes)));
}
template <class T>
Bits mad_lo(Bits x, Bits y, Bits z) {
  return static_cast<typename T::U>(x * y + z);
}
template <class T>
Bits mad_wide(Bits x, Bits y, Bits z) {
  return static_cast<typename Wide<T>::U>(mul_wide<T>(x, y) + z);
}
template <class T>
Bits div(Bits x, Bits y) {
  const auto a = T::number(x), b = T::number(y);
  if constexpr (is_float<T>) {
    return T::bits(a / b);
  } else {
    if (b == 0) fail("an integer is divided by zero");
    return T::bits(a / b);
  }
}
template <class T>
Bits rem(Bits x, Bits y) {
  if (T::number(y) == 0) fail("an integer is divided by zero");
  return T::bits(T::number(x) % T::number(y));
}
#define PTX_SAME(name, other)                    \
  template <class T, class... X>                 \
  Bits name(X... x) {                            \
    return other<T>(x...);                       \
  }
PTX_SAME(add_rn, add)
PTX_SAME(div_rn, div)
PTX_SAME(div_full, div)  // to 2 units in the last place
template <class T>
Bits fma_rn(Bits x, Bits y, Bits z) {
  return T::bits(std::fma(T::number(x), T::number(y), T::number(z)));
}
template <class T>
Bits fma_rn_ftz(Bits x, Bits y, Bits z) {
  return T::bits(flushed(std::fma(flushed(T::number(x)), flushed(T::number(y)), flushed(T::number(z)))));
}
template <class T>
Bits fma_rm(Bits x, Bits y, Bits z) {
  volatile float a = T::number(x), b = T::number(y), c = T::number(z);
  std::fesetround(FE_DOWNWARD);
  volatile float sum = std::fma(a, b, c);
  std::fesetround(FE_TONEAREST);
  return T::bits(sum);
}
template <class T>
Bits abs(Bits x) {
  return T::bits(std::abs(T::number(x)));
}
template <class T>
Bits neg(Bits x) {
  if constexpr (is_float<T>) return T::bits(-T::number(x));
  else return static_cast<typename T::U>(-x);
}
template <class T>
Bits min(Bits x, Bits y) {
  const auto a = T::number(x), b = T::number(y);
  if constexpr (is_float<T>) return T::bits(a < b || b != b || (a == b && std::signbit(a)) ? a : b);
  else return T::bits(std::min(a, b));
}
template <class T>
Bits max(Bits x, Bits y) {
  const auto a = T::number(x), b = T::number(y);
  if constexpr (is_float<T>) return T::bits(a > b || b != b || (a == b && std::signbit(b)) ? a : b);
  else return T::bits(std::max(a, b));
}
template <class T>
Bits max_NaN(Bits x, Bits y) {
  return setp_nan<T>(x, y) ? 0x7fffffff : max<T>(x, y);
}
template <class T>
Bits rcp_rn(Bits x) {
  return T::bits(1 / T::number(x));
}
template <class T>
Bits rcp_approx_ftz(Bits x) {
  if constexpr (std::same_as<T, f64>) return f64::bits(1 / f64::number(x)) >> 32 << 32;
  else return f32::bits(flushed(1 / flushed(f32::number(x))));
}
template <class T>
Bits sqrt_rn(Bits x) {
  return T::bits(std::sqrt(T::number(x)));
}
template <class T>
Bits ex2_approx_ftz(Bits x) {
  return T::bits(flushed(std::exp2(flushed(T::number(x)))));
}

// Bits.
PTX_BINARY(and_, a & b)
PTX_BINARY(or_, a | b)
PTX_BINARY(xor_, a ^ b)
template <class T>
Bits not_(Bits x) {
  if constexpr (std::same_as<T, pred>) return !pred::number(x);
  else return static_cast<typename T::U>(~x);
}
template <class T>
Bits shl(Bits x, Bits by) {
  const auto n = static_cast<uint32_t>(by);
  return n >= 8 * T::bytes ? 0 : static_cast<typename T::U>(x << n);
}
template <class T>
Bits shr(Bits x, Bits by) {
  const auto n = std::min(static_cast<uint32_t>(by), 8u * T::bytes);
  const auto a = T::number(x);
  return T::bits(static_cast<typename T::N>(n < 8 * T::bytes ? a >> n : a < 0 ? -1 : 0));
}
template <class T>
Bits bfe(Bits x, Bits from, Bits count) {
  const unsigned start = from & 0xff, size = count & 0xff, width = 8 * T::bytes;
  if (size == 0) return 0;
  const unsigned last = std::min(start + size - 1, width - 1);
  const bool sign = std::is_signed_v<typename T::N> && (static_cast<typename T::U>(x) >> last & 1);
  Bits all = sign ? ~Bits{0} : 0;
  for (unsigned i = 0; i < size && start + i < width; ++i) {
    all = (all & ~(Bits{1} << i)) | (static_cast<typename T::U>(x) >> (start + i) & Bits{1}) << i;
  }
  return static_cast<typename T::U>(all);
}
template <class T>
Bits bfi(Bits x, Bits into, Bits from, Bits count) {
  const unsigned start = from & 0xff, size = count & 0xff;
  for (unsigned i = 0; i < size && start + i < 8 * T::bytes; ++i) {
    into = (into & ~(Bits{1} << (start + i))) | (x >> i & 1) << (start + i);
  }
  return into;
}
template <class T>
Bits brev(Bits x) {
  Bits all = 0;
  for (int i = 0; i < 8 * T::bytes; ++i) all = all << 1 | (x >> i & 1);
  return all;
}
template <class T>
Bits popc(Bits x) {
  return std::popcount(static_cast<typename T::U>(x));
}
template <class T>
Bits bfind_shiftamt(Bits x) {
  static_assert(std::same_as<T, u32>);
  return x == 0 ? 0xffffffff : std::countl_zero(static_cast<uint32_t>(x));
}
template <class T>
Bits prmt(Bits x, Bits y, Bits selector) {
  const Bits all = (y & 0xffffffff) << 32 | (x & 0xffffffff);
  Bits out = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned choice = selector >> (4 * i) & 15;
    Bits byte = all >> (8 * (choice & 7)) & 0xff;
    if (choice & 8) byte = byte & 0x80 ? 0xff : 0;
    out |= byte << (8 * i);
  }
  return out;
}

// Choice and conversion.
template <class T>
Bits mov(Bits x) {
  return x;
}
template <class T, int n>
Bits mov(const Bits (&parts)[n]) {
  Bits all = 0;
  for (int i = 0; i < n; ++i) all |= (parts[i] & ((Bits{1} << (8 * T::bytes / n)) - 1)) << (8 * T::bytes / n * i);
  return all;
}
template <class T, int n>
void mov(Bits (&parts)[n], Bits all) {
  for (int i = 0; i < n; ++i) parts[i] = all >> (8 * T::bytes / n * i) & ((Bits{1} << (8 * T::bytes / n)) - 1);
}
template <class T>
Bits selp(Bits x, Bits y, Bits which) {
  return which & 1 ? x : y;
}
template <class To, class From>
Bits cvt(Bits x) {
  if constexpr (std::same_as<From, pred>) return x;
  else if constexpr (std::floating_point<typename To::N> || std::same_as<To, f16>) {
    return To::bits(static_cast<typename To::N>(From::number(x)));
  } else {  // a number keeps its sign in a wider register
    return static_cast<Bits>(static_cast<int64_t>(static_cast<typename To::N>(From::number(x))));
  }
}
template <class To, class From>
Bits cvt_rn(Bits x) {
  return cvt<To, From>(x);
}
template <class To, class From>
Bits cvt_rn(Bits high, Bits low) {
  using T = std::conditional_t<std::same_as<To, f16x2>, f16, bf16>;
  return cvt<T, From>(high) << 16 | cvt<T, From>(low);
}
template <class To, class From>
Bits cvt_rna(Bits x) {
  static_assert(std::same_as<To, tf32>);
  return tf32::bits(f32::number(x));
}
template <class To, class From>
Bits cvt_sat(Bits x) {
  const float a = f32::number(x);
  return f32::bits(a > 0 ? std::min(a, 1.f) : 0.f);
}

}  // namespace ptx
