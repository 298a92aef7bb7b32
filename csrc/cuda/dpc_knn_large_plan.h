// What dpc_knn of many tokens (dpc_knn_large.h) decides on the host, and where its arrays are.
#pragma once
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "dpc_knn_common.h"
#include "dpc_knn_large_tiles.h"
#include "launch.h"

namespace hotkernels::dpc::large {

constexpr int kUsualList = 16;          // neighbours in a list that is kept in registers while it is filled
constexpr int kQueue = 15;              // candidates of a token that can wait to be inserted into its list
constexpr int kMaxSplits = 16;          // splits of the columns, each with lists of its own
constexpr int kListTiles = 1;           // what filling a list costs, in tiles (an estimate)
constexpr double kWorthSplits = 0.97;   // further splits must bring the time below this share of the best so far
constexpr int kLeastShared = 99 << 10;  // bytes that a block can have on every chip from sm_80 on
constexpr int kSortThreads = 1024;      // of blocks that work on a whole sample

// Shared memory of a block that fills lists (Lists).
constexpr int lists_bytes(int list) { return kTileBytes + (list + kQueue) * kTile * 8 + kTile * 8 + 16; }
static_assert(lists_bytes(kUsualList) <= kLeastShared, "chips with 99 KB fill the usual list in registers, too");

struct Tuning {
  int list_min = kUsualList;  // neighbours kept per token: fewer leave more tokens to the other passes
  int list_max = 64;          // if k asks for more, the k-th distance is found bit by bit instead
  int blocks = 0;             // assumed to run at once; 0: as many as fit the GPU
};
#ifdef HK_EMULATION
inline Tuning tuning;  // tests reach with few tokens what otherwise takes many
extern "C" __attribute__((visibility("default"), used)) inline void hk_dpc_knn_tune(int list_min, int list_max,
                                                                                    int blocks) {
  tuning = {list_min, list_max, blocks};
}
#else
constexpr Tuning tuning;
#endif

// What the kernels get. Shapes are per sample; T is N rounded up to whole tiles.
struct Plan {
  DpcKnn p;
  int64_t T;
  int blocks, chunks;            // T / kTile, C / kChunk rounded up
  int list, splits;              // neighbours per list; splits of the columns, merged into one list by density_kernel
  int workers;                   // blocks of the second and third pass
  bool listed;                   // the list holds k neighbours
  bool packed;                   // x can be read 16 bytes at a time
  uint8_t* valid;                // [N]
  int32_t* position;             // [T] where in the sample a token stands
  int32_t* token_at;             // [N] the inverse, -1 = invalid
  int32_t* count;                // n
  unsigned* spread;              // largest distance of a coordinate from the pivot, as bits
  unsigned* farthest;            // largest squared distance, as bits
  int32_t* pending_count;        // [2] of delta, of assignment
  int32_t* pending;              // [T] tokens that their list has no answer for
  float* pivot;                  // [chunks * kChunk], 0 beyond the last channel
  uint16_t* value;               // [blocks, chunks, kTile, kChunk] the tokens as Tokens has them
  float* norm;                   // [T]
  uint64_t* lists;               // [splits, blocks, list, kTile] squared distance and token, ascending
  uint64_t* merged;              // [blocks, list, kTile]
  float* r;                      // [T] mean of the k smallest squared distances
  DensityKey* order;             // [T]
  unsigned* delta2;              // [T] squared distance to the nearest denser token, as bits
  uint64_t* score;               // [T]
  int32_t* kept_by;              // [T] which entry of `keep` keeps a token, or INT_MAX
  uint64_t* chosen_score;        // [M] of the best, in the order of `chosen`
  int32_t* chosen;               // [M] the best by position, then those of `keep`
  int32_t* chosen_count;         // [2] how many are the best, how many in all
  int32_t* kept;                 // [M] the chosen, in the order of `index`
  int32_t* slot;                 // [T] place in `index`, or -1
  unsigned long long* nearest;   // [T] squared distance to the nearest kept token, and its place

