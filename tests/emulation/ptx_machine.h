// PTX's instructions on the host, over emulation.h, named and called as ptx.py says. A register holds bits: arguments
// and results are 64 of them, of which an instruction takes as many as its types have.
#pragma once
#include <algorithm>
#include <bit>
#include <cfenv>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <cstring>
#include <limits>

#include "emulation.h"

namespace ptx {

using hk_emulation::fail;
using Bits = uint64_t;

// What every translated kernel begins with, and every instruction of it. With HK_COUNT they are counted, over all
// threads.
#ifdef HK_COUNT
struct Counter {
  const char* kernel;
  uint64_t instructions = 0;
  Counter* next;
  explicit Counter(const char* kernel) : kernel(kernel), next(first) { first = this; }
  static inline Counter* first = nullptr;  // of all modules of a library
};
#define PTX_KERNEL(name) static ptx::Counter counter(#name)
#define PTX_INSTRUCTION ++counter.instructions;
#else
#define PTX_KERNEL(name)
#define PTX_INSTRUCTION
#endif

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

// Memory. An address in shared memory counts from its block's first byte; one of the cluster has, above that, its
// block's rank + 1.
constexpr int kRankShift = 24;
constexpr Bits kOffsetMask = (Bits{1} << kRankShift) - 1;
unsigned char* global(Bits address, int64_t bytes);
unsigned char* shared(Bits address, int64_t bytes);
unsigned char* generic(Bits address, int64_t bytes);
inline const unsigned char* parameter(Bits address, int64_t) { return reinterpret_cast<unsigned char*>(address); }

#define PTX_LOAD(name, memory)                                                  \
  template <class T, int n>                                                     \
  void name(Bits (&values)[n], Bits address) {                                  \
    const unsigned char* from = memory(address, n * T::bytes);                  \
    for (int i = 0; i < n; ++i) {                                               \
      Bits bits = 0;                                                            \
      std::memcpy(&bits, from + i * T::bytes, T::bytes);                        \
      values[i] = std::is_signed_v<typename T::N> ? cvt<T, T>(bits) : bits;     \
    }                                                                           \
  }
#define PTX_MEMORY(space, memory)                                               \
  PTX_LOAD(ld##space, memory)                                                   \
  template <class T, int n>                                                     \
  void st##space(Bits address, const Bits (&values)[n]) {                       \
    unsigned char* to = memory(address, n * T::bytes);                          \
    for (int i = 0; i < n; ++i) std::memcpy(to + i * T::bytes, &values[i], T::bytes); \
  }                                                                             \
  template <class T, class F>                                                   \
  Bits atom##space(Bits address, const F& next) {                               \
    Bits old[1], now[1];                                                        \
    ld##space<T>(old, address);                                                 \
    now[0] = next(old[0]);                                                      \
    st##space<T>(address, now);                                                 \
    return old[0];                                                              \
  }                                                                             \
  template <class T>                                                            \
  Bits atom##space##_add(Bits address, Bits x) {                                \
    return atom##space<T>(address, [=](Bits old) { return add<T>(old, x); });   \
  }                                                                             \
  template <class T>                                                            \
  Bits atom##space##_min(Bits address, Bits x) {                                \
    return atom##space<T>(address, [=](Bits old) { return min<T>(old, x); });   \
  }                                                                             \
  template <class T>                                                            \
  Bits atom##space##_max(Bits address, Bits x) {                                \
    return atom##space<T>(address, [=](Bits old) { return max<T>(old, x); });   \
  }
PTX_LOAD(ld_param, parameter)
PTX_LOAD(ld_global_nc, global)
PTX_MEMORY(, generic)
PTX_MEMORY(_global, global)
PTX_MEMORY(_shared, shared)

template <class T>
Bits cvta_to_global(Bits x) {
  return x;
}
template <class T>
Bits cvta_shared(Bits x) {  // to a generic address, which the host's are
  return reinterpret_cast<uint64_t>(hk_emulation::shared_memory() + x);
}
template <class T>
Bits mapa(Bits generic, Bits rank) {
  return reinterpret_cast<Bits>(hk_emulation::shared_memory_of(reinterpret_cast<void*>(generic), rank));
}
template <class T>
Bits mapa_shared_cluster(Bits shared, Bits rank) {
  return shared | (rank + 1) << kRankShift;
}
inline void prefetch_global_L2(Bits) {}

