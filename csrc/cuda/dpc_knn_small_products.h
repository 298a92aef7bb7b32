// The valid tokens of a sample, up to 352, and the dot products of all pairs of them: the first part of
// dpc_knn_small.h, which says how blocks share it.
#pragma once
#include "dpc_knn_common.h"

namespace hotkernels::dpc::small {

constexpr int kTile = 32, kMaxAcross = 11, kMaxTokens = kTile * kMaxAcross;
constexpr int kThreads = 384, kWarps = kThreads / kWarp;
constexpr int kGroups = 2, kSplits = 4;  // groups of blocks share the tiles, the blocks of a group the channels
constexpr int kTilesPerWarp = 3;         // 96 accumulators per thread
constexpr int kTileFloats = kTile * kTile;
constexpr int kPivots = 1024;  // channels whose pivot is in shared memory at a time

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int tiles_of(int across) { return across * (across + 1) / 2; }
__host__ __device__ constexpr int tiles_of_group(int across) { return ceil_div(tiles_of(across), kGroups); }
static_assert(tiles_of_group(kMaxAcross) <= kWarps * kTilesPerWarp && kMaxAcross < kWarps && kGroups == 2);

// The valid tokens, numbered 0 .. n-1 in ascending position, and what `products` needs.
struct alignas(16) Tokens {
  int position[kMaxTokens];  // from n on: of a valid token
  int token[kMaxTokens];     // of a position, -1 if it is not valid
  unsigned words[kWarps];
  float pivot_part[kWarps], peak[kWarps];  // of each warp's channels: pivot2; how far the pivot's tokens are apart
  float pivot2;  // squared norm of the pivot, of this block's channels
  float floor2;  // squared norm in them below which a token's coordinates may have lost bits to underflow
  uint64_t arrived[4];  // barriers of Pair
};

// ---- valid tokens -------------------------------------------------------------------------------------------------

// How many threads have their bit set in `words`, a word per warp: in the warps before this one, and in all.
struct Marked {
  int here, before, all;
};
__device__ inline Marked marked(const Tokens& s) {
  const int lane = lane_id(), here = lane < kWarps ? __popc(s.words[lane]) : 0;
  return {here, __reduce_add_sync(kAllLanes, lane < warp_id() ? here : 0), __reduce_add_sync(kAllLanes, here)};
}

// Numbers the valid positions; returns how many there are. Called by all threads, thread = position.
__device__ inline int number_tokens(Tokens& s, bool valid) {
  const unsigned word = __ballot_sync(kAllLanes, valid);
  if (lane_id() == 0) s.words[warp_id()] = word;
  __syncthreads();
  const Marked tokens = marked(s);
  const int n = tokens.all, token = tokens.before + __popc(word & ((1u << lane_id()) - 1));
  const int some_warp = __ffs(static_cast<int>(__ballot_sync(kAllLanes, tokens.here > 0))) - 1;
  if (threadIdx.x < kMaxTokens) {
    s.token[threadIdx.x] = valid ? token : -1;
    const int some = n == 0 ? 0 : some_warp * kWarp + __ffs(static_cast<int>(s.words[some_warp])) - 1;
    if (static_cast<int>(threadIdx.x) >= n) s.position[threadIdx.x] = some;
  }
  if (valid) s.position[token] = static_cast<int>(threadIdx.x);
  __syncthreads();
  return n;
}

// Twice the largest coordinate of a token, or -1 if its squared norm is beyond the limit. No centred coordinate exceeds
// the largest of these. The same answer in all lanes of the warp that asks.
template <class T>
__device__ float bound_of(const DpcKnn& p, int64_t b, int64_t position) {
  const T* x = static_cast<const T*>(p.x) + b * p.x_stride_b + position * p.x_stride_n;
  float square = 0, largest = 0;
  for (int64_t c = lane_id(); c < p.C; c += kWarp) {
    const float value = get(x[c * p.x_stride_c]);
    square += value * value;
    largest = fmaxf(largest, fabsf(value));
  }
  return warp_sum(square) <= kNormLimit ? 2 * warp_max_of_nonnegative(largest) : -1;
}

// The largest of those that are not negative, in every warp; 0 if there is none.
__device__ inline float largest_bound(const float* bound, int n) {
  float largest = 0;
  for (int i = lane_id(); i < n; i += kWarp) largest = fmaxf(largest, bound[i]);
  return warp_max_of_nonnegative(largest);
}

// ---- who centres which tokens --------------------------------------------------------------------------------------

// An Exchange says which tokens a block centres, and how warps know that a chunk is ready. Warp t centres kTokens of
// tile t, from `first` on, kChunk channels at a time, into each of kSlots places in turn.

// A block centres all tokens itself.
struct Single {
  static constexpr int kChunk = 16, kSlots = 2, kTokens = kTile, first = 0;
  __device__ unsigned slot(unsigned chunk) const { return chunk % kSlots; }
  // The chunk before is centred, and no warp reads the one before that any more.
  __device__ void begin() const { __syncthreads(); }
  __device__ void put(unsigned char* to, uint2 four, int) const { *reinterpret_cast<uint2*>(to) = four; }
  __device__ void commit(int, int) const {}
  __device__ void wait(int) const {}
  __device__ void advance(int) const {}
};

// Two blocks of a cluster each centre half of the tokens, for both. No warp asks whether a place is free. Before it
// puts chunk i, it has waited for chunk i - 2, for which every warp of both blocks arrived, with tokens or without,
// after it had multiplied chunk i - 4, the last in the same place. Hence four places.
struct Pair {
  static constexpr int kChunk = 32, kSlots = 4, kTokens = kTile / 2;
  Tokens& s;
  const int first;
  const uint32_t other;  // the block's rank
  unsigned before = 0;  // chunks of earlier calls of `products`

