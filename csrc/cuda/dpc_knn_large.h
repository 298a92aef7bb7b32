// DPC-kNN of samples with many tokens: up to three passes of tensor-core tiles, and no N x N anywhere.
//
// The valid tokens of a sample are numbered 0 .. n-1. In the first pass a block of 128 tokens meets all others, and
// each token keeps a sorted list of its nearest. As csrc/cpu/dpc_knn.cpp explains, the list answers density, delta and
// assignment exactly for most tokens; the others are gathered and meet all tokens (delta) or the kept (assignment).
//
// Threads race where lists are filled and where tokens are gathered. Neither race decides anything: a list ends up with
// the same distances whoever came first; of several equally far tokens at its end either may stay, because no answer
// relies on them; and a gathered token's answer is a minimum, whoever its neighbours in the block are.
#pragma once
#include <algorithm>
#include <climits>
#include <cmath>
#include <type_traits>

#include "block_sort.h"
#include "dpc_knn_order.h"
#include "dpc_knn_tiles.h"
#include "launch.h"

namespace hotkernels::dpc::large {

constexpr int kQueue = 15;           // candidates of a token that may wait for a place in its list
constexpr int kGroup = 2;            // tiles of one piece of work of the second and third pass
constexpr int kMaxSplits = 16;       // shares of the columns that are listed by themselves
constexpr int kListTiles = 1;        // what filling a list costs, in tiles (an estimate)
constexpr double kWorthSplits = 0.97;    // more of them must take no more of the time with fewer
constexpr int kLeastShared = 99 << 10;   // bytes that a block can have on every chip from sm_80 on
constexpr int kSortThreads = 1024;   // of the blocks that look after all tokens of a sample
constexpr int kPlaceRows = 32;       // chosen tokens whose places one block finds
constexpr uint64_t kNobody = uint64_t{0x7f800000} << 32 | 0xffffffff;  // an empty place in a list: infinitely far

constexpr int kUsualList = 16;       // neighbours of a list that is filled in registers

struct Tuning {
  int list_min = kUsualList;  // neighbours kept per token: fewer leave more tokens to the other passes
  int list_max = 64;          // if k asks for more, the k-th distance is found bit by bit instead
  int blocks = 0;             // that should be at work at once; 0: as many as fit the GPU
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

// All that the kernels are told. Arrays are per sample; T is N rounded up to whole tiles.
struct Large {
  DpcKnn p;
  int64_t T;
  int blocks, chunks;            // T / kTile, C / kChunk rounded up
  int list, splits;              // neighbours per list, lists per token while they are made
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
  uint64_t* chosen_score;        // [M] the best by position, then those of `keep`
  int32_t* chosen;               // [M]
  int32_t* chosen_count;         // [2] the best, all
  int32_t* kept;                 // [M] the chosen, in the order of `index`
  int32_t* slot;                 // [T] place in `index`, or -1
  unsigned long long* nearest;   // [T] squared distance to the nearest kept token, and its place

