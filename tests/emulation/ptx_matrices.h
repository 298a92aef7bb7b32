// PTX's products of matrices, of a warp and of a warp group, and their loads and stores.
#pragma once
#include <concepts>
#include <cstdint>
#include <cstring>

#include "ptx_memory.h"
#include "ptx_warps.h"

namespace ptx {

// With g = lane / 4 and t = lane % 4, an 8 x 8 matrix of 16-bit numbers has (g, 2t) and
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
