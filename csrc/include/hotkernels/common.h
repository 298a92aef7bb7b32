// What native contracts and kernels share: element types, a range runner, instruction sets, functions for CPU and GPU.
#pragma once
#include <cstdint>
#include <cstring>

// Marks functions that CPU and CUDA kernels share. They must have internal linkage (static, or an unnamed namespace):
// csrc/cpu compiles them once per instruction set, and of copies with external linkage the linker would keep only one,
// perhaps that for AVX-512, which an older processor cannot run.
#ifdef __CUDACC__
#define HK_HOST_DEVICE __host__ __device__
#else
#define HK_HOST_DEVICE
#endif

namespace hotkernels {

template <class To, class From>
HK_HOST_DEVICE static inline To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  memcpy(&y, &x, sizeof y);
  return y;
}

enum class DType : int32_t { f32, f16, bf16, f64 };

// How a kernel asks its caller for parallelism. csrc owns no threads: the caller decides, and a kernel's result never
// depends on how a range was cut. `run` covers [0, count) with calls of task(state, begin, end).
struct Runner {
  void (*run)(int64_t count, void (*task)(void* state, int64_t begin, int64_t end), void* state);
  int32_t threads;  // an upper bound of the tasks that run at once
};

inline void run_serially(int64_t count, void (*task)(void*, int64_t, int64_t), void* state) { task(state, 0, count); }
constexpr Runner kSerial{run_serially, 1};

// Every CPU kernel is compiled once per instruction set, each into a namespace of its own.
// avx512_bf16 runs those of avx512, and attention in them then multiplies bfloat16 in pairs.
enum class Isa : int32_t { base, avx2, avx512, avx512_bf16 };

#if defined(__x86_64__)
#define HK_CPU_KERNEL(...)          \
  namespace base { __VA_ARGS__; }   \
  namespace avx2 { __VA_ARGS__; }   \
  namespace avx512 { __VA_ARGS__; }
#define HK_CPU_DISPATCH(isa, kernel)                       \
  ((isa) >= ::hotkernels::Isa::avx512 ? ::hotkernels::avx512::kernel \
   : (isa) == ::hotkernels::Isa::avx2 ? ::hotkernels::avx2::kernel   \
                                      : ::hotkernels::base::kernel)
#else
#define HK_CPU_KERNEL(...) \
  namespace base { __VA_ARGS__; }
#define HK_CPU_DISPATCH(isa, kernel) (::hotkernels::base::kernel)
#endif

// Whether the AVX-512 kernels can multiply bfloat16 in pairs. They do so in inline assembly (AVX512-BF16), because only
// at run time is it known whether the processor can; Clang refuses instructions that its flags do not allow.
#if defined(__x86_64__) && !defined(__clang__)
#define HK_BF16_PAIRS 1
#else
#define HK_BF16_PAIRS 0
#endif

}  // namespace hotkernels