  __device__ Tokens tokens(int64_t b) const { return {value + b * blocks * chunks * kPanel, norm + b * T, chunks}; }
};

// ---- 1. which tokens count, the pivot, the copy that the tiles read ------------------------------------------------

// A warp per token; what an invalid one answers is known at once.
template <class T>
__global__ void __launch_bounds__(256) valid_kernel(const Large s) {
  const DpcKnn& p = s.p;
  const int64_t at = int64_t{blockIdx.x} * (256 / kWarp) + warp_id();
  if (at >= p.B * p.N) return;
  bool there = in_mask(p, at);
  if (there) {
    const T* x = static_cast<const T*>(p.x) + at / p.N * p.x_stride_b + at % p.N * p.x_stride_n;
    float square = 0;
#pragma unroll 4
    for (int64_t c = lane_id(); c < p.C; c += kWarp) {
      const float v = get(x[c * p.x_stride_c]);
      square += v * v;
    }
    there = warp_sum(square) <= kNormLimit;
  }
  if (lane_id() != 0) return;
  s.valid[at] = there;
  if (there) return;
  p.density[at] = p.delta[at] = p.score[at] = 0;
  if (p.assign) p.assignment[at] = -1;
}

// Numbers the valid tokens, a block per sample.
__global__ void __launch_bounds__(kSortThreads) number_kernel(const Large s) {
  int* sums = reinterpret_cast<int*>(ptx::shared_memory());
  const int64_t b = blockIdx.x, N = s.p.N, share = (N + kSortThreads - 1) / kSortThreads;
  const int64_t begin = min(N, threadIdx.x * share), end = min(N, begin + share);
  const uint8_t* valid = s.valid + b * N;
  int n = 0;
  for (int64_t i = begin; i < end; ++i) n += valid[i];
  const Scan scan = scan_block(n, sums);
  int token = scan.before;
  for (int64_t i = begin; i < end; ++i) {
    s.token_at[b * N + i] = valid[i] ? token : -1;
    if (valid[i]) s.position[b * s.T + token++] = static_cast<int32_t>(i);
  }
  if (threadIdx.x > 0) return;
  s.count[b] = scan.total;
  s.spread[b] = s.farthest[b] = 0;
  s.pending_count[2 * b] = s.pending_count[2 * b + 1] = 0;
}

// The pivot and how far 128 tokens are from it, a thread per channel.
template <class T>
__global__ void __launch_bounds__(kThreads) pivot_kernel(const Large s, int slices) {
  const DpcKnn& p = s.p;
  const int64_t c = int64_t{blockIdx.x % slices} * kThreads + threadIdx.x, block = blockIdx.x / slices % s.blocks;
  const int64_t b = blockIdx.x / slices / s.blocks;
  const int n = s.count[b], begin = static_cast<int>(block) * kTile, end = min(n, begin + kTile);
  if (begin >= end) return;
  float pivot = 0, spread = 0;
  if (c < p.C) {
    const T* x = static_cast<const T*>(p.x) + b * p.x_stride_b + c * p.x_stride_c;
    const int32_t* position = s.position + b * s.T;
    const auto value = [&](int i) { return get(x[position[i] * p.x_stride_n]); };
    pivot = median(value(pivot_token(n, 0)), value(pivot_token(n, 1)), value(pivot_token(n, 2)));
#pragma unroll 8
    for (int i = begin; i < end; ++i) spread = fmaxf(spread, fabsf(value(i) - pivot));
  }
  if (block == 0 && c < int64_t{s.chunks} * kChunk) s.pivot[b * s.chunks * kChunk + c] = pivot;
  spread = warp_max_of_nonnegative(spread);
  if (lane_id() == 0) atomicMax(&s.spread[b], __float_as_uint(spread));
}

// The power of two that brings a sample's largest coordinate to [2^14, 2^15), so that float16 loses nothing but bits 12
// and on; `inverse` takes it back.
struct Scale {
  float scale, inverse;
};
__device__ inline Scale scale_of(const Large& s, int64_t b) {
  const int exponent = min(126, 141 - static_cast<int>(s.spread[b] >> 23));
  return {__uint_as_float(static_cast<unsigned>(127 + exponent) << 23),
          __uint_as_float(static_cast<unsigned>(127 - exponent) << 23)};
}

// v = channels c .. c+7 of a token, 0 beyond the last.
template <class T>
__device__ void read_8(const T* x, const Large& s, int64_t c, float (&v)[8]) {
  if (s.packed) {
    constexpr int V = kPackBytes / sizeof(T);
#pragma unroll
    for (int i = 0; i < 8; i += V) {
      const auto pack = c < s.p.C ? *reinterpret_cast<const Pack<T, V>*>(x + c + i) : Pack<T, V>{};
#pragma unroll
      for (int e = 0; e < V; ++e) v[i + e] = get(pack.value[e]);
    }
  } else {
#pragma unroll
    for (int e = 0; e < 8; ++e) v[e] = c + e < s.p.C ? get(x[(c + e) * s.p.x_stride_c]) : 0.0f;
  }
}

// Centres and rounds tokens, 16 per warp: lanes 4 g .. 4 g+3 have tokens g and g+8, eight channels each.
template <class T>
__global__ void __launch_bounds__(kThreads) centre_kernel(const Large s) {
  unsigned char* const shared = ptx::shared_memory() + warp_id() * 16 * kTokenBytes;
  const DpcKnn& p = s.p;
  const int64_t b = blockIdx.x / (s.blocks * 2), first = blockIdx.x % (s.blocks * 2) * 64 + warp_id() * 16;
  const int n = s.count[b];
  if (first / kTile * kTile >= n) return;  // no tile will read it
  const float scale = scale_of(s, b).scale;
  const T* x = static_cast<const T*>(p.x) + b * p.x_stride_b;
  const float* pivot = s.pivot + b * s.chunks * kChunk;
  const int row = lane_id() / 4, part = lane_id() % 4;
  uint16_t* value = s.value + (b * s.blocks + first / kTile) * s.chunks * kPanel + first % kTile * kChunk;
  const T* token[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t i = first + row + 8 * half;
    token[half] = i < n ? x + s.position[b * s.T + i] * p.x_stride_n : nullptr;
  }
  float norm[2][4] = {};
  for (int chunk = 0; chunk < s.chunks; ++chunk, value += kPanel) {
    const int64_t c = int64_t{chunk} * kChunk + part * 8;
    float centre[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) centre[e] = pivot[c + e];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint4 rounded{};
      if (token[half]) {
        float v[8];
        read_8(token[half], s, c, v);
#pragma unroll
        for (int e = 0; e < 8; ++e) v[e] = (v[e] - centre[e]) * scale;
        rounded = make_uint4(ptx::pack_half(v[0], v[1]), ptx::pack_half(v[2], v[3]), ptx::pack_half(v[4], v[5]),
                             ptx::pack_half(v[6], v[7]));
      }
      const int offset = offset_of(row + 8 * half, part);
      *reinterpret_cast<uint4*>(shared + offset) = rounded;
      *reinterpret_cast<uint4*>(value + offset / 2) = rounded;
    }
    __syncwarp();
    add_norms(norm, shared);
    __syncwarp();
  }
  if (row / 2 != part) return;  // the diagonal
  float* norms = s.norm + b * s.T + first + row;
  norms[0] = token[0] ? row % 2 ? norm[0][1] : norm[0][0] : no_number();
  norms[8] = token[1] ? row % 2 ? norm[1][3] : norm[1][2] : no_number();
}

// ---- 2. the nearest of every token ---------------------------------------------------------------------------------

__device__ inline uint64_t entry(float d, int id) {  // ascending by distance, then id
  return uint64_t{__float_as_uint(fmaxf(d, 0.0f))} << 32 | static_cast<unsigned>(id);
}
__device__ inline float distance_of(uint64_t entry) { return __uint_as_float(static_cast<unsigned>(entry >> 32)); }
__device__ inline int token_of(uint64_t entry) { return static_cast<int>(static_cast<unsigned>(entry)); }

// Calls body(row, column, value) for all distances of a tile; row and column count from the tile's corner.
template <class Body>
__device__ inline void each_distance(Accumulators& d, const Body& body) {
#pragma unroll
  for (int i = 0; i < kWarpTile / 16; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int j = 0; j < kWarpTile / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) body(row_of(i, half), column_of(j, e), d[i][j][2 * half + e]);
      }
    }
  }
}

