// gather_tokens: a group of threads per output token, each copying (and adding to) the widest pack that is aligned;
// backward a sum per token (segment_sum.h).
#include "hotkernels/gather_tokens.h"
#include "launch.h"

#include "segment_sum.h"

namespace hotkernels {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxPieces = 65535;  // the largest gridDim.y

// blockDim = (threads per token, tokens per block); blockIdx.y: which piece of a token of more than blockDim.x packs.
// R rows of `packs` packs of V elements; pos may be null.
template <class T, int V, bool kAddPos>
__global__ void __launch_bounds__(kThreads)
    gather_tokens_fwd_kernel(GatherTokens p, int64_t first_sample, unsigned tokens, int R, int packs) {
  using Packed = Pack<T, V>;
  const unsigned t = blockIdx.x * blockDim.y + threadIdx.y;
  if (t >= tokens) return;
  const unsigned sample = t / static_cast<unsigned>(p.M), m = t - sample * static_cast<unsigned>(p.M);
  const int64_t b = first_sample + sample, place = b * p.M + m, n = p.index[place];
  const bool there = n >= 0 && n < p.N;
  const T* token = static_cast<const T*>(p.x) + b * p.x_stride_b + (there ? n : 0) * p.x_stride_n;
  for (int j = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x); j < R * packs; j += gridDim.y * blockDim.x) {
    const int r = R == 1 ? 0 : j / packs, c = j - r * packs;
    Packed pack{};
    if (there) pack = reinterpret_cast<const Packed*>(token + r * p.x_stride_r)[c];
    if constexpr (kAddPos) {
      const Packed pos = static_cast<const Packed*>(p.pos)[int64_t{m} * packs + c];
      if (there) {
#pragma unroll
        for (int v = 0; v < V; ++v) pack.value[v] = put<T>(get(pack.value[v]) + get(pos.value[v]));
      } else {
        pack = pos;
      }
    }
    static_cast<Packed*>(p.out)[place * R * packs + j] = pack;
  }
}

template <class T, int V, bool kAddPos>
cudaError_t launch(const GatherTokens& p, int64_t R, int64_t C, cudaStream_t stream) {
  const int64_t packs = C / V;
  const unsigned lanes = lanes_for(R * packs, kThreads), tokens_per_block = kThreads / lanes;
  const int64_t pieces = (R * packs + lanes - 1) / lanes;
  return launch_in_runs(p.B, p.M, [&](int64_t first, int64_t samples) {
    const auto tokens = static_cast<unsigned>(samples * p.M);
    const dim3 grid(blocks_for(tokens, tokens_per_block),
                    static_cast<unsigned>(pieces < kMaxPieces ? pieces : kMaxPieces));
    return launch_kernel(gather_tokens_fwd_kernel<T, V, kAddPos>, grid, dim3(lanes, tokens_per_block), 0, stream, p,
                         first, tokens, static_cast<int>(R), static_cast<int>(packs));
  });
}

template <class T, bool kAddPos>
cudaError_t launch_widest(const GatherTokens& p, cudaStream_t stream) {
  constexpr int V = kPackBytes / sizeof(T);
  const bool whole = !kAddPos && p.x_stride_r == p.C;  // a token is one run; pos repeats per row
  const int64_t R = whole ? 1 : p.R, C = whole ? p.R * p.C : p.C;
  const bool packed = C % V == 0 && aligned(p.x, kPackBytes) && aligned(p.out, kPackBytes) &&
                      aligned(p.pos, kPackBytes) && p.x_stride_b % V == 0 && p.x_stride_n % V == 0 &&
                      (R == 1 || p.x_stride_r % V == 0);
  return packed ? launch<T, V, kAddPos>(p, R, C, stream) : launch<T, 1, kAddPos>(p, R, C, stream);
}

}  // namespace

CudaError gather_tokens_fwd_cuda(const GatherTokens& p, CudaStream stream) {
  if (p.B * p.M * p.R * p.C == 0) return cudaSuccess;
  if (p.pos != nullptr) {
    return with_element(p.dtype, [&](auto element) { return launch_widest<decltype(element), true>(p, stream); });
  }
  switch (p.item_size) {  // a copy needs to know no more than the size
    case 1: return launch_widest<uint8_t, false>(p, stream);
    case 2: return launch_widest<uint16_t, false>(p, stream);
    case 4: return launch_widest<uint32_t, false>(p, stream);
    case 8: return launch_widest<uint64_t, false>(p, stream);
  }
  return cudaErrorInvalidValue;
}

CudaError gather_tokens_bwd_cuda(const GatherTokensGrad& p, CudaStream stream) {
  const SegmentSum sum{p.B, p.M, p.N, p.R, p.C, p.grad_out, p.grad_stride_b, p.grad_stride_m, p.grad_stride_r,
                       p.index, p.start, p.slots, p.grad_x};
  return segment_sum<false>(sum, p.dtype, stream);
}

}  // namespace hotkernels
