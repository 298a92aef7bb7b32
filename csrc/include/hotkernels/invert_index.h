// Inverts an index: which entries refer to me? A stable sort, so that sums over the answer have one fixed order.
#pragma once
#include "hotkernels/common.h"
#include "hotkernels/cuda.h"

namespace hotkernels {

// For rows [begin, end) of index [G, L], values in [-1, N): afterwards slots[start[n] .. start[n + 1]) are the entries
// l with index[l] = n, ascending. start is [G, N + 1], slots [G, L]; all contiguous.
HK_CPU_KERNEL(void invert_index(const int64_t* index, int64_t L, int64_t N, int64_t* start, int64_t* slots,
                                int64_t begin, int64_t end))

// The same for all G rows on `stream`. A value outside [0, N) refers to nothing: nobody looked at the values before.
struct InvertIndex {
  int64_t G, L, N;       // L and N below 2^30
  const int64_t* index;  // [G, L]
  int64_t *start, *slots;
};

// Rows of at most so many entries are sorted within thread blocks: by a kernel of their own, or by the one that sums.
constexpr int64_t kMaxSortedInBlock = 8192;

// Bytes of device memory that one call needs, 16-byte aligned: about 16 per entry of longer rows.
int64_t invert_index_scratch_cuda(const InvertIndex& p);
CudaError invert_index_cuda(const InvertIndex& p, void* scratch, CudaStream stream);

}  // namespace hotkernels