inline void cp_async_cg_shared_global(Bits to, Bits from, Bits size, Bits valid) {
  const auto bytes = static_cast<int>(size), count = static_cast<int>(valid);
  if (count > bytes) fail("an asynchronous copy reads more than it writes");
  if (count == bytes) global(from, bytes);
  for (int i = 0; i < count; ++i) global(from + i, 1);
  hk_emulation::copy_later(shared(to, bytes), reinterpret_cast<const void*>(from), bytes, count);
}
inline void cp_async_cg_shared_global(Bits to, Bits from, Bits size) {
  cp_async_cg_shared_global(to, from, size, size);
}
template <class... X>
void cp_async_ca_shared_global(X... x) {
  cp_async_cg_shared_global(x...);
}
inline void cp_async_commit_group() { hk_emulation::commit_copies(); }
inline void cp_async_wait_group(Bits pending) { hk_emulation::wait_for_copies(static_cast<int>(pending)); }

// Barriers.
inline void bar_sync(Bits barrier) {
  if (barrier != 0) fail("barriers of a block but the first are not emulated");
  hk_emulation::block_barrier();
}
inline void barrier_cluster_arrive_release_aligned() {}
inline void barrier_cluster_arrive_relaxed_aligned() {}
inline void barrier_cluster_wait_acquire_aligned() { hk_emulation::cluster_barrier(); }
inline void fence_mbarrier_init_release_cluster() {}
inline void fence_proxy_async_shared_cta() {}
inline hk_emulation::Barrier* barrier(Bits address) {
  return reinterpret_cast<hk_emulation::Barrier*>(shared(address, 8));
}
template <class T>
void mbarrier_init_shared_cta(Bits address, Bits count) {
  hk_emulation::barrier_init(barrier(address), static_cast<unsigned>(count));
}
template <class T>
void mbarrier_arrive_release_cta_shared_cta(Bits address) {
  hk_emulation::barrier_arrive(barrier(address), 0);
}
template <class T>
void mbarrier_arrive_expect_tx_release_cta_shared_cta(Bits address, Bits bytes) {
  hk_emulation::barrier_arrive(barrier(address), static_cast<int>(bytes));
}
template <class T>
Bits mbarrier_try_wait_parity_acquire_cluster_shared_cta(Bits address, Bits parity) {
  hk_emulation::barrier_wait(barrier(address), static_cast<int>(parity));
  return 1;
}
template <class T>
void st_async_weak_shared_cluster_mbarrier_complete_tx_bytes(Bits to, Bits value, Bits at) {
  const Bits rank = to >> kRankShift;
  if (rank == 0 || rank != at >> kRankShift) fail("an asynchronous store and its barrier are of one block");
  hk_emulation::store_later(shared(to & kOffsetMask, T::bytes), &value, T::bytes, barrier(at & kOffsetMask), rank - 1);
}

