// What translated kernels include: PTX's instructions on the host, over emulation.h, named and called as ptx.py says.
#pragma once
#include <cstdint>

#include "ptx_matrices.h"
#include "ptx_memory.h"
#include "ptx_numbers.h"
#include "ptx_warps.h"

namespace ptx {

// What every translated kernel begins with, and every instruction of it. With HK_COUNT they are counted, over all
// threads.
#ifdef HK_COUNT
struct Counter {
  const char* kernel;
  uint64_t instructions = 0;
  Counter* next;
  explicit Counter(const char* kernel) : kernel(kernel), next(first) { first = this; }
  static inline Counter* first = nullptr;  // of all modules of a library
};
#define PTX_KERNEL(name) static ptx::Counter counter(#name)
#define PTX_INSTRUCTION ++counter.instructions;
#else
#define PTX_KERNEL(name)
#define PTX_INSTRUCTION
#endif

}  // namespace ptx

#ifdef HK_COUNT
// The name of the n-th kernel and its instructions; null after the last.
extern "C" __attribute__((weak)) const char* hk_ptx_count(unsigned n, uint64_t* instructions) {
  const ptx::Counter* c = ptx::Counter::first;
  for (; c != nullptr && n > 0; --n) c = c->next;
  if (c != nullptr) *instructions = c->instructions;
  return c == nullptr ? nullptr : c->kernel;
}
#endif
