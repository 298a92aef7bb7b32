// merge_tokens on the CPU: checks, allocates, shares samples and channels (forward) or tokens (backward) among threads.
#include "merge_tokens.h"

#include <algorithm>
#include <tuple>

namespace hotkernels {
namespace {

constexpr int64_t kChannels = 128;     // channels per task at least: 512 bytes of a row, which the prefetcher follows
constexpr int64_t kSums = 128 * 1024;  // of a task's sums: half a megabyte, which the second-level cache keeps
constexpr int64_t kGrain = 64;         // tokens per task at least

// Whole rows are read fastest, but sums should stay in the cache and every thread should have a task.
int64_t channels_per_task(const MergeTokens& p) {
  const auto threads = static_cast<int64_t>(torch::stable::get_num_threads());
  int64_t chunks = 1;
  const auto size = [&] { return (p.C + chunks * kChannels - 1) / (chunks * kChannels) * kChannels; };
  while (size() > kChannels && (p.M * size() > kSums || p.B * chunks < threads)) ++chunks;
  return std::max<int64_t>(std::min(size(), p.C), 1);
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& assignment, int64_t num_clusters,
                                           const std::optional<Tensor>& weight, double eps, bool need_mean) {
  const MergeTokensCall call(x, assignment, num_clusters, weight, eps, need_mean);
  const MergeTokens& p = call.p;
  check_index_range(assignment, p.M, kMergeTokens, "assignment");
  const Isa set = isa();
  const auto sum_weights = HK_CPU_DISPATCH(set, merge_tokens_total);
  const auto kernel = HK_CPU_DISPATCH(set, merge_tokens_fwd);
  parallel(p.B, 1, [&](int64_t begin, int64_t end) { sum_weights(p, begin, end); });
  const int64_t channels = channels_per_task(p), chunks = (p.C + channels - 1) / channels;
  const int64_t bytes = HK_CPU_DISPATCH(set, merge_tokens_scratch)(p, channels);
  parallel(p.B * chunks, 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch(x, bytes);
    for (int64_t t = begin; t < end; ++t) {
      const int64_t c = t % chunks * channels;
      kernel(p, t / chunks, c, std::min(p.C, c + channels), scratch.data);
    }
  });
  return {call.out, call.total, call.mean};
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad_out, const std::optional<Tensor>& mean, const Tensor& total,
                                    const Tensor& x, const Tensor& assignment, const std::optional<Tensor>& weight,
                                    bool need_weight) {
  const MergeTokensGradCall call(grad_out, mean, total, x, assignment, weight, need_weight);
  const MergeTokens& p = call.p;
  check_index_range(assignment, p.M, kMergeTokens, "assignment");
  const auto kernel = HK_CPU_DISPATCH(isa(), merge_tokens_bwd);
  parallel(p.B * p.N, kGrain, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  return {call.grad_x, call.grad_weight};
}

}  // namespace
}  // namespace hotkernels

STABLE_TORCH_LIBRARY_IMPL(hotkernels, CPU, m) {
  m.impl("merge_tokens_fwd", TORCH_BOX(&hotkernels::forward));
  m.impl("merge_tokens_bwd", TORCH_BOX(&hotkernels::backward));
}