// Warps.
inline void bar_warp_sync(Bits mask) {
  hk_emulation::warp_instruction(static_cast<uint32_t>(mask), nullptr, [](void* const(&)[32], unsigned) {});
}
struct Lane {
  Bits value, from, result;
};
struct Lanes {
  void* const (&payload)[32];
  unsigned mask;
  bool has(int lane) const { return mask >> lane & 1; }
  Lane& operator[](int lane) const { return *static_cast<Lane*>(payload[lane]); }
};
// f(all lanes, one of them) for each lane of the mask.
template <class F>
Bits exchange(Bits mask, Bits value, Bits from, F) {
  Lane mine{value, from, 0};
  hk_emulation::warp_instruction(static_cast<uint32_t>(mask), &mine, [](void* const(&payload)[32], unsigned mask) {
    const Lanes lanes{payload, mask};
    for (int lane = 0; lane < 32; ++lane) {
      if (lanes.has(lane)) lanes[lane].result = F{}(lanes, lane);
    }
  });
  return mine.result;
}
// The value of lane `from`, and above its 32 bits whether that is a lane of this one's segment.
inline Bits shuffle(Bits mask, Bits value, int from, bool within) {
  const int lane = static_cast<int>(hk_emulation::lane());
  const Bits got = exchange(mask, value, within ? from : lane, [](const Lanes& lanes, int lane) -> Bits {
    const int from = static_cast<int>(lanes[lane].from);
    return lanes.has(from) ? lanes[from].value : 0xcdcdcdcd;  // undefined
  });
  return (got & 0xffffffff) | Bits{within} << 32;
}
struct Segment {
  int lane, clamp, first, last;
  explicit Segment(Bits c) : lane(hk_emulation::lane()), clamp(c & 31), first(c >> 8 & 31) {
    last = (lane & first) | (clamp & ~first), first = lane & first;
  }
};
template <class T>
Bits shfl_sync_bfly(Bits value, Bits by, Bits c, Bits mask) {
  const Segment s(c);
  const int from = s.lane ^ static_cast<int>(by & 31);
  return shuffle(mask, value, from, from <= s.last);
}
template <class T>
Bits shfl_sync_up(Bits value, Bits by, Bits c, Bits mask) {
  const Segment s(c);
  const int from = s.lane - static_cast<int>(by & 31);
  return shuffle(mask, value, from, from >= s.last);
}
template <class T>
Bits shfl_sync_idx(Bits value, Bits lane, Bits c, Bits mask) {
  const Segment s(c);
  const int segment = static_cast<int>(c >> 8 & 31), from = s.first | (static_cast<int>(lane & 31) & ~segment);
  return shuffle(mask, value, from, from <= s.last);
}
template <class T>
Bits vote_sync_ballot(Bits set, Bits mask) {
  return exchange(mask, set & 1, 0, [](const Lanes& lanes, int) {
    Bits all = 0;
    for (int l = 0; l < 32; ++l) all |= lanes.has(l) ? lanes[l].value << l : 0;
    return all;
  });
}
template <class T>
Bits vote_sync_any(Bits set, Bits mask) {
  return vote_sync_ballot<b32>(set, mask) != 0;
}
template <class T>
Bits vote_sync_all(Bits set, Bits mask) {
  return vote_sync_ballot<b32>(set, mask) == static_cast<uint32_t>(mask);
}
template <class T>
Bits match_any_sync(Bits value, Bits mask) {
  return exchange(mask, value, 0, [](const Lanes& lanes, int lane) {
    Bits all = 0;
    for (int l = 0; l < 32; ++l) all |= Bits{lanes.has(l) && lanes[l].value == lanes[lane].value} << l;
    return all;
  });
}
#define PTX_REDUX(name)                                                                        \
  template <class T>                                                                           \
  Bits redux_sync_##name(Bits value, Bits mask) {                                              \
    return exchange(mask, value, 0, [](const Lanes& lanes, int lane) {                         \
      Bits all = lanes[lane].value;                                                            \
      for (int l = 0; l < 32; ++l) {                                                           \
        if (lanes.has(l) && l != lane) all = name<T>(all, lanes[l].value);                     \
      }                                                                                        \
      return all;                                                                              \
    });                                                                                        \
  }
PTX_REDUX(add)
PTX_REDUX(min)
PTX_REDUX(max)

// Matrices over a warp. With g = lane / 4 and t = lane % 4, an 8 x 8 matrix of 16-bit numbers has (g, 2t) and
// (g, 2t + 1) in a register of each lane; lane 8 m + i says where row i of matrix m is in shared memory.
struct Matrices {
  Bits* registers;
  Bits row;
  int count;
};
// f(a register, where its low and its high number are in memory) for each.
template <bool transposed, class F>
void each_pair(void* const (&payload)[32], const F& f) {
  for (int lane = 0; lane < 32; ++lane) {
    const auto& mine = *static_cast<Matrices*>(payload[lane]);
    for (int m = 0; m < mine.count; ++m) {
      const auto place = [&](int row, int column) {
        return shared(static_cast<Matrices*>(payload[8 * m + row])->row, 16) + 2 * column;
      };
      const int g = lane / 4, pair = 2 * (lane % 4);
      if (transposed) f(mine.registers[m], place(pair, g), place(pair + 1, g));
      else f(mine.registers[m], place(g, pair), place(g, pair + 1));
    }
  }
}
template <bool transposed>
void load_matrices(void* const (&payload)[32], unsigned) {
  each_pair<transposed>(payload, [](Bits& bits, const unsigned char* low, const unsigned char* high) {
    uint16_t numbers[2];
    std::memcpy(&numbers[0], low, 2), std::memcpy(&numbers[1], high, 2);
    bits = uint32_t{numbers[1]} << 16 | numbers[0];
  });
}
template <bool transposed>
void store_matrices(void* const (&payload)[32], unsigned) {
  each_pair<transposed>(payload, [](const Bits& bits, unsigned char* low, unsigned char* high) {
    const Bits upper = bits >> 16;
    std::memcpy(low, &bits, 2), std::memcpy(high, &upper, 2);
  });
}
template <int n>
void matrices(Bits (&registers)[n], Bits row, hk_emulation::Combine move) {
  Matrices mine{registers, row, n};
  hk_emulation::warp_instruction(~0u, &mine, move);
}
template <class T, int n>
void ldmatrix_sync_aligned_m8n8_shared(Bits (&registers)[n], Bits row) {
  matrices(registers, row, load_matrices<false>);
}
template <class T, int n>
void ldmatrix_sync_aligned_m8n8_trans_shared(Bits (&registers)[n], Bits row) {
  matrices(registers, row, load_matrices<true>);
}
template <class T, int n>
void stmatrix_sync_aligned_m8n8_shared(Bits row, Bits (&registers)[n]) {
  matrices(registers, row, store_matrices<false>);
}
template <class T, int n>
void stmatrix_sync_aligned_m8n8_trans_shared(Bits row, Bits (&registers)[n]) {
  matrices(registers, row, store_matrices<true>);
}

