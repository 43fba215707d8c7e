// Small kernels that are right, whose results and counts say whether the emulator is.
#pragma once

#include "faults.h"

namespace vmae_fast {

// ---- conflicts ------------------------------------------------------------------------------

template <int PITCH>
void load_rows(const char*, char*) {
  uint32_t r[4];
  ldmatrix_x4(r, shared_memory() + thread() % 32 * PITCH);
}

template <typename T, int PITCH>
void load_apart(const char*, char*) {
  for (int i = 0; i < 2; ++i) {
    load_shared(reinterpret_cast<T*>(shared_memory() + (thread() * 2 + i) * PITCH));
  }
}

// ---- values ---------------------------------------------------------------------------------

inline void read_unwritten(const char*, char* out) {
  auto* const found = reinterpret_cast<float*>(out);
  if (thread() == 0) {
    store_global(found, static_cast<float>(load_shared(shared_as<half>())));
    store_global(found + 1, static_cast<float>(load_shared(shared_as<bfloat16>())));
    store_global(found + 2, load_shared(shared_as<float>()));
  }
}

inline void shuffle_all(const char*, char* out) {
  auto* const found = reinterpret_cast<float*>(out) + 8 * thread();
  const float x = static_cast<float>(thread());
  store_global(found, __shfl_xor_sync(FULL_WARP, x, 5));
  store_global(found + 1, __shfl_xor_sync(FULL_WARP, x, 3, 8));
  store_global(found + 2, __shfl_sync(FULL_WARP, x, 9));
  store_global(found + 3, __shfl_sync(FULL_WARP, x, 9, 8));
  store_global(found + 4, __shfl_down_sync(FULL_WARP, x, 3));
  store_global(found + 5, __shfl_down_sync(FULL_WARP, x, 3, 8));
  store_global(found + 6, static_cast<float>(__reduce_add_sync(FULL_WARP, thread() - 20)));
  store_global(found + 7, static_cast<float>(__reduce_add_sync(FULL_WARP, threadIdx.x)));
}

// Floats to a 16-bit type and back, and powers of two.
template <typename T>
void convert(const char* in, char* out) {
  const float x = load_global(reinterpret_cast<const float*>(in) + thread());
  const float2 back = unpack<T>(pack<T>(x, -x));
  auto* const found = reinterpret_cast<float*>(out) + 3 * thread();
  store_global(found, back.x);
  store_global(found + 1, back.y);
  store_global(found + 2, exp2_approximate(x));
}

inline void take_bytes(const char* in, char* out) {
  const auto a = load_global(reinterpret_cast<const uint4*>(in) + thread());
  auto* const found = reinterpret_cast<uint2*>(out) + thread();
  store_global(found, make_uint2(__byte_perm(a.x, a.y, a.z), __dp4a(a.x, a.y, a.z)));
}

// Rows of 16 bytes, given back to front, to registers: x4, x4_trans, x2, x2_trans.
inline void load_fragments(const char* in, char* out) {
  store_shared(shared_as<uint4>() + 31 - thread(),
               load_global(reinterpret_cast<const uint4*>(in) + thread()));
  __syncwarp();
  const void* const row = shared_as<uint4>() + 31 - thread();
  uint32_t r[12];
  ldmatrix_x4(*reinterpret_cast<uint32_t (*)[4]>(r), row);
  ldmatrix_x4_trans(*reinterpret_cast<uint32_t (*)[4]>(r + 4), row);
  ldmatrix_x2(*reinterpret_cast<uint32_t (*)[2]>(r + 8), row);
  ldmatrix_x2_trans(*reinterpret_cast<uint32_t (*)[2]>(r + 10), row);
  for (int i = 0; i < 12; ++i) {
    store_global(reinterpret_cast<uint32_t*>(out) + 12 * thread() + i, r[i]);
  }
}

// One product whose fragments go between memory and registers by the formulas of PTX's manual:
// a (16 x DEPTH), then b (DEPTH x 8), both by rows; d (16 x 8) starts from one.
template <typename T, int DEPTH>
void multiply_by_formula(const char* in, char* out) {
  const T* const a = reinterpret_cast<const T*>(in);
  const T* const b = a + 16 * DEPTH;
  const int group = thread() >> 2, in_group = thread() % 4;
  float x[8], y[4], d[4] = {1, 1, 1, 1};
  for (int i = 0; i < DEPTH / 2; ++i) {
    const int row = i % 4 < 2 ? group : group + 8;
    const int column = in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0);
    x[i] = static_cast<float>(load_global(a + row * DEPTH + column));
  }
  for (int i = 0; i < DEPTH / 4; ++i) {
    const int row = in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0);
    y[i] = static_cast<float>(load_global(b + row * 8 + group));
  }
  if constexpr (DEPTH == 16) {
    mma_16x8x16<T>(d, pack<T>(x[0], x[1]), pack<T>(x[2], x[3]), pack<T>(x[4], x[5]),
                   pack<T>(x[6], x[7]), pack<T>(y[0], y[1]), pack<T>(y[2], y[3]));
  } else {
    mma_16x8x8<T>(d, pack<T>(x[0], x[1]), pack<T>(x[2], x[3]), pack<T>(y[0], y[1]));
  }
  for (int i = 0; i < 4; ++i) {
    const int row = i < 2 ? group : group + 8, column = in_group * 2 + (i & 1);
    store_global(reinterpret_cast<float*>(out) + row * 8 + column, d[i]);
  }
}

// (32 x 48) (48 x 16), four warps, two buffers of copies that are ahead.
template <typename T, int DEPTH>
void multiply_tiles(const char* in, char* out) {
  constexpr int M = 32, N = 16, K = 48, PITCH = 24;
  // Rows of 16 values: a's 32, then b's 16.
  T* const shared = shared_as<T>();
  const auto bring = [&](int step) {
    T* const to = shared + step % 2 * (M + 16) * PITCH;
    for (int i = thread(); i < (M + 16) * 2; i += threads()) {
      const int row = i / 2, piece = i % 2 * 8;
      const T* const from =
          reinterpret_cast<const T*>(in) +
          (row < M ? row * K + step * 16 + piece : M * K + (step * 16 + row - M) * N + piece);
      cp_async_16(to + row * PITCH + piece, from, true);
    }
    cp_async_commit();
  };
  const int lane = thread() % 32, m = thread() / 64 * 16, n = thread() / 32 % 2 * 8;
  float d[4] = {};
  bring(0);
  for (int step = 0; step < K / 16; ++step) {
    if (step + 1 < K / 16) {
      bring(step + 1);
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    __syncthreads();
    const T* const tile = shared + step % 2 * (M + 16) * PITCH;
    uint32_t a[4], b[2];
    ldmatrix_x4(a, tile + (m + lane % 16) * PITCH + lane / 16 * 8);
    ldmatrix_x2_trans(b, tile + (M + lane % 16) * PITCH + n);
    if constexpr (DEPTH == 16) {
      mma_16x8x16<T>(d, a[0], a[1], a[2], a[3], b[0], b[1]);
    } else {
      mma_16x8x8<T>(d, a[0], a[1], b[0]);
      mma_16x8x8<T>(d, a[2], a[3], b[1]);
    }
    __syncthreads();
  }
  const int g = lane / 4, t = lane % 4;
  float2* const to = reinterpret_cast<float2*>(out);
  store_global(to + ((m + g) * N + n) / 2 + t, make_float2(d[0], d[1]));
  store_global(to + ((m + g + 8) * N + n) / 2 + t, make_float2(d[2], d[3]));
}

}  // namespace vmae_fast
