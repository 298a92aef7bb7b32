// invert_index on NVIDIA GPUs: the checks of the CPU binding, scratch, the launches on PyTorch's current stream.
#include "cuda.h"
#include "invert_index.h"

namespace hotkernels {

std::tuple<Tensor, Tensor> invert_index(const Tensor& index, int64_t num_tokens) {
  const DeviceGuard guard(index.get_device_index());
  check_32_bits(num_tokens, kInvertIndex, "num_tokens", "tokens");  // before memory for as many is asked for
  const InvertIndexCall call(index, num_tokens);
  check_32_bits(call.p.L, kInvertIndex, "index", "entries per row");
  Tensor scratch = allocate(index, {invert_index_scratch_cuda(call.p)}, ScalarType::Byte);
  const CudaStream stream = current_stream(index.get_device_index());
  check_launch(invert_index_cuda(call.p, scratch.mutable_data_ptr(), stream), kInvertIndex);
  return {call.start, call.slots};
}

}  // namespace hotkernels

STABLE_TORCH_LIBRARY_IMPL(hotkernels, CUDA, m) { m.impl("invert_index", TORCH_BOX(&hotkernels::invert_index)); }