  __device__ unsigned slot(int chunk) const { return (before + chunk) % kSlots; }
  __device__ uint64_t* arrived(int chunk) const { return s.arrived + slot(chunk); }
  __device__ void begin() const {}
  __device__ void put(unsigned char* to, uint2 four, int chunk) const {
    *reinterpret_cast<uint2*>(to) = four;
    ptx::store_async(reinterpret_cast<uint2*>(to), four, arrived(chunk), other);
  }
  __device__ void commit(int chunk, int across) const {
    __syncwarp();
    if (lane_id() != 0) return;
    if (warp_id() == 0) {
      ptx::barrier_arrive(arrived(chunk), across * kTokens * kChunk * 2);
    } else {
      ptx::barrier_arrive(arrived(chunk));
    }
    ptx::barrier_arrive_in(other, arrived(chunk));
  }
  __device__ void wait(int chunk) const { ptx::barrier_wait(arrived(chunk), (before + chunk) / kSlots % 2); }
  __device__ void advance(int chunks) { before += chunks; }
  __device__ void init() const {
    if (threadIdx.x < kSlots) ptx::barrier_init(s.arrived + threadIdx.x, 2 * kWarps);
  }
};
static_assert(sizeof(Tokens::arrived) == Pair::kSlots * sizeof(uint64_t));

template <class Exchange>
constexpr int64_t centred_bytes(int across) {  // what `products` needs beside Tokens
  return 4 * kPivots + int64_t{Exchange::kSlots} * Exchange::kChunk * 2 * across * kTile;
}

// ---- products -----------------------------------------------------------------------------------------------------

template <class T>
using Quad = Pack<T, 4>;

// Four channels of a token, of which the first `valid` exist; the others are 0.
template <class T>
__device__ inline Quad<T> first_of(const T* from, int64_t stride, int valid) {
  Quad<T> quad{};
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    if (e < valid) quad.value[e] = from[e * stride];
  }
  return quad;
}

__device__ inline float4 operator+(float4 a, float4 b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}
__device__ inline float4 operator*(float4 a, float b) { return make_float4(a.x * b, a.y * b, a.z * b, a.w * b); }

// Tile number `tile` of the upper triangle, row by row.
struct TileAt {
  int row, column;
  __device__ TileAt(int tile, int across) : row(0), column(tile) {
    while (column >= across) {
      ++row;
      column += row - across;
    }
  }
};

// acc += the products of 32 tokens with 32 tokens over 16 channels. `columns` points at what this lane reads of the
// latter; from eight tokens to the next eight are `step` bytes.
__device__ inline void multiply(float (&acc)[8][4], const uint32_t (&rows)[2][4], const unsigned char* columns,
                                int step) {
#pragma unroll
  for (int c = 0; c < 4; c += 2) {
    uint32_t column[4];
    ptx::load_matrices(column, columns + c * step);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      ptx::mma_m16n8k16(acc[4 * r + c], rows[r], {column[0], column[1]});
      ptx::mma_m16n8k16(acc[4 * r + c + 1], rows[r], {column[2], column[3]});
    }
  }
}

// A power of two that brings `peak` to [2^power, 2^(power + 1)).
__device__ inline int exponent_for(float peak, int power) {
  return max(-60, min(60, 127 + power - static_cast<int>(__float_as_uint(peak) >> 23)));
}
__device__ inline float power_of_two(int exponent) {
  return __uint_as_float(static_cast<unsigned>(127 + exponent) << 23);
}

// Which tiles of `group` a warp multiplies. Warps w, w + 4, .. share a scheduler: they get neighbouring shares, so that
// all schedulers have as much to do.
struct Share {
  int first, count;  // of the group's tiles
  int row[kTilesPerWarp] = {}, column[kTilesPerWarp] = {};  // where a tile's tokens start in a centred chunk

