// csrc/runtime.h on the CPU.
#pragma once

#include <cstddef>
#include <cstdint>

#include "machine.h"

namespace vmae_fast {

using Stream = void*;

class DeviceGuard {
 public:
  explicit DeviceGuard(int) {}
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
};

// What kernels may touch of global memory, until it is forgotten: of this host thread.
void allow_memory(const void* begin, size_t bytes);
void forget_memory();

inline int most_shared_bytes() { return emulator::settings.most_shared_bytes; }

template <typename... Parameters>
int resident_blocks(void (*)(Parameters...), int, int) {
  return emulator::settings.resident_blocks;
}

// Runs a kernel to its end.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int shared_bytes, Stream,
            Arguments... arguments) {
  emulator::run(blocks, threads, shared_bytes, [&] { kernel(arguments...); });
}

}  // namespace vmae_fast
