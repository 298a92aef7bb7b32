// DPC-kNN of up to 352 tokens: a team of eight blocks per sample; in a cluster, distances never leave the chip.
//
// On sm_90 and later the team is a thread-block cluster and all of it is one launch; blocks write to each other's
// shared memory. Elsewhere the same device functions run in three launches, with global memory between them.
//
//   products   Tiles of 32 x 32 dot products, on and above the diagonal only, stay in registers. Two groups of blocks
//              share the tiles, the four blocks of a group the channels (split-K), in chunks that hold every token.
//              Tokens are centred (the pivot of dpc_knn_order.h is subtracted), scaled by a power of two, rounded to
//              float16, which has the 11 bits of TF32 at half the bytes and twice the rate, and multiplied. In a
//              cluster the two blocks of the same channels each centre half of the tokens for both.
//   distances  The four partial sums of a tile are added in order and sent to the blocks that own its rows, and its
//              columns. Norms are the diagonal: d2 = (n_i + n_j) - 2 <i, j> is exactly 0 for copies, exactly symmetric.
//   rows       A warp per token: density, then delta, then its place by counting, then its nearest kept token. Between
//              these steps each token's result goes to every block.
//
// Which tokens are valid (no NaN, no norm over 1e14) and how large their coordinates are would take a pass over x. So
// the cluster first takes all tokens of the mask for valid, and the scale from the three tokens that make the pivot. If
// then the pivot and all norms are small, all are valid and nothing overflowed; if most norms are not too small, no
// bits were lost. Otherwise it makes that pass, and starts again with the valid tokens only: nothing depends on where
// the others stood.
#pragma once
#include <atomic>
#include <climits>

#include "dpc_knn_small_products.h"
#include "launch.h"

namespace hotkernels::dpc::small {

constexpr int kTeam = kGroups * kSplits;
constexpr int64_t kStagedSamples = 64;  // per round of launches, which bounds the scratch
constexpr int kNever = INT_MAX;
enum Step { kDistancesPosted, kScoresPosted, kSlotsPosted, kSteps };  // what is posted of every token to every block

// Floats from one row of distances to the next, which starts 8 banks further.
__host__ __device__ constexpr int row_stride(int across) { return across * kTile + 8; }
__host__ __device__ inline int across_of(const DpcKnn& p) { return ceil_div(static_cast<int>(p.N), kTile); }

struct Shared : Tokens {
  uint64_t key[kMaxTokens], tie[kMaxTokens];  // the DensityKey of each token
  uint64_t score[kMaxTokens];    // score_key of each token
  float2 r_far[kMaxTokens];      // r and the largest squared distance of each token
  float norm[kMaxTokens];
  float density[kMaxTokens];
  float delta2[kMaxTokens];      // of this block's rows only, as is `nearest`
  int nearest[kMaxTokens];
  int keep[kMaxTokens];          // where `keep` has the token first, or kNever
  int slot[kMaxTokens];          // place of the token, best first, or -1
  int kept[kMaxTokens];          // token of each place
  int place[kMaxTokens];         // place of each token, or -1
  uint64_t posted[kSteps];       // barriers of Cluster
  float bound[kMaxTokens];       // bound_of each token
};

constexpr int64_t shared_bytes(int across) {  // of a block of a cluster
  const int64_t centred = centred_bytes<Pair>(across);
  const int64_t rest =
      4 * (tiles_of_group(across) * kTileFloats + ceil_div(across * kTile, kTeam) * row_stride(across));
  return static_cast<int64_t>(sizeof(Shared)) + (centred > rest ? centred : rest);
}
constexpr int64_t staged_shared_bytes(int across) {  // of a block of dpc_knn_products_kernel
  return static_cast<int64_t>(sizeof(Tokens)) + centred_bytes<Single>(across);
}
static_assert(sizeof(Shared) % 16 == 0 && sizeof(Tokens) % 16 == 0);
static_assert(shared_bytes(kMaxAcross) <= 227 * 1024 && staged_shared_bytes(kMaxAcross) <= 99 * 1024);
static_assert(sizeof(Shared) <= 48 * 1024);

// ---- teams --------------------------------------------------------------------------------------------------------

// The blocks of a cluster, each with a part of the rows and of the partial products in its shared memory.
struct Cluster {
  static constexpr int kSize = kTeam;
  int rank;
  float *rows, *partial;
  uint64_t* posted;

