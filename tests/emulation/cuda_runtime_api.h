// The part of CUDA's runtime that launchers and bindings use, over emulation.h.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "emulation.h"

struct CUstream_st;
using cudaStream_t = CUstream_st*;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorLaunchFailure = 719,
};

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess                   ? "no error"
         : error == cudaErrorLaunchFailure      ? "unspecified launch failure"
         : error == cudaErrorInsufficientDriver ? "CUDA driver version is insufficient for CUDA runtime version"
                                                : "invalid argument";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaPeekAtLastError() { return cudaSuccess; }

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum cudaLaunchAttributeID {
  cudaLaunchAttributeClusterDimension = 4,
  cudaLaunchAttributeProgrammaticStreamSerialization = 6,
};
union cudaLaunchAttributeValue {
  struct {
    unsigned x, y, z;
  } clusterDim;
  int programmaticStreamSerializationAllowed;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9,
  cudaFuncAttributeNonPortableClusterSizeAllowed = 13,
};
struct cudaFuncAttributes {
  size_t sharedSizeBytes, constSizeBytes, localSizeBytes;
  int maxThreadsPerBlock, numRegs, ptxVersion, binaryVersion, maxDynamicSharedSizeBytes;
};

namespace hk_emulation {
int compute_capability();
int shared_memory_per_block();
int shared_memory_limit(const void* function);
cudaError_t raise_shared_memory_limit(const void* function, int bytes);
bool allows_cluster(const void* function, unsigned blocks);
void allow_any_cluster(const void* function);

template <class T>
void append(std::vector<unsigned char>& parameters, const T& value) {
  const size_t place = (parameters.size() + alignof(T) - 1) / alignof(T) * alignof(T);
  parameters.resize(place + sizeof(T));
  std::memcpy(parameters.data() + place, &value, sizeof(T));
}

inline unsigned cluster_of(const cudaLaunchConfig_t& config) {
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const auto& size = config.attrs[i].val.clusterDim;
    if (config.attrs[i].id == cudaLaunchAttributeClusterDimension) return size.x * size.y * size.z;
  }
  return 1;
}
}  // namespace hk_emulation

inline cudaError_t cudaGetDevice(int* device) {
  if (hk_emulation::compute_capability() == 0) return cudaErrorInsufficientDriver;
  *device = hk_emulation::compute_capability() / 10;  // what is remembered of a device is of one generation
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  if (hk_emulation::compute_capability() == 0) return cudaErrorInsufficientDriver;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = 132; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor: *value = hk_emulation::compute_capability() / 10; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: *value = hk_emulation::compute_capability() % 10; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = hk_emulation::shared_memory_per_block(); return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}

template <class F>
cudaError_t cudaFuncSetAttribute(F* function, cudaFuncAttribute attribute, int value) {
  const void* f = reinterpret_cast<const void*>(function);
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    return hk_emulation::raise_shared_memory_limit(f, value);
  }
  if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed && value) hk_emulation::allow_any_cluster(f);
  return cudaSuccess;
}
template <class F>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, F* function) {
  *attributes = {};
  attributes->maxThreadsPerBlock = 1024;
  // From 11.0 on, the chip runs what its driver makes of the PTX for sm_80, the only one we build.
  const int capability = hk_emulation::compute_capability();
  attributes->binaryVersion = capability;
  attributes->ptxVersion = capability < 110 ? capability : 80;
  attributes->maxDynamicSharedSizeBytes = hk_emulation::shared_memory_limit(reinterpret_cast<const void*>(function));
  return cudaSuccess;
}
template <class F>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, F* function, const cudaLaunchConfig_t* config) {
  const unsigned blocks = hk_emulation::cluster_of(*config);
  *clusters = hk_emulation::allows_cluster(reinterpret_cast<const void*>(function), blocks) ? 132 / blocks : 0;
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t = nullptr) {
  if (hk_emulation::compute_capability() == 0) return cudaErrorInsufficientDriver;
  std::memset(to, value, bytes);
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  if (hk_emulation::compute_capability() == 0) return cudaErrorInsufficientDriver;
  const dim3 grid = config->gridDim, block = config->blockDim;
  const unsigned cluster = hk_emulation::cluster_of(*config);
  const void* function = reinterpret_cast<const void*>(kernel);
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (grid.x < 1 || grid.x > 0x7fffffffu || grid.y < 1 || grid.y > 65535 || grid.z < 1 || grid.z > 65535 ||
      threads < 1 || threads > 1024 || block.z > 64 || cluster < 1 || grid.x % cluster != 0) {
    return cudaErrorInvalidConfiguration;
  }
  if (static_cast<int64_t>(config->dynamicSmemBytes) > hk_emulation::shared_memory_limit(function) ||
      !hk_emulation::allows_cluster(function, cluster)) {
    return cudaErrorInvalidValue;
  }
  std::function<void()> body = [=] { kernel(arguments...); };
  if (const hk_emulation::Translated translated = hk_emulation::translated(function)) {
    std::vector<unsigned char> parameters;
    (hk_emulation::append<Parameters>(parameters, arguments), ...);
    body = [=] { translated(parameters.data()); };
  }
  const bool done = hk_emulation::launch({grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, cluster,
                                         static_cast<int64_t>(config->dynamicSmemBytes), body);
  return done ? cudaSuccess : cudaErrorLaunchFailure;
}
