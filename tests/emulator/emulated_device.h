// csrc/device.h on the CPU: the same functions, each of which asks the emulator.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda_names.h"
#include "machine.h"

namespace vmae_fast {

using half = _Float16;

// The upper half of a float.
class bfloat16 {
 public:
  bfloat16() = default;
  // To nearest, ties to even; NaN stays NaN.
  bfloat16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    if (value != value) {
      bits_ = static_cast<uint16_t>(bits >> 16 | 0x40);
    } else {
      bits_ = static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
  }
  operator float() const {
    const uint32_t bits = static_cast<uint32_t>(bits_) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  }

 private:
  uint16_t bits_;
};

constexpr unsigned FULL_WARP = 0xffffffffu;

// ---- memory ---------------------------------------------------------------------------------

inline char* shared_memory() { return emulator::shared_memory(); }

inline void cp_async_16(void* shared, const void* global, bool there, VMAE_FAST_LINE) {
  emulator::copy(shared, global, 16, there, {"cp_async_16", line});
}

inline void cp_async_4(void* shared, const void* global, bool there, VMAE_FAST_LINE) {
  emulator::copy(shared, global, 4, there, {"cp_async_4", line});
}

inline void cp_async_commit() { emulator::commit_copies(); }

template <int GROUPS>
void cp_async_wait() {
  emulator::wait_for_copies(GROUPS);
}

template <typename T>
T load_shared(const T* shared, VMAE_FAST_LINE) {
  static_assert(std::is_trivially_copyable_v<T>);
  T value;
  emulator::load_shared(&value, shared, sizeof(T), {"load_shared", line});
  return value;
}

template <typename T>
void store_shared(T* shared, T value, VMAE_FAST_LINE) {
  static_assert(std::is_trivially_copyable_v<T>);
  emulator::store_shared(shared, &value, sizeof(T), {"store_shared", line});
}

template <typename T>
T load_global(const T* global, VMAE_FAST_LINE) {
  static_assert(std::is_trivially_copyable_v<T>);
  T value;
  emulator::load_global(&value, global, sizeof(T), {"load_global", line});
  return value;
}

template <typename T>
void store_global(T* global, T value, VMAE_FAST_LINE) {
  static_assert(std::is_trivially_copyable_v<T>);
  emulator::store_global(global, &value, sizeof(T), {"store_global", line});
}

inline void prefetch(const void* global, VMAE_FAST_LINE) {
  emulator::prefetch(global, {"prefetch", line});
}

// ---- matrices -------------------------------------------------------------------------------

inline void ldmatrix_x4(uint32_t (&r)[4], const void* shared, VMAE_FAST_LINE) {
  emulator::Rows mine{shared, r};
  emulator::together({"ldmatrix_x4", line}, emulator::load_matrices<4, false>, &mine,
                     emulator::Lanes::all);
}

inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared, VMAE_FAST_LINE) {
  emulator::Rows mine{shared, r};
  emulator::together({"ldmatrix_x4_trans", line}, emulator::load_matrices<4, true>, &mine,
                     emulator::Lanes::all);
}

inline void ldmatrix_x2(uint32_t (&r)[2], const void* shared, VMAE_FAST_LINE) {
  emulator::Rows mine{shared, r};
  emulator::together({"ldmatrix_x2", line}, emulator::load_matrices<2, false>, &mine,
                     emulator::Lanes::all);
}

inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* shared, VMAE_FAST_LINE) {
  emulator::Rows mine{shared, r};
  emulator::together({"ldmatrix_x2_trans", line}, emulator::load_matrices<2, true>, &mine,
                     emulator::Lanes::all);
}

template <typename T>
void mma_16x8x16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                 uint32_t b1, VMAE_FAST_LINE) {
  emulator::Product mine{{a0, a1, a2, a3}, {b0, b1}, d};
  emulator::together({"mma_16x8x16", line}, emulator::multiply<std::is_same_v<T, bfloat16>, 16>,
                     &mine, emulator::Lanes::all);
}

template <typename T>
void mma_16x8x8(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b0, VMAE_FAST_LINE) {
  emulator::Product mine{{a0, a1, 0, 0}, {b0, 0}, d};
  emulator::together({"mma_16x8x8", line}, emulator::multiply<std::is_same_v<T, bfloat16>, 8>,
                     &mine, emulator::Lanes::all);
}

// ---- numbers --------------------------------------------------------------------------------

template <typename T>
uint32_t pack(float low, float high) {
  const T both[2] = {static_cast<T>(low), static_cast<T>(high)};
  uint32_t bits;
  std::memcpy(&bits, both, sizeof(bits));
  return bits;
}

template <typename T>
float2 unpack(uint32_t both) {
  T low, high;
  std::memcpy(static_cast<void*>(&low), &both, sizeof(low));
  const uint32_t upper = both >> 16;
  std::memcpy(static_cast<void*>(&high), &upper, sizeof(high));
  return {static_cast<float>(low), static_cast<float>(high)};
}

// Results below the least normal number are 0, as the instruction has it.
inline float exp2_approximate(float x) {
  const float result = std::exp2(x);
  return result < FLT_MIN ? 0 : result;
}

}  // namespace vmae_fast
