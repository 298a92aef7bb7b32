// Squared distances of many tokens, 128 x 128 at a time on tensor cores: how tokens lie in memory, the loop over tiles.
//
// Tokens are centred, scaled by a power of two and rounded to float16: 11 bits, as TF32 has, at half the bytes and
// twice the rate. Norms are those of the rounded tokens, summed by the same instruction in the same order as the
// products, so a squared distance (|x_i|^2 + |x_j|^2) - 2 <x_i, x_j> is the same bits both ways and exactly 0 between
// copies.
#pragma once
#include <cstdint>

#include "dpc_knn_common.h"
#include "ptx.h"

namespace hotkernels::dpc::large {

constexpr int kTile = 128;              // tokens per side of a tile
constexpr int kThreads = 128;           // 2 x 2 warps
constexpr int kWarpTile = 64;           // each with 64 x 64 distances in registers
constexpr int kChunk = 32;              // channels per step: four parts of 16 bytes per token
constexpr int kTokenBytes = kChunk * 2;
constexpr int kPanel = kTile * kChunk;  // float16 numbers of 128 tokens in one step; they lie together in global memory
constexpr int kPanelBytes = kPanel * 2;
constexpr int kStages = 4;              // steps in shared memory: one in use, three on their way
constexpr int kCopies = kPanelBytes / 16 / kThreads;  // 16-byte copies per thread, step and side
constexpr int kTileBytes = kStages * (2 * kPanelBytes + kTile * 4) + kTile * 4;  // shared memory of for_each_tile
static_assert(kTile == kThreads);  // each thread also has one token of the block

// Squared distances of a warp, in the layout of the tensor core: see row_of and column_of.
using Accumulators = float[kWarpTile / 16][kWarpTile / 8][4];

// The row of accumulators [i][...][2 * half + ...], and the column of [...][j][... + e].
__device__ inline int row_of(int i, int half) { return warp_id() / 2 * kWarpTile + i * 16 + half * 8 + lane_id() / 4; }
__device__ inline int column_of(int j, int e) { return warp_id() % 2 * kWarpTile + j * 8 + lane_id() % 4 * 2 + e; }

// The norm of a token that is not there: its distances are NaN too, neither smaller nor larger than any.
__device__ inline float quiet_nan() { return __uint_as_float(0x7fffffffu); }

// The tokens of one sample. After the last one, tokens are 0 and their norms NaN.
struct Tokens {
  const uint16_t* value;  // [blocks, chunks, kTile, kChunk], the parts of a token where swizzled_offset says
  const float* norm;      // [blocks * kTile]
  int chunks;
};

// One side of the tiles: all tokens, or those that `ids` names.
struct Side {
  const int32_t* ids;  // null: all tokens, and `count` is not read
  int count;           // how many there are
};

// The tensor core's left operand: 16 tokens from `tokens` (bytes of a panel, a multiple of 8 tokens), 16 channels.
__device__ inline void read_rows(uint32_t (&a)[4], const unsigned char* tokens, int step) {
  ptx::load_matrices(a, tokens + swizzled_offset<kChunk>(lane_id() % 16, 2 * step + lane_id() / 16));
}
// The right operand for these tokens and for the eight after them: b[0], b[1] and b[2], b[3].
__device__ inline void read_columns(uint32_t (&b)[4], const unsigned char* tokens, int step) {
  const int token = lane_id() % 8 + lane_id() / 16 * 8, part = 2 * step + lane_id() / 8 % 2;
  ptx::load_matrices(b, tokens + swizzled_offset<kChunk>(token, part));
}

// d += the products of 32 channels of the block's rows with those of its columns.
__device__ inline void multiply_chunk(Accumulators& d, const unsigned char* rows, const unsigned char* columns) {
  rows += warp_id() / 2 * kWarpTile * kTokenBytes;
  columns += warp_id() % 2 * kWarpTile * kTokenBytes;
#pragma unroll
  for (int step = 0; step < kChunk / 16; ++step) {
    uint32_t a[kWarpTile / 16][4];
#pragma unroll
    for (int i = 0; i < kWarpTile / 16; ++i) read_rows(a[i], rows + i * 16 * kTokenBytes, step);
#pragma unroll
    for (int j = 0; j < kWarpTile / 8; j += 2) {
      uint32_t b[4];
      read_columns(b, columns + j * 8 * kTokenBytes, step);
#pragma unroll
      for (int i = 0; i < kWarpTile / 16; ++i) {
        ptx::mma_m16n8k16(d[i][j], a[i], {b[0], b[1]});
        ptx::mma_m16n8k16(d[i][j + 1], a[i], {b[2], b[3]});
      }
    }
  }
}

// The squared norms of 16 tokens by the same instructions in the same order: the diagonal of their products with
// themselves, in d[0] of the first eight, in d[1] of the others. `tokens` is in shared memory; d starts at 0.
__device__ inline void add_norms(float (&d)[2][4], const unsigned char* tokens) {
#pragma unroll
  for (int step = 0; step < kChunk / 16; ++step) {
    uint32_t a[4];
    read_rows(a, tokens, step);
    ptx::mma_m16n8k16(d[0], a, {a[0], a[2]});
    ptx::mma_m16n8k16(d[1], a, {a[1], a[3]});
  }
}

// Calls epilogue(tile, d) for `tiles` tiles of squared distances, one after another: between block `row_block` of the
// row side and block tile = tile_at(0), tile_at(1), ... of the column side. NaN where either token is not there. For
// all threads of the block; shared memory is free again after the next barrier.
template <bool kGatherRows, bool kGatherColumns, class TileAt, class Epilogue>
__device__ void for_each_tile(const Tokens& s, Side rows, int row_block, Side columns, int tiles, const TileAt& tile_at,
                              const Epilogue& epilogue) {
  unsigned char* const panels = ptx::shared_memory();
  float* const column_norms = reinterpret_cast<float*>(panels + kStages * 2 * kPanelBytes);  // [kStages, kTile]
  float* const row_norms = column_norms + kStages * kTile;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t stride = int64_t{s.chunks} * kPanel;  // from one block of tokens to the next

  // What this thread copies: 16 bytes of token thread / 4 + 32 i of a panel, i = 0 .. kCopies-1. A gathered token has
  // another place in its panel than in memory, so its parts are swizzled anew.
  const auto id_of = [](const Side& side, int row) { return row < side.count ? side.ids[row] : -1; };
  const auto find = [&](const Side& side, int block, const uint16_t* (&from)[kCopies]) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int row = thread / 4 + 32 * i, id = id_of(side, block * kTile + row), part = thread % 4 ^ (row / 2 % 4);
      from[i] = id < 0 ? nullptr : s.value + id / kTile * stride + swizzled_offset<kChunk>(id % kTile, part) / 2;
    }
  };
  const auto copy = [&](unsigned char* to, const uint16_t* block, int chunk) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int at = (thread + i * kThreads) * 8;
      ptx::async_copy(to + at * 2, block + int64_t{chunk} * kPanel + at);
    }
  };
  const auto copy_found = [&](unsigned char* to, const uint16_t* const(&from)[kCopies], int chunk) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const uint16_t* token = from[i] ? from[i] + int64_t{chunk} * kPanel : s.value;
      ptx::async_copy_part(to + (thread + i * kThreads) * 16, token, from[i] ? 16 : 0);
    }
  };
  const uint16_t *row_from[kCopies], *column_from[kCopies];

  __syncthreads();  // shared memory may have been in use
  if constexpr (kGatherRows) {
    find(rows, row_block, row_from);
    const int id = id_of(rows, row_block * kTile + thread);
    row_norms[thread] = id < 0 ? quiet_nan() : s.norm[id];
  } else {
    row_norms[thread] = s.norm[row_block * kTile + thread];
  }

  const bool rows_stay = kStages % s.chunks == 0;  // every stage has the same of their chunks each time
  int next = 0, next_chunk = 0;                    // what is to be loaded next
  const auto load = [&](int stage) {
    if (next < tiles) {
      unsigned char* to = panels + stage * 2 * kPanelBytes;
      const int tile = tile_at(next);
      if (!rows_stay || next * s.chunks + next_chunk < kStages) {
        if constexpr (kGatherRows) {
          copy_found(to, row_from, next_chunk);
        } else {
          copy(to, s.value + row_block * stride, next_chunk);
        }
      }
      float* norms = column_norms + next % kStages * kTile;
      if constexpr (kGatherColumns) {
        if (next_chunk == 0) {
          find(columns, tile, column_from);
          const int id = id_of(columns, tile * kTile + thread);
          norms[thread] = id < 0 ? quiet_nan() : s.norm[id];
        }
        copy_found(to + kPanelBytes, column_from, next_chunk);
      } else {
        if (next_chunk == 0 && thread < kTile / 4) {
          ptx::async_copy(norms + thread * 4, s.norm + tile * kTile + thread * 4);
        }
        copy(to + kPanelBytes, s.value + tile * stride, next_chunk);
      }
      if (++next_chunk == s.chunks) next_chunk = 0, ++next;
    }
    ptx::async_commit();  // even if empty: one group per step
  };

#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) load(stage);
  int stage = 0;
  for (int u = 0; u < tiles; ++u) {
    Accumulators d{};
    for (int chunk = 0; chunk < s.chunks; ++chunk) {
      ptx::async_wait<kStages - 2>();
      __syncthreads();  // this step is there for all, and all are done with the one before: its memory is loaded again
      load((stage + kStages - 1) % kStages);
      const unsigned char* panel = panels + stage * 2 * kPanelBytes;
      multiply_chunk(d, panel, panel + kPanelBytes);
      stage = (stage + 1) % kStages;
    }
    const float* norms = column_norms + u % kStages * kTile;
#pragma unroll
    for (int i = 0; i < kWarpTile / 16; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float row_norm = row_norms[row_of(i, half)];
#pragma unroll
        for (int j = 0; j < kWarpTile / 8; ++j) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& value = d[i][j][2 * half + e];
            value = fmaf(-2.0f, value, row_norm + norms[column_of(j, e)]);
          }
        }
      }
    }
    epilogue(tile_at(u), d);
  }
}

}  // namespace hotkernels::dpc::large
