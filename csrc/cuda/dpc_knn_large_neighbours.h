// dpc_knn of many tokens (dpc_knn_large.h): the first pass, which lists the nearest of every token.
#pragma once
#include "dpc_knn_large_plan.h"

namespace hotkernels::dpc::large {

constexpr uint64_t kNoNeighbour = uint64_t{0x7f800000} << 32 | 0xffffffff;  // an empty place in a list: infinitely far

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

struct Lists {  // in shared memory behind for_each_tile's, one column per token of the block
  uint64_t* list;   // [length, kTile]
  uint64_t* queue;  // [kQueue, kTile]
  float* worst;     // [kTile] the end of each list
  int* waiting;     // [kTile] candidates of each token: beyond kQueue they found no room in its queue
  int* full;        // [2] whether any found no room, in even and odd turns

  __device__ explicit Lists(int length)
      : list(reinterpret_cast<uint64_t*>(ptx::shared_memory() + kTileBytes)), queue(list + length * kTile),
        worst(reinterpret_cast<float*>(queue + kQueue * kTile)), waiting(reinterpret_cast<int*>(worst + kTile)),
        full(waiting + kTile) {}
};

// Inserts the queued candidates of this thread's token into its list: in registers if it has kLength entries, or, if
// that is 0, in place and of any length. For whole warps.
template <int kLength>
__device__ inline void drain_queue(const Lists& lists, int length) {
  const int row = static_cast<int>(threadIdx.x), waiting = min(lists.waiting[row], kQueue);
  const int most = __reduce_max_sync(kAllLanes, waiting);
  if (most == 0) return;
  uint64_t* list = lists.list + row;
  if constexpr (kLength > 0) {
    uint64_t held[kLength];
#pragma unroll
    for (int e = 0; e < kLength; ++e) held[e] = list[e * kTile];
    for (int q = 0; q < most; ++q) {
      const uint64_t candidate = q < waiting ? lists.queue[q * kTile + row] : kNoNeighbour;
#pragma unroll
      for (int e = kLength - 1; e > 0; --e) {  // a comparison serves two places, which min() would hide
        held[e] = candidate < held[e - 1] ? held[e - 1] : candidate < held[e] ? candidate : held[e];
      }
      held[0] = candidate < held[0] ? candidate : held[0];
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

// Offers a tile's distances to the lists of its rows, in as many turns as the queues take to hold them all. For all
// threads of the block; lists are up to date after the next barrier.
template <int kLength>
__device__ inline void offer_tile(const Lists& lists, int length, int tile, Accumulators& d, int& turn) {
  for (bool again = true; again; ++turn) {
    bool left_over = false;
    if (threadIdx.x == 0) lists.full[(turn + 1) % 2] = 0;
#pragma unroll
    for (int i = 0; i < kWarpTile / 16; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int to = row_of(i, half);
        const float worst = lists.worst[to];
        float least = kInf;
#pragma unroll
        for (int j = 0; j < kWarpTile / 8; ++j) {
#pragma unroll
          for (int e = 0; e < 2; ++e) least = fminf(least, d[i][j][2 * half + e]);
        }
        if (!(least < worst)) continue;
        int mine = 0;
#pragma unroll
        for (int j = 0; j < kWarpTile / 8; ++j) {
#pragma unroll
          for (int e = 0; e < 2; ++e) mine += d[i][j][2 * half + e] < worst;
        }
        int place = atomicAdd(&lists.waiting[to], mine);
#pragma unroll
        for (int j = 0; j < kWarpTile / 8; ++j) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& value = d[i][j][2 * half + e];
            if (!(value < worst)) continue;
            if (place < kQueue) {
              lists.queue[place * kTile + to] = entry(value, tile * kTile + column_of(j, e));
              value = quiet_nan();
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
    again = lists.full[turn % 2];
    drain_queue<kLength>(lists, length);
    if (again) __syncthreads();  // all lists are up to date
  }
}

// A block of 128 tokens against one split of all tokens: first its own block, if that is in the split, since tokens are
// often ordered in time or space, and lists that begin with near ones accept little later; then the others in order.
template <int kLength>
__global__ void __launch_bounds__(kThreads, 2) neighbours_kernel(const Plan s) {
  const int64_t b = blockIdx.x / s.blocks;
  const int block = static_cast<int>(blockIdx.x % s.blocks), split = static_cast<int>(blockIdx.y);
  const int blocks = (s.count[b] + kTile - 1) / kTile, row = static_cast<int>(threadIdx.x);
  if (block >= blocks) return;
  const Lists lists(kLength > 0 ? kLength : s.list);
  for (int e = 0; e < s.list; ++e) lists.list[e * kTile + row] = kNoNeighbour;
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
      each_distance(d, [](int row, int column, float& value) { value = row == column ? quiet_nan() : value; });
    }
    each_distance(d, [&](int, int, float value) { farthest = fmaxf(farthest, value); });
    offer_tile<kLength>(lists, s.list, tile, d, turn);  // for_each_tile has a barrier before the next tile
  });
  farthest = warp_max_of_nonnegative(farthest);
  if (lane_id() == 0) atomicMax(&s.farthest[b], __float_as_uint(farthest));
  uint64_t* to = s.lists + ((b * s.splits + split) * s.blocks + block) * s.list * kTile + row;
  for (int e = 0; e < s.list; ++e) to[e * kTile] = lists.list[e * kTile + row];  // no barrier: this thread wrote it
}

// r where the list is shorter than k: finds the k-th smallest distance of each token four bits at a time, then adds up
// what is smaller. Nine passes, whatever k.
constexpr int kDigits = 16;
constexpr int kSelectBytes = kTileBytes + kDigits * kTile * 4 + kTile * 4 + 2 * kTile * 8;

__global__ void __launch_bounds__(kThreads, 2) kth_distance_kernel(const Plan s) {
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

}  // namespace hotkernels::dpc::large
