// invert_index: short rows by a counting sort within a block, long ones by a radix sort. Both are stable.
#include <cuda_runtime.h>

#include "block_sort.h"
#include "element.h"
#include "hotkernels/invert_index.h"
#include "launch.h"
#include "ptx.h"

namespace hotkernels {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxRange = 511;  // tokens whose entries one block counts
static_assert(sizeof(int) * sort_in_block_ints(kThreads, kMaxRange + 1) <= 48 << 10, "more would have to be asked for");

// ---- short rows ----------------------------------------------------------------------------------------------------

// A block per row and range of tokens. It reads the whole row, and also counts the entries that go before its range.
__global__ void __launch_bounds__(kThreads)
    invert_short_rows_kernel(InvertIndex p, int64_t first_row, int range, unsigned ranges) {
  int* shared = reinterpret_cast<int*>(ptx::shared_memory());
  const int64_t g = first_row + blockIdx.x / ranges, first = int64_t{blockIdx.x % ranges} * range;
  const int count = static_cast<int>(min(p.N - first, int64_t{range}));
  const int64_t* index = p.index + g * p.L;
  int64_t *start = p.start + g * (p.N + 1) + first, *slots = p.slots + g * p.L;
  const auto bucket_of = [&](int l) {  // 0: before the range
    const int64_t n = index[l];
    return n < 0 || n >= first + count ? -1 : n < first ? 0 : static_cast<int>(n - first) + 1;
  };
  const auto place = [&](int at, int l, int bucket) {
    if (bucket > 0) slots[at] = l;
  };
  sort_in_block(static_cast<int>(p.L), count + 1, shared, bucket_of, place);
  const int written = first + count == p.N ? count + 1 : count;  // the next range's first token is not ours
  for (int c = thread_of_block(); c < written; c += threads_per_block()) start[c] = shared[c + 1];
}

cudaError_t invert_short_rows(const InvertIndex& p, cudaStream_t stream) {
  const int range = static_cast<int>(p.N < kMaxRange ? p.N : kMaxRange);
  const int64_t ranges = p.N <= range ? 1 : (p.N + range - 1) / range;
  const int64_t warps = p.L >= kThreads ? kThreads / kWarp : p.L <= kWarp ? 1 : (p.L + kWarp - 1) / kWarp;
  const int threads = static_cast<int>(warps) * kWarp;
  return launch_in_runs(p.G, ranges, [&](int64_t first, int64_t rows) {
    return launch_kernel(invert_short_rows_kernel, static_cast<unsigned>(rows * ranges), threads,
                         sizeof(int) * sort_in_block_ints(threads, range + 1), stream, p, first, range,
                         static_cast<unsigned>(ranges));
  });
}

// ---- long rows -----------------------------------------------------------------------------------------------------
// Least significant digit first, 8 bits at a time. A key is a token, or N for an entry that refers to nothing; each
// pass counts the digits of every tile, adds up the counts before each tile, and moves keys and slots to their places.

constexpr int kDigitBits = 8;
constexpr int kDigits = 1 << kDigitBits;  // as many as a block has threads: a thread has a digit of its own
constexpr int kTile = 2048;
static_assert(kDigits == kThreads);

struct Radix {
  InvertIndex p;
  unsigned tiles;                  // per row
  int32_t *counts, *totals;        // [G, digits, tiles], after the scan of the tiles before; [G, digits]
  const int32_t *keys, *slots;     // [G, L] of the pass before; null in the first one
  int32_t *keys_out, *slots_out;   // [G, L]; in the last pass slots_out is null: they go to p.slots
  int shift;                       // of this pass's digit

  __device__ int key(int64_t at) const {  // at: in [0, G * L)
    if (keys) return keys[at];
    const int64_t n = p.index[at];
    return static_cast<int>(n >= 0 && n < p.N ? n : p.N);
  }
  __device__ int digit(int64_t at) const { return key(at) >> shift & (kDigits - 1); }
};

// What a block of a kernel over [G, tiles] works on.
struct Tile {
  int64_t g, tile, first;  // first: of its entries, in [0, G * L)
  int size;