  __device__ Tokens tokens(int64_t b) const { return {value + b * blocks * chunks * kPanel, norm + b * T, chunks}; }
};

// The power of two that brings a sample's largest centred coordinate to [2^14, 2^15), so that float16 costs nothing but
// the bits after the 11th; and its inverse.
struct Scale {
  float scale, inverse;
};
__device__ inline Scale scale_of(const Plan& s, int64_t b) {
  const int exponent = min(126, 141 - static_cast<int>(s.spread[b] >> 23));
  return {__uint_as_float(static_cast<unsigned>(127 + exponent) << 23),
          __uint_as_float(static_cast<unsigned>(127 - exponent) << 23)};
}

// The token of a thread, in kernels with a thread per token: block x of the grid is block x % blocks of sample
// x / blocks.
struct Token {
  int64_t b;
  int block, row;
  int64_t at;  // in arrays [B, T]
  bool there;
};
__device__ inline Token this_token(const Plan& s) {
  Token t;
  t.b = blockIdx.x / s.blocks, t.block = static_cast<int>(blockIdx.x % s.blocks), t.row = static_cast<int>(threadIdx.x);
  t.at = t.b * s.T + t.block * kTile + t.row;
  t.there = t.block * kTile + t.row < s.count[t.b];
  return t;
}

// Chooses lists and splits, and lays the arrays out from an address on; from address 0 it only counts their bytes.
inline Plan make_plan(const DpcKnn& p, void* scratch, int64_t* bytes) {
  const int64_t B = p.B;
  Plan s{};
  s.p = p;
  s.blocks = static_cast<int>((p.N + kTile - 1) / kTile), s.T = int64_t{s.blocks} * kTile;
  s.chunks = static_cast<int>((p.C + kChunk - 1) / kChunk);
  const int shared = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, kLeastShared);
  const int fit = (shared - lists_bytes(0)) / (lists_bytes(1) - lists_bytes(0));
  s.listed = p.k - 1 <= std::min(fit, tuning.list_max);
  s.list = std::min(fit, s.listed ? std::max(tuning.list_min, static_cast<int>(p.k - 1)) : tuning.list_min);
  s.workers = tuning.blocks ? tuning.blocks : 2 * device_attribute(cudaDevAttrMultiProcessorCount, 1);
  // As many splits as leave the fewest blocks idle in the last round; each has lists of its own to fill, which take
  // memory.
  double least = HUGE_VAL;
  for (int splits = 1; splits <= std::min(s.blocks, kMaxSplits); ++splits) {
    const int64_t rounds = (B * s.blocks * splits + s.workers - 1) / s.workers;
    const double time = static_cast<double>(rounds) * (s.blocks + kListTiles * splits) / splits;
    if (time < kWorthSplits * least) least = time, s.splits = splits;
  }
  const int64_t item = p.dtype == DType::f32 ? 4 : 2;
  s.packed = p.x_stride_c == 1 && p.C % 8 == 0 && reinterpret_cast<uintptr_t>(p.x) % 16 == 0 &&
             p.x_stride_n * item % 16 == 0 && p.x_stride_b * item % 16 == 0;

  uintptr_t next = reinterpret_cast<uintptr_t>(scratch);
  const auto take = [&](auto*& array, int64_t count) {
    array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(next);
    next += static_cast<uintptr_t>((count * static_cast<int64_t>(sizeof(*array)) + 255) / 256 * 256);
  };
  take(s.valid, B * p.N), take(s.position, B * s.T), take(s.token_at, B * p.N), take(s.count, B), take(s.spread, B);
  take(s.farthest, B), take(s.pending_count, B * 2), take(s.pending, B * s.T);
  take(s.pivot, B * s.chunks * kChunk);
  take(s.value, B * s.T * s.chunks * kChunk), take(s.norm, B * s.T);
  take(s.lists, B * s.splits * s.T * s.list);
  if (s.splits > 1) take(s.merged, B * s.T * s.list); else s.merged = s.lists;
  take(s.r, B * s.T), take(s.order, B * s.T), take(s.delta2, B * s.T), take(s.score, B * s.T), take(s.kept_by, B * s.T);
  take(s.chosen_score, B * p.M), take(s.chosen, B * p.M), take(s.chosen_count, B * 2), take(s.kept, B * p.M);
  take(s.slot, B * s.T), take(s.nearest, B * s.T);
  *bytes = static_cast<int64_t>(next - reinterpret_cast<uintptr_t>(scratch));
  return s;
}

}  // namespace hotkernels::dpc::large
