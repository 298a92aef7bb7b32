// Scratch memory cut into pieces: a kernel's caller allocates once, the kernel says how much and lays it out.
#pragma once
#include <cstdint>

namespace hotkernels::HK_ISA {
namespace {

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// Hands out 64-byte aligned pieces of the memory from an address on; from address 0 it only counts.
struct Arena {
  uintptr_t next;
  template <class T>
  T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(next);
    next += static_cast<uintptr_t>(round_up(count * static_cast<int64_t>(sizeof(T)), 64));
    return p;
  }
};

}  // namespace
}  // namespace hotkernels::HK_ISA
