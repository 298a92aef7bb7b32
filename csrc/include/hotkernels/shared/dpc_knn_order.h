// What dpc_knn computes alike on CPUs and GPUs: the keys that order tokens by density and by score, and what the
// pivot is made of. Keys are integers that sort ascending, so both devices break ties in the same way.
#pragma once
#include <cmath>

#include "hotkernels/common.h"

namespace hotkernels::dpc {

// A token's place in the strict total order, densest first. key: the density if there is noise, else r. tie: r, then a
// hash of the position. No two positions share a hash: they differ in 32 bits, which mix32 maps one to one.
struct alignas(16) DensityKey {
  uint64_t key, tie;
};

namespace {  // common.h says why, at HK_HOST_DEVICE

// The pivot is subtracted from every token before rounding: per channel, the median of tokens pivot_token(n, 0 .. 2) of
// the n valid ones. A mean would do as well, were it not for outliers: one token at distance A moves the mean by A / n,
// and the distances between all others would be rounded as if they were that long. Not the first and the last token,
// which often are special.
HK_HOST_DEVICE inline int pivot_token(int n, int which) { return n / 6 + which * (n / 3); }
HK_HOST_DEVICE inline float median(float a, float b, float c) {
  const float low = a < b ? a : b, high = a < b ? b : a;
  return c < low ? low : c > high ? high : c;
}

// The finaliser of MurmurHash3: every input bit reaches every output bit.
HK_HOST_DEVICE inline uint32_t mix32(uint32_t h) {
  h = (h ^ (h >> 16)) * 0x85ebca6bu;
  h = (h ^ (h >> 13)) * 0xc2b2ae35u;
  return h ^ (h >> 16);
}

// The hash that orders equal densities: position_hash of reference.py.
HK_HOST_DEVICE inline uint32_t position_hash(int64_t seed, int64_t position) {
  const uint32_t start = mix32(static_cast<uint32_t>(seed) ^ mix32(static_cast<uint32_t>(seed >> 32)));
  return mix32(static_cast<uint32_t>(position) + start);
}

// Floats as unsigned integers in the same order, with -0 = 0.
HK_HOST_DEVICE inline uint32_t ascending_bits(float x) {
  const uint32_t u = bits_as<uint32_t>(x + 0.0f);
  return u >> 31 ? ~u : u | 0x80000000u;
}

// Doubles as unsigned integers in the opposite order; no number becomes ~0.
HK_HOST_DEVICE inline uint64_t descending_bits(double x) {
  const uint64_t u = bits_as<uint64_t>(x + 0.0);
  return u >> 63 ? u : ~(u | uint64_t{1} << 63);
}

// r: mean of the k smallest squared distances. density: exp(-r) + noise, read only if there is noise; a double, since
// float32 would round noise of 1e-6 to a few steps.
HK_HOST_DEVICE inline DensityKey density_key(float r, double density, bool noise, int64_t seed, int64_t position) {
  const uint64_t least_r = ascending_bits(r);
  return {noise ? descending_bits(density) : least_r, least_r << 32 | position_hash(seed, position)};
}

// Best score first: log density + log delta as a double, where nothing underflows. density() is called only if there is
// noise: without it, log density is -r. delta2 is the squared distance before its division by the number of channels.
template <class Density>
HK_HOST_DEVICE inline uint64_t score_key(float r, bool noise, const Density& density, float delta2, int64_t channels) {
  const double noisy = noise ? density() : 0;
  const double log_density = !noise ? -static_cast<double>(r) : noisy > 0 ? std::log(noisy) : -INFINITY;
  double log_score = log_density + 0.5 * std::log(static_cast<double>(delta2) / static_cast<double>(channels));
  if (!(log_score < INFINITY)) log_score = INFINITY;  // NaN too: infinite noise on a token at distance 0
  return descending_bits(log_score);
}

}  // namespace
}  // namespace hotkernels::dpc