struct Lists {  // in shared memory, one column per token of the block
  uint64_t* list;   // [list, kTile]
  uint64_t* queue;  // [kQueue, kTile]
  float* worst;     // [kTile] the end of each list
  int* waiting;     // [kTile] candidates in each queue, or more: those found no room
  int* full;        // [2] whether any found no room, by turns
};
constexpr int lists_bytes(int list) { return kTileBytes + (list + kQueue) * kTile * 8 + kTile * 8 + 16; }
static_assert(lists_bytes(kUsualList) <= kLeastShared, "chips with 99 KB fill the usual list in registers, too");

// Takes the waiting candidates of this thread's token into its list: one of kLength entries in registers, or, if that
// is 0, one of any length where it lies. For whole warps.
template <int kLength>
__device__ inline void take_in(const Lists& lists, int length) {
  const int row = static_cast<int>(threadIdx.x), waiting = min(lists.waiting[row], kQueue);
  const int most = __reduce_max_sync(kAllLanes, waiting);
  if (most == 0) return;
  uint64_t* list = lists.list + row;
  if constexpr (kLength > 0) {
    uint64_t held[kLength];
#pragma unroll
    for (int e = 0; e < kLength; ++e) held[e] = list[e * kTile];
    for (int q = 0; q < most; ++q) {
      const uint64_t candidate = q < waiting ? lists.queue[q * kTile + row] : kNobody;
#pragma unroll
      for (int e = kLength - 1; e > 0; --e) held[e] = candidate < held[e - 1] ? held[e - 1] : min(candidate, held[e]);
      held[0] = min(candidate, held[0]);
    }
#pragma unroll
    for (int e = 0; e < kLength; ++e) list[e * kTile] = held[e];
  } else {
    for (int q = 0; q < waiting; ++q) {
      const uint64_t candidate = lists.queue[q * kTile + row];
      int e = length - 1;
      if (candidate >= list[e * kTile]) continue;
      for (; e > 0; --e) {
        const uint64_t before = list[(e - 1) * kTile];
        if (before <= candidate) break;
        list[e * kTile] = before;
      }
      list[e * kTile] = candidate;
    }
  }
  lists.waiting[row] = 0;
  lists.worst[row] = distance_of(list[(length - 1) * kTile]);
}

// A block of 128 tokens against a share of all: its own block first, since tokens are often ordered in time or space
// and lists that begin with near ones take in little later, then all blocks of tokens in the same order.
template <int kLength>
__global__ void __launch_bounds__(kThreads, 2) neighbours_kernel(const Large s) {
  const int64_t b = blockIdx.x / s.blocks;
  const int block = static_cast<int>(blockIdx.x % s.blocks), split = static_cast<int>(blockIdx.y);
  const int blocks = (s.count[b] + kTile - 1) / kTile, row = static_cast<int>(threadIdx.x);
  if (block >= blocks) return;
  unsigned char* shared = ptx::shared_memory() + kTileBytes;
  Lists lists;
  lists.list = reinterpret_cast<uint64_t*>(shared), lists.queue = lists.list + (kLength > 0 ? kLength : s.list) * kTile;
  lists.worst = reinterpret_cast<float*>(lists.queue + kQueue * kTile);
  lists.waiting = reinterpret_cast<int*>(lists.worst + kTile), lists.full = lists.waiting + kTile;
  for (int e = 0; e < s.list; ++e) lists.list[e * kTile + row] = kNobody;
  lists.worst[row] = kInf, lists.waiting[row] = 0;
  if (row < 2) lists.full[row] = 0;

  const int begin = static_cast<int>(int64_t{blocks} * split / s.splits);
  const int end = static_cast<int>(int64_t{blocks} * (split + 1) / s.splits);
  const bool own = begin <= block && block < end;
  const auto tile_at = [&](int u) {
    if (!own) return begin + u;
    return u == 0 ? block : begin + u - (begin + u <= block);
  };
  float farthest = 0;
  int turn = 0;
  for_each_tile<false, false>(s.tokens(b), {}, block, {}, end - begin, tile_at, [&](int tile, Accumulators& d) {
    if (tile == block) {
      each_distance(d, [](int row, int column, float& value) { value = row == column ? no_number() : value; });
    }
    each_distance(d, [&](int, int, float value) { farthest = fmaxf(farthest, value); });
    for (;; ++turn) {
      bool left_over = false;
      if (row == 0) lists.full[(turn + 1) % 2] = 0;
#pragma unroll
      for (int i = 0; i < kWarpTile / 16; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int to = row_of(i, half);
          const float worst = lists.worst[to];
          int mine = 0;
#pragma unroll
          for (int j = 0; j < kWarpTile / 8; ++j) {
#pragma unroll
            for (int e = 0; e < 2; ++e) mine += d[i][j][2 * half + e] < worst;
          }
          if (mine == 0) continue;
          int place = atomicAdd(&lists.waiting[to], mine);
#pragma unroll
          for (int j = 0; j < kWarpTile / 8; ++j) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              float& value = d[i][j][2 * half + e];
              if (!(value < worst)) continue;
              if (place < kQueue) {
                lists.queue[place * kTile + to] = entry(value, tile * kTile + column_of(j, e));
                value = no_number();
              } else {
                left_over = true;
              }
              ++place;
            }
          }
        }
      }
      if (left_over) lists.full[turn % 2] = 1;
      __syncthreads();  // all candidates wait in their queues
      const bool again = lists.full[turn % 2];
      take_in<kLength>(lists, s.list);
      if (!again) break;
      __syncthreads();  // all lists are up to date
    }
    ++turn;  // for_each_tile has a barrier before the next tile
  });
  farthest = warp_max_of_nonnegative(farthest);
  if (lane_id() == 0) atomicMax(&s.farthest[b], __float_as_uint(farthest));
  uint64_t* to = s.lists + ((b * s.splits + split) * s.blocks + block) * s.list * kTile + row;
  for (int e = 0; e < s.list; ++e) to[e * kTile] = lists.list[e * kTile + row];  // its own token's: no barrier
}