  __device__ Share(int group, int across, int token_bytes) {
    const int all = tiles_of(across), first_of_group = group * (all / kGroups);
    const int tiles = group == 0 ? all / kGroups : all - first_of_group;
    const int share = warp_id() % 4 * (kWarps / 4) + warp_id() / 4;
    first = tiles * share / kWarps, count = tiles * (share + 1) / kWarps - first;
#pragma unroll
    for (int u = 0; u < kTilesPerWarp; ++u) {
      if (u >= count) continue;
      const TileAt at(first_of_group + first + u, across);
      row[u] = at.row * kTile * token_bytes, column[u] = at.column * kTile * token_bytes;
    }
  }
};

// Writes the products of a warp's tiles, times `factor`, as `partial` of `products` has them.
__device__ inline void store_products(const float (&acc)[kTilesPerWarp][8][4], const Share& mine, float factor,
                                      float* partial) {
#pragma unroll
  for (int u = 0; u < kTilesPerWarp; ++u) {
    if (u >= mine.count) continue;
    float4* to = reinterpret_cast<float4*>(partial + (mine.first + u) * kTileFloats) + lane_id();
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      to[e * kWarp] = make_float4(acc[u][e][0], acc[u][e][1], acc[u][e][2], acc[u][e][3]) * factor;
    }
  }
}