  __device__ void sync() const { ptx::cluster_sync(); }
  template <class E>
  __device__ E* in(int block, E* shared) const { return ptx::in_block(shared, static_cast<uint32_t>(block)); }
  __device__ const float* partial_of(int block) const { return in(block, partial); }

  // Stores a token's value in a block's shared memory, without waiting; `wait_for` waits for the values, an E each, of
  // all n tokens, and for nothing else.
  template <class E>
  __device__ void post(Step step, int block, E* shared, E value) const {
    ptx::store_async(shared, value, posted + step, static_cast<uint32_t>(block));
  }
  template <class E>
  __device__ void wait_for(Step step, const E*, int n) const {
    if (threadIdx.x == 0) ptx::barrier_arrive(posted + step, n * static_cast<int>(sizeof(E)));
    ptx::barrier_wait(posted + step, 0);
  }
};

// One block with all rows and partial products, in global memory.
struct Alone {
  static constexpr int kSize = 1, rank = 0;
  float *rows, *partial;
  int partial_floats;  // of one block of `products`

  __device__ void sync() const { __syncthreads(); }
  template <class E>
  __device__ E* in(int, E* shared) const { return shared; }
  __device__ const float* partial_of(int block) const { return partial + int64_t{block} * partial_floats; }
  template <class E>
  __device__ void post(Step, int, E* shared, E value) const { *shared = value; }
  template <class E>
  __device__ void wait_for(Step, const E*, int) const { __syncthreads(); }
};

// Which rows a block owns: [first, last).
template <class Team>
struct Rows {
  int count, first, last, inverse;
  __device__ Rows(const Team& team, int n)
      : count(max(ceil_div(n, Team::kSize), 1)), first(min(team.rank * count, n)), last(min(first + count, n)),
        inverse((1 << 20) / count + 1) {}
  __device__ int owner(int row) const { return row * inverse >> 20; }  // row / count: exact up to kMaxTokens
};

// Writes the products of token i with tokens j and j + 1 to the rows of all three; at(row, column) says where that is.
template <class Team, class At>
__device__ inline void place_pair(const Team& team, Shared& s, int n, int i, int j, const float (&value)[2],
                                  const At& at) {
  if (i < j && j + 1 < n) {
    *reinterpret_cast<float2*>(at(i, j)) = make_float2(value[0], value[1]);
    *at(j, i) = value[0];
    *at(j + 1, i) = value[1];
    return;
  }
#pragma unroll
  for (int w = 0; w < 2; ++w) {  // at the diagonal and the end
    if (i < j + w && j + w < n) *at(i, j + w) = *at(j + w, i) = value[w];
    if (i != j + w || i >= n) continue;
#pragma unroll 1
    for (int block = 0; block < Team::kSize; ++block) team.in(block, s.norm)[i] = value[w];
  }
}

// Adds up the partial products and sends each sum to the owners of its row and of its column; norms go to all.
template <class Team>
__device__ void reduce_scatter(const Team& team, Shared& s, int n) {
  const int warp = warp_id(), lane = lane_id();
  const int across = ceil_div(n, kTile), tiles = tiles_of(across), stride = row_stride(across);
  const Rows<Team> mine(team, n);
  const auto at = [&](int row, int column) {
    const int owner = mine.owner(row);
    return team.in(owner, team.rows) + (row - owner * mine.count) * stride + column;
  };
  for (int item = team.rank * kWarps + warp; item < 4 * tiles; item += Team::kSize * kWarps) {  // a quarter of a tile
    const int tile = item / 4, group = tile >= tiles / kGroups;
    const TileAt where(tile, across);
    const int from = (tile - group * (tiles / kGroups)) * kTileFloats + item % 4 * (kTileFloats / 4) + 4 * lane;
    float4 part[2][kSplits];
#pragma unroll
    for (int split = 0; split < kSplits; ++split) {
      const float* block = team.partial_of(group * kSplits + split) + from;
      part[0][split] = *reinterpret_cast<const float4*>(block);
      part[1][split] = *reinterpret_cast<const float4*>(block + 4 * kWarp);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float4 sum = ((part[h][0] + part[h][1]) + part[h][2]) + part[h][3];
      const float value[2][2] = {{sum.x, sum.y}, {sum.z, sum.w}};
      const int e = item % 4 * 2 + h;  // as in `multiply`: rows e / 4 * 16 .., columns e % 4 * 8 ..
      const int j = where.column * kTile + e % 4 * 8 + lane % 4 * 2;
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        place_pair(team, s, n, where.row * kTile + e / 4 * 16 + v * 8 + lane / 4, j, value[v], at);
      }
    }
  }
}

