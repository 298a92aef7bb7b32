// Chooses the instruction set of the CPU kernels, once; _isa(force) returns it, or changes it for tests and benchmarks.
// _is_intel() says whether the processor is Intel's: MKL, with which PyTorch multiplies, chooses its kernels by that.
#include <atomic>
#include <cstdlib>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "check.h"

namespace hotkernels {
namespace {

constexpr const char* kNames[] = {"base", "avx2", "avx512", "avx512_bf16"};

#if defined(__x86_64__)
bool has_f16c() {  // not by __builtin_cpu_supports: older Clang does not know the name
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

bool is_intel() {
#if defined(__x86_64__)
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

Isa widest() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
#if HK_BF16_PAIRS  // without it, the compiler may not know the name
    if (__builtin_cpu_supports("avx512bf16")) return Isa::avx512_bf16;
#endif
    return Isa::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()) return Isa::avx2;
#endif
  return Isa::base;
}

// Pairs of bfloat16 were measured on AMD's processors only; on Intel's they are used only if asked for.
Isa chosen_unasked() { return widest() == Isa::avx512_bf16 && is_intel() ? Isa::avx512 : widest(); }

Isa named(const std::string& name, const char* arg) {
  const Isa limit = widest();
  for (int i = 0; i <= static_cast<int>(limit); ++i) {
    if (name == kNames[i]) return static_cast<Isa>(i);
  }
  std::string served;
  for (int i = 0; i <= static_cast<int>(limit); ++i) served += std::string(i ? ", " : "") + kNames[i];
  HK_CHECK(false, "hotkernels", arg, "an instruction set of this machine (" << served << ")", "'" << name << "'");
  return limit;
}

std::atomic<int>& current() {
  static std::atomic<int> chosen = [] {
    const char* name = std::getenv("HOTKERNELS_ISA");
    return static_cast<int>(name && *name ? named(name, "HOTKERNELS_ISA") : chosen_unasked());
  }();
  return chosen;
}

std::string isa_name(std::optional<std::string> force) {
  if (force) current() = static_cast<int>(named(*force, "force"));
  return kNames[current()];
}

}  // namespace

Isa isa() { return static_cast<Isa>(current().load(std::memory_order_relaxed)); }

}  // namespace hotkernels

STABLE_TORCH_LIBRARY_IMPL(hotkernels, CompositeExplicitAutograd, m) {
  m.impl("_isa", TORCH_BOX(&hotkernels::isa_name));
  m.impl("_is_intel", TORCH_BOX(&hotkernels::is_intel));
}
