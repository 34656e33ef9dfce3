// As much of NVIDIA's driver as Triton's launcher calls, without a GPU. A launch is handed to whoever
// wants it; otherwise it does nothing, so that what it costs the host can be measured.
#include <stddef.h>
#include <stdint.h>

typedef int Result;
#define SUCCEEDS(name) \
  Result name(void) { return 0; }

typedef struct {
  unsigned grid[3], block[3], shared;
  void* stream;
  void* attributes;
  unsigned attribute_count;
} Config;  // CUlaunchConfig

// Gets what a GPU would, if it is set, and returns an error or 0. `stand_in_error` is then what it was.
Result (*stand_in_on_launch)(uintptr_t function, const unsigned* grid, const unsigned* block, unsigned shared,
                             uintptr_t stream, void** parameters);
char stand_in_error[4096] = "an error of the stand-in";

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

// Each function that is loaded has a handle of its own.
Result cuModuleGetFunction(void** function, void* module, const char* name) {
  static uintptr_t last = 100;
  (void)module, (void)name;
  return give_handle(function, ++last);
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
  *text = stand_in_error;
  return 0;
}

Result cuPointerGetAttribute(void* data, int attribute, uint64_t address) {
  (void)attribute;
  *(uint64_t*)data = address;
  return 0;
}

Result cuLaunchKernelEx(const Config* config, void* function, void** parameters, void** extra) {
  (void)extra;
  if (stand_in_on_launch == NULL) return 0;
  return stand_in_on_launch((uintptr_t)function, config->grid, config->block, config->shared,
                            (uintptr_t)config->stream, parameters);
}
