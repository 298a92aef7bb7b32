// Inverts an index: who refers to me? A stable counting sort, so that sums over the answer have one fixed order.
#pragma once
#include "simd.h"

namespace hotkernels::HK_ISA {
namespace {

// index [M] in [-1, N). Afterwards slots[start[n] .. start[n + 1]) are the m with index[m] = n, ascending.
// start has N + 1 entries, slots M.
inline void invert_index(const int64_t* index, int64_t M, int64_t N, int64_t* start, int64_t* slots) {
  for (int64_t n = 0; n <= N; ++n) start[n] = 0;
  for (int64_t m = 0; m < M; ++m) {
    if (index[m] >= 0) ++start[index[m]];
  }
  int64_t end = 0;
  for (int64_t n = 0; n <= N; ++n) start[n] = end += start[n];  // end of n's slots
  for (int64_t m = M - 1; m >= 0; --m) {
    if (index[m] >= 0) slots[--start[index[m]]] = m;  // filled from the back: start[n] ends as the beginning
  }
}

}  // namespace
}  // namespace hotkernels::HK_ISA
