// What CUDA C++ has no syntax for: asynchronous copies, tensor cores, thread-block clusters. The tests replace this by
// what does the same on the host (tests/emulation/emulated_ptx.h), for which all shared memory must be dynamic.
#pragma once
#ifdef HK_EMULATION
#include "emulated_ptx.h"
#else
#include <cuda_runtime.h>

#include <cstdint>

#include "hotkernels/common.h"

namespace hotkernels::ptx {

// The block's dynamic shared memory, 128-byte aligned.
__device__ inline unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char hk_shared_memory[];
  return hk_shared_memory;
}

__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// The larger, or NaN if one is.
__device__ inline float max_or_nan(float a, float b) {
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
}

// Two floats rounded to float16, `low` in the lower half.
__device__ inline uint32_t pack_half(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

// d += a b, with a [16, 16] and b [16, 8] of float16 and d [16, 8] float32, spread over the warp. With g = lane / 4 and
// t = lane % 4, an operand is two neighbours in k:
//   a = {(g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8)} as (row, k),  b = {(2t, g), (2t + 8, g)} as (k, column),
//   d = {(g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)} as (row, column).
__device__ inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8 x 8 matrices of 16-bit numbers from shared memory: lane 8 m + i says where row i of matrix m is, 16 aligned
// bytes; lane l gets numbers 2 (l % 4) and the next of row l / 4, of matrix m in registers[m].
__device__ inline void load_matrices(uint32_t (&registers)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(shared_address(row))
               : "memory");
}

// Asynchronous copies from global to shared memory of 16 aligned bytes. A thread's copies form groups: after
// async_wait<n> at most its n last groups are still under way. Other threads see the copies after a barrier.
__device__ inline void async_copy(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
// Reads the first `valid` bytes only, which may be none, and fills the rest with 0.
__device__ inline void async_copy_part(void* shared, const void* global, int valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(valid)
               : "memory");
}
__device__ inline void async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ inline void async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Prefetches the line of this address into L2.
__device__ inline void prefetch(const void* global) { asm volatile("prefetch.global.L2 [%0];" ::"l"(global)); }

// Thread-block clusters: sm_90 and later. Elsewhere a kernel must not come here.
__device__ inline uint32_t cluster_rank() {
#if __CUDA_ARCH__ >= 900
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  __trap();
  return 0;
#endif
}

// A barrier for all threads of the cluster; writes to shared memory of any of its blocks before it are seen after it.
// Barriers of a cluster are for whole warps: the lanes come together first.
__device__ inline void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  __syncwarp();
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __trap();
#endif
}

// cluster_sync in two halves, for barriers that are initialised before `cluster_arrive` and used after `cluster_wait`:
// of other writes before, none need be seen after.
__device__ inline void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  __syncwarp();
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#else
  __trap();
#endif
}
__device__ inline void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  __syncwarp();
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __trap();
#endif
}

// Where block `rank` of the cluster holds what this block holds at `shared`.
template <class T>
__device__ inline T* in_block(T* shared, uint32_t rank) {
#if __CUDA_ARCH__ >= 900
  uint64_t there;
  asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(reinterpret_cast<uint64_t>(shared)), "r"(rank));
  return reinterpret_cast<T*>(there);
#else
  __trap();
  return shared;
#endif
}

// A barrier in shared memory. A phase of it ends when `count` threads have arrived and as many bytes as they said they
// expect have been stored by store_async; then the next begins. What threads read and wrote before they arrived, and
// what was stored, comes before what a thread does after it has waited.
__device__ inline void barrier_init(uint64_t* barrier, uint32_t count) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n\tfence.mbarrier_init.release.cluster;" ::
               "r"(shared_address(barrier)), "r"(count) : "memory");
#else
  __trap();
#endif
}
__device__ inline void barrier_arrive(uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
#else
  __trap();
#endif
}
__device__ inline void barrier_arrive(uint64_t* barrier, int expected_bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(expected_bytes)
               : "memory");
#else
  __trap();
#endif
}
// Arrives at the barrier that block `rank` of the cluster holds where this block holds `barrier`: who has waited there
// may overwrite what this thread has read and used. (Formally that takes the scope .cluster, which ptxas compiles to a
// fence of the whole GPU before each arrival. CUTLASS's ClusterBarrier arrives at .cta scope, too.)
__device__ inline void barrier_arrive_in(uint32_t rank, uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
  uint32_t at;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"(shared_address(barrier)), "r"(rank));
  asm volatile("mbarrier.arrive.release.cta.shared::cluster.b64 _, [%0];" ::"r"(at) : "memory");
#else
  __trap();
#endif
}
// Waits until the phase of this parity has ended: 0 for the first, third, ..., 1 for the others.
__device__ inline void barrier_wait(uint64_t* barrier, int parity) {
#if __CUDA_ARCH__ >= 900
  uint32_t ended;
  do {
    asm volatile("{\n\t.reg .pred ended;\n\t"
                 "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 ended, [%1], %2;\n\t"
                 "selp.u32 %0, 1, 0, ended;\n\t}"
                 : "=r"(ended)
                 : "r"(shared_address(barrier)), "r"(parity)
                 : "memory");
  } while (!ended);
#else
  __trap();
#endif
}
// Stores a value of four or eight bytes where block `rank` of the cluster holds what this block holds at `shared`, and
// counts its bytes at that block's barrier.
template <class T>
__device__ inline void store_async(T* shared, T value, uint64_t* barrier, uint32_t rank) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
#if __CUDA_ARCH__ >= 900
  uint32_t to, at;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to) : "r"(shared_address(shared)), "r"(rank));
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"(shared_address(barrier)), "r"(rank));
  if constexpr (sizeof(T) == 4) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::
                 "r"(to), "r"(bits_as<uint32_t>(value)), "r"(at) : "memory");
  } else {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b64 [%0], %1, [%2];" ::
                 "r"(to), "l"(bits_as<uint64_t>(value)), "r"(at) : "memory");
  }
#else
  __trap();
#endif
}

}  // namespace hotkernels::ptx
#endif