// r where the list is shorter than k: finds the k-th smallest distance of each token four bits at a time, then adds up
// what is smaller. Nine passes, whatever k.
constexpr int kDigits = 16;
constexpr int kSelectBytes = kTileBytes + kDigits * kTile * 4 + kTile * 4 + 2 * kTile * 8;

__global__ void __launch_bounds__(kThreads, 2) kth_distance_kernel(const Large s) {
  const int64_t b = blockIdx.x / s.blocks;
  const int block = static_cast<int>(blockIdx.x % s.blocks), row = static_cast<int>(threadIdx.x), n = s.count[b];
  const int blocks = (n + kTile - 1) / kTile, k = static_cast<int>(min(s.p.k, int64_t{n}));
  if (block >= blocks) return;
  unsigned* counts = reinterpret_cast<unsigned*>(ptx::shared_memory() + kTileBytes);  // [kDigits, kTile]
  unsigned* prefix = counts + kDigits * kTile;                                        // [kTile] digits found
  double* sums = reinterpret_cast<double*>(prefix + kTile);                           // [2, kTile] by half of a tile
  const auto all = [](int u) { return u; };
  unsigned left = static_cast<unsigned>(k);  // which of the distances with this prefix is the k-th
  prefix[row] = 0, sums[row] = sums[kTile + row] = 0;
  for (int shift = 28; shift >= 0; shift -= 4) {
    for (int digit = 0; digit < kDigits; ++digit) counts[digit * kTile + row] = 0;
    for_each_tile<false, false>(s.tokens(b), {}, block, {}, blocks, all, [&](int tile, Accumulators& d) {
      each_distance(d, [&](int to, int column, float value) {
        if (value != value) return;
        const unsigned bits = tile == block && to == column ? 0 : __float_as_uint(fmaxf(value, 0.0f));
        if (uint64_t{bits} >> (shift + 4) == prefix[to]) atomicAdd(&counts[(bits >> shift) % kDigits * kTile + to], 1u);
      });
    });
    __syncthreads();
    unsigned digit = 0;
    for (; digit < kDigits - 1 && left > counts[digit * kTile + row]; ++digit) left -= counts[digit * kTile + row];
    prefix[row] = prefix[row] << 4 | digit;
  }
  for_each_tile<false, false>(s.tokens(b), {}, block, {}, blocks, all, [&](int tile, Accumulators& d) {
#pragma unroll
    for (int i = 0; i < kWarpTile / 16; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int to = row_of(i, half);
        const float kth = __uint_as_float(prefix[to]);
        double sum = 0;
#pragma unroll
        for (int j = 0; j < kWarpTile / 8; ++j) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float value = d[i][j][2 * half + e];
            const bool self = tile == block && to == column_of(j, e);
            if (value < kth && value > 0 && !self) sum += static_cast<double>(value);
          }
        }
        sum += __shfl_xor_sync(kAllLanes, sum, 1);
        sum += __shfl_xor_sync(kAllLanes, sum, 2);
        if (lane_id() % 4 == 0) sums[warp_id() % 2 * kTile + to] += sum;
      }
    }
  });
  __syncthreads();
  const double kth = static_cast<double>(__uint_as_float(prefix[row]));
  s.r[b * s.T + block * kTile + row] = static_cast<float>(sums[row] + sums[kTile + row] + left * kth);
}

// ---- 3. density, its order, delta from the lists -------------------------------------------------------------------

// A thread per token, here and below: block x of these grids is block x % blocks of sample x / blocks.
struct Token {
  int64_t b;
  int block, row;
  int64_t at;  // in arrays [B, T]
  bool there;
};
__device__ inline Token this_token(const Large& s) {
  Token t;
  t.b = blockIdx.x / s.blocks, t.block = static_cast<int>(blockIdx.x % s.blocks), t.row = static_cast<int>(threadIdx.x);
  t.at = t.b * s.T + t.block * kTile + t.row;
  t.there = t.block * kTile + t.row < s.count[t.b];
  return t;
}
__device__ inline uint64_t* merged_list(const Large& s, const Token& t) {
  return s.merged + (t.b * s.blocks + t.block) * s.list * kTile + t.row;
}

