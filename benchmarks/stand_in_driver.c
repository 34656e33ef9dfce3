// As much of NVIDIA's driver as Triton's launcher calls, doing nothing: what a launch costs the host can then
// be measured without a GPU. It counts launches.
#include <stddef.h>
#include <stdint.h>

typedef int Result;
#define SUCCEEDS(name) \
  Result name(void) { return 0; }

long stand_in_launches;

SUCCEEDS(cuInit)
SUCCEEDS(cuCtxSetCurrent)
SUCCEEDS(cuCtxSetLimit)
SUCCEEDS(cuFuncSetAttribute)
SUCCEEDS(cuFuncSetCacheConfig)
SUCCEEDS(cuModuleUnload)
SUCCEEDS(cuOccupancyMaxActiveClusters)
SUCCEEDS(cuPointerGetAttributes)
SUCCEEDS(cuTensorMapEncodeIm2col)
SUCCEEDS(cuTensorMapEncodeTiled)

static Result give(int* to, int value) {
  *to = value;
  return 0;
}

static Result give_handle(void** to, uintptr_t value) {
  *to = (void*)value;
  return 0;
}

Result cuCtxGetCurrent(void** context) { return give_handle(context, 1); }
Result cuDevicePrimaryCtxRetain(void** context, int device) { return (void)device, give_handle(context, 1); }
Result cuModuleLoadData(void** module, const void* image) { return (void)image, give_handle(module, 2); }
Result cuModuleGetFunction(void** function, void* module, const char* name) {
  (void)module, (void)name;
  return give_handle(function, 3);
}

Result cuCtxGetDevice(int* device) { return give(device, 0); }
Result cuDeviceGet(int* device, int ordinal) { return give(device, ordinal); }
Result cuDriverGetVersion(int* version) { return give(version, 13000); }
Result cuStreamIsCapturing(void* stream, int* status) { return (void)stream, give(status, 0); }

Result cuCtxGetLimit(size_t* value, int limit) {
  (void)limit;
  *value = (size_t)1 << 20;
  return 0;
}

// Compute capability 9.0, and enough shared memory.
Result cuDeviceGetAttribute(int* value, int attribute, int device) {
  (void)device;
  return give(value, attribute == 75 ? 9 : attribute == 76 ? 0 : 232448);
}

// At most 1024 threads a block, no local memory, 64 registers.
Result cuFuncGetAttribute(int* value, int attribute, void* function) {
  (void)function;
  return give(value, attribute == 0 ? 1024 : attribute == 3 ? 0 : 64);
}

Result cuGetErrorString(int error, const char** text) {
  (void)error;
  *text = "an error of the stand-in";
  return 0;
}

Result cuPointerGetAttribute(void* data, int attribute, uint64_t address) {
  (void)attribute;
  *(uint64_t*)data = address;
  return 0;
}

Result cuLaunchKernelEx(const void* config, void* function, void** arguments, void** extra) {
  (void)config, (void)function, (void)arguments, (void)extra;
  ++stand_in_launches;
  return 0;
}