// The squared norms, over all channels, of the pivot and of the smallest token that loses no bits to underflow.
struct Limits {
  float pivot2 = 0, floor2 = 0;

  __device__ Limits(const Cluster& team, Shared& s) {
    for (int split = 0; split < kSplits; ++split) {
      pivot2 += *team.in(split, &s.pivot2), floor2 += *team.in(split, &s.floor2);
    }
  }
};

// Whether certainly all tokens are valid, since |x| <= |pivot| + |x - pivot|; nothing overflowed, which would have left
// inf or NaN; and few lost bits to underflow: a few near the pivot lose no more than rounding takes from the others.
// The same answer in every warp of the cluster.
__device__ inline bool all_valid(const Shared& s, const Limits& limits, int n) {
  bool sure = limits.pivot2 <= kNormLimit / 8;
  int below = 0;
  for (int i = lane_id(); i < n; i += kWarp) {
    sure = sure && s.norm[i] <= kNormLimit / 8;
    below += s.norm[i] < limits.floor2;
  }
  return (__all_sync(kAllLanes, sure) && __reduce_add_sync(kAllLanes, below) <= 1 + n / 8) || n == 0;
}

// ---- rows ---------------------------------------------------------------------------------------------------------

// Makes squared distances from a token of its products with others, of which `mine` and their norms are this lane's;
// the smallest and the largest of them. NaN, as norms are past the end, stays NaN, and is neither.
__device__ inline float2 distances_of(float* __restrict__ mine, const float* __restrict__ norms, float norm,
                                      int across) {
  float least = kInf, largest = 0;
#pragma unroll 4
  for (int e = 0; e < across; ++e) {
    const float d2 = ptx::max_or_nan(fmaf(-2.0f, mine[e * kWarp], norm + norms[e * kWarp]), 0.0f);
    mine[e * kWarp] = d2;
    least = fminf(least, d2), largest = fmaxf(largest, d2);
  }
  return make_float2(least, largest);
}

// The sum of the k smallest of a row, of which `mine` are this lane's, in ascending order, equal ones at once; `least`
// is the smallest of them. NaN is not a number of the row.
__device__ inline float sum_of_smallest(const float* mine, int across, float least, int k) {
  float sum = 0;
  while (k > 0) {
    least = warp_min_of_nonnegative(least);
    if (k == 1) return sum + least;
    int equal = 0;
    float next = kInf;
#pragma unroll 4
    for (int e = 0; e < across; ++e) {
      const float value = mine[e * kWarp];
      equal += value == least;
      next = value > least ? fminf(next, value) : next;
    }
    equal = min(__reduce_add_sync(kAllLanes, equal), k);
    sum += static_cast<float>(equal) * least;
    k -= equal;
    least = next;
  }
  return sum;
}

// All that follows the products, for the rows of this block.
template <class Team>
struct Choice {
  const DpcKnn& p;
  const int64_t b;
  const Team& team;
  Shared& s;
  const int n;
  const int thread = static_cast<int>(threadIdx.x), warp = warp_id(), lane = lane_id();
  const int num_keep = static_cast<int>(p.num_keep), across = ceil_div(n, kTile), stride = row_stride(across);
  const Rows<Team> mine{team, n};

  __device__ const float* noise_of(int position) const { return p.noise ? p.noise + b * p.N + position : nullptr; }
  __device__ float* row(int i) const { return team.rows + (i - mine.first) * stride; }

  // In each step a lane takes every 32nd token, and past the end what has no distance and the worst score: no read
  // waits for a branch.
  __device__ void end_tokens() const {
    if (thread >= n && thread < kMaxTokens) s.norm[thread] = kNaN, s.score[thread] = kNotACandidate;
  }

  __device__ void choose() const {
    end_tokens();
    __syncthreads();
    mean_distances();
    team.wait_for(kDistancesPosted, s.r_far, n);
    order();
    __syncthreads();
    deltas();
    __syncthreads();
    scores();
    team.wait_for(kScoresPosted, s.score, n);
    slots();
    team.wait_for(kSlotsPosted, s.slot, n);
    const int kept = places();
    __syncthreads();
    write(kept);
    if (p.assign) assign(kept);
  }