// One list of those that the splits made; r; the token's place in the order of densities.
__global__ void __launch_bounds__(kTile) density_kernel(const Large s) {
  uint8_t* taken = ptx::shared_memory() + threadIdx.x;  // [splits, kTile] how much of each list is merged
  const DpcKnn& p = s.p;
  const Token t = this_token(s);
  if (!t.there) return;
  uint64_t* merged = merged_list(s, t);
  const int k = static_cast<int>(min(p.k, int64_t{s.count[t.b]}));
  float sum = 0;  // the token itself is its nearest, at distance 0
  for (int split = 0; split < s.splits; ++split) taken[split * kTile] = 0;
  for (int e = 0; e < s.list; ++e) {
    uint64_t nearest = merged[e * kTile];
    if (s.splits > 1) {
      int from = 0;
      nearest = kNobody;
      for (int split = 0; split < s.splits; ++split) {
        const int next = taken[split * kTile];
        const uint64_t* list = s.lists + ((t.b * s.splits + split) * s.blocks + t.block) * s.list * kTile + t.row;
        const uint64_t candidate = list[next * kTile];  // next < s.list: e entries are merged
        if (candidate < nearest) nearest = candidate, from = split;
      }
      ++taken[from * kTile];
      merged[e * kTile] = nearest;
    }
    if (e < k - 1) sum += distance_of(nearest);
  }
  if (!s.listed) sum = s.r[t.at];
  const float inverse = scale_of(s, t.b).inverse;
  const float r = sum / (static_cast<float>(k) * static_cast<float>(p.C)) * inverse * inverse;
  const int64_t position = s.position[t.at], at = t.b * p.N + position;
  const double density = density_of(r, p.noise ? p.noise + at : nullptr);
  p.density[at] = static_cast<float>(density);
  s.r[t.at] = r;
  s.order[t.at] = density_key(r, density, p.noise != nullptr, p.seed, position);
  s.kept_by[t.at] = INT_MAX;
  s.slot[t.at] = -1;
}

// Adds a token to those of the second (which = 0) or third pass.
__device__ inline void leave_pending(const Large& s, const Token& t, int which) {
  s.pending[t.b * s.T + atomicAdd(&s.pending_count[2 * t.b + which], 1)] = t.block * kTile + t.row;
}

__global__ void __launch_bounds__(kTile) list_delta_kernel(const Large s) {
  const Token t = this_token(s);
  if (!t.there) return;
  const uint64_t* list = merged_list(s, t);
  const DensityKey own = s.order[t.at];
  s.delta2[t.at] = __float_as_uint(kInf);
  for (int e = 0; e < s.list; ++e) {
    const uint64_t next = list[e * kTile];
    if (next == kNobody) return;  // it has met all: it is the densest
    if (denser(s.order[t.b * s.T + token_of(next)], own)) {
      s.delta2[t.at] = __float_as_uint(distance_of(next));
      return;
    }
  }
  leave_pending(s, t, 0);
}

// ---- 4. the second and third pass ----------------------------------------------------------------------------------

// The pending tokens of one sample in blocks of 128, against groups of tiles: kAssign ? of the kept tokens : of all.
constexpr int kSearchBytes = kTileBytes + kTile * 8 + kThreads * 8;

// How many tokens the pending ones of a sample meet, and in how many groups of tiles.
template <bool kAssign>
__device__ inline int columns_of(const Large& s, int64_t b) {
  return kAssign ? s.chosen_count[2 * b + 1] : s.count[b];
}
template <bool kAssign>
__device__ inline int groups_of(const Large& s, int64_t b) {
  return (columns_of<kAssign>(s, b) + kTile * kGroup - 1) / (kTile * kGroup);
}

template <bool kAssign>
__device__ void search(const Large& s, int64_t b, int block, int group) {
  uint64_t* const keys = reinterpret_cast<uint64_t*>(ptx::shared_memory() + kTileBytes);  // [kTile] of the rows
  const int columns = columns_of<kAssign>(s, b);
  const Side rows{s.pending + b * s.T, s.pending_count[2 * b + kAssign]}, kept{s.kept + b * s.p.M, columns};
  const int begin = group * kGroup, end = min((columns + kTile - 1) / kTile, begin + kGroup);
  const DensityKey* order = s.order + b * s.T;
  if (!kAssign) {
    const int row = block * kTile + static_cast<int>(threadIdx.x);
    __syncthreads();  // the keys may have been in use
    keys[threadIdx.x] = row < rows.count ? order[rows.ids[row]].key : 0;
  }
  float best[kWarpTile / 16][2];
  int where[kWarpTile / 16][2];
#pragma unroll
  for (int i = 0; i < kWarpTile / 16; ++i) best[i][0] = best[i][1] = kInf, where[i][0] = where[i][1] = 0;
  const auto tile_at = [&](int u) { return begin + u; };
  for_each_tile<true, kAssign>(s.tokens(b), rows, block, kept, end - begin, tile_at, [&](int tile, Accumulators& d) {
#pragma unroll
    for (int j = 0; j < kWarpTile / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = tile * kTile + column_of(j, e);
        const uint64_t key = kAssign || column >= columns ? kLeastDense : order[column].key;
#pragma unroll
        for (int i = 0; i < kWarpTile / 16; ++i) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float value = d[i][j][2 * half + e], distance = fmaxf(value, 0.0f);
            if (!(value < best[i][half]) || !(distance < best[i][half])) continue;  // the former is false for NaN
            if (!kAssign) {
              const int row = row_of(i, half);
              if (key > keys[row]) continue;
              if (key == keys[row] && !denser(order[column], order[rows.ids[block * kTile + row]])) continue;
            }
            best[i][half] = distance, where[i][half] = column;
          }
        }
      }
    }
  });
