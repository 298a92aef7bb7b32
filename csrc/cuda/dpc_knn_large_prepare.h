// dpc_knn of many tokens (dpc_knn_large.h): which tokens are valid, the pivot, the copy that the tiles read.
#pragma once
#include "block_sort.h"
#include "dpc_knn_large_plan.h"

namespace hotkernels::dpc::large {

// Finds the valid tokens, a warp per token, and writes the results of the others.
template <class T>
__global__ void __launch_bounds__(256) valid_kernel(const Plan s) {
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
__global__ void __launch_bounds__(kSortThreads) number_kernel(const Plan s) {
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

// The pivot, and the largest distance from it along a channel among a block of tokens: a thread per channel.
template <class T>
__global__ void __launch_bounds__(kThreads) pivot_kernel(const Plan s, int slices) {
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

// v = channels c .. c+7 of a token, 0 beyond the last.
template <class T>
__device__ void read_8(const T* x, const Plan& s, int64_t c, float (&v)[8]) {
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
__global__ void __launch_bounds__(kThreads) centre_kernel(const Plan s) {
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
      const int offset = swizzled_offset<kChunk>(row + 8 * half, part);
      *reinterpret_cast<uint4*>(shared + offset) = rounded;
      *reinterpret_cast<uint4*>(value + offset / 2) = rounded;
    }
    __syncwarp();
    add_norms(norm, shared);
    __syncwarp();
  }
  if (row / 2 != part) return;  // the diagonal
  float* norms = s.norm + b * s.T + first + row;
  norms[0] = token[0] ? row % 2 ? norm[0][1] : norm[0][0] : quiet_nan();
  norms[8] = token[1] ? row % 2 ? norm[1][3] : norm[1][2] : quiet_nan();
}

}  // namespace hotkernels::dpc::large
