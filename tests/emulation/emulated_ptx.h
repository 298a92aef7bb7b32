// csrc/cuda/ptx.h on the host.
#pragma once
#include <cstdint>

#include "cuda_runtime.h"

namespace hotkernels::ptx {

inline unsigned char* shared_memory() { return hk_emulation::shared_memory(); }

inline float max_or_nan(float a, float b) { return std::isnan(a) || std::isnan(b) ? a + b : std::max(a, b); }

inline uint32_t pack_half(float low, float high) {
  const auto bits = [](float x) { return std::bit_cast<uint16_t>(static_cast<_Float16>(x)); };
  return uint32_t{bits(high)} << 16 | bits(low);
}

inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Operands {
    float* d;
    uint32_t a[4], b[2];
  } mine{d, {a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  hk_emulation::warp_instruction(~0u, &mine, [](void* const(&payload)[32], unsigned) {
    float left[16][16], right[16][8];
    for (int l = 0; l < 32; ++l) {
      const auto& o = *static_cast<Operands*>(payload[l]);
      for (int i = 0; i < 8; ++i) {
        const int shift = 16 * (i % 2);
        const auto half = [=](uint32_t pair) { return std::bit_cast<_Float16>(static_cast<uint16_t>(pair >> shift)); };
        const int k = 2 * (l % 4) + i % 2 + 8 * (i / 4), row = l / 4 + 8 * (i / 2 % 2);
        left[row][k] = half(o.a[i / 2]);
        if (i < 4) right[2 * (l % 4) + i % 2 + 8 * (i / 2)][l / 4] = half(o.b[i / 2]);
      }
    }
    for (int l = 0; l < 32; ++l) {
      float* d = static_cast<Operands*>(payload[l])->d;
      for (int i = 0; i < 4; ++i) {
        const int row = l / 4 + 8 * (i / 2), column = 2 * (l % 4) + i % 2;
        for (int k = 0; k < 16; ++k) d[i] += left[row][k] * right[k][column];
      }
    }
  });
}

inline void load_matrices(uint32_t (&registers)[4], const void* row) {
  struct Operands {
    uint32_t* registers;
    const unsigned char* row;
  } mine{registers, static_cast<const unsigned char*>(row)};
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) hk_emulation::fail("load_matrices takes rows aligned to 16 bytes");
  hk_emulation::warp_instruction(~0u, &mine, [](void* const(&payload)[32], unsigned) {
    for (int l = 0; l < 32; ++l) {
      for (int m = 0; m < 4; ++m) {
        const unsigned char* from = static_cast<Operands*>(payload[8 * m + l / 4])->row + l % 4 * 4;
        std::memcpy(&static_cast<Operands*>(payload[l])->registers[m], from, 4);
      }
    }
  });
}

inline void async_copy_part(void* shared, const void* global, int valid) {
  hk_emulation::copy_later(shared, global, 16, valid);
}
inline void async_copy(void* shared, const void* global) { async_copy_part(shared, global, 16); }
inline void async_commit() { hk_emulation::commit_copies(); }
template <int kPending>
inline void async_wait() {
  hk_emulation::wait_for_copies(kPending);
}

inline void prefetch(const void*) {}

inline uint32_t cluster_rank() { return hk_emulation::cluster_rank(); }
inline void cluster_sync() { hk_emulation::cluster_barrier(); }
inline void cluster_arrive() {}
inline void cluster_wait() { hk_emulation::cluster_barrier(); }
template <class T>
inline T* in_block(T* shared, uint32_t rank) {
  return reinterpret_cast<T*>(hk_emulation::shared_memory_of(shared, rank));
}

inline hk_emulation::Barrier* as_barrier(uint64_t* barrier) {
  static_assert(sizeof(hk_emulation::Barrier) == sizeof(uint64_t));
  return reinterpret_cast<hk_emulation::Barrier*>(barrier);
}
inline void barrier_init(uint64_t* barrier, uint32_t count) { hk_emulation::barrier_init(as_barrier(barrier), count); }
inline void barrier_arrive(uint64_t* barrier, int expected_bytes = 0) {
  hk_emulation::barrier_arrive(as_barrier(barrier), expected_bytes);
}
inline void barrier_arrive_in(uint32_t rank, uint64_t* barrier) { barrier_arrive(in_block(barrier, rank)); }
inline void barrier_wait(uint64_t* barrier, int parity) { hk_emulation::barrier_wait(as_barrier(barrier), parity); }
template <class T>
void store_async(T* shared, T value, uint64_t* barrier, uint32_t rank) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  hk_emulation::store_later(shared, &value, sizeof(T), as_barrier(barrier), rank);
}

}  // namespace hotkernels::ptx
