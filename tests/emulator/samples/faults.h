// Small kernels with a fault planted, and the same without it. Each takes a buffer to read and one
// to write; of a template <bool RIGHT>, <false> has the fault.
#pragma once

#include <type_traits>

#include "device.h"

namespace vmae_fast {

using Kernel = void (*)(const char*, char*);

template <typename T>
T* shared_as() {
  return reinterpret_cast<T*>(shared_memory());
}

inline int thread() { return static_cast<int>(threadIdx.x); }
inline int threads() { return static_cast<int>(blockDim.x); }

// ---- races ----------------------------------------------------------------------------------

template <bool RIGHT>
void read_other_warp(const char*, char* out) {
  store_shared(shared_as<int>() + thread(), thread());
  if (RIGHT) {
    __syncthreads();
  }
  const int value = load_shared(shared_as<int>() + (thread() + 32) % threads());
  store_global(reinterpret_cast<int*>(out) + thread(), value);
}

template <bool RIGHT>
void overwrite_other_warp(const char*, char*) {
  load_shared(shared_as<int>() + (thread() + 32) % threads());
  if (RIGHT) {
    __syncthreads();
  }
  store_shared(shared_as<int>() + thread(), 1);
}

// The last to have read it is the writer itself.
template <bool RIGHT>
void overwrite_what_all_read(const char*, char*) {
  load_shared(shared_as<int>());
  __syncwarp();
  if (RIGHT) {
    __syncthreads();
  }
  if (thread() == 0) {
    store_shared(shared_as<int>(), 1);
  }
}

template <bool RIGHT>
void write_same(const char*, char*) {
  store_shared(shared_as<int>() + (RIGHT ? thread() : thread() % 32), 1);
}

template <bool RIGHT>
void read_other_lane(const char*, char* out) {
  store_shared(shared_as<int>() + thread(), thread());
  // Lanes meet, but nothing says that they see each other's writes.
  __shfl_xor_sync(FULL_WARP, 0, 1);
  if (RIGHT) {
    __syncwarp();
  }
  store_global(reinterpret_cast<int*>(out) + thread(),
               load_shared(shared_as<int>() + (thread() ^ 1)));
}

template <bool RIGHT>
void overwrite_other_lane(const char*, char*) {
  load_shared(shared_as<int>() + (thread() / 32 * 32 + (thread() + 1) % 32));
  if (RIGHT) {
    __syncwarp();
  }
  store_shared(shared_as<int>() + thread(), 1);
}

template <bool RIGHT>
void ldmatrix_of_own_stores(const char*, char*) {
  if (thread() >= 32) {
    return;
  }
  store_shared(shared_as<uint4>() + thread(), make_uint4(1, 2, 3, 4));
  if (RIGHT) {
    __syncwarp();
  }
  uint32_t r[4];
  ldmatrix_x4(r, shared_as<uint4>() + thread());
}

// ---- asynchronous copies --------------------------------------------------------------------

// Two groups; the second is read.
template <int GROUPS, bool COMMIT>
void copy_and_read(const char* in, char* out) {
  float* const tile = shared_as<float>();
  cp_async_4(tile + thread(), in + 4 * thread(), true);
  cp_async_commit();
  cp_async_4(tile + threads() + thread(), in + 4 * thread(), thread() % 2 == 0);
  if (COMMIT) {
    cp_async_commit();
  }
  cp_async_wait<GROUPS>();
  store_global(reinterpret_cast<float*>(out) + thread(), load_shared(tile + threads() + thread()));
  cp_async_commit();
  cp_async_wait<0>();
}

template <bool RIGHT>
void copy_and_end(const char* in, char*) {
  cp_async_4(shared_as<float>() + thread(), in + 4 * thread(), true);
  cp_async_commit();
  if (RIGHT) {
    cp_async_wait<0>();
  }
}

template <bool RIGHT>
void store_into_copy(const char* in, char*) {
  if (thread() != 0) {
    return;
  }
  cp_async_16(shared_as<uint4>(), in, true);
  cp_async_commit();
  if (RIGHT) {
    cp_async_wait<0>();
  }
  store_shared(shared_as<float>() + 1, 1.0f);
  cp_async_wait<0>();
}

template <bool RIGHT>
void copy_over_what_was_read(const char* in, char*) {
  load_shared(shared_as<float>() + (thread() + 32) % threads());
  if (RIGHT) {
    __syncthreads();
  }
  cp_async_4(shared_as<float>() + thread(), in + 4 * thread(), true);
  cp_async_commit();
  cp_async_wait<0>();
}

// ---- bounds and alignment -------------------------------------------------------------------

template <int AT, int BYTES>
void touch_shared(const char* in, char*) {
  if (thread() != 0) {
    return;
  }
  char* const at = shared_memory() + AT;
  if constexpr (BYTES == 16) {
    cp_async_16(at, in, true);
    cp_async_commit();
    cp_async_wait<0>();
  } else {
    store_shared(reinterpret_cast<std::conditional_t<BYTES == 4, float, half>*>(at), {});
  }
}

inline void misaligned_rows(const char*, char*) {
  uint32_t r[2];
  ldmatrix_x2(r, shared_memory() + 8);
}

// Other than by the device functions.
inline void read_directly(const char*, char*) {
  static_cast<void>(*const_cast<volatile char*>(shared_memory()));
}

template <int AT>
void read_global(const char* in, char*) {
  load_global(reinterpret_cast<const float*>(in + AT));
}

template <int AT>
void write_global(const char*, char* out) {
  if (thread() == 0) {
    store_global(reinterpret_cast<float*>(out + AT), 1.0f);
  }
}

inline void write_input_of_other_block(const char*, char* out) {
  auto* const mine = reinterpret_cast<float*>(out) + blockIdx.x;
  auto* const other = reinterpret_cast<float*>(out) + (blockIdx.x + 1) % gridDim.x;
  if (thread() == 0) {
    store_global(mine, 1.0f);
    load_global(other);
  }
}

inline void copy_from_nowhere(const char*, char*) {
  cp_async_16(shared_as<uint4>() + thread(), nullptr, false);
  cp_async_commit();
  cp_async_wait<0>();
}

// ---- lanes that part ------------------------------------------------------------------------

inline void part_at_operations(const char*, char*) {
  uint32_t r[4];
  float d[4] = {};
  if (thread() < 3 * 32 + 16) {
    ldmatrix_x4(r, shared_memory());
  } else {
    mma_16x8x16<half>(d, 0, 0, 0, 0, 0, 0);
  }
}

inline void part_at_lines(const char*, char*) {
  float d[4] = {};
  if (thread() % 2 == 0) {
    mma_16x8x8<half>(d, 0, 0, 0);
  } else {
    mma_16x8x8<half>(d, 0, 0, 0);
  }
}

inline void part_at_barrier(const char*, char*) {
  if (thread() == 5) {
    __syncthreads();
  }
  __syncwarp();
}

inline void part_at_barriers(const char*, char*) {
  if (thread() < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

template <bool RIGHT>
void end_before_product(const char*, char*) {
  if (RIGHT ? thread() < 32 : thread() == 7) {
    return;
  }
  float d[4] = {};
  mma_16x8x16<bfloat16>(d, 0, 0, 0, 0, 0, 0);
}

inline void end_before_barrier(const char*, char* out) {
  if (thread() >= 32) {
    return;
  }
  __syncthreads();
  store_global(out + thread(), char{1});
}

inline void take_from_ended(const char*, char*) {
  if (thread() % 32 == 3) {
    return;
  }
  __shfl_xor_sync(FULL_WARP, 1.0f, 1);
}

inline void name_few_lanes(const char*, char*) { __syncwarp(0xffu); }

}  // namespace vmae_fast
