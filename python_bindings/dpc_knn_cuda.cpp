// dpc_knn on NVIDIA GPUs: the checks of the CPU binding, scratch, the launches on PyTorch's current stream.
#include "cuda.h"
#include "dpc_knn.h"

namespace hotkernels {
namespace {

Peaks dpc_knn(const Tensor& x, int64_t num_clusters, int64_t k, const std::optional<Tensor>& mask,
              const std::optional<Tensor>& keep, const std::optional<Tensor>& noise, int64_t seed, bool assign,
              bool ordered) {
  const DeviceGuard guard(x.get_device_index());
  const DpcKnnCall call(x, num_clusters, k, mask, keep, noise, seed, assign, ordered);
  check_32_bits(call.p.N, kDpcKnn, "x", "tokens per sample");
  check_32_bits(call.p.C, kDpcKnn, "x", "channels");
  Tensor scratch = allocate(x, {dpc_knn_scratch_cuda(call.p)}, ScalarType::Byte);
  check_launch(dpc_knn_fwd_cuda(call.p, scratch.mutable_data_ptr(), current_stream(x.get_device_index())), kDpcKnn);
  return call.results();
}

}  // namespace
}  // namespace hotkernels

STABLE_TORCH_LIBRARY_IMPL(hotkernels, CUDA, m) { m.impl("dpc_knn_fwd", TORCH_BOX(&hotkernels::dpc_knn)); }
