// Kernels that are right, or lack one thing on purpose: what the emulation is for is to tell them apart.
#include <vector>

#include "../../csrc/cuda/ptx.h"

namespace {

using namespace hotkernels;

constexpr int kThreads = 96;

// Sums 96 values through shared memory. bug: no barrier between writing and reading.
__global__ void block_sum(const float* x, float* out, bool bug) {
  auto* shared = reinterpret_cast<float*>(ptx::shared_memory());
  shared[threadIdx.x] = x[threadIdx.x];
  if (!bug) __syncthreads();
  float sum = 0;
  for (int t = 0; t < kThreads; ++t) sum += shared[t];
  out[threadIdx.x] = sum;
}

// Sums through shared memory twice. bug: no barrier before the memory is used again.
__global__ void used_again(const float* x, float* out, bool bug) {
  auto* shared = reinterpret_cast<float*>(ptx::shared_memory());
  float sum = 0;
  for (int pass = 0; pass < 2; ++pass) {
    shared[threadIdx.x] = pass ? 0 : x[threadIdx.x];
    __syncthreads();
    for (int t = 0; t < kThreads; ++t) sum += shared[t];
    if (!bug) __syncthreads();
  }
  out[threadIdx.x] = sum;
}

// Sums per warp by shuffles, then over warps by lane 0 of each. bug: lanes read what others wrote without __syncwarp.
__global__ void warp_sum(const float* x, float* out, bool bug) {
  auto* shared = reinterpret_cast<float*>(ptx::shared_memory());
  float sum = x[threadIdx.x];
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
  shared[threadIdx.x] = sum;
  if (!bug) __syncwarp();
  const float neighbour = shared[threadIdx.x ^ 1];
  __syncthreads();
  shared[threadIdx.x] = neighbour;
  __syncthreads();
  out[threadIdx.x] = shared[0] + shared[32] + shared[64];
}

// Each block of a cluster of two sums its half; both add the halves. bug: no cluster barrier in between.
__global__ void cluster_sum(const float* x, float* out, bool bug) {
  auto* shared = reinterpret_cast<float*>(ptx::shared_memory());
  const unsigned rank = ptx::cluster_rank();
  if (threadIdx.x == 0) {
    float sum = 0;
    for (int t = 0; t < kThreads / 2; ++t) sum += x[rank * (kThreads / 2) + t];
    shared[0] = sum;
  }
  if (bug) __syncthreads();
  else ptx::cluster_sync();
  const float sum = *ptx::in_block(shared, 0) + *ptx::in_block(shared, 1);
  ptx::cluster_sync();
  if (rank == 0) out[threadIdx.x] = sum;
}

// Block 0 of a cluster of two reads what block 1 summed. bug: block 1 may have ended by then.
__global__ void sum_of_other(const float* x, float* out, bool bug) {
  auto* shared = reinterpret_cast<float*>(ptx::shared_memory());
  const unsigned rank = ptx::cluster_rank();
  if (threadIdx.x == 0) {
    shared[0] = 0;
    for (int t = 0; t < kThreads; ++t) shared[0] += x[t];
  }
  ptx::cluster_sync();
  if (rank == 0) out[threadIdx.x] = *ptx::in_block(shared, 1);
  if (!bug) ptx::cluster_sync();
}

// Each block of a cluster of two stores its half for both. bug: does not wait for what the other stores.
__global__ void handed_sum(const float* x, float* out, bool bug) {
  auto* shared = reinterpret_cast<float*>(ptx::shared_memory());
  auto* barrier = reinterpret_cast<uint64_t*>(shared + kThreads);
  const unsigned rank = ptx::cluster_rank();
  if (threadIdx.x == 0) ptx::barrier_init(barrier, 1);
  ptx::cluster_sync();
  if (threadIdx.x < kThreads / 4) {
    const int i = rank * (kThreads / 2) + 2 * threadIdx.x;
    shared[i] = x[i], shared[i + 1] = x[i + 1];
    for (int t = i; t < i + 2; ++t) ptx::store_async(shared + t, shared[t], barrier, rank ^ 1);
  }
  __syncthreads();
  if (threadIdx.x == 0) ptx::barrier_arrive(barrier, kThreads / 2 * 4);
  if (!bug) ptx::barrier_wait(barrier, 0);
  float sum = 0;
  for (int t = 0; t < kThreads; ++t) sum += shared[t];
  if (rank == 0) out[threadIdx.x] = sum;
  ptx::cluster_sync();
}

// Block 1 of a cluster of two stores zeros over what block 0 sums, once all its threads have said that they did. bug:
// does not wait for that.
__global__ void told_sum(const float* x, float* out, bool bug) {
  auto* shared = reinterpret_cast<float*>(ptx::shared_memory());
  auto* barrier = reinterpret_cast<uint64_t*>(shared + kThreads);
  const bool sums = ptx::cluster_rank() == 0;
  if (threadIdx.x == 0) ptx::barrier_init(barrier, sums ? 1 : kThreads);
  shared[threadIdx.x] = x[threadIdx.x];
  ptx::cluster_sync();
  if (sums) {
    if (threadIdx.x == 0) ptx::barrier_arrive(barrier, kThreads * 4);
    float sum = 0;
    for (int t = 0; t < kThreads; ++t) sum += shared[t];
    out[threadIdx.x] = sum;
    ptx::barrier_arrive_in(1, barrier);
    ptx::barrier_wait(barrier, 0);  // for the zeros
  } else {
    if (!bug) ptx::barrier_wait(barrier, 0);
    ptx::store_async(shared + threadIdx.x, 0.0f, barrier, 0);
  }
  ptx::cluster_sync();
}

// Brings the values in asynchronously. bug: does not wait for the second half.
__global__ void copied_sum(const float* x, float* out, bool bug) {
  auto* shared = reinterpret_cast<float*>(ptx::shared_memory());
  for (int half = 0; half < 2; ++half) {
    if (threadIdx.x < kThreads / 8) {
      const int i = half * kThreads / 2 + 4 * threadIdx.x;
      ptx::async_copy(shared + i, x + i);
    }
    ptx::async_commit();
  }
  if (bug) ptx::async_wait<1>();
  else ptx::async_wait<0>();
  __syncthreads();
  float sum = 0;
  for (int t = 0; t < kThreads; ++t) sum += shared[t];
  out[threadIdx.x] = sum;
}

// bug: one value too many for the shared memory.
__global__ void outside(const float* x, float* out, bool bug) {
  auto* shared = reinterpret_cast<float*>(ptx::shared_memory());
  shared[threadIdx.x + (bug && threadIdx.x == kThreads - 1)] = x[threadIdx.x];
  block_sum(x, out, false);
}

// bug: half of a warp never comes to the barrier of the whole.
__global__ void divergent(const float* x, float* out, bool bug) {
  if (bug && threadIdx.x < 16) __syncwarp();
  block_sum(x, out, false);
}

// The sum of all values as a product with ones on the tensor core, from [16, 8] blocks. bug: two operands exchanged.
__global__ void tensor_core_sum(const float* x, float* out, bool bug) {
  const int g = (threadIdx.x & 31) / 4, t = threadIdx.x & 3;
  const float* row = x + 8 * g + 2 * t;
  uint32_t a[4] = {ptx::pack_half(row[0], row[1]), g < 4 ? ptx::pack_half(row[64], row[65]) : 0, 0, 0};
  const uint32_t ones = g == 0 ? ptx::pack_half(1, 1) : 0, b[2] = {ones, ones};
  if (bug) std::swap(a[1], a[2]);
  float d[4] = {};
  ptx::mma_m16n8k16(d, a, b);
  auto* shared = reinterpret_cast<float*>(ptx::shared_memory());
  if (threadIdx.x < 32 && t == 0) shared[g] = d[0], shared[g + 8] = d[2];
  __syncthreads();
  float sum = 0;
  for (int row = 0; row < 12; ++row) sum += shared[row] * (row + 1);
  float rest = 0;
  for (int row = 0; row < 12; ++row) {
    for (int i = 0; i < 8; ++i) rest += x[8 * row + i] * row;
  }
  out[threadIdx.x] = sum - rest;
}

// Reads four values at a time. bug: from the fourth on, which is no place for that.
__global__ void wide_sum(const float* x, float* out, bool bug) {
  const int first = bug ? 3 : 0;
  float sum = 0;
  for (int t = 0; t < first; ++t) sum += x[t];
  for (int t = first; t < kThreads; t += 4) {
    if (t + 4 > kThreads) {
      sum += x[t];
    } else {
      const float4 four = *reinterpret_cast<const float4*>(x + t);
      sum += four.x + four.y + four.z + four.w;
    }
  }
  out[threadIdx.x] = sum;
}

}  // namespace

