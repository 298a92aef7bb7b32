// The one list of raw operators. A device's library adds its kernels with STABLE_TORCH_LIBRARY_IMPL.
#include "check.h"

STABLE_TORCH_LIBRARY(hotkernels, m) {
  m.def(
      "dpc_knn_fwd(Tensor x, SymInt num_clusters, SymInt k, Tensor? mask, Tensor? keep, Tensor? noise, SymInt seed, "
      "bool assign, bool ordered) -> (Tensor index, Tensor assignment, Tensor density, Tensor delta, Tensor score)");
  m.def("gather_tokens_fwd(Tensor x, Tensor index, Tensor? pos) -> Tensor");
  m.def("gather_tokens_bwd(Tensor grad_out, Tensor index, SymInt num_tokens) -> Tensor");
  m.def(
      "merge_tokens_fwd(Tensor x, Tensor assignment, SymInt num_clusters, Tensor? weight, float eps, bool need_mean) "
      "-> (Tensor out, Tensor total, Tensor mean)");
  m.def(
      "merge_tokens_bwd(Tensor grad_out, Tensor? mean, Tensor total, Tensor x, Tensor assignment, Tensor? weight, "
      "bool need_weight) -> (Tensor grad_x, Tensor grad_weight)");
  m.def("invert_index(Tensor index, SymInt num_tokens) -> (Tensor start, Tensor slots)");
  m.def(
      "gathered_attention_fwd(Tensor query, Tensor key, Tensor value, Tensor? index, Tensor? bias, Tensor? key_bias, "
      "float scale) -> (Tensor out, Tensor lse)");
  m.def(
      "gathered_attention_bwd(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, "
      "Tensor lse, Tensor? index, Tensor? start, Tensor? slots, Tensor? bias, Tensor? key_bias, float scale, bool "
      "need_bias, bool need_key_bias) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_bias, "
      "Tensor grad_key_bias)");
  m.def(
      "gathered_attention_packed_bwd(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
      "float scale) -> Tensor grad_qkv");
  m.def(
      "recovery_attention_fwd(Tensor query, Tensor key, Tensor value, Tensor? key_bias, float scale) -> (Tensor out, "
      "Tensor lse)");
  m.def(
      "recovery_attention_bwd(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, Tensor? "
      "key_bias, float scale) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)");
  m.def("_isa(str? force) -> str");
  m.def("_is_intel() -> bool");
}
