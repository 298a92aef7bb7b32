// PTX's instructions on memory, and its barriers.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "ptx_numbers.h"

namespace ptx {

// An address in shared memory counts from its block's first byte; one of the cluster has, above that, its
// block's rank + 1.
constexpr int kRankShift = 24;
constexpr Bits kOffsetMask = (Bits{1} << kRankShift) - 1;
unsigned char* global(Bits address, int64_t bytes);
unsigned char* shared(Bits address, int64_t bytes);
unsigned char* generic(Bits address, int64_t bytes);
inline const unsigned char* parameter(Bits address, int64_t) { return reinterpret_cast<unsigned char*>(address); }

#define PTX_LOAD(name, memory)                                                  \
  template <class T, int n>                                                     \
  void name(Bits (&values)[n], Bits address) {                                  \
    const unsigned char* from = memory(address, n * T::bytes);                  \
    for (int i = 0; i < n; ++i) {                                               \
      Bits bits = 0;                                                            \
      std::memcpy(&bits, from + i * T::bytes, T::bytes);                        \
      values[i] = std::is_signed_v<typename T::N> ? cvt<T, T>(bits) : bits;     \
    }                                                                           \
  }
#define PTX_MEMORY(space, memory)                                               \
  PTX_LOAD(ld##space, memory)                                                   \
  template <class T, int n>                                                     \
  void st##space(Bits address, const Bits (&values)[n]) {                       \
    unsigned char* to = memory(address, n * T::bytes);                          \
    for (int i = 0; i < n; ++i) std::memcpy(to + i * T::bytes, &values[i], T::bytes); \
  }                                                                             \
  template <class T, class F>                                                   \
  Bits atom##space(Bits address, const F& next) {                               \
    Bits old[1], now[1];                                                        \
    ld##space<T>(old, address);                                                 \
    now[0] = next(old[0]);                                                      \
    st##space<T>(address, now);                                                 \
    return old[0];                                                              \
  }                                                                             \
  template <class T>                                                            \
  Bits atom##space##_add(Bits address, Bits x) {                                \
    return atom##space<T>(address, [=](Bits old) { return add<T>(old, x); });   \
  }                                                                             \
  template <class T>                                                            \
  Bits atom##space##_min(Bits address, Bits x) {                                \
    return atom##space<T>(address, [=](Bits old) { return min<T>(old, x); });   \
  }                                                                             \
  template <class T>                                                            \
  Bits atom##space##_max(Bits address, Bits x) {                                \
    return atom##space<T>(address, [=](Bits old) { return max<T>(old, x); });   \
  }
PTX_LOAD(ld_param, parameter)
PTX_LOAD(ld_global_nc, global)
PTX_MEMORY(, generic)
PTX_MEMORY(_global, global)
PTX_MEMORY(_shared, shared)

template <class T>
Bits cvta_to_global(Bits x) {
  return x;
}
template <class T>
Bits cvta_shared(Bits x) {  // to a generic address, which the host's are
  return reinterpret_cast<uint64_t>(hk_emulation::shared_memory() + x);
}
template <class T>
Bits mapa(Bits generic, Bits rank) {
  return reinterpret_cast<Bits>(hk_emulation::shared_memory_of(reinterpret_cast<void*>(generic), rank));
}
template <class T>
Bits mapa_shared_cluster(Bits shared, Bits rank) {
  return shared | (rank + 1) << kRankShift;
}
inline void prefetch_global_L2(Bits) {}

inline void cp_async_cg_shared_global(Bits to, Bits from, Bits size, Bits valid) {
  const auto bytes = static_cast<int>(size), count = static_cast<int>(valid);
  if (count > bytes) fail("an asynchronous copy reads more than it writes");
  if (count == bytes) global(from, bytes);
  for (int i = 0; i < count; ++i) global(from + i, 1);
  hk_emulation::copy_later(shared(to, bytes), reinterpret_cast<const void*>(from), bytes, count);
}
inline void cp_async_cg_shared_global(Bits to, Bits from, Bits size) {
  cp_async_cg_shared_global(to, from, size, size);
}
template <class... X>
void cp_async_ca_shared_global(X... x) {
  cp_async_cg_shared_global(x...);
}
inline void cp_async_commit_group() { hk_emulation::commit_copies(); }
inline void cp_async_wait_group(Bits pending) { hk_emulation::wait_for_copies(static_cast<int>(pending)); }

// Barriers.
inline void bar_sync(Bits barrier) {
  if (barrier != 0) fail("barriers of a block but the first are not emulated");
  hk_emulation::block_barrier();
}
inline void barrier_cluster_arrive_release_aligned() {}
inline void barrier_cluster_arrive_relaxed_aligned() {}
inline void barrier_cluster_wait_acquire_aligned() { hk_emulation::cluster_barrier(); }
inline void fence_mbarrier_init_release_cluster() {}
inline void fence_proxy_async_shared_cta() {}
inline hk_emulation::Barrier* barrier(Bits address) {
  return reinterpret_cast<hk_emulation::Barrier*>(shared(address, 8));
}
inline hk_emulation::Barrier* barrier_in_cluster(Bits address) {
  const Bits rank = address >> kRankShift;
  if (rank == 0) fail("an arrival in another block takes an address of the cluster's");
  return reinterpret_cast<hk_emulation::Barrier*>(
      hk_emulation::shared_memory_of(barrier(address & kOffsetMask), static_cast<unsigned>(rank - 1)));
}
template <class T>
void mbarrier_init_shared_cta(Bits address, Bits count) {
  hk_emulation::barrier_init(barrier(address), static_cast<unsigned>(count));
}
template <class T>
void mbarrier_arrive_release_cta_shared_cta(Bits address) {
  hk_emulation::barrier_arrive(barrier(address), 0);
}
template <class T>
void mbarrier_arrive_expect_tx_release_cta_shared_cta(Bits address, Bits bytes) {
  hk_emulation::barrier_arrive(barrier(address), static_cast<int>(bytes));
}
template <class T>
void mbarrier_arrive_release_cta_shared_cluster(Bits address) {
  hk_emulation::barrier_arrive(barrier_in_cluster(address), 0);
}
template <class T>
Bits mbarrier_try_wait_parity_acquire_cluster_shared_cta(Bits address, Bits parity) {
  hk_emulation::barrier_wait(barrier(address), static_cast<int>(parity));
  return 1;
}
template <class T>
void st_async_weak_shared_cluster_mbarrier_complete_tx_bytes(Bits to, Bits value, Bits at) {
  const Bits rank = to >> kRankShift;
  if (rank == 0 || rank != at >> kRankShift) fail("an asynchronous store and its barrier are of one block");
  hk_emulation::store_later(shared(to & kOffsetMask, T::bytes), &value, T::bytes, barrier(at & kOffsetMask), rank - 1);
}

}  // namespace ptx
