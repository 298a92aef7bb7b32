// Inverts an index: which entries refer to me? A stable counting sort, so that sums over the answer have one fixed order.
#pragma once
#include "hotkernels/common.h"

namespace hotkernels {

// For rows [begin, end) of index [G, L], values in [-1, N): afterwards slots[start[n] .. start[n + 1]) are the entries l
// with index[l] = n, ascending. start is [G, N + 1], slots [G, L]; all contiguous.
HK_CPU_KERNEL(void invert_index(const int64_t* index, int64_t L, int64_t N, int64_t* start, int64_t* slots, int64_t begin,
                                int64_t end))

}  // namespace hotkernels
