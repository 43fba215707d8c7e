// The names of CUDA C++ that kernels use and that a plain C++ compiler does not know.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "machine.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

struct emulated_index {
  unsigned x = 1, y = 0, z = 0;
};

extern emulated_index threadIdx, blockIdx, blockDim, gridDim;

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(4) uchar4 {
  unsigned char x, y, z, w;
};

inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline uchar4 make_uchar4(unsigned char x, unsigned char y, unsigned char z, unsigned char w) {
  return {x, y, z, w};
}

template <typename T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}

// glibc declares some of these names for itself.
#define __expf(x) ::expf(x)
#define __logf(x) ::logf(x)
#define __log2f(x) ::log2f(x)
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }

inline unsigned __dp4a(unsigned a, unsigned b, unsigned sum) {
  for (int i = 0; i < 32; i += 8) {
    sum += (a >> i & 0xff) * (b >> i & 0xff);
  }
  return sum;
}

// Bytes of (b, a), the lowest first: those that the selector's lower four hexadecimal digits name.
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned from = selector >> 4 * i & 7;
    result |= static_cast<unsigned>(bytes >> 8 * from & 0xff) << 8 * i;
  }
  return result;
}

inline void __syncthreads(VMAE_FAST_LINE) {
  vmae_fast::emulator::sync_threads({"__syncthreads", line});
}

inline void __syncwarp(unsigned mask = 0xffffffffu, VMAE_FAST_LINE) {
  using namespace vmae_fast::emulator;
  demand_full_warp(mask, {"__syncwarp", line});
  together({"__syncwarp", line}, sync_warp, nullptr, Lanes::alive);
}

namespace vmae_fast::emulator {

template <typename T>
T shuffle_from(int source, T value, unsigned mask, const Operation& what) {
  static_assert(sizeof(T) == sizeof(uint32_t));
  demand_full_warp(mask, what);
  Shuffle mine{0, source};
  std::memcpy(&mine.value, &value, sizeof(T));
  together(what, shuffle, &mine, Lanes::alive);
  std::memcpy(&value, &mine.value, sizeof(T));
  return value;
}

inline int this_lane() { return static_cast<int>(threadIdx.x % WARP); }

}  // namespace vmae_fast::emulator

// Within groups of `width` lanes; a lane whose source would be outside keeps its own value.
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, VMAE_FAST_LINE) {
  using namespace vmae_fast::emulator;
  const int first = this_lane() & ~(width - 1);
  const int from = first + (source & (width - 1));
  return shuffle_from(from, value, mask, {"__shfl_sync", line});
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, VMAE_FAST_LINE) {
  using namespace vmae_fast::emulator;
  const int lane = this_lane(), last = lane | (width - 1), from = lane + static_cast<int>(delta);
  return shuffle_from(from > last ? lane : from, value, mask, {"__shfl_down_sync", line});
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, VMAE_FAST_LINE) {
  using namespace vmae_fast::emulator;
  const int lane = this_lane(), last = lane | (width - 1), from = lane ^ lane_mask;
  return shuffle_from(from > last ? lane : from, value, mask, {"__shfl_xor_sync", line});
}

template <typename T>
T __reduce_add_sync(unsigned mask, T value, VMAE_FAST_LINE) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned>);
  using namespace vmae_fast::emulator;
  const Operation what{"__reduce_add_sync", line};
  demand_full_warp(mask, what);
  Sum mine{static_cast<uint32_t>(value)};
  together(what, add_up, &mine, Lanes::alive);
  return static_cast<T>(mine.value);
}