  // r; distances overwrite the products. That of a token to itself, and past the end, is NaN.
  __device__ void mean_distances() const {
    const int k = static_cast<int>(min(p.k, int64_t{n}));
    const float denominator = static_cast<float>(k) * static_cast<float>(p.C);
    for (int i = mine.first + warp; i < mine.last; i += kWarps) {
      float* const own = row(i) + lane;
      if (i % kWarp == lane) row(i)[i] = kNaN;
      const float2 ends = distances_of(own, s.norm + lane, s.norm[i], across);
      const float r = sum_of_smallest(own, across, ends.x, k - 1) / denominator;  // the token itself adds 0
      const float far = warp_max_of_nonnegative(ends.y);
      if (lane < Team::kSize) team.post(kDistancesPosted, lane, s.r_far + i, make_float2(r, far));
    }
  }

  // The keys of the order, and which tokens `keep` names, in every block.
  __device__ void order() const {
    if (thread < n) {
      const float r = s.r_far[thread].x;
      const int position = s.position[thread];
      const double density = density_of(r, noise_of(position));
      s.density[thread] = static_cast<float>(density);
      const DensityKey key = density_key(r, density, p.noise != nullptr, p.seed, position);
      s.key[thread] = key.key, s.tie[thread] = key.tie;
      s.keep[thread] = kNever;
    }
    __syncthreads();
    if (thread < num_keep) {
      const int64_t position = keep_position(p, b, thread);
      const int token = position < 0 ? -1 : s.token[position];
      if (token >= 0) atomicMin(&s.keep[token], thread);
    }
  }

  // delta: the nearest denser token. Without noise the tie, which begins with r, is all of the order.
  __device__ void deltas() const {
    if (p.noise == nullptr) {
      each_delta([&](int j, int i) { return s.tie[j] < s.tie[i]; });
    } else {
      each_delta([&](int j, int i) { return denser({s.key[j], s.tie[j]}, {s.key[i], s.tie[i]}); });
    }
  }
  template <class IsDenser>
  __device__ void each_delta(const IsDenser& is_denser) const {
    for (int i = mine.first + warp; i < mine.last; i += kWarps) {
      const float* const own = row(i) + lane;
      float nearest = kInf;
#pragma unroll 4
      for (int e = 0; e < across; ++e) {
        const float d2 = own[e * kWarp];
        nearest = is_denser(e * kWarp + lane, i) ? fminf(nearest, d2) : nearest;
      }
      nearest = warp_min_of_nonnegative(nearest);
      if (nearest == kInf) {  // the densest: the largest distance of all
        float far = 0;
        for (int j = lane; j < n; j += kWarp) far = fmaxf(far, s.r_far[j].y);
        nearest = warp_max_of_nonnegative(far);
      }
      if (lane == 0) s.delta2[i] = nearest;
    }
  }

  // A thread for each row and block to post to: float64 logarithms are slow, so all rows are done at once.
  __device__ void scores() const {
    static_assert(ceil_div(kMaxTokens, Team::kSize) * Team::kSize <= kThreads);
    const int i = mine.first + thread / Team::kSize;
    if (i >= mine.last) return;
    const bool candidate = s.keep[i] == kNever;
    const float* noise = noise_of(s.position[i]);
    const uint64_t score = candidate ? score_key(s.r_far[i].x, noise, s.delta2[i], p.C) : kNotACandidate;
    team.post(kScoresPosted, thread % Team::kSize, s.score + i, score);
  }

  // A token's place is the number of better ones; tokens of `keep` come after the best.
  __device__ void slots() const {
    int named = 0;
    for (int j = lane; j < n && num_keep > 0; j += kWarp) named += s.keep[j] != kNever;
    const int best = min(static_cast<int>(p.M) - num_keep, n - __reduce_add_sync(kAllLanes, named));
    for (int i = mine.first + warp; i < mine.last; i += kWarps) {
      const uint64_t score = s.score[i];
      const int keep = s.keep[i];
      int before = 0;
      if (keep == kNever) {
#pragma unroll 4
        for (int j = lane; j < across * kWarp; j += kWarp) before += s.score[j] < score + (j < i);
      } else {
        for (int j = lane; j < n; j += kWarp) before += s.keep[j] < keep;
      }
      before = __reduce_add_sync(kAllLanes, before);
      const int slot = keep != kNever ? best + before : before < best ? before : -1;
      if (lane < Team::kSize) team.post(kSlotsPosted, lane, s.slot + i, slot);
    }
  }