#pragma unroll
  for (int i = 0; i < kWarpTile / 16; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = block * kTile + row_of(i, half);
      if (row >= rows.count || !(best[i][half] < kInf)) continue;
      const int64_t at = b * s.T + rows.ids[row];
      if constexpr (kAssign) {
        atomicMin(&s.nearest[at], static_cast<unsigned long long>(entry(best[i][half], where[i][half])));
      } else {
        atomicMin(&s.delta2[at], __float_as_uint(best[i][half]));
      }
    }
  }
}

// Pieces of work (sample, block of pending tokens, group of tiles) are dealt out in turn: how many there are is known
// here only.
template <bool kAssign>
__global__ void __launch_bounds__(kThreads, 2) search_kernel(const Large s) {
  // [kThreads] of as many samples: 64 bits, for they grow with N^2.
  auto* pieces = reinterpret_cast<int64_t*>(ptx::shared_memory() + kTileBytes + kTile * 8);
  const int workers = static_cast<int>(gridDim.x);
  int64_t turn = blockIdx.x;  // the next piece of this block, counted from the sample's first
  for (int64_t from = 0; from < s.p.B; from += kThreads) {
    const int64_t mine = from + threadIdx.x;
    __syncthreads();
    if (mine < s.p.B) {
      const int blocks = (s.pending_count[2 * mine + kAssign] + kTile - 1) / kTile;
      pieces[threadIdx.x] = int64_t{blocks} * groups_of<kAssign>(s, mine);
    }
    __syncthreads();
    for (int64_t b = from; b < min(s.p.B, from + kThreads); ++b) {
      const int64_t here = pieces[b - from];
      for (const int groups = groups_of<kAssign>(s, b); turn < here; turn += workers) {
        search<kAssign>(s, b, static_cast<int>(turn / groups), static_cast<int>(turn % groups));
      }
      turn -= here;
    }
  }
}

// ---- 5. scores, the choice -----------------------------------------------------------------------------------------

__global__ void __launch_bounds__(kTile) score_kernel(const Large s) {
  const DpcKnn& p = s.p;
  const Token t = this_token(s);
  if (!t.there) return;
  const unsigned found = s.delta2[t.at];
  const float inverse = scale_of(s, t.b).inverse;
  const float delta2 = __uint_as_float(found == __float_as_uint(kInf) ? s.farthest[t.b] : found) * inverse * inverse;
  const int64_t at = t.b * p.N + s.position[t.at];
  const float density = p.density[at], delta = sqrtf(delta2 / static_cast<float>(p.C));
  p.delta[at] = delta;
  p.score[at] = density * delta;
  s.score[t.at] = score_key(s.r[t.at], p.noise ? p.noise + at : nullptr, delta2, p.C);
}

