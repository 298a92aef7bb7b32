// What CUDA C++ adds to the language, over emulation.h: qualifiers, indices, barriers, warp functions, atomics.
#pragma once
#include <algorithm>
#include <bit>
#include <cfloat>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <type_traits>

#include "cuda_runtime_api.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ static_assert(false, "shared memory must be dynamic: ptx::shared_memory()");

using hk_emulation::blockDim, hk_emulation::blockIdx, hk_emulation::gridDim, hk_emulation::threadIdx;
constexpr int warpSize = 32;

#define HK_VECTOR(T, name, alignment)                                                \
  struct alignas(alignment / 2) name##2 { T x, y; };                                 \
  struct name##3 { T x, y, z; };                                                     \
  struct alignas(alignment) name##4 { T x, y, z, w; };                               \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                         \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }                 \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
HK_VECTOR(float, float, 16)
HK_VECTOR(int, int, 16)
HK_VECTOR(unsigned, uint, 16)
HK_VECTOR(double, double, 16)
HK_VECTOR(long long, longlong, 16)
#undef HK_VECTOR

namespace hk_emulation {

template <class T, class R = T>
struct Operand {
  T value;
  int from;
  R result;
};

template <class T>
T shuffle(unsigned mask, T value, int from) {
  Operand<T> mine{value, from, value};
  warp_instruction(mask, &mine, [](void* const(&payload)[32], unsigned mask) {
    for (int l = 0; l < 32; ++l) {
      if (!(mask >> l & 1)) continue;
      auto* me = static_cast<Operand<T>*>(payload[l]);
      auto* other = static_cast<Operand<T>*>(payload[me->from]);
      if (other) me->result = other->value;
      else std::memset(&me->result, 0xcd, sizeof(T));  // what a lane outside the mask holds is undefined
    }
  });
  return mine.result;
}

// One value from all lanes of the mask: fold(so far, lane's value, lane).
template <class R, class T, class Fold>
R fold_warp(unsigned mask, T value, Fold) {
  static_assert(std::is_empty_v<Fold>);
  Operand<T, R> mine{value, 0, R{}};
  warp_instruction(mask, &mine, [](void* const(&payload)[32], unsigned mask) {
    R all{};
    bool first = true;
    for (int l = 0; l < 32; ++l) {
      if (mask >> l & 1) all = Fold{}(all, static_cast<Operand<T, R>*>(payload[l])->value, l, first), first = false;
    }
    for (int l = 0; l < 32; ++l) {
      if (mask >> l & 1) static_cast<Operand<T, R>*>(payload[l])->result = all;
    }
  });
  return mine.result;
}

}  // namespace hk_emulation

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  const int lane = hk_emulation::lane(), from = lane ^ lanes;
  return hk_emulation::shuffle(mask, value, from / width <= lane / width ? from : lane);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
  const int lane = hk_emulation::lane();
  return hk_emulation::shuffle(mask, value, lane % width >= static_cast<int>(by) ? lane - by : lane);
}
inline unsigned __ballot_sync(unsigned mask, int set) {
  return hk_emulation::fold_warp<unsigned>(
      mask, set != 0, [](unsigned all, bool set, int lane, bool) { return all | unsigned{set} << lane; });
}
inline int __any_sync(unsigned mask, int set) { return __ballot_sync(mask, set) != 0; }
inline int __all_sync(unsigned mask, int set) { return __ballot_sync(mask, set) == mask; }
template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
  hk_emulation::Operand<T, unsigned> mine{value, 0, 0};
  hk_emulation::warp_instruction(mask, &mine, [](void* const(&payload)[32], unsigned mask) {
    for (int l = 0; l < 32; ++l) {
      for (int o = 0; o < 32; ++o) {
        if (!(mask >> l & 1) || !(mask >> o & 1)) continue;
        auto *me = static_cast<hk_emulation::Operand<T, unsigned>*>(payload[l]),
             *other = static_cast<hk_emulation::Operand<T, unsigned>*>(payload[o]);
        me->result |= unsigned{me->value == other->value} << o;
      }
    }
  });
  return mine.result;
}
template <class T>
T __reduce_add_sync(unsigned mask, T value) {
  return hk_emulation::fold_warp<T>(mask, value, [](T all, T one, int, bool) { return static_cast<T>(all + one); });
}
template <class T>
T __reduce_min_sync(unsigned mask, T value) {
  return hk_emulation::fold_warp<T>(mask, value,
                                    [](T all, T one, int, bool first) { return first || one < all ? one : all; });
}
template <class T>
T __reduce_max_sync(unsigned mask, T value) {
  return hk_emulation::fold_warp<T>(mask, value,
                                    [](T all, T one, int, bool first) { return first || one > all ? one : all; });
}
inline void __syncwarp(unsigned mask = ~0u) {
  hk_emulation::warp_instruction(mask, nullptr, [](void* const(&)[32], unsigned) {});
}
inline void __syncthreads() { hk_emulation::block_barrier(); }
[[noreturn]] inline void __trap() { hk_emulation::fail("__trap()"); }

template <class T>
T atomicAdd(T* p, std::type_identity_t<T> v) {
  const T old = *p;
  *p = old + v;
  return old;
}
template <class T>
T atomicMax(T* p, std::type_identity_t<T> v) {
  const T old = *p;
  *p = std::max(old, v);
  return old;
}
template <class T>
T atomicMin(T* p, std::type_identity_t<T> v) {
  const T old = *p;
  *p = std::min(old, v);
  return old;
}

inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __ffs(int x) { return x == 0 ? 0 : 1 + std::countr_zero(static_cast<unsigned>(x)); }
using std::max;
using std::min;