  // Places, in every block: as they are, or renumbered by position. Returns how many tokens are kept.
  __device__ int places() const {
    const bool chosen = thread < n && s.slot[thread] >= 0;
    const unsigned word = __ballot_sync(kAllLanes, chosen);
    if (lane == 0) s.words[warp] = word;
    __syncthreads();
    const Marked kept = marked(s);
    const int earlier = kept.before + __popc(word & ((1u << lane) - 1));
    const int place = !chosen ? -1 : p.ordered ? earlier : s.slot[thread];
    if (thread < n) s.place[thread] = place;
    if (chosen) s.kept[place] = thread;
    return kept.all;
  }

  // Results. Written last, so that no barrier has to wait for global memory.
  __device__ void write(int kept) const {
    if (thread < mine.last - mine.first) {
      const int i = mine.first + thread;
      const int64_t at = b * p.N + s.position[i];
      const float delta = sqrtf(s.delta2[i] / static_cast<float>(p.C));
      p.density[at] = s.density[i];
      p.delta[at] = delta;
      p.score[at] = s.density[i] * delta;
    }
    if (team.rank == 0 && thread < p.M) p.index[b * p.M + thread] = thread < kept ? s.position[s.kept[thread]] : -1;
    if (team.rank == Team::kSize - 1 && thread < p.N && s.token[thread] < 0) {
      const int64_t at = b * p.N + thread;
      p.density[at] = p.delta[at] = p.score[at] = 0;
      if (p.assign) p.assignment[at] = -1;
    }
  }

  // The nearest kept token.
  __device__ void assign(int kept) const {
    for (int i = mine.first + warp; i < mine.last; i += kWarps) {
      float nearest = kInf;
      int where = kNever;
      for (int m = lane; m < kept; m += kWarp) {
        const float d2 = row(i)[s.kept[m]];
        if (d2 < nearest) nearest = d2, where = m;
      }
      const float least = warp_min_of_nonnegative(nearest);
      where = __reduce_min_sync(kAllLanes, nearest == least ? where : kNever);
      if (s.place[i] >= 0) where = s.place[i];
      if (lane == 0) s.nearest[i] = kept == 0 ? -1 : where;
    }
    __syncthreads();
    if (thread < mine.last - mine.first) {
      const int i = mine.first + thread;
      p.assignment[b * p.N + s.position[i]] = s.nearest[i];
    }
  }
};

// ---- one launch: a cluster per sample -----------------------------------------------------------------------------

template <class T, bool kWide>
__global__ void __launch_bounds__(kThreads, 1) dpc_knn_small_kernel(DpcKnn p, int64_t first_sample) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  Shared& s = *reinterpret_cast<Shared*>(ptx::shared_memory());
  unsigned char* const memory = ptx::shared_memory() + sizeof(Shared);
  float* const partial = reinterpret_cast<float*>(memory);
  const int64_t b = first_sample + blockIdx.x / kTeam;
  const int rank = static_cast<int>(ptx::cluster_rank()), group = rank / kSplits, split = rank % kSplits;
  const int partial_floats = tiles_of_group(across_of(p)) * kTileFloats;
  const Cluster team{rank, partial + partial_floats, partial, s.posted};
  Pair pair{s, group * Pair::kTokens, static_cast<uint32_t>(rank ^ kSplits)};
  pair.init();
  if (threadIdx.x < kSteps) ptx::barrier_init(s.posted + threadIdx.x, 1);
  ptx::cluster_arrive();
  int n = number_tokens(s, threadIdx.x < p.N && in_mask(p, b * p.N + threadIdx.x));
  ptx::cluster_wait();
  for (float bound = -1;;) {
    products<T, kWide>(p, b, s, n, bound, group, split, pair, memory, partial);
    team.sync();
    const Limits limits(team, s);  // not after the next barrier: a block without rows may have ended then
    reduce_scatter(team, s, n);
    team.sync();
    if (bound >= 0 || all_valid(s, limits, n)) break;
    for (int i = rank * kWarps + warp_id(); i < n; i += kTeam * kWarps) {
      const float own = bound_of<T>(p, b, s.position[i]);
      if (lane_id() < kTeam) team.in(lane_id(), s.bound)[i] = own;
    }
    team.sync();
    bound = largest_bound(s.bound, n);
    const int token = threadIdx.x < kMaxTokens ? s.token[threadIdx.x] : -1;
    n = number_tokens(s, token >= 0 && s.bound[token] >= 0);
  }
  Choice<Cluster>{p, b, team, s, n}.choose();
