// invert_index: count, accumulate, place.
#include "hotkernels/invert_index.h"

namespace hotkernels::HK_ISA {

void invert_index(const InvertIndex& p, int64_t begin, int64_t end) {
  for (int64_t g = begin; g < end; ++g) {
    const int64_t* index = p.index + g * p.L;
    int64_t *start = p.start + g * (p.N + 1), *slots = p.slots + g * p.L;
    for (int64_t n = 0; n <= p.N; ++n) start[n] = 0;
    for (int64_t l = 0; l < p.L; ++l) {
      if (index[l] >= 0) ++start[index[l]];
    }
    int64_t total = 0;
    for (int64_t n = 0; n <= p.N; ++n) start[n] = total += start[n];  // the end of n's slots
    for (int64_t l = p.L - 1; l >= 0; --l) {
      if (index[l] >= 0) slots[--start[index[l]]] = l;  // filled from the back: start[n] ends as the beginning
    }
    for (int64_t l = total; l < p.L; ++l) slots[l] = -1;
  }
}

}  // namespace hotkernels::HK_ISA