// The M best of a sample: the score of the last of them by radix selection, then all up to it by position; after them
// the tokens of `keep`. A block per sample.
__global__ void __launch_bounds__(kSortThreads, 1) choose_kernel(const Large s) {
  int* sums = reinterpret_cast<int*>(ptx::shared_memory());  // [kWarp]
  int* counts = sums + kWarp;                                // [256]
  int* found = counts + 256;                                 // [3] digit, how many with it are taken, how many have it
  const DpcKnn& p = s.p;
  const int64_t b = blockIdx.x;
  const int n = s.count[b], thread = static_cast<int>(threadIdx.x);
  int32_t* kept_by = s.kept_by + b * s.T;
  const uint64_t* score = s.score + b * s.T;
  const auto token_kept = [&](int64_t e) {
    const int64_t position = keep_position(p, b, e);
    return position < 0 ? -1 : s.token_at[b * p.N + position];
  };
  const auto scan = [&](int value) {
    __syncthreads();
    return scan_block(value, sums);
  };

  for (int64_t e = thread; e < p.num_keep; e += kSortThreads) {
    const int token = token_kept(e);
    if (token >= 0) atomicMin(&kept_by[token], static_cast<int32_t>(e));  // the first of those that name it
  }
  __syncthreads();
  const int share = (n + kSortThreads - 1) / kSortThreads, begin = min(n, thread * share), end = min(n, begin + share);
  int mine = 0;
  for (int i = begin; i < end; ++i) mine += kept_by[i] == INT_MAX;
  const int candidates = scan(mine).total;
  const int best = static_cast<int>(min(p.M - p.num_keep, int64_t{candidates}));

  uint64_t last = kNotACandidate;  // takes all scores before it and `ties` tokens that have it
  int ties = 0;
  if (best == 0) {
    last = 0;
  } else if (best < candidates) {
    last = 0, ties = best;
    for (int shift = 56; shift >= 0; shift -= 8) {
      __syncthreads();
      if (thread < 256) counts[thread] = 0;
      __syncthreads();
      for (int i0 = 0; i0 < n; i0 += kSortThreads) {
        const int i = i0 + thread;
        int digit = -1;
        if (i < n && kept_by[i] == INT_MAX && score[i] >> shift >> 8 == last >> shift >> 8) {
          digit = static_cast<int>(score[i] >> shift & 255);
        }
        const unsigned same = __match_any_sync(kAllLanes, digit);
        if (digit >= 0 && same >> lane_id() == 1) atomicAdd(&counts[digit], __popc(same));
      }
      __syncthreads();
      const int here = thread < 256 ? counts[thread] : 0;
      const int before = scan(here).before;
      if (before < ties && ties <= before + here) found[0] = thread, found[1] = ties - before, found[2] = here;
      __syncthreads();
      last |= static_cast<uint64_t>(found[0]) << shift;
      ties = found[1];
      if (ties == found[2]) {  // all of these: no need to tell them apart
        last |= (uint64_t{1} << shift) - 1;
        break;
      }
    }
  }

  int before = 0, equal = 0;
  for (int i = begin; i < end; ++i) {
    if (kept_by[i] == INT_MAX) before += score[i] < last, equal += score[i] == last;
  }
  int room = ties - scan(equal).before;  // for ties among this thread's tokens: they go to the lower positions
  int at = scan(before + max(0, min(equal, room))).before;
  for (int i = begin; i < end; ++i) {
    if (kept_by[i] != INT_MAX || score[i] > last || (score[i] == last && room-- <= 0)) continue;
    s.chosen[b * p.M + at] = i;
    s.chosen_score[b * p.M + at++] = score[i];
  }

  const int64_t keep_share = (p.num_keep + kSortThreads - 1) / kSortThreads;
  const int64_t keep_begin = min(p.num_keep, thread * keep_share), keep_end = min(p.num_keep, keep_begin + keep_share);
  int kept = 0;
  for (int64_t e = keep_begin; e < keep_end; ++e) {
    const int token = token_kept(e);
    kept += token >= 0 && kept_by[token] == e;
  }
  const Scan places = scan(kept);
  int place = best + places.before;
  for (int64_t e = keep_begin; e < keep_end; ++e) {
    const int token = token_kept(e);
    if (token >= 0 && kept_by[token] == e) s.chosen[b * p.M + place++] = token;
  }
  if (thread == 0) s.chosen_count[2 * b] = best, s.chosen_count[2 * b + 1] = best + places.total;
}

// Places in `index`: by score or, if ordered, by position, found by counting who comes before. A lane per chosen token;
// the warps share those it is compared with.
__global__ void __launch_bounds__(256) place_kernel(const Large s, int slices) {
  constexpr int kWarps = 256 / kWarp;
  int* partial = reinterpret_cast<int*>(ptx::shared_memory());  // [kWarps, kPlaceRows]
  const DpcKnn& p = s.p;
  const int64_t b = blockIdx.x / slices, e = int64_t{blockIdx.x % slices} * kPlaceRows + lane_id();
  const int best = s.chosen_count[2 * b], all = s.chosen_count[2 * b + 1], others = p.ordered ? all : best;
  const int32_t* chosen = s.chosen + b * p.M;
  const uint64_t* score = s.chosen_score + b * p.M;
  int before = 0;
  if (e < others) {
    const int token = chosen[e];
    const int begin = static_cast<int>(int64_t{others} * warp_id() / kWarps);
    const int end = static_cast<int>(int64_t{others} * (warp_id() + 1) / kWarps);
    if (p.ordered) {
#pragma unroll 4
      for (int o = begin; o < end; ++o) before += chosen[o] < token;
    } else {
      const uint64_t own = score[e];
#pragma unroll 4
      for (int o = begin; o < end; ++o) before += score[o] < own || (score[o] == own && o < e);  // o: by position
    }
  }
  partial[warp_id() * kPlaceRows + lane_id()] = before;
  __syncthreads();
  if (warp_id() > 0 || e >= p.M) return;
  if (e >= all) {
    p.index[b * p.M + e] = -1;
    return;
  }
  int place = e < others ? 0 : static_cast<int>(e);
  if (e < others) {
    for (int w = 0; w < kWarps; ++w) place += partial[w * kPlaceRows + lane_id()];
  }
  const int token = chosen[e];
  p.index[b * p.M + place] = s.position[b * s.T + token];
  s.kept[b * p.M + place] = token;
  s.slot[b * s.T + token] = place;
}

// ---- 6. assignment -------------------------------------------------------------------------------------------------

__global__ void __launch_bounds__(kTile) list_assign_kernel(const Large s) {
  const Token t = this_token(s);
  if (!t.there) return;
  int64_t& assignment = s.p.assignment[t.b * s.p.N + s.position[t.at]];
  const int own = s.slot[t.at];
  if (own >= 0 || s.chosen_count[2 * t.b + 1] == 0) {
    assignment = own;
    return;
  }
  const uint64_t* list = merged_list(s, t);
  const float end = distance_of(list[(s.list - 1) * kTile]);  // only nearer ones: equally far ones may be missing
  float distance = end;
  int nearest = INT_MAX;
  for (int e = 0; e < s.list; ++e) {
    const uint64_t next = list[e * kTile];
    if (distance_of(next) >= end || (nearest < INT_MAX && distance_of(next) > distance)) break;
    const int slot = s.slot[t.b * s.T + token_of(next)];
    if (slot >= 0 && slot < nearest) nearest = slot, distance = distance_of(next);
  }
  if (nearest < INT_MAX) {
    assignment = nearest;
  } else {
    s.nearest[t.at] = kNobody;
    leave_pending(s, t, 1);
  }
}

