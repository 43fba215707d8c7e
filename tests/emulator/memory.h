// What the emulator knows of memory: what may be touched, who touched it, what is under way.
#pragma once

#include <cstdint>
#include <vector>

#include "machine.h"

namespace vmae_fast::emulator {

// A block's shared memory.
//
// Kernels see addresses at which nothing is mapped: an access other than by the device functions
// is a segmentation fault.
class SharedMemory {
 public:
  // The first launch's is kept for all.
  void start_launch(int bytes);
  // Fills it with 0xFF: NaN in every floating point type.
  void start_block();
  char* address() const { return address_; }

  // Of this turn; by the whole warp's lanes if so.
  void load(void* into, const void* from, int bytes, const Operation& what, bool by_warp);
  void store(void* into, const void* from, int bytes, const Operation& what);

  // A copy by this turn that lasts, and its end; zeros where `from` is null.
  void begin_copy(const void* into, int bytes, const Operation& what);
  void end_copy(const void* into, const void* from, int bytes, const Operation& what);

  // The warp whose turn it is has come to its next operation.
  void end_step();
  // All threads have come to __syncthreads.
  void end_phase();

 private:
  struct Access {
    Operation what;
    int warp;
    int lane;  // EVERY_LANE: all of the warp's
    int64_t step;
    int64_t fence;
    int offset;
    int bytes;
    bool takes_banks;
  };

  // Accesses are numbered through a launch.
  struct Byte {
    int64_t written = 0;
    int64_t read = 0;
    // In this phase by several warps, in this step by several lanes.
    bool read_by_warps = false;
    bool read_by_lanes = false;
    // Thread that copies to it, counted from 1.
    int16_t copied_by = 0;
  };

  int offset_of(const void* shared, int bytes, const Operation& what) const;
  void note(const Access& access, bool writes);
  void check_writer(const Byte& byte, const Access& access, const char* does) const;
  void check_readers(const Byte& byte, const Access& access) const;
  const Access* known(int64_t number) const;

  char* address_ = nullptr;
  int bytes_ = 0;
  std::vector<char> content_;
  std::vector<Byte> shadow_;
  // Since the phase began, the first being number first_.
  std::vector<Access> accesses_;
  int64_t first_ = 1;
  size_t step_began_ = 0;
};

extern SharedMemory shared;

// Global memory as a launch may touch it.
class GlobalMemory {
 public:
  // Takes what this host thread has allowed.
  void start_launch();
  void check_load(const void* from, int bytes, const Operation& what) const;
  void store(void* into, const void* from, int bytes, const Operation& what);

 private:
  struct Range {
    uintptr_t begin;
    uintptr_t end;
    // Block that wrote each byte, counted from 1; empty until one does.
    std::vector<int64_t> writers;
  };

  // Index of the range that holds all of it.
  size_t range_of(const void* global, int bytes, const Operation& what) const;

  std::vector<Range> ranges_;
};

extern GlobalMemory global;

// Turns beyond one that shared memory takes for these bytes from each offset: its banks are 4 bytes
// wide, 32 of them.
int extra_turns(const std::vector<int>& offsets, int bytes, const Operation& what);

}  // namespace vmae_fast::emulator
