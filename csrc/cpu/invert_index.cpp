// invert_index: count, accumulate, place.
#include "hotkernels/invert_index.h"

namespace hotkernels::HK_ISA {

void invert_index(const int64_t* indices, int64_t L, int64_t N, int64_t* starts, int64_t* slots_of, int64_t begin,
                  int64_t end_row) {
  for (int64_t g = begin; g < end_row; ++g) {
    const int64_t* index = indices + g * L;
    int64_t* start = starts + g * (N + 1);
    int64_t* slots = slots_of + g * L;
    for (int64_t n = 0; n <= N; ++n) start[n] = 0;
    for (int64_t l = 0; l < L; ++l) {
      if (index[l] >= 0) ++start[index[l]];
    }
    int64_t end = 0;
    for (int64_t n = 0; n <= N; ++n) start[n] = end += start[n];  // end of n's slots
    for (int64_t l = L - 1; l >= 0; --l) {
      if (index[l] >= 0) slots[--start[index[l]]] = l;  // filled from the back: start[n] ends as the beginning
    }
    for (int64_t l = end; l < L; ++l) slots[l] = -1;
  }
}

}  // namespace hotkernels::HK_ISA