#endif
}

// ---- a few launches -----------------------------------------------------------------------------------------------

// Scratch of one round: bound_of each token, the partial products and the distances of each sample.
struct Staged {
  float *bound, *partial, *rows;
  int64_t samples, partial_floats, row_floats, bytes;

  Staged(const DpcKnn& p, void* scratch) : samples(min(p.B, kStagedSamples)) {
    const int across = across_of(p);
    partial_floats = int64_t{tiles_of_group(across)} * kTileFloats, row_floats = p.N * row_stride(across);
    const int64_t bounds = (samples * p.N + 63) / 64 * 64;
    bound = static_cast<float*>(scratch);
    partial = bound + bounds;
    rows = partial + samples * kTeam * partial_floats;
    bytes = 4 * (bounds + samples * (kTeam * partial_floats + row_floats));
  }
};

// A warp per token.
template <class T>
__global__ void __launch_bounds__(kThreads)
dpc_knn_bound_kernel(DpcKnn p, int64_t first_sample, int64_t tokens, float* bound) {
  const int64_t t = int64_t{blockIdx.x} * kWarps + warp_id();
  if (t >= tokens) return;
  const int64_t at = first_sample * p.N + t, b = at / p.N;
  const float own = in_mask(p, at) ? bound_of<T>(p, b, at - b * p.N) : -1;
  if (lane_id() == 0) bound[t] = own;
}

template <class T, bool kWide>
__global__ void __launch_bounds__(kThreads, 1)
dpc_knn_products_kernel(DpcKnn p, int64_t first_sample, const float* bound, float* partial, int64_t partial_floats) {
  Tokens& s = *reinterpret_cast<Tokens*>(ptx::shared_memory());
  const int64_t sample = blockIdx.x / kTeam;
  const int rank = static_cast<int>(blockIdx.x % kTeam);
  bound += sample * p.N;
  const int n = number_tokens(s, threadIdx.x < p.N && bound[threadIdx.x] >= 0);
  Single single;
  products<T, kWide>(p, first_sample + sample, s, n, largest_bound(bound, static_cast<int>(p.N)), rank / kSplits,
                     rank % kSplits, single, ptx::shared_memory() + sizeof(Tokens),
                     partial + blockIdx.x * partial_floats);
}

__global__ void __launch_bounds__(kThreads)
dpc_knn_choose_kernel(DpcKnn p, int64_t first_sample, const float* bound, float* partial, int64_t partial_floats,
                      float* rows, int64_t row_floats) {
  Shared& s = *reinterpret_cast<Shared*>(ptx::shared_memory());
  const int64_t sample = blockIdx.x;
  const Alone team{rows + sample * row_floats, partial + sample * kTeam * partial_floats,
                   static_cast<int>(partial_floats)};
  const int n = number_tokens(s, threadIdx.x < p.N && bound[sample * p.N + threadIdx.x] >= 0);
  reduce_scatter(team, s, n);
  team.sync();
  Choice<Alone>{p, first_sample + sample, team, s, n}.choose();
}

// ---- launchers ----------------------------------------------------------------------------------------------------

// Once per device and kernel: lets it have as much shared memory as it may need.
template <class... P>
cudaError_t allow_shared(void (*kernel)(P...), int64_t bytes, std::atomic<uint64_t>& devices) {
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if (devices.load() & bit) return cudaSuccess;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error == cudaSuccess) devices.fetch_or(bit);
  return error;
}

// The configuration of a launch in clusters of kTeam blocks.
struct ClusterLaunch {
  cudaLaunchAttribute attribute{};
  cudaLaunchConfig_t config{};

  ClusterLaunch(int64_t blocks, int64_t bytes, cudaStream_t stream) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = kTeam;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = static_cast<size_t>(bytes);
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  ClusterLaunch(const ClusterLaunch&) = delete;  // config points into it
};

