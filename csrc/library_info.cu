// What the CUDA library is and what it sees; `reelforge doctor` prints it.
// Plain C interface, no libtorch headers: loaded with ctypes, also on a machine without a GPU.

#include <cuda_runtime.h>

#define REELFORGE_EXPORT extern "C" __attribute__((visibility("default")))

// CUDA runtime the library was linked with, e.g. 13000 for 13.0.
REELFORGE_EXPORT int reelforge_cuda_runtime_version() { return CUDART_VERSION; }

// Hash of the sources in csrc/, which kernels/backends/sm90.py compares with the one it was written for.
REELFORGE_EXPORT const char* reelforge_sources() { return REELFORGE_SOURCES; }

// Devices of compute capability 9.0, the only one the kernels are compiled for; a negated cudaError_t on failure.
REELFORGE_EXPORT int reelforge_hopper_device_count() {
  int total = 0;
  if (cudaError_t error = cudaGetDeviceCount(&total); error != cudaSuccess) return -static_cast<int>(error);
  int hopper = 0;
  for (int device = 0; device < total; ++device) {
    int major = 0, minor = 0;
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess) continue;
    if (cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess) continue;
    hopper += major == 9 && minor == 0;
  }
  return hopper;
}
