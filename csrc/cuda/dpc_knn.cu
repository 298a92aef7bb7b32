// dpc_knn: the samples of up to a few hundred tokens in one go, larger ones by neighbour lists.
#include "dpc_knn_large.h"
#include "dpc_knn_small.h"

namespace hotkernels {

int64_t dpc_knn_scratch_cuda(const DpcKnn& p) {
  return dpc::small::takes(p) ? dpc::small::scratch(p) : dpc::large::scratch(p);
}

CudaError dpc_knn_fwd_cuda(const DpcKnn& p, void* scratch, CudaStream stream) {
  if (p.B == 0) return cudaSuccess;
  return dpc::small::takes(p) ? dpc::small::fwd(p, scratch, stream) : dpc::large::fwd(p, scratch, stream);
}

}  // namespace hotkernels
