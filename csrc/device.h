// What kernels ask of the machine: the instructions that CUDA C++ has no name for, in PTX.
//
// Kernels reach shared and global memory by these functions alone. So the emulator of the tests,
// which has another definition of each, sees every access.
//
// Fragments are those of PTX's mma instructions (PTX ISA, "Matrix fragments for mma.m16n8k16").
// With g = lane / 4 and t = lane % 4, two values a register, the even one low:
//   a (16 x 16)   a[0] row g, columns 2t; a[1] row g + 8; a[2] and a[3] the same 8 columns on
//   b (16 x 8)    b[0] column g, rows 2t; b[1] 8 rows on
//   d (16 x 8)    fp32: d[0], d[1] row g, columns 2t, 2t + 1; d[2], d[3] row g + 8
#pragma once

#ifdef VMAE_FAST_EMULATED
#include "emulated_device.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace vmae_fast {

using half = __half;
using bfloat16 = __nv_bfloat16;

constexpr unsigned FULL_WARP = 0xffffffffu;

// ---- memory ---------------------------------------------------------------------------------

// The block's shared memory, as many bytes as the launch asked for, 128-byte aligned.
__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(128) char shared[];
  return shared;
}

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// 16 bytes from global to shared memory, both 16-byte aligned; zeros where there is nothing to
// read, and then `global` is not touched. Done when cp_async_wait says so, for this thread.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(there ? 16 : 0)
               : "memory");
}

// As cp_async_16, 4 bytes.
__device__ __forceinline__ void cp_async_4(void* shared, const void* global, bool there) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(there ? 4 : 0)
               : "memory");
}

// Closes a group of copies.
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most so many of this thread's groups are under way.
template <int GROUPS>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
}

template <typename T>
__device__ __forceinline__ T load_shared(const T* shared) {
  return *shared;
}

template <typename T>
__device__ __forceinline__ void store_shared(T* shared, T value) {
  *shared = value;
}

template <typename T>
__device__ __forceinline__ T load_global(const T* global) {
  __builtin_assume(__isGlobal(global));
  return *global;
}

template <typename T>
__device__ __forceinline__ void store_global(T* global, T value) {
  // Pointers out of a struct may be to any memory, for all that the compiler sees.
  __builtin_assume(__isGlobal(global));
  *global = value;
}

// Has the line of 128 bytes at this address fetched into the second-level cache.
__device__ __forceinline__ void prefetch(const void* global) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
}

// ---- matrices -------------------------------------------------------------------------------

// Four 8 x 8 matrices of 16-bit values: lane l gives the address of row l % 8 of matrix l / 8, 16
// bytes, and gets of each two values of row g, from column 2t on (transposed: of column g).
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared))
               : "memory");
}

// Two matrices; the addresses of lanes 0 to 15 count, the others' must be valid.
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(shared))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(shared))
               : "memory");
}

// d += a b: (16 x 16) (16 x 8), sums in fp32.
template <typename T>
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                            uint32_t a3, uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void mma_16x8x16<half>(float (&d)[4], uint32_t a0, uint32_t a1,
                                                  uint32_t a2, uint32_t a3, uint32_t b0,
                                                  uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void mma_16x8x16<bfloat16>(float (&d)[4], uint32_t a0, uint32_t a1,
                                                      uint32_t a2, uint32_t a3, uint32_t b0,
                                                      uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// d += a b: (16 x 8) (8 x 8), the first halves of the fragments above.
template <typename T>
__device__ __forceinline__ void mma_16x8x8(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b0);

template <>
__device__ __forceinline__ void mma_16x8x8<half>(float (&d)[4], uint32_t a0, uint32_t a1,
                                                 uint32_t b0) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(b0));
}

template <>
__device__ __forceinline__ void mma_16x8x8<bfloat16>(float (&d)[4], uint32_t a0, uint32_t a1,
                                                     uint32_t b0) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(b0));
}

// ---- numbers --------------------------------------------------------------------------------

// Two floats rounded to nearest in a register, the first low.
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high);

template <>
__device__ __forceinline__ uint32_t pack<half>(float low, float high) {
  const __half2 both = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}

template <>
__device__ __forceinline__ uint32_t pack<bfloat16>(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}

template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t both);

template <>
__device__ __forceinline__ float2 unpack<half>(uint32_t both) {
  return __half22float2(*reinterpret_cast<const __half2*>(&both));
}

template <>
__device__ __forceinline__ float2 unpack<bfloat16>(uint32_t both) {
  return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&both));
}

// 2 ** x to about 2 units in the last place; 0 for -inf.
__device__ __forceinline__ float exp2_approximate(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

}  // namespace vmae_fast

#endif  // VMAE_FAST_EMULATED