// Products d += a b of a [m, k] and b [k, n]. A register has one number of 32 bits or two neighbours in k of 16.
template <class T>
constexpr bool kIsWide = std::same_as<T, tf32>;
template <class T>
constexpr int kDepth = kIsWide<T> ? 8 : 16;  // k
template <class T>
float number(const Bits* registers, int i) {
  return static_cast<float>(T::number(kIsWide<T> ? registers[i] : registers[i / 2] >> (16 * (i % 2))));
}
// What a lane has of 16 rows of a.
template <class T>
void spread_left(const Bits* a, int lane, float (&left)[16][16]) {
  const int g = lane / 4, t = lane % 4;
  for (int i = 0; i < kDepth<T> / 2; ++i) {
    if (kIsWide<T>) left[g + 8 * (i % 2)][t + 4 * (i / 2)] = number<T>(a, i);
    else left[g + 8 * (i / 2 % 2)][2 * t + i % 2 + 8 * (i / 4)] = number<T>(a, i);
  }
}
// What a lane has of 16 rows of d, [16, n].
template <class T, class Right>
void add_products(float* d, int lane, int n, const float (&left)[16][16], const Right& right) {
  for (int i = 0; i < n / 2; ++i) {
    const int row = lane / 4 + 8 * (i / 2 % 2), column = 8 * (i / 4) + 2 * (lane % 4) + i % 2;
    for (int k = 0; k < kDepth<T>; ++k) d[i] += left[row][k] * right[k][column];
  }
}

