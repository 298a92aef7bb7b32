// The one list of raw operators. A device's library adds its kernels with STABLE_TORCH_LIBRARY_IMPL.
#include "check.h"

STABLE_TORCH_LIBRARY(hotkernels, m) {
  m.def(
      "dpc_knn_fwd(Tensor x, int num_clusters, int k, Tensor? mask, Tensor? keep, Tensor? noise, int seed, bool assign, "
      "bool ordered) -> (Tensor index, Tensor assignment, Tensor density, Tensor delta, Tensor score)");
  m.def("gather_tokens_fwd(Tensor x, Tensor index, Tensor? pos) -> Tensor");
  m.def("gather_tokens_bwd(Tensor grad_out, Tensor index, int num_tokens) -> Tensor");
  m.def(
      "merge_tokens_fwd(Tensor x, Tensor assignment, int num_clusters, Tensor? weight, float eps) -> (Tensor out, Tensor "
      "total)");
  m.def(
      "merge_tokens_bwd(Tensor grad_out, Tensor out, Tensor total, Tensor x, Tensor assignment, Tensor? weight, bool "
      "need_weight) -> (Tensor grad_x, Tensor grad_weight)");
  m.def("_isa(str? force) -> str");
}
