// The host's side of a launch: device, stream, errors.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#ifdef VMAE_FAST_EMULATED
#include "emulated_runtime.h"
#else

#include <cuda_runtime.h>

namespace vmae_fast {

using Stream = cudaStream_t;

// Throws what CUDA says, and what was being done.
inline void check_cuda(cudaError_t status, const char* doing) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string(doing) + ": " + cudaGetErrorString(status) + " (" +
                             cudaGetErrorName(status) + ")");
  }
}

// The device is current while this lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check_cuda(cudaGetDevice(&before_), "asking for the current device");
    if (device != before_) {
      check_cuda(cudaSetDevice(device), "choosing the device");
    }
    changed_ = device != before_;
  }
  ~DeviceGuard() {
    if (changed_) {
      cudaSetDevice(before_);
    }
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// Of the current device.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check_cuda(cudaGetDevice(&device), "asking for the current device");
  check_cuda(cudaDeviceGetAttribute(&value, attribute, device), "asking for a device attribute");
  return value;
}

// The most shared memory that a block may ask for, bytes.
inline int most_shared_bytes() { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

// Blocks of a kernel that the whole device holds at once.
template <typename... Parameters>
int resident_blocks(void (*kernel)(Parameters...), int threads, int shared_bytes) {
  check_cuda(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
      "asking for shared memory");
  int each = 0;
  check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads,
                                                           static_cast<size_t>(shared_bytes)),
             "asking for the occupancy");
  return each * device_attribute(cudaDevAttrMultiProcessorCount);
}

// Starts a kernel on the current device.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int shared_bytes,
            Stream stream, Arguments... arguments) {
  if (blocks == 0) {
    return;
  }
  check_cuda(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
      "asking for shared memory");
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  check_cuda(cudaLaunchKernelEx(&config, kernel, arguments...), "launching a kernel");
}

}  // namespace vmae_fast

#endif  // VMAE_FAST_EMULATED
