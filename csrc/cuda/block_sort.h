// A stable counting sort by one thread block in shared memory, and the scan that it and larger sorts are made of.
#pragma once
#include <cstdint>

#include "element.h"

namespace hotkernels {

constexpr int kLoadsInFlight = 8;  // of one thread, before it waits for the first

__device__ inline int thread_of_block() { return static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x); }
__device__ inline int threads_per_block() { return static_cast<int>(blockDim.x * blockDim.y); }

struct Scan {
  int before, total;  // sums over the threads before this one, and over all
};

// For all threads of a block of whole warps. sums: one int per warp, free again after the next barrier.
__device__ inline Scan scan_block(int value, int* sums) {
  const int lane = thread_of_block() % kWarp, warp = thread_of_block() / kWarp;
  int sum = value;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int other = __shfl_up_sync(kAllLanes, sum, step);
    if (lane >= step) sum += other;
  }
  if (lane == kWarp - 1) sums[warp] = sum;
  __syncthreads();
  Scan scan{sum - value, 0};
  for (int w = 0; w < threads_per_block() / kWarp; ++w) {
    if (w < warp) scan.before += sums[w];
    scan.total += sums[w];
  }
  return scan;
}

// ints of shared memory that sort_in_block needs.
__host__ __device__ constexpr int sort_in_block_ints(int threads, int buckets) {
  return buckets + 1 + (threads / kWarp) * (buckets + 1);
}

// Sorts entries [0, L) by bucket_of(l), which is in [0, buckets), or -1 for an entry to leave out. Afterwards the
// entries of bucket c are at places shared[c] .. shared[c + 1], ascending, and place(at, l, c) has been called for each
// of them; it may read shared[c] already. For all threads of a block of whole warps; begins and ends with a barrier.
template <class BucketOf, class Place>
__device__ void sort_in_block(int L, int buckets, int* shared, const BucketOf& bucket_of, const Place& place) {
  const int thread = thread_of_block(), threads = threads_per_block(), warps = threads / kWarp;
  const int warp = thread / kWarp, lane = thread % kWarp;
  int *start = shared, *sums = start + buckets + 1, *counts = sums + warps;
  // Each warp takes one run of entries, a whole number of rounds, and counts it on its own.
  const int entries = (L + threads - 1) / threads * kWarp;
  const int begin = min(warp * entries, L), end = min(begin + entries, L);
  int* count = counts + warp * buckets;
  const auto load = [&](int(&bucket)[kLoadsInFlight], int base) {
#pragma unroll
    for (int i = 0; i < kLoadsInFlight; ++i) {
      const int l = base + i * kWarp + lane;
      bucket[i] = l < end ? bucket_of(l) : -1;
    }
  };

  __syncthreads();
  for (int i = thread; i < warps * buckets; i += threads) counts[i] = 0;
  __syncthreads();
  for (int base = begin; base < end; base += kLoadsInFlight * kWarp) {
    int bucket[kLoadsInFlight];
    load(bucket, base);
#pragma unroll
    for (int i = 0; i < kLoadsInFlight; ++i) {
      if (bucket[i] >= 0) atomicAdd(&count[bucket[i]], 1);
    }
  }
  __syncthreads();

  // Prefix sums: counts become where each warp's entries begin within their bucket, start where the buckets begin.
  const int share = (buckets + threads - 1) / threads;
  const int first = min(thread * share, buckets), last = min(first + share, buckets);
  int total = 0;
  for (int c = first; c < last; ++c) {
    start[c] = total;
    int before = 0;
    for (int run = 0; run < warps; run += kLoadsInFlight) {
      int n[kLoadsInFlight];
#pragma unroll
      for (int i = 0; i < kLoadsInFlight; ++i) n[i] = run + i < warps ? counts[(run + i) * buckets + c] : 0;
#pragma unroll
      for (int i = 0; i < kLoadsInFlight; ++i) {
        if (run + i < warps) counts[(run + i) * buckets + c] = before;
        before += n[i];
      }
    }
    total += before;
  }
  const Scan scan = scan_block(total, sums);
  for (int c = first; c < last; ++c) start[c] += scan.before;
  if (thread == 0) start[buckets] = scan.total;
  __syncthreads();

  for (int base = begin; base < end; base += kLoadsInFlight * kWarp) {
    int bucket[kLoadsInFlight];
    load(bucket, base);
#pragma unroll
    for (int i = 0; i < kLoadsInFlight; ++i) {
      const int c = bucket[i];
      const unsigned same = __match_any_sync(kAllLanes, c);
      const int at = c < 0 ? 0 : count[c] + __popc(same & ((1u << lane) - 1));
      __syncwarp();  // all lanes have read count[c]
      if (c >= 0 && same >> lane == 1) count[c] = at + 1;  // the last of them
      __syncwarp();
      if (c >= 0) place(start[c] + at, base + i * kWarp + lane, c);
    }
  }
  __syncthreads();
}

}  // namespace hotkernels