// Calls body(T{}, wide) with wide = std::true_type if four channels are always one aligned load.
template <class Body>
auto with_layout(const DpcKnn& p, const Body& body) {
  return with_element<false>(p.dtype, [&](auto element) {
    constexpr int kBytes = 4 * sizeof(element);
    const bool wide = reinterpret_cast<uintptr_t>(p.x) % kBytes == 0 && (p.x_stride_c == 1 || p.C == 1) &&
                      p.x_stride_n % 4 == 0 && p.x_stride_b % 4 == 0 && p.x_stride_n < INT_MAX / kMaxTokens;
    return wide ? body(element, std::true_type{}) : body(element, std::false_type{});
  });
}

// Whether the current device takes the cluster form: its code was compiled for sm_90 or later, rather than from the PTX
// of an older generation, and the device has room for a whole cluster. Remembered per device, unless asking failed.
inline bool has_clusters() {
  static std::atomic<uint64_t> known{0}, takes{0}, raised{0};
  int device = 0, generation = 0, clusters = 0;
  cudaFuncAttributes attributes{};
  const auto kernel = dpc_knn_small_kernel<float, true>;
  const ClusterLaunch launch(kTeam, shared_bytes(kMaxAcross), nullptr);
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&generation, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess && generation < 9) return false;
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if (error == cudaSuccess && (known.load() & bit)) return takes.load() & bit;
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kernel);
  if (error == cudaSuccess && attributes.ptxVersion >= 90) {
    error = allow_shared(kernel, shared_bytes(kMaxAcross), raised);
    if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &launch.config);
  }
  if (error != cudaSuccess) {
    cudaGetLastError();  // what was asked is not what the caller asked for
    return false;
  }
  if (clusters > 0) takes.fetch_or(bit);
  known.fetch_or(bit);
  return clusters > 0;
}

inline cudaError_t fwd_cluster(const DpcKnn& p, cudaStream_t stream) {
  return with_layout(p, [&](auto element, auto wide) {
    static std::atomic<uint64_t> raised{0};
    const auto kernel = dpc_knn_small_kernel<decltype(element), decltype(wide)::value>;
    const cudaError_t error = allow_shared(kernel, shared_bytes(kMaxAcross), raised);
    if (error != cudaSuccess) return error;
    return launch_in_runs(p.B, kTeam, [&](int64_t first, int64_t samples) {
      const ClusterLaunch launch(samples * kTeam, shared_bytes(across_of(p)), stream);
      return cudaLaunchKernelEx(&launch.config, kernel, p, first);
    });
  });
}

inline cudaError_t fwd_staged(const DpcKnn& p, void* scratch, cudaStream_t stream) {
  const Staged s(p, scratch);
  return with_layout(p, [&](auto element, auto wide) {
    static std::atomic<uint64_t> raised{0};
    using T = decltype(element);
    const auto multiply_kernel = dpc_knn_products_kernel<T, decltype(wide)::value>;
    cudaError_t error = allow_shared(multiply_kernel, staged_shared_bytes(kMaxAcross), raised);
    for (int64_t first = 0; first < p.B && error == cudaSuccess; first += s.samples) {
      const int64_t samples = min(p.B - first, s.samples), tokens = samples * p.N;
      error = launch_kernel(dpc_knn_bound_kernel<T>, blocks_for(tokens, kWarps), kThreads, 0, stream, p, first, tokens,
                            s.bound);
      if (error != cudaSuccess) break;
      error = launch_kernel(multiply_kernel, static_cast<unsigned>(samples * kTeam), kThreads,
                            staged_shared_bytes(across_of(p)), stream, p, first, s.bound, s.partial, s.partial_floats);
      if (error != cudaSuccess) break;
      error = launch_kernel(dpc_knn_choose_kernel, static_cast<unsigned>(samples), kThreads, sizeof(Shared), stream, p,
                            first, s.bound, s.partial, s.partial_floats, s.rows, s.row_floats);
    }
    return error;
  });
}

inline bool takes(const DpcKnn& p) { return p.N <= kMaxTokens; }

inline int64_t scratch(const DpcKnn& p) { return has_clusters() ? 0 : Staged(p, nullptr).bytes; }

// Without scratch there were clusters a moment ago.
inline cudaError_t fwd(const DpcKnn& p, void* scratch, cudaStream_t stream) {
  return scratch == nullptr || has_clusters() ? fwd_cluster(p, stream) : fwd_staged(p, scratch, stream);
}

}  // namespace hotkernels::dpc::small
