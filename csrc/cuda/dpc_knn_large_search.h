// dpc_knn of many tokens (dpc_knn_large.h): density, delta and assignment where the lists answer; the second and third
// pass, which answer the rest.
#pragma once
#include <climits>

#include "dpc_knn_large_neighbours.h"

namespace hotkernels::dpc::large {

constexpr int kGroup = 2;  // tiles of one piece of work of the second and third pass

// ---- from the lists -----------------------------------------------------------------------------------------------

__device__ inline uint64_t* merged_list(const Plan& s, const Token& t) {
  return s.merged + (t.b * s.blocks + t.block) * s.list * kTile + t.row;
}

// Merges the lists of the splits into one; then r, and the token's key in the order of densities.
__global__ void __launch_bounds__(kTile) density_kernel(const Plan s) {
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
      nearest = kNoNeighbour;
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

// Adds a token to those of the second (which = 0) or third pass (which = 1).
__device__ inline void leave_pending(const Plan& s, const Token& t, int which) {
  s.pending[t.b * s.T + atomicAdd(&s.pending_count[2 * t.b + which], 1)] = t.block * kTile + t.row;
}

__global__ void __launch_bounds__(kTile) list_delta_kernel(const Plan s) {
  const Token t = this_token(s);
  if (!t.there) return;
  const uint64_t* list = merged_list(s, t);
  const DensityKey own = s.order[t.at];
  s.delta2[t.at] = __float_as_uint(kInf);
  for (int e = 0; e < s.list; ++e) {
    const uint64_t next = list[e * kTile];
    if (next == kNoNeighbour) return;  // the list holds all tokens, and none is denser: it is the densest
    if (denser(s.order[t.b * s.T + token_of(next)], own)) {
      s.delta2[t.at] = __float_as_uint(distance_of(next));
      return;
    }
  }
  leave_pending(s, t, 0);
}

__global__ void __launch_bounds__(kTile) list_assign_kernel(const Plan s) {
  const Token t = this_token(s);
  if (!t.there) return;
  int64_t& assignment = s.p.assignment[t.b * s.p.N + s.position[t.at]];
  const int own = s.slot[t.at];
  if (own >= 0 || s.chosen_count[2 * t.b + 1] == 0) {
    assignment = own;
    return;
  }
  const uint64_t* list = merged_list(s, t);
  // Only tokens strictly nearer than the end of the list: it may lack others that are as far.
  const float end = distance_of(list[(s.list - 1) * kTile]);
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
    s.nearest[t.at] = kNoNeighbour;
    leave_pending(s, t, 1);
  }
}

__global__ void __launch_bounds__(kTile) write_assignment_kernel(const Plan s) {
  const int64_t b = blockIdx.x / s.blocks, i = blockIdx.x % s.blocks * kTile + threadIdx.x;
  if (i >= s.pending_count[2 * b + 1]) return;
  const int token = s.pending[b * s.T + i];
  s.p.assignment[b * s.p.N + s.position[b * s.T + token]] = token_of(s.nearest[b * s.T + token]);
}

// ---- the second and third pass ------------------------------------------------------------------------------------

// The pending tokens of a sample in blocks of 128, against groups of tiles: of the kept tokens if kAssign, else of all.
constexpr int kSearchBytes = kTileBytes + kTile * 8 + kThreads * 8;

// How many tokens the pending ones of a sample meet, and in how many groups of tiles.
template <bool kAssign>
__device__ inline int columns_of(const Plan& s, int64_t b) {
  return kAssign ? s.chosen_count[2 * b + 1] : s.count[b];
}
template <bool kAssign>
__device__ inline int groups_of(const Plan& s, int64_t b) {
  return (columns_of<kAssign>(s, b) + kTile * kGroup - 1) / (kTile * kGroup);
}

template <bool kAssign>
__device__ void search(const Plan& s, int64_t b, int block, int group) {
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

// Pieces of work (sample, block of pending tokens, group of tiles) are dealt to the blocks in turn, since the host does
// not know how many there are.
template <bool kAssign>
__global__ void __launch_bounds__(kThreads, 2) search_kernel(const Plan s) {
  // [kThreads] the pieces of as many samples, in 64 bits since they grow with N^2.
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

}  // namespace hotkernels::dpc::large
