// Sums of tokens per segment, in ascending order of the tokens: the forward of merging, and the backward of gathering.
// Each block finds the tokens of its own segments by a sort in shared memory, so that all of it is one launch; where
// rows are too long for that, it follows an inverted index.
#pragma once
#include "block_sort.h"
#include "element.h"
#include "hotkernels/invert_index.h"
#include "launch.h"
#include "ptx.h"

namespace hotkernels {

// out[b, s] = sum of x[b, l] over the l with index[b, l] = s. A token is R rows of C contiguous elements.
struct SegmentSum {
  int64_t B, L, S, R, C;         // samples, tokens that are read, segments; rows, channels; L, S, R * C below 2^30
  const void* x;                 // [B, L, R, C]
  int64_t x_stride_b, x_stride_l, x_stride_r;
  const int64_t* index;          // [B, L]; outside [0, S): in no segment
  const int64_t *start, *slots;  // the inverted index [B, S + 1], [B, L]; or null if L <= kMaxSortedInBlock
  void* out;                     // [B, S, R, C] contiguous

  // For a weighted mean: out[b, s] is divided by total[b, s] = sum of weights + eps. R = 1.
  const void* weight;  // [B, L], or null = 1
  double eps;
  void* total;         // [B, S]
  void* mean;          // out before rounding, or null
};

// A block sums a range of segments: grid = (samples x ranges, pieces that a token is cut into).
struct SegmentWork {
  int64_t first_sample;
  int packs;                // per row
  int range;                // segments per block
  unsigned ranges;          // per sample
};

constexpr int kSumThreads = 512;      // many, as each block reads the whole row of the index
constexpr unsigned kMaxLanes = 256;
constexpr int kSumBlocksPerSM = 2;
constexpr double kSortShare = 0.1;    // of a block's time, if it summed all segments of a sample (an estimate)
constexpr int kMaxSumRange = 448;

// Of shared memory, where a block sorts a row of L entries.
__host__ __device__ constexpr int segment_sum_bytes(int range, int64_t L) {
  return static_cast<int>(sizeof(int) * sort_in_block_ints(kSumThreads, range) + sizeof(uint16_t) * L);
}
static_assert(segment_sum_bytes(kMaxSumRange, kMaxSortedInBlock) <= 48 << 10, "more would have to be asked for");

// blockDim = (threads that share a token's packs, segments at a time). kMean: weights, total and mean are there.
template <class T, int V, bool kMean>
__global__ void __launch_bounds__(kSumThreads, kSumBlocksPerSM) segment_sum_kernel(SegmentSum p, SegmentWork work) {
  using Packed = Pack<T, V>;
  using Sum = Compute<T>;
  constexpr int kTokensInFlight = kMean && V == 8 ? 3 : 4;  // 4 of half types, weighted, would spill on sm_100
  int* place = reinterpret_cast<int*>(ptx::shared_memory());  // of each segment's first token in `sorted`
  auto* sorted = reinterpret_cast<uint16_t*>(place + sort_in_block_ints(kSumThreads, work.range));
  static_assert(kMaxSortedInBlock <= 1 << 16);
  const bool sorts = p.start == nullptr;
  const int64_t b = work.first_sample + blockIdx.x / work.ranges;
  const int64_t first = int64_t{blockIdx.x % work.ranges} * work.range;
  const int count = static_cast<int>(min(p.S - first, int64_t{work.range}));
  if (sorts) {
    const int64_t* index = p.index + b * p.L;
    sort_in_block(
        static_cast<int>(p.L), count, place,
        [&](int l) {
          const int64_t s = index[l];
          return s >= first && s < first + count ? static_cast<int>(s - first) : -1;
        },
        [&](int at, int l, int) { sorted[at] = static_cast<uint16_t>(l); });
  }
  const T* x = static_cast<const T*>(p.x) + b * p.x_stride_b;
  const int packs = static_cast<int>(p.R) * work.packs, step = static_cast<int>(gridDim.y * blockDim.x);
  for (int s = threadIdx.y; s < count; s += blockDim.y) {
    const int64_t segment = b * p.S + first + s;
    const int begin = static_cast<int>(sorts ? place[s] : p.start[segment + b]);  // S + 1 per sample
    const int end = static_cast<int>(sorts ? place[s + 1] : p.start[segment + b + 1]);
    // Without channels there still are totals.
    for (int j = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x); j < packs || (kMean && j == 0); j += step) {
      const int row = p.R == 1 ? 0 : j / work.packs;
      const T* from = x + row * p.x_stride_r + int64_t{j - row * work.packs} * V;
      const bool reads = !kMean || j < packs;
      Sum sum[V] = {}, total = 0;
      for (int u = begin; u < end; u += kTokensInFlight) {
        int token[kTokensInFlight];  // -1 after the last: it adds nothing
        Packed pack[kTokensInFlight];
        Sum w[kTokensInFlight];
#pragma unroll
        for (int i = 0; i < kTokensInFlight; ++i) {
          token[i] = u + i >= end ? -1 : sorts ? sorted[u + i] : static_cast<int>(p.slots[b * p.L + u + i]);
        }
#pragma unroll
        for (int i = 0; i < kTokensInFlight; ++i) {
          pack[i] = {};
          if (token[i] >= 0 && reads) pack[i] = *reinterpret_cast<const Packed*>(from + token[i] * p.x_stride_l);
          if constexpr (kMean) {
            w[i] = token[i] >= 0 ? 1 : 0;
            if (token[i] >= 0 && p.weight) w[i] = get(static_cast<const T*>(p.weight)[b * p.L + token[i]]);
          }
        }
#pragma unroll
        for (int i = 0; i < kTokensInFlight; ++i) {
          if constexpr (kMean) total += w[i];
#pragma unroll
          for (int v = 0; v < V; ++v) sum[v] += kMean ? w[i] * get(pack[i].value[v]) : get(pack[i].value[v]);
        }
      }
      if constexpr (kMean) {
        total += static_cast<Sum>(p.eps);
        const Sum scale = Sum{1} / total;
        constexpr Sum kInfinite = static_cast<Sum>(INFINITY);
        const bool empty = scale == kInfinite || scale == -kInfinite;  // nothing, or too little to have a reciprocal
        if (empty) total = 0;
#pragma unroll
        for (int v = 0; v < V; ++v) sum[v] = empty ? Sum{0} : sum[v] * scale;
        if (j == 0) static_cast<Sum*>(p.total)[segment] = total;
        if (p.mean && reads) {
          Pack<Sum, V> mean;
#pragma unroll
          for (int v = 0; v < V; ++v) mean.value[v] = sum[v];
          static_cast<Pack<Sum, V>*>(p.mean)[segment * packs + j] = mean;
        }
      }
      Packed out;
#pragma unroll
      for (int v = 0; v < V; ++v) out.value[v] = put<T>(sum[v]);
      if (reads) static_cast<Packed*>(p.out)[segment * packs + j] = out;
    }
  }
}

