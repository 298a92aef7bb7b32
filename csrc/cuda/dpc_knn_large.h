// DPC-kNN of samples with many tokens: up to three passes of tensor-core tiles, and no N x N matrix anywhere.
//
// The valid tokens of a sample are numbered 0 .. n-1. In the first pass a block of 128 tokens meets all others, and
// each token keeps a sorted list of its nearest. As csrc/cpu/dpc_knn_large.h explains, the list answers density, delta
// and assignment exactly for most tokens; the others are gathered and meet all tokens (for delta, in the second pass)
// or the kept ones (for assignment, in the third).
//
// Threads race where lists are filled and where tokens are gathered. Neither race changes a result: a list ends up with
// the same distances whoever came first; of several equally far tokens at its end any may stay, because no answer
// relies on them; and a gathered token's answer is a minimum, whichever tokens share its block.
//
// In the order of `run`, below:
//   dpc_knn_large_plan.h        what the host decides, and where the arrays are
//   dpc_knn_large_prepare.h     which tokens are valid, the pivot, the copy that tiles are multiplied from
//   dpc_knn_large_tiles.h       squared distances, a tile at a time: the loop of all passes
//   dpc_knn_large_neighbours.h  the first pass
//   dpc_knn_large_search.h      density, delta and assignment: from the lists, then the other passes
//   dpc_knn_large_choose.h      scores, the chosen tokens and their places, which assignment waits for
#pragma once
#include "dpc_knn_large_choose.h"
#include "dpc_knn_large_neighbours.h"
#include "dpc_knn_large_plan.h"
#include "dpc_knn_large_prepare.h"
#include "dpc_knn_large_search.h"
#include "launch.h"

namespace hotkernels::dpc::large {

template <class... Parameters, class... Arguments>
cudaError_t launch(cudaStream_t stream, void (*kernel)(Parameters...), dim3 grid, int threads, int shared,
                   Arguments... arguments) {
  if (shared > 48 << 10) {
    // The most that there is: less could be lowered by another thread's call before this launch.
    const int most = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, kLeastShared);
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 100);
    if (error != cudaSuccess) return error;
  }
  return launch_kernel(kernel, grid, static_cast<unsigned>(threads), shared, stream, arguments...);
}

template <class T>
cudaError_t run(const Plan& s, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  const DpcKnn& p = s.p;
  const auto go = [&](auto* kernel, int64_t grid, int threads, int shared, auto... arguments) {
    if (error != cudaSuccess) return;
    error = launch(stream, kernel, dim3(static_cast<unsigned>(grid)), threads, shared, s, arguments...);
  };
  const int64_t tiles = p.B * s.blocks;
  const int slices = (s.chunks * kChunk + kThreads - 1) / kThreads;
  go(valid_kernel<T>, (p.B * p.N + 256 / kWarp - 1) / (256 / kWarp), 256, 0);
  go(number_kernel, p.B, kSortThreads, kWarp * 4);
  go(pivot_kernel<T>, tiles * slices, kThreads, 0, slices);
  go(centre_kernel<T>, tiles * 2, kThreads, kThreads / kWarp * 16 * kTokenBytes);
  if (error == cudaSuccess) {
    const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(s.splits));
    const auto kernel = s.list == kUsualList ? neighbours_kernel<kUsualList> : neighbours_kernel<0>;
    error = launch(stream, kernel, grid, kThreads, lists_bytes(s.list), s);
  }
  if (!s.listed) go(kth_distance_kernel, tiles, kThreads, kSelectBytes);
  go(density_kernel, tiles, kTile, kMaxSplits * kTile);
  go(list_delta_kernel, tiles, kTile, 0);
  go(search_kernel<false>, s.workers, kThreads, kSearchBytes);
  go(score_kernel, tiles, kTile, 0);
  go(choose_kernel, p.B, kSortThreads, sizeof(ChooseShared));
  const int rows = static_cast<int>((p.M + kPlaceRows - 1) / kPlaceRows);
  go(place_kernel, p.B * rows, 256, 256 * 4, rows);
  if (p.assign) {
    go(list_assign_kernel, tiles, kTile, 0);
    go(search_kernel<true>, s.workers, kThreads, kSearchBytes);
    go(write_assignment_kernel, tiles, kTile, 0);
  }
  return error;
}

inline int64_t scratch(const DpcKnn& p) {
  int64_t bytes = 0;
  if (p.B > 0) make_plan(p, nullptr, &bytes);
  return bytes;
}

inline cudaError_t fwd(const DpcKnn& p, void* scratch, cudaStream_t stream) {
  int64_t bytes = 0;
  const Plan s = make_plan(p, scratch, &bytes);
  return with_element<false>(p.dtype, [&](auto element) { return run<decltype(element)>(s, stream); });
}

}  // namespace hotkernels::dpc::large