__global__ void __launch_bounds__(kTile) write_assignment_kernel(const Large s) {
  const int64_t b = blockIdx.x / s.blocks, i = blockIdx.x % s.blocks * kTile + threadIdx.x;
  if (i >= s.pending_count[2 * b + 1]) return;
  const int token = s.pending[b * s.T + i];
  s.p.assignment[b * s.p.N + s.position[b * s.T + token]] = token_of(s.nearest[b * s.T + token]);
}

// ---- the host's part -----------------------------------------------------------------------------------------------

// Decides how to go about it and lays the arrays out from an address on; from address 0 it only counts their bytes.
inline Large plan(const DpcKnn& p, void* scratch, int64_t* bytes) {
  const int64_t B = p.B;
  Large s{};
  s.p = p;
  s.blocks = static_cast<int>((p.N + kTile - 1) / kTile), s.T = int64_t{s.blocks} * kTile;
  s.chunks = static_cast<int>((p.C + kChunk - 1) / kChunk);
  const int shared = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, kLeastShared);
  const int fit = (shared - lists_bytes(0)) / (lists_bytes(1) - lists_bytes(0));
  s.listed = p.k - 1 <= std::min(fit, tuning.list_max);
  s.list = std::min(fit, s.listed ? std::max(tuning.list_min, static_cast<int>(p.k - 1)) : tuning.list_min);
  s.workers = tuning.blocks ? tuning.blocks : 2 * device_attribute(cudaDevAttrMultiProcessorCount, 1);
  // As many splits as leave the fewest blocks idle in the last round; each has to fill lists of its own, and more of
  // them, which take memory, must be worth it.
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

template <class... Parameters, class... Arguments>
cudaError_t launch(cudaStream_t stream, void (*kernel)(Parameters...), dim3 grid, int threads, int shared,
                   Arguments... arguments) {
  if (shared > 48 << 10) {
    // All that there is: what this launch needs might be taken back by another thread's call just before it.
    const int most = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, kLeastShared);
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 100);
    if (error != cudaSuccess) return error;
  }
  return launch_kernel(kernel, grid, static_cast<unsigned>(threads), shared, stream, arguments...);
}

template <class T>
cudaError_t run(const Large& s, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  const DpcKnn& p = s.p;
  const auto go = [&](auto* kernel, int64_t grid, int threads, int shared, auto... arguments) {
    if (error != cudaSuccess) return;
    error = launch(stream, kernel, dim3(static_cast<unsigned>(grid)), threads, shared, s, arguments...);
  };
  const int64_t tiles = p.B * s.blocks;
  const int slices = (s.chunks * kChunk + kThreads - 1) / kThreads;
  constexpr int kScan = kWarp * 4;
  go(valid_kernel<T>, (p.B * p.N + 256 / kWarp - 1) / (256 / kWarp), 256, 0);
  go(number_kernel, p.B, kSortThreads, kScan);
  go(pivot_kernel<T>, tiles * slices, kThreads, 0, slices);
  go(centre_kernel<T>, tiles * 2, kThreads, kThreads / kWarp * 16 * kTokenBytes);
  if (error == cudaSuccess) {
    const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(s.splits));
    const auto kernel = s.list == kUsualList ? neighbours_kernel<kUsualList> : neighbours_kernel<0>;
    error = launch(stream, kernel, grid, kThreads, lists_bytes(s.list), s);
  }
  if (!s.listed) go(kth_distance_kernel, tiles, kThreads, kSelectBytes);
  go(density_kernel, tiles, kTile, kMaxSplits * kTile);
  go(list_delta_kernel, tiles, kTile, 0);
  go(search_kernel<false>, s.workers, kThreads, kSearchBytes);
  go(score_kernel, tiles, kTile, 0);
  go(choose_kernel, p.B, kSortThreads, kScan + 259 * 4);
  const int rows = static_cast<int>((p.M + kPlaceRows - 1) / kPlaceRows);
  go(place_kernel, p.B * rows, 256, 256 * 4, rows);
  if (p.assign) {
    go(list_assign_kernel, tiles, kTile, 0);
    go(search_kernel<true>, s.workers, kThreads, kSearchBytes);
    go(write_assignment_kernel, tiles, kTile, 0);
  }
  return error;
}

inline int64_t scratch(const DpcKnn& p) {
  int64_t bytes = 0;
  if (p.B > 0) plan(p, nullptr, &bytes);
  return bytes;
}

inline cudaError_t fwd(const DpcKnn& p, void* scratch, cudaStream_t stream) {
  int64_t bytes = 0;
  const Large s = plan(p, scratch, &bytes);
  return with_element<false>(p.dtype, [&](auto element) { return run<decltype(element)>(s, stream); });
}

}  // namespace hotkernels::dpc::large