  __device__ explicit Tile(const Radix& r) : g(blockIdx.x / r.tiles), tile(blockIdx.x % r.tiles) {
    first = g * r.p.L + tile * kTile;
    size = static_cast<int>(min(r.p.L - tile * kTile, int64_t{kTile}));
  }
};

__global__ void __launch_bounds__(kThreads) count_digits_kernel(Radix r) {
  int* count = reinterpret_cast<int*>(ptx::shared_memory());
  const int thread = thread_of_block();
  const Tile tile(r);
  count[thread] = 0;
  __syncthreads();
  int digit[kTile / kThreads];
#pragma unroll
  for (int i = 0; i < kTile / kThreads; ++i) {
    const int l = i * kThreads + thread;
    digit[i] = l < tile.size ? r.digit(tile.first + l) : -1;
  }
#pragma unroll
  for (int i = 0; i < kTile / kThreads; ++i) {
    if (digit[i] >= 0) atomicAdd(&count[digit[i]], 1);
  }
  __syncthreads();
  r.counts[(tile.g * kDigits + thread) * r.tiles + tile.tile] = count[thread];
}

// A block per row and digit.
__global__ void __launch_bounds__(kThreads) scan_tiles_kernel(Radix r) {
  int* sums = reinterpret_cast<int*>(ptx::shared_memory());
  int32_t* counts = r.counts + int64_t{blockIdx.x} * r.tiles;
  const int threads = threads_per_block();
  int before = 0;
  for (unsigned base = 0; base < r.tiles; base += threads) {
    const unsigned t = base + thread_of_block();
    const Scan scan = scan_block(t < r.tiles ? counts[t] : 0, sums);
    if (t < r.tiles) counts[t] = before + scan.before;
    before += scan.total;
    __syncthreads();
  }
  if (thread_of_block() == 0) r.totals[blockIdx.x] = before;
}

__global__ void __launch_bounds__(kThreads) move_by_digit_kernel(Radix r) {
  int* base = reinterpret_cast<int*>(ptx::shared_memory());  // where each digit's entries of this tile go
  int *sums = base + kDigits, *start = sums + kThreads / kWarp;
  const Tile tile(r);
  const int64_t digit = tile.g * kDigits + thread_of_block();
  base[thread_of_block()] = scan_block(r.totals[digit], sums).before + r.counts[digit * r.tiles + tile.tile];
  const auto digit_of = [&](int l) { return r.digit(tile.first + l); };
  const auto place = [&](int at, int l, int d) {
    const int64_t from = tile.first + l, to = tile.g * r.p.L + base[d] + (at - start[d]);
    const int slot = r.slots ? r.slots[from] : static_cast<int>(tile.tile * kTile) + l;
    r.keys_out[to] = r.key(from);
    if (r.slots_out) {
      r.slots_out[to] = slot;
    } else {
      r.p.slots[to] = slot;
    }
  };
  sort_in_block(tile.size, kDigits, start, digit_of, place);
}

// A thread per token and row looks its first entry up among the sorted keys.
__global__ void __launch_bounds__(kThreads) find_starts_kernel(Radix r, unsigned blocks_per_row) {
  const int64_t g = blockIdx.x / blocks_per_row, n = int64_t{blockIdx.x % blocks_per_row} * kThreads + threadIdx.x;
  if (n > r.p.N) return;
  const int32_t* keys = r.keys + g * r.p.L;
  int64_t low = 0, high = r.p.L;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (keys[middle] < n) low = middle + 1;
    else high = middle;
  }
  r.p.start[g * (r.p.N + 1) + n] = low;
}

unsigned tiles_of(const InvertIndex& p) { return blocks_for(p.L, kTile); }

cudaError_t invert_long_rows(const InvertIndex& p, void* scratch, cudaStream_t stream) {
  const int64_t entries = p.G * p.L;
  auto* memory = static_cast<int32_t*>(scratch);
  int32_t* buffers[2] = {memory, memory + 2 * entries};  // keys, then slots
  Radix r{p, tiles_of(p)};
  r.totals = memory + 4 * entries;
  r.counts = r.totals + p.G * kDigits;

  // No grid is too large: one of 2^31 blocks would be an index that no GPU's memory holds.
  const auto launch = [&](int64_t blocks, int threads, int ints, auto* kernel, const auto&... more) {
    return launch_kernel(kernel, static_cast<unsigned>(blocks), threads, sizeof(int) * ints, stream, r, more...);
  };
  const int64_t tiles = p.G * r.tiles;
  constexpr int kWarps = kThreads / kWarp;
  const int scanners = r.tiles <= kWarp ? kWarp : kThreads;
  cudaError_t error = cudaSuccess;
  for (int pass = 0; error == cudaSuccess && (pass == 0 || p.N >> (pass * kDigitBits) > 0); ++pass) {
    r.shift = pass * kDigitBits;
    r.keys_out = buffers[pass % 2];
    r.slots_out = p.N >> (r.shift + kDigitBits) > 0 ? r.keys_out + entries : nullptr;
    error = launch(tiles, kThreads, kDigits, count_digits_kernel);
    if (error == cudaSuccess) error = launch(p.G * kDigits, scanners, kWarps, scan_tiles_kernel);
    const int ints = kDigits + kWarps + sort_in_block_ints(kThreads, kDigits);
    if (error == cudaSuccess) error = launch(tiles, kThreads, ints, move_by_digit_kernel);
    r.keys = r.keys_out, r.slots = r.slots_out;
  }
  if (error != cudaSuccess) return error;
  const unsigned blocks = blocks_for(p.N + 1, kThreads);
  return launch(p.G * blocks, kThreads, 0, find_starts_kernel, blocks);
}

}  // namespace

int64_t invert_index_scratch_cuda(const InvertIndex& p) {
  if (p.L <= kMaxSortedInBlock) return 0;
  return static_cast<int64_t>(sizeof(int32_t)) * p.G * (4 * p.L + kDigits + kDigits * tiles_of(p));
}

CudaError invert_index_cuda(const InvertIndex& p, void* scratch, CudaStream stream) {
  if (p.G == 0) return cudaSuccess;
  return p.L <= kMaxSortedInBlock ? invert_short_rows(p, stream) : invert_long_rows(p, scratch, stream);
}

}  // namespace hotkernels