struct Product {
  float* d;
  const Bits *a, *b;
};
template <class T>
void multiply(void* const (&payload)[32], unsigned) {
  float left[16][16], right[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& mine = *static_cast<Product*>(payload[lane]);
    spread_left<T>(mine.a, lane, left);
    for (int i = 0; i < kDepth<T> / 4; ++i) {
      const int g = lane / 4, t = lane % 4;
      right[kIsWide<T> ? t + 4 * i : 2 * t + i % 2 + 8 * (i / 2)][g] = number<T>(mine.b, i);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    add_products<T>(static_cast<Product*>(payload[lane])->d, lane, 8, left, right);
  }
}
template <class T>
void mma(Bits (&d)[4], const Bits* a, const Bits* b, const Bits (&c)[4]) {
  float sum[4];
  for (int i = 0; i < 4; ++i) sum[i] = f32::number(c[i]);
  Product mine{sum, a, b};
  hk_emulation::warp_instruction(~0u, &mine, multiply<T>);
  for (int i = 0; i < 4; ++i) d[i] = f32::bits(sum[i]);
}
template <class D, class A, class B, class C>
void mma_sync_aligned_m16n8k16_row_col(Bits (&d)[4], const Bits (&a)[4], const Bits (&b)[2], const Bits (&c)[4]) {
  mma<A>(d, a, b, c);
}
template <class D, class A, class B, class C>
void mma_sync_aligned_m16n8k8_row_col(Bits (&d)[4], const Bits (&a)[4], const Bits (&b)[2], const Bits (&c)[4]) {
  static_assert(std::same_as<A, tf32>);
  mma<A>(d, a, b, c);
}

// A matrix in shared memory, as a descriptor of a warp group's instruction says: rows of `width` bytes along k, or
// along the other dimension, m or n, eight of which are swizzled together; `stride` is from eight to the next eight,
// `leading` from one row's end to where it goes on.
template <class T>
struct Described {
  Bits begin, leading, stride;
  int width;
  bool along_k;
  Described(Bits d, bool along_k)
      : begin((d & 0x3fff) << 4), leading((d >> 16 & 0x3fff) << 4), stride((d >> 32 & 0x3fff) << 4),
        width(d >> 62 ? 256 >> (d >> 62) : 16), along_k(along_k) {
    if (d >> 49 & 7) fail("matrices with a base offset are not emulated");
    if (width == 16) fail("matrices without swizzle are not emulated");
  }
  float at(int mn, int k) const {
    constexpr int bytes = kIsWide<T> ? 4 : 2;
    const int row = along_k ? mn : k, byte = (along_k ? k : mn) * bytes;
    Bits place = begin + row / 8 * stride + row % 8 * width + byte / width * leading + byte % width;
    place ^= (place >> 7 & (width / 16 - 1)) << 4;
    Bits bits = 0;
    std::memcpy(&bits, shared(place, bytes), bytes);
    return number<T>(&bits, 0);
  }
};
struct GroupProduct {
  float* d;
  const Bits* a;  // registers, if it is not described
  Bits described_a, b;
  bool transposed_a, transposed_b;
  int n;
};
// One warp's part, 16 rows, of what four do.
template <class T>
void multiply_group(void* const (&payload)[32], unsigned) {
  const auto& first = *static_cast<GroupProduct*>(payload[0]);
  float left[16][16], right[16][256];
  const Described<T> b(first.b, !first.transposed_b);
  for (int k = 0; k < kDepth<T>; ++k) {
    for (int column = 0; column < first.n; ++column) right[k][column] = b.at(column, k);
    if (first.a != nullptr) continue;
    const Described<T> a(first.described_a, !first.transposed_a);
    for (int row = 0; row < 16; ++row) left[row][k] = a.at(16 * (hk_emulation::warp() % 4) + row, k);
  }
  for (int lane = 0; lane < 32 && first.a != nullptr; ++lane) {
    spread_left<T>(static_cast<GroupProduct*>(payload[lane])->a, lane, left);
  }
  for (int lane = 0; lane < 32; ++lane) {
    add_products<T>(static_cast<GroupProduct*>(payload[lane])->d, lane, first.n, left, right);
  }
}
template <class T, int n>
void wgmma(Bits (&d)[n], const Bits* a, Bits described_a, Bits b, Bits adds, Bits transposed_a, Bits transposed_b) {
  float sum[n];
  for (int i = 0; i < n; ++i) sum[i] = adds & 1 ? f32::number(d[i]) : 0;
  GroupProduct mine{sum, a, described_a, b, transposed_a != 0, transposed_b != 0, 2 * n};
  hk_emulation::warp_instruction(~0u, &mine, multiply_group<T>);
  for (int i = 0; i < n; ++i) d[i] = f32::bits(sum[i]);
}
// Done at once, which is early but allowed. Both signs are +; only 16-bit numbers can be transposed.
template <class D, class A, class B, int n>
void wgmma_mma_async_sync_aligned(Bits (&d)[n], const Bits (&a)[4], Bits b, Bits adds, Bits, Bits, Bits trans_b = 0) {
  wgmma<A>(d, a, 0, b, adds, 0, trans_b);
}
template <class D, class A, class B, int n>
void wgmma_mma_async_sync_aligned(Bits (&d)[n], Bits a, Bits b, Bits adds, Bits, Bits, Bits trans_a = 0,
                                  Bits trans_b = 0) {
  wgmma<A>(d, nullptr, a, b, adds, trans_a, trans_b);
}
inline void wgmma_fence_sync_aligned() {}
inline void wgmma_commit_group_sync_aligned() {}
inline void wgmma_wait_group_sync_aligned(Bits) {}

}  // namespace ptx

#ifdef HK_COUNT
// The name of the n-th kernel and its instructions; null after the last.
extern "C" __attribute__((weak)) const char* hk_ptx_count(unsigned n, uint64_t* instructions) {
  const ptx::Counter* c = ptx::Counter::first;
  for (; c != nullptr && n > 0; --n) c = c->next;
  if (c != nullptr) *instructions = c->instructions;
  return c == nullptr ? nullptr : c->kernel;
}
#endif
