// Inverts an index: which entries refer to me? A stable sort, so that sums over the answer have one fixed order.
#pragma once
#include "hotkernels/common.h"
#include "hotkernels/cuda.h"

namespace hotkernels {

// Per row, slots[start[n] .. start[n + 1]) are the entries l with index[l] = n, ascending. All contiguous.
struct InvertIndex {
  int64_t G, L, N;       // rows, entries, tokens; on a GPU L and N below 2^30
  const int64_t* index;  // [G, L], values in [-1, N)
  int64_t* start;        // [G, N + 1]
  int64_t* slots;        // [G, L]
};

// Inverts rows [begin, end).
HK_CPU_KERNEL(void invert_index(const InvertIndex& p, int64_t begin, int64_t end))
// Inverts all of them on `stream`. A value outside [0, N) refers to nothing: no caller has checked them.
CudaError invert_index_cuda(const InvertIndex& p, void* scratch, CudaStream stream);

// Rows of at most so many entries are sorted within thread blocks: by a kernel of their own, or by the one that sums.
constexpr int64_t kMaxSortedInBlock = 8192;

// Bytes of device memory that one call needs, 16-byte aligned: about 16 per entry of longer rows.
int64_t invert_index_scratch_cuda(const InvertIndex& p);

}  // namespace hotkernels