// Into how many ranges the segments of a sample are cut where each block sorts, if `slots` blocks run at once: as many
// as one round of blocks has room for, or two or three rounds if those leave fewer idle.
inline int64_t ranges_for(int64_t samples, int64_t slots) {
  int64_t ranges = 1;
  double least = 0;
  for (int64_t rounds = 1; rounds <= 3; ++rounds) {
    const int64_t here = rounds * slots / samples;
    if (here < 1) continue;
    const double time = static_cast<double>(rounds) * (1.0 / static_cast<double>(here) + kSortShare);
    if (least == 0 || time < least) least = time, ranges = here;
  }
  return ranges;
}

template <class T, int V, bool kMean>
cudaError_t launch_segment_sum(const SegmentSum& p, cudaStream_t stream) {
  const bool sorts = p.start == nullptr;
  const int64_t packs = p.R * (p.C / V);
  const unsigned lanes = lanes_for(packs, kMaxLanes), rows = kSumThreads / lanes;
  // Few blocks per sample where each of them sorts, then pieces of tokens to fill the GPU.
  const int64_t slots = int64_t{kSumBlocksPerSM} * device_attribute(cudaDevAttrMultiProcessorCount, 1);
  const int64_t wanted = sorts ? ranges_for(p.B, slots) : p.S;
  const int64_t rounded = ((p.S + wanted - 1) / wanted + rows - 1) / rows * rows;
  const int range = static_cast<int>(rounded < kMaxSumRange ? rounded : kMaxSumRange);
  const unsigned ranges = blocks_for(p.S, range);
  const int64_t pieces = (packs + lanes - 1) / lanes, free = slots / (p.B * ranges);
  return launch_in_runs(p.B, ranges, [&](int64_t first, int64_t samples) {
    const dim3 grid(static_cast<unsigned>(samples * ranges),
                    static_cast<unsigned>(pieces < 1 || free < 1 ? 1 : pieces < free ? pieces : free));
    const SegmentWork work{first, static_cast<int>(p.C / V), range, ranges};
    return launch_kernel(segment_sum_kernel<T, V, kMean>, grid, dim3(lanes, rows),
                         sorts ? segment_sum_bytes(range, p.L) : 0, stream, p, work);
  });
}

template <bool kMean>
cudaError_t segment_sum(SegmentSum p, DType dtype, cudaStream_t stream) {
  if (p.B * p.S == 0 || (!kMean && p.R * p.C == 0)) return cudaSuccess;
  if (p.R > 1 && p.x_stride_r == p.C) p.C *= p.R, p.R = 1;  // a token is one run
  return with_element(dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int V = kPackBytes / sizeof(T);
    const bool packed = p.C % V == 0 && aligned(p.x, kPackBytes) && aligned(p.out, kPackBytes) &&
                        aligned(p.mean, sizeof(Pack<Compute<T>, V>)) && p.x_stride_b % V == 0 &&
                        p.x_stride_l % V == 0 && (p.R == 1 || p.x_stride_r % V == 0);
    return packed ? launch_segment_sum<T, V, kMean>(p, stream) : launch_segment_sum<T, 1, kMean>(p, stream);
  });
}

}  // namespace hotkernels
