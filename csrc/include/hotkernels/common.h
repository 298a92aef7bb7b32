// Types shared by every native contract: element types, strided views, a range runner, instruction sets.
#pragma once
#include <cstdint>

namespace hotkernels {

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
// avx512_bf16 runs those of avx512, where attention then multiplies bfloat16 in pairs.
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

// Whether kernels for AVX-512 can multiply bfloat16 in pairs. They name the instructions (AVX512-BF16) themselves,
// since only the running library knows whether the processor has them; Clang refuses names that its flags do not allow.
#if defined(__x86_64__) && !defined(__clang__)
#define HK_BF16_PAIRS 1
#else
#define HK_BF16_PAIRS 0
#endif

}  // namespace hotkernels
