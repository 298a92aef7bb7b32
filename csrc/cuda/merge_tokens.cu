// merge_tokens: forward a sum per cluster (segment_sum.h), backward a gather of each token's cluster.
#include "hotkernels/merge_tokens.h"
#include "launch.h"

#include "segment_sum.h"

namespace hotkernels {
namespace {

constexpr int kThreads = 256;

// blockDim = (threads per token, tokens per block); with kWeight the threads of a token are in one warp, and share the
// products that are its weight's gradient.
template <class T, int V, bool kWeight>
__global__ void __launch_bounds__(kThreads)
    merge_tokens_bwd_kernel(MergeTokens p, int64_t first_sample, unsigned tokens, int packs) {
  using Packed = Pack<T, V>;
  using Sum = Compute<T>;
  const unsigned number = blockIdx.x * blockDim.y + threadIdx.y, N = static_cast<unsigned>(p.N), sample = number / N;
  const bool exists = number < tokens;  // if not, its threads still take part in sums
  const int64_t b = first_sample + sample, t = first_sample * p.N + number, m = exists ? p.assignment[t] : -1;
  const bool named = m >= 0 && m < p.M;
  const int64_t cluster = named ? b * p.M + m : 0;
  const Sum total = named ? static_cast<const Sum*>(p.total)[cluster] : Sum{0};
  const bool there = total != 0;  // not where the cluster counts as empty either
  const Sum scale = there ? Sum{1} / total : Sum{0};
  const Sum weight = there && p.weight ? get(static_cast<const T*>(p.weight)[t]) : Sum{1};
  const Packed* grad = static_cast<const Packed*>(p.grad_out) + cluster * packs;
  const T* x = static_cast<const T*>(p.x) + b * p.x_stride_b + (number - sample * N) * p.x_stride_n;
  Packed* grad_x = static_cast<Packed*>(p.grad_x) + t * packs;
  Sum dot = 0;
  for (int j = threadIdx.x; exists && j < packs; j += blockDim.x) {
    Packed out, from{};
    if (there) from = grad[j];
#pragma unroll
    for (int v = 0; v < V; ++v) out.value[v] = put<T>(there ? get(from.value[v]) * (weight * scale) : Sum{0});
    grad_x[j] = out;
    if (kWeight && there) {  // d out / d w = (x - out) / total, with out as it was before rounding
      const Packed token = reinterpret_cast<const Packed*>(x)[j];
      const Pack<Sum, V> mean = static_cast<const Pack<Sum, V>*>(p.mean)[cluster * packs + j];
#pragma unroll
      for (int v = 0; v < V; ++v) dot += get(from.value[v]) * (get(token.value[v]) - mean.value[v]);
    }
  }
  if constexpr (kWeight) {
    for (unsigned lanes = blockDim.x / 2; lanes > 0; lanes /= 2) dot += __shfl_xor_sync(kAllLanes, dot, lanes);
    if (threadIdx.x == 0 && exists) static_cast<T*>(p.grad_weight)[t] = put<T>(there ? dot * scale : Sum{0});
  }
}

template <class T, int V, bool kWeight>
cudaError_t launch_bwd(const MergeTokens& p, cudaStream_t stream) {
  const int64_t packs = p.C / V;
  const unsigned lanes = lanes_for(packs, kWeight ? kWarp : kThreads), tokens_per_block = kThreads / lanes;
  return launch_in_runs(p.B, p.N, [&](int64_t first, int64_t samples) {
    const auto tokens = static_cast<unsigned>(samples * p.N);
    return launch_kernel(merge_tokens_bwd_kernel<T, V, kWeight>, blocks_for(tokens, tokens_per_block),
                         dim3(lanes, tokens_per_block), 0, stream, p, first, tokens, static_cast<int>(packs));
  });
}

template <class T, int V>
cudaError_t launch_bwd(const MergeTokens& p, cudaStream_t stream) {
  return p.grad_weight ? launch_bwd<T, V, true>(p, stream) : launch_bwd<T, V, false>(p, stream);
}

}  // namespace

CudaError merge_tokens_fwd_cuda(const MergeTokens& p, CudaStream stream) {
  SegmentSum sum{p.B, p.N, p.M, 1, p.C, p.x, p.x_stride_b, p.x_stride_n, p.C, p.assignment, p.start, p.slots, p.out};
  sum.weight = p.weight, sum.eps = p.eps, sum.total = p.total, sum.mean = p.mean;
  return segment_sum<true>(sum, p.dtype, stream);
}

CudaError merge_tokens_bwd_cuda(const MergeTokens& p, CudaStream stream) {
  if (p.B * p.N == 0) return cudaSuccess;
  return with_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int V = kPackBytes / sizeof(T);
    // x and mean are read only for the weights' gradient.
    const bool packed = p.C % V == 0 && aligned(p.grad_out, kPackBytes) && aligned(p.grad_x, kPackBytes) &&
                        (!p.grad_weight || (aligned(p.x, kPackBytes) && aligned(p.mean, sizeof(Pack<Compute<T>, V>)) &&
                                            p.x_stride_b % V == 0 && p.x_stride_n % V == 0));
    return packed ? launch_bwd<T, V>(p, stream) : launch_bwd<T, 1>(p, stream);
  });
}

}  // namespace hotkernels