// The largest error of kernel `which` over its 96 threads; -1 if the launch failed, -2 if there is no such kernel.
extern "C" __attribute__((visibility("default"))) double hk_emulation_selftest(int which, bool bug) {
  using Kernel = void (*)(const float*, float*, bool);
  constexpr Kernel kernels[] = {cluster_sum, sum_of_other, handed_sum, told_sum,  // in clusters, these four
                                block_sum,   used_again,   warp_sum,   copied_sum,
                                outside,     divergent,    wide_sum,   tensor_core_sum};
  if (which >= static_cast<int>(std::size(kernels))) return -2;
  std::vector<float> x(kThreads), out(kThreads, NAN);
  float sum = 0;
  for (int t = 0; t < kThreads; ++t) sum += x[t] = static_cast<float>(t * t % 61);
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {2, 1, 1};
  cudaLaunchConfig_t config{};
  const bool pair = which < 4;
  config.gridDim = dim3(pair ? 2 : 1), config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kThreads * sizeof(float) + pair * sizeof(uint64_t);
  config.attrs = &cluster, config.numAttrs = pair;
  const float* given = x.data();
  if (cudaLaunchKernelEx(&config, kernels[which], given, out.data(), bug) != cudaSuccess) return -1;
  double error = 0;
  for (const float value : out) {
    error = std::isfinite(value) ? std::max(error, double{std::fabs(value - sum)}) : INFINITY;
  }
  return error;
}
