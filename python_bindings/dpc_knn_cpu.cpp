// dpc_knn on the CPU: checks, allocates, shares samples or the tiles of one sample among torch's threads.
#include "dpc_knn.h"

namespace hotkernels {
namespace {

Peaks dpc_knn(const Tensor& x, int64_t num_clusters, int64_t k, const std::optional<Tensor>& mask,
              const std::optional<Tensor>& keep, const std::optional<Tensor>& noise, int64_t seed, bool assign,
              bool ordered) {
  const DpcKnnCall call(x, num_clusters, k, mask, keep, noise, seed, assign, ordered);
  const DpcKnn& p = call.p;
  if (keep) check_index_range(*keep, p.N, kDpcKnn, "keep");

  const Isa set = isa();
  const auto scratch_bytes = HK_CPU_DISPATCH(set, dpc_knn_scratch);
  const auto fwd = HK_CPU_DISPATCH(set, dpc_knn_fwd);
  const Runner runner = torch_runner();
  if (p.B >= runner.threads) {  // samples share nothing: the cheapest cut
    parallel(p.B, 1, [&](int64_t begin, int64_t end) {
      const Scratch scratch(x, scratch_bytes(p, 1));
      for (int64_t b = begin; b < end; ++b) fwd(p, b, scratch.data, kSerial);
    });
  } else if (p.B > 0) {
    const Scratch scratch(x, scratch_bytes(p, runner.threads));
    for (int64_t b = 0; b < p.B; ++b) fwd(p, b, scratch.data, runner);
  }
  return call.results();
}

}  // namespace
}  // namespace hotkernels

STABLE_TORCH_LIBRARY_IMPL(hotkernels, CPU, m) { m.impl("dpc_knn_fwd", TORCH_BOX(&hotkernels::dpc_knn)); }