// The dot products of the tiles of `group`, summed over the channels of `split`, in the order of the registers:
// `partial` is [tile of the group, 8, lane, 4] and may overlap `memory`, centred_bytes. No centred coordinate exceeds
// `bound`. If that is negative, the scale follows from how far the three tokens of the pivot are apart: coordinates may
// be 1000 times as large before they overflow, or 2^19 times smaller before they lose a bit.
template <class T, bool kWide, class Exchange>
__device__ void products(const DpcKnn& p, int64_t b, Tokens& s, int n, float bound, int group, int split,
                         Exchange& exchange, unsigned char* memory, float* partial) {
  constexpr int kChunk = Exchange::kChunk, kBytes = kChunk * 2, kQuads = kChunk / 4, kAtOnce = kWarp / kQuads;
  constexpr int kPasses = Exchange::kTokens / kAtOnce;
  const int thread = static_cast<int>(threadIdx.x), warp = warp_id(), lane = lane_id();
  const int across = ceil_div(n, kTile), padded = across * kTile;
  const int all_chunks = static_cast<int>((p.C + kChunk - 1) / kChunk), most = ceil_div(all_chunks, kSplits);
  const int chunks = n == 0 ? 0 : max(0, min(most, all_chunks - split * most));
  const int64_t first_channel = int64_t{split} * most * kChunk;
  const int channels = chunks == 0 ? 0 : static_cast<int>(min(p.C - first_channel, int64_t{chunks} * kChunk));
  float* const pivots = reinterpret_cast<float*>(memory);
  const auto ready = [&](int chunk) { return memory + 4 * kPivots + exchange.slot(chunk) * padded * kBytes; };
  const int64_t stride = kWide ? 1 : p.x_stride_c;
  const T* const x = static_cast<const T*>(p.x) + b * p.x_stride_b + first_channel * stride;
  const auto row_bytes = static_cast<uint32_t>(p.x_stride_n * sizeof(T));  // where kWide: with_layout saw that it fits
  const auto of_token = [&](const T* first, int token) {  // what `first` points at in position 0
    const auto position = static_cast<uint32_t>(s.position[token]);
    if constexpr (!kWide) return first + position * p.x_stride_n;
    const auto* bytes = reinterpret_cast<const unsigned char*>(first);
    return reinterpret_cast<const T*>(bytes + uint64_t{position} * row_bytes);
  };

  // A thread reads and centres the same four channels of the same tokens, a chunk ahead. The last tile is filled up
  // with repeats of a token, whose products are not used.
  const bool centres = warp < across;
  const int quad = lane % kQuads, token0 = (centres ? warp * kTile : 0) + exchange.first + lane / kQuads;
  Quad<T> raw[kPasses];
  const T* next = x + quad * 4 * stride;
  // Further ahead, lines are prefetched into L2: one of each token, where a token's channels are contiguous.
  constexpr int kLine = 128 / (kChunk * static_cast<int>(sizeof(T))), kAhead = 4 * kLine;  // in chunks
  const auto prefetch = [&](int chunk) {
    if (kWide && centres && lane < Exchange::kTokens && chunk < chunks) {
      ptx::prefetch(of_token(x + chunk * kChunk, token0 - lane / kQuads + lane));
    }
  };
  const auto read = [&](int chunk) {
    if (!centres || chunk >= chunks) return;
    if (chunk % kLine == 0) prefetch(chunk + kAhead);
    const int valid = channels - chunk * kChunk - quad * 4;
    if (kWide && valid >= 4) {
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        raw[pass] = *reinterpret_cast<const Quad<T>*>(of_token(next, token0 + pass * kAtOnce));
      }
    } else {
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        raw[pass] = first_of<T>(of_token(next, token0 + pass * kAtOnce), stride, valid);
      }
    }
    next += kChunk * stride;
  };

  float pivot2 = 0, peak = 0;
  const auto find_pivots = [&](int chunk) {  // of the channels from this chunk on
    const int begin = chunk * kChunk, count = min(kPivots, chunks * kChunk - begin);
#pragma unroll 1
    for (int c = thread; c < count; c += kThreads) {
      float v[3] = {};
      if (begin + c < channels) {
#pragma unroll
        for (int e = 0; e < 3; ++e) v[e] = get(*of_token(x + (begin + c) * stride, pivot_token(n, e)));
      }
      const float pivot = median(v[0], v[1], v[2]);
      pivots[c] = pivot;
      pivot2 += pivot * pivot;
      peak = fmaxf(peak, fmaxf(v[0], fmaxf(v[1], v[2])) - fminf(v[0], fminf(v[1], v[2])));
    }
  };
  int exponent = bound >= 0 ? exponent_for(bound, 14) : 0;
  float scale = power_of_two(exponent);
  const auto centre = [&](int chunk) {  // (x - pivot) * scale, rounded once
    if (centres) {
      const float4 pivot = *reinterpret_cast<const float4*>(pivots + chunk * kChunk % kPivots + quad * 4);
      const float4 shift = pivot * -scale;
      unsigned char* const to = ready(chunk);
      const int at = swizzled_offset<kChunk>(token0, quad / 2) + quad % 2 * 8;
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        const T(&v)[4] = raw[pass].value;
        const uint2 four = make_uint2(
            ptx::pack_half(fmaf(get(v[0]), scale, shift.x), fmaf(get(v[1]), scale, shift.y)),
            ptx::pack_half(fmaf(get(v[2]), scale, shift.z), fmaf(get(v[3]), scale, shift.w)));
        exchange.put(to + (at ^ swizzled_offset<kChunk>(pass * kAtOnce, 0)), four, chunk);
      }
    }
    exchange.commit(chunk, across);
  };

  const Share mine(group, across, kBytes);
  float acc[kTilesPerWarp][8][4] = {};
  const int row_lane = swizzled_offset<kChunk>(lane % 16, lane / 16);
  const int column_lane = swizzled_offset<kChunk>(lane % 8 + lane / 16 * 8, lane / 8 % 2);

  for (int chunk = kLine; chunk < kAhead; chunk += kLine) prefetch(chunk);
  read(0);
  for (int chunk = 0; chunk <= chunks; ++chunk) {
    exchange.begin();
    if (chunk < chunks) {
      if (chunk % (kPivots / kChunk) == 0) {
        __syncthreads();  // no warp needs the pivots before these any more
        find_pivots(chunk);
        if (chunk == 0) {
          peak = warp_max_of_nonnegative(peak);
          if (lane == 0) s.peak[warp] = peak;
        }
        __syncthreads();
        if (chunk == 0 && bound < 0) {
          for (int w = 0; w < kWarps; ++w) peak = fmaxf(peak, s.peak[w]);
          exponent = peak > 0 ? exponent_for(peak, 5) : 0;
          scale = power_of_two(exponent);
        }
      }
      centre(chunk);
      read(chunk + 1);
    }
    if (chunk == 0) continue;
    exchange.wait(chunk - 1);
    const unsigned char* here = ready(chunk - 1);
#pragma unroll
    for (int step = 0; step < kChunk / 16; ++step) {
      uint32_t rows[2][4];
#pragma unroll
      for (int u = 0; u < kTilesPerWarp; ++u) {
        if (u < mine.count) {
          if (u == 0 || mine.row[u] != mine.row[u - 1]) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
              ptx::load_matrices(rows[r], here + mine.row[u] + (row_lane ^ step * 32) + r * 16 * kBytes);
            }
          }
          multiply(acc[u], rows, here + mine.column[u] + (column_lane ^ step * 32), 8 * kBytes);
        }
      }
    }
  }
  pivot2 = warp_sum(pivot2);
  if (lane == 0) s.pivot_part[warp] = pivot2;
  __syncthreads();
  const float inverse2 = power_of_two(-2 * exponent);
  store_products(acc, mine, inverse2, partial);
  if (thread == 0) {
    for (int w = 1; w < kWarps; ++w) pivot2 += s.pivot_part[w];
    s.pivot2 = pivot2;
    // Underflow moves a coordinate by up to 2^-25, rounding by 2^-12 of it.
    s.floor2 = static_cast<float>(channels) * 0x1p-26f * inverse2;
  }
  exchange.advance(chunks);
}

}  // namespace hotkernels::dpc::small
