// What both CUDA forms of dpc_knn share, beside the keys of dpc_knn_order.h: reductions over a warp, the mask, `keep`.
#pragma once
#include <cmath>
#include <cstdint>

#include "element.h"
#include "hotkernels/dpc_knn.h"
#include "hotkernels/shared/dpc_knn_order.h"
#include "ptx.h"

namespace hotkernels::dpc {

constexpr float kInf = __builtin_inff(), kNaN = __builtin_nanf("");

// ---- warps --------------------------------------------------------------------------------------------------------

__device__ inline int lane_id() { return static_cast<int>(threadIdx.x % kWarp); }
__device__ inline int warp_id() { return static_cast<int>(threadIdx.x / kWarp); }

__device__ inline float warp_sum(float x) {  // the same bits in every lane
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

// Numbers that are not negative are in the order of their bits, which a warp reduces in one instruction.
__device__ inline float warp_min_of_nonnegative(float x) {
  return __uint_as_float(__reduce_min_sync(kAllLanes, __float_as_uint(x)));
}
__device__ inline float warp_max_of_nonnegative(float x) {
  return __uint_as_float(__reduce_max_sync(kAllLanes, __float_as_uint(x)));
}

// ---- centred tokens -----------------------------------------------------------------------------------------------

// Where part `part`, eight float16 channels, of a token lies among tokens of kChunk channels: swizzled, so that one
// part of eight tokens meets no bank of shared memory twice. An xor: (token, part ^ 2) is at (token, part) ^ 32.
template <int kChunk>
__device__ inline int swizzled_offset(int token, int part) {
  constexpr int kParts = kChunk / 8, kTokensPerTurn = 8 / kParts;
  return (token * kParts + (part ^ (token / kTokensPerTurn % kParts))) * 16;
}

// ---- densest first ------------------------------------------------------------------------------------------------

constexpr uint64_t kLeastDense = ~uint64_t{0};  // of tokens that are not valid: after all valid ones

// A double only where there is noise: density_key says why.
__device__ inline double density_of(float r, const float* noise) {
  return noise ? exp(-static_cast<double>(r)) + static_cast<double>(*noise) : static_cast<double>(expf(-r));
}

// Whether a's token is denser than b's; without branches.
__device__ inline bool denser(const DensityKey& a, const DensityKey& b) {
  return (a.key < b.key) | ((a.key == b.key) & (a.tie < b.tie));
}

// ---- best first ---------------------------------------------------------------------------------------------------

// Ties go to the position.
__device__ inline uint64_t score_key(float r, const float* noise, float delta2, int64_t channels) {
  return score_key(r, noise != nullptr, [&] { return density_of(r, noise); }, delta2, channels);
}
constexpr uint64_t kNotACandidate = ~uint64_t{0};  // after every score, even that of density or delta 0

// ---- arguments ----------------------------------------------------------------------------------------------------

// Whether token `at` of all B * N is in the mask and its noise a number.
__device__ inline bool in_mask(const DpcKnn& p, int64_t at) {
  return (p.mask == nullptr || p.mask[at]) && !(p.noise != nullptr && std::isnan(p.noise[at]));
}

// Position e of `keep`, -1 if it is out of range: no caller has checked the values.
__device__ inline int64_t keep_position(const DpcKnn& p, int64_t b, int64_t e) {
  const int64_t n = p.keep[b * p.keep_stride_b + e];
  return n >= 0 && n < p.N ? n : -1;
}

}  // namespace hotkernels::dpc
