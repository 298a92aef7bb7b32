// A CUDA driver that loads and runs nothing: it shows what Triton's launcher gives it, and refuses where it is told to.
// Its functions are those that the launcher asks a driver for; numbers in them are those of cuda.h.
#include <stdint.h>
#include <string.h>

typedef int Result;
typedef void* Handle;

enum { kSuccess = 0, kInvalidImage = 200, kLaunchRefused = 701, kCapturing = 900 };  // CUresult

static int some_handle;

void (*hk_on_launch)(const unsigned* config, Handle* params);
int hk_refuse_launch, hk_refuse_load;

Result cuInit(unsigned flags) { return kSuccess; }
Result cuGetErrorString(Result error, const char** text) {
  *text = error == kLaunchRefused ? "too many resources requested for launch"
          : error == kCapturing   ? "operation not permitted when stream is capturing"
                                  : "an error";
  return kSuccess;
}
Result cuDriverGetVersion(int* version) { return *version = 13000, kSuccess; }
Result cuDeviceGetCount(int* count) { return *count = 1, kSuccess; }
Result cuDeviceGet(int* device, int ordinal) { return *device = ordinal, kSuccess; }
Result cuDeviceGetAttribute(int* value, int attribute, int device) {
  switch (attribute) {  // CUdevice_attribute
    case 97: return *value = 227 * 1024, kSuccess;  // shared memory per block, opted in to
    case 75: return *value = 9, kSuccess;           // compute capability, major
    case 76: return *value = 0, kSuccess;           // minor
    case 10: return *value = 32, kSuccess;          // threads of a warp
    default: return *value = 1, kSuccess;
  }
}
Result cuDevicePrimaryCtxRetain(Handle* context, int device) { return *context = &some_handle, kSuccess; }
Result cuCtxGetCurrent(Handle* context) { return *context = &some_handle, kSuccess; }
Result cuCtxSetCurrent(Handle context) { return kSuccess; }
Result cuCtxGetDevice(int* device) { return *device = 0, kSuccess; }
Result cuCtxGetLimit(size_t* value, int limit) { return *value = 0, kSuccess; }
Result cuCtxSetLimit(int limit, size_t value) { return kSuccess; }
Result cuModuleLoadData(Handle* module, const void* image) {
  if (hk_refuse_load) return kCapturing;
  *module = &some_handle;
  return memcmp(image, "\177ELF", 4) ? kInvalidImage : kSuccess;
}
Result cuModuleUnload(Handle module) { return kSuccess; }
Result cuModuleGetFunction(Handle* function, Handle module, const char* name) {
  return *function = &some_handle, kSuccess;
}
Result cuFuncGetAttribute(int* value, int attribute, Handle function) {
  return *value = attribute == 0 ? 1024 : 0, kSuccess;  // 0: threads of a block, at most
}
Result cuFuncSetAttribute(Handle function, int attribute, int value) { return kSuccess; }
Result cuFuncSetCacheConfig(Handle function, int config) { return kSuccess; }
Result cuPointerGetAttribute(uint64_t* value, int attribute, uint64_t pointer) { return *value = pointer, kSuccess; }
Result cuStreamIsCapturing(Handle stream, int* status) { return *status = 0, kSuccess; }
Result cuOccupancyMaxActiveClusters(int* count, Handle function, const void* config) { return *count = 1, kSuccess; }
Result cuTensorMapEncodeTiled(void) { return kSuccess; }
Result cuTensorMapEncodeIm2col(void) { return kSuccess; }
Result cuLaunchKernelEx(const unsigned* config, Handle function, Handle* params, Handle* extra) {
  if (hk_refuse_launch) return kLaunchRefused;
  if (hk_on_launch) hk_on_launch(config, params);
  return kSuccess;
}
