// What both CUDA forms of dpc_knn share: which tokens count, the pivot, the order of densities and of scores.
#pragma once
#include <cmath>
#include <cstdint>

#include "element.h"
#include "hotkernels/dpc_knn.h"
#include "ptx.h"

namespace hotkernels::dpc {

constexpr float kInf = __builtin_inff();

// ---- the pivot ----------------------------------------------------------------------------------------------------

// What is subtracted before rounding: of each channel, the median of three tokens. csrc/cpu/dpc_knn_sample.h says why.
__device__ inline float median(float a, float b, float c) { return fmaxf(fminf(a, b), fminf(fmaxf(a, b), c)); }
__device__ inline int pivot_token(int n, int which) { return n / 6 + which * (n / 3); }  // of n, which = 0, 1, 2

// ---- warps --------------------------------------------------------------------------------------------------------

__device__ inline int lane_id() { return static_cast<int>(threadIdx.x % kWarp); }
__device__ inline int warp_id() { return static_cast<int>(threadIdx.x / kWarp); }

__device__ inline float warp_sum(float x) {  // the same bits in every lane
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

// Numbers that are not negative are ordered as their bits are, and those have a reduction of their own.
__device__ inline float warp_min_of_nonnegative(float x) {
  return __uint_as_float(__reduce_min_sync(kAllLanes, __float_as_uint(x)));
}
__device__ inline float warp_max_of_nonnegative(float x) {
  return __uint_as_float(__reduce_max_sync(kAllLanes, __float_as_uint(x)));
}

// ---- densest first ------------------------------------------------------------------------------------------------

__device__ inline uint32_t mix32(uint32_t h) {  // finaliser of MurmurHash3: every input bit reaches every output bit
  h = (h ^ (h >> 16)) * 0x85ebca6bu;
  h = (h ^ (h >> 13)) * 0xc2b2ae35u;
  return h ^ (h >> 16);
}

// The hash that orders equal densities: position_hash of reference.py.
__device__ inline uint32_t position_hash(int64_t seed, int64_t position) {
  const uint32_t start = mix32(static_cast<uint32_t>(seed) ^ mix32(static_cast<uint32_t>(seed >> 32)));
  return mix32(static_cast<uint32_t>(position) + start);
}

__device__ inline uint32_t ascending_bits(float x) {  // unsigned integers in the order of the floats, -0 = 0
  const uint32_t u = __float_as_uint(x + 0.0f);
  return u >> 31 ? ~u : u | 0x80000000u;
}

__device__ inline uint64_t descending_bits(double x) {  // the larger, the smaller; ~0 of no number
  const uint64_t u = static_cast<uint64_t>(__double_as_longlong(x + 0.0));
  return u >> 63 ? u : ~(u | uint64_t{1} << 63);
}

// A token's place in the strict total order: larger density (if there is noise), smaller r, smaller hash, which no two
// positions share: they differ in 32 bits, and mix32 maps these one to one.
struct alignas(16) DensityKey {
  uint64_t key, tie;
};
constexpr uint64_t kLeastDense = ~uint64_t{0};  // of tokens that do not count: after all that do

// With noise, in float64: float32 would round noise of 1e-6 to a few steps.
__device__ inline double density_of(float r, const float* noise) {
  return noise ? exp(-static_cast<double>(r)) + static_cast<double>(*noise) : static_cast<double>(expf(-r));
}

// `noise`: whether there is any; density is read only then.
__device__ inline DensityKey density_key(float r, double density, bool noise, int64_t seed, int64_t position) {
  const uint64_t least_r = ascending_bits(r);
  return {noise ? descending_bits(density) : least_r, least_r << 32 | position_hash(seed, position)};
}

__device__ inline bool denser(const DensityKey& a, const DensityKey& b) {  // without branches
  return (a.key < b.key) | ((a.key == b.key) & (a.tie < b.tie));
}

// ---- best first ---------------------------------------------------------------------------------------------------

// Smaller is better: log density + log delta in float64, where nothing underflows, descending. Ties go to the position.
// delta2 is the squared distance before its division by the number of channels.
__device__ inline uint64_t score_key(float r, const float* noise, float delta2, int64_t channels) {
  const double density = noise ? density_of(r, noise) : 0;
  const double log_density = noise == nullptr ? -static_cast<double>(r) : density > 0 ? log(density) : -INFINITY;
  double log_score = log_density + 0.5 * log(static_cast<double>(delta2) / static_cast<double>(channels));
  if (!(log_score < INFINITY)) log_score = INFINITY;  // NaN too: infinite noise on a token at distance 0
  return descending_bits(log_score);
}
constexpr uint64_t kNotACandidate = ~uint64_t{0};  // after every score, be it log 0

// ---- arguments ----------------------------------------------------------------------------------------------------

// Whether token `at` of all B * N is in the mask, and its noise a number.
__device__ inline bool in_mask(const DpcKnn& p, int64_t at) {
  return (p.mask == nullptr || p.mask[at]) && !(p.noise != nullptr && std::isnan(p.noise[at]));
}

// Position e of `keep`, -1 if it is none: nobody looked at the values before.
__device__ inline int64_t keep_position(const DpcKnn& p, int64_t b, int64_t e) {
  const int64_t n = p.keep[b * p.keep_stride_b + e];
  return n >= 0 && n < p.N ? n : -1;
}

}  // namespace hotkernels::dpc
