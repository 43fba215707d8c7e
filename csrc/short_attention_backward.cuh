// Backward pass: a block has q, k and the gradient of its item in shared memory, a warp 16 of its
// keys, whose dK and dV stay in registers while it goes over the queries. What the logits'
// gradients come to is kept whole in shared memory, for dQ: five products of matrices, no atomics,
// everything read and written once.
//
// Where one block fills a multiprocessor it stays for several items and has the next one's memory
// on the way while it computes.
#pragma once

#include <type_traits>

#include "attention_tiles.cuh"

namespace vmae_fast {

// Of a query: the log-sum-exp in units of log 2, and the product of output and its gradient.
struct Statistics {
  float lse;
  float delta;
};

// How a block is laid out: its warps, and by offset in bytes its shared memory, which holds stages
// of q, k and the gradient, the gradients of the logits, the statistics, and a place for each warp
// to put what it writes.
template <int K>
struct BackwardPlan {
  int tiles;
  int warps;
  int stages;

  __host__ __device__ constexpr int tensor() const { return Tile<K>::bytes(tiles * TILE); }
  __host__ __device__ constexpr int stage() const { return 3 * tensor(); }
  __host__ __device__ constexpr int logits() const { return stages * stage(); }
  // A row for every key.
  __host__ __device__ constexpr int statistics() const {
    return logits() + WideTile::bytes(tiles * TILE, tiles * TILE);
  }
  __host__ __device__ constexpr int results() const {
    return statistics() + tiles * TILE * static_cast<int>(sizeof(Statistics));
  }
  __host__ __device__ constexpr int bytes() const {
    return results() + warps * Tile<K>::bytes(TILE);
  }
};

// Has 16 rows of an item brought to the warp's own place.
template <typename T, int K>
__device__ __forceinline__ void bring_rows(const Tile<K>& to, const T* from, const Layout& layout,
                                           const Item& item, int row) {
#pragma unroll 1
  for (int i = threadIdx.x % 32; i < TILE * Tile<K>::PIECES; i += 32) {
    const int down = i / Tile<K>::PIECES, piece = i % Tile<K>::PIECES;
    const bool there = row + down < item.rows;
    const int64_t at = there ? item.at(layout, K, row + down) + piece * PIECE : 0;
    cp_async_16(to.at(down, piece), from + at, there);
  }
  cp_async_commit();
}

// Has q, k and the gradient of an item brought to a stage.
template <typename T, int K>
__device__ __forceinline__ void bring(const Tile<K>& to, const BackwardPlan<K>& plan,
                                      const Item& item, const T* q, const T* k, const Layout& given,
                                      const T* grad, const Layout& result) {
  constexpr int PIECES = K / PIECE;
#pragma unroll 1
  for (int i = threadIdx.x; i < plan.tiles * TILE * PIECES; i += blockDim.x) {
    const int row = i / PIECES, piece = i % PIECES;
    const bool there = row < item.rows;
    const int64_t at = there ? item.at(given, K, row) + piece * PIECE : 0;
    const int64_t at_grad = there ? item.at(result, K, row) + piece * PIECE : 0;
    char* const here = to.at(row, piece);
    cp_async_16(here, q + at, there);
    cp_async_16(here + plan.tensor(), k + at, there);
    cp_async_16(here + 2 * plan.tensor(), grad + at_grad, there);
  }
}

// Has what a warp will read of an item by itself fetched into the second-level cache.
template <typename T, int K>
__device__ __forceinline__ void announce(const Item& item, int row, const T* v, const Layout& given,
                                         const T* out, const Layout& result) {
  const int here = row + static_cast<int>(threadIdx.x) % TILE;
  if (here < item.rows) {
    const bool upper = threadIdx.x % 32 < TILE;
    const T* at = upper ? v + item.at(given, K, here) : out + item.at(result, K, here);
    prefetch(at);
    prefetch(at + K - 1);
  }
}

// A warp's 16 of the statistics; two threads a query.
template <typename T, int K>
struct Outputs {
  static constexpr int EACH = (K / PIECE + 1) / 2;
  uint4 out[EACH];
  float lse;

  __device__ __forceinline__ void load(const Item& item, int row, const T* from,
                                       const Layout& result, const float* lse_of) {
    const int here = row + static_cast<int>(threadIdx.x) % 32 / 2, side = threadIdx.x % 2;
    const bool there = here < item.rows;
    const T* at = from + (there ? item.at(result, K, here) : 0);
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const int piece = side * EACH + i;
      const bool has = there && piece < K / PIECE;
      out[i] = has ? load_global(reinterpret_cast<const uint4*>(at + piece * PIECE))
                   : make_uint4(0, 0, 0, 0);
    }
    // No query: a weight of exp(-inf).
    lse = there ? load_global(lse_of + item.at_lse(here)) * LOG2_E : INFINITY;
  }

  __device__ __forceinline__ void finish(int row, const Tile<K>& grad,
                                         Statistics* statistics) const {
    const int here = row + static_cast<int>(threadIdx.x) % 32 / 2, side = threadIdx.x % 2;
    float delta = 0;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const int piece = side * EACH + i;
      if (piece < K / PIECE) {
        const uint4 values = load_shared(reinterpret_cast<const uint4*>(grad.at(here, piece)));
        delta += inner(out[i].x, values.x) + inner(out[i].y, values.y);
        delta += inner(out[i].z, values.z) + inner(out[i].w, values.w);
      }
    }
    delta += __shfl_xor_sync(FULL_WARP, delta, 1);
    if (side == 0) {
      store_shared(reinterpret_cast<float2*>(statistics + here), make_float2(lse, delta));
    }
  }

  static __device__ __forceinline__ float inner(uint32_t a, uint32_t b) {
    const float2 x = unpack<T>(a), y = unpack<T>(b);
    return x.x * y.x + x.y * y.y;
  }
};

// Weights of 16 keys by 16 queries from their logits, and the gradients of the logits (unscaled)
// from those of the weights; each in the other's place.
__device__ __forceinline__ void to_gradients(float (&logits)[2][4], float (&grads)[2][4],
                                             const Statistics* statistics, int row,
                                             const Span (&keys)[2], bool masked, float scale_log2) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const int query = row + 8 * n + 2 * t;
    // Of two queries that follow each other.
    const float4 both = load_shared(reinterpret_cast<const float4*>(statistics + query));
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float lse = j % 2 == 0 ? both.x : both.z, delta = j % 2 == 0 ? both.y : both.w;
      const bool seen = !masked || keys[j / 2].has(query + j % 2);
      const float weight = exp2_approximate(fmaf(logits[n][j], scale_log2, -lse));
      logits[n][j] = seen ? weight : 0.0f;
      grads[n][j] = seen ? weight * (grads[n][j] - delta) : 0.0f;
    }
  }
}

// Writes 16 rows of gradients, from sums, by way of the warp's own place in shared memory.
template <typename T, int K>
__device__ __forceinline__ void write_sums(T* to, const Layout& layout, const Item& item, int row,
                                           const float (&sums)[K / 8][4], float factor,
                                           const Tile<K>& place) {
  __syncwarp();
  stage<T, K>(place, 0, sums, factor, factor);
  __syncwarp();
  write_rows<T, K>(to, layout, item, row, place);
}

// All gradients of one head of a group.
//
// Blocks: as many as there is room for, each with every so many-th item, heads fastest. WARPS: the
// most warps; HOLD: values stay in registers. Writes the rows of the gradients that the items have.
template <typename T, int K, int WARPS, bool HOLD>
__global__ void __launch_bounds__(32 * WARPS, 1)
    short_attention_backward_kernel(const T* grad, const T* q, const T* k, const T* v, const T* out,
                                    const float* lse, T* grad_q, T* grad_k, T* grad_v, Layout given,
                                    Layout result, Layout grads, Grouping grouping, int items,
                                    BackwardPlan<K> plan, float scale) {
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int first_row = warp * TILE, step = plan.warps * TILE;
  const WideTile logits_tile{shared_memory() + plan.logits(),
                             WideTile::pitch_of(plan.tiles * TILE)};
  auto* const statistics = reinterpret_cast<Statistics*>(shared_memory() + plan.statistics());
  const Tile<K> place{shared_memory() + plan.results() + warp * Tile<K>::bytes(TILE)};
  int number = 0;
  for (int index = blockIdx.x; index < items; index += gridDim.x, ++number) {
    const Item item(grouping, index);
    const Tile<K> q_tile{shared_memory() + number % plan.stages * plan.stage()};
    const Tile<K> k_tile = q_tile.from(plan.tiles * TILE);
    const Tile<K> grad_tile = k_tile.from(plan.tiles * TILE);
    if (plan.stages == 1 || number == 0) {
      bring<T, K>(q_tile, plan, item, q, k, given, grad, result);
      cp_async_commit();
    }
    bring_rows<T, K>(place, v, given, item, first_row);
    Outputs<T, K> outputs;
    outputs.load(item, first_row, out, result, lse);
    if (plan.stages == 2) {
      if (index + static_cast<int>(gridDim.x) < items) {
        const Item next(grouping, index + gridDim.x);
        const Tile<K> other{shared_memory() + (number + 1) % 2 * plan.stage()};
        bring<T, K>(other, plan, next, q, k, given, grad, result);
        announce<T, K>(next, first_row, v, given, out, result);
      }
      cp_async_commit();
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    __syncthreads();
    for (int row = first_row; row < plan.tiles * TILE; row += step) {
      if (row != first_row) {
        outputs.load(item, row, out, result, lse);
      }
      outputs.finish(row, grad_tile, statistics);
    }
    __syncthreads();

    for (int row = first_row; row < item.rows; row += step) {
      if (row != first_row) {
        __syncwarp();
        bring_rows<T, K>(place, v, given, item, row);
        cp_async_wait<0>();
        __syncwarp();
      }
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
      // With 12 warps the compiler runs out of registers there.
      constexpr bool HELD = HOLD && WARPS <= MOST_TILES / 2;
#else
      constexpr bool HELD = HOLD;
#endif
      using Values = std::conditional_t<HELD, RowsInRegisters<K>, RowsInShared<K>>;
      const RowsInShared<K> keys[1] = {{k_tile, row}};
      const Values values[1] = {Values(RowsInShared<K>{place, 0})};
      Span spans[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int key = row + g + 8 * half;
        spans[half] = key < item.rows ? item.span(key) : Span{0, 0};
      }
      float sums_k[1][K / 8][4] = {}, sums_v[1][K / 8][4] = {};
      const Span queries = item.tiles(row, TILE);
#pragma unroll 1
      for (int tile = queries.start; tile < queries.end; ++tile) {
        float weights[1][2][4] = {}, gradients[1][2][4] = {};
        add_inner<T, K>(weights, 0, keys, q_tile, tile * TILE);
        add_inner<T, K>(gradients, 0, values, grad_tile, tile * TILE);
        to_gradients(weights[0], gradients[0], statistics, tile * TILE, spans, item.masked(),
                     scale * LOG2_E);
        uint32_t a[1][4];
        as_weights<T>(a[0], weights[0], 0);
        add_product<T, K>(sums_v, a, grad_tile, tile * TILE);
        as_weights<T>(a[0], gradients[0], 0);
        add_product<T, K>(sums_k, a, q_tile, tile * TILE);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          char* const here = logits_tile.at(row + g + i % 2 * 8, 2 * tile + i / 2);
          store_shared(reinterpret_cast<uint32_t*>(here + 4 * t), a[0][i]);
        }
      }
      const Item again(grouping, anew(index));
      write_sums<T, K>(grad_k, grads, again, row, sums_k[0], scale, place);
      write_sums<T, K>(grad_v, grads, again, row, sums_v[0], 1.0f, place);
    }
    __syncthreads();
    for (int row = first_row; row < item.rows; row += step) {
      float sums_q[1][K / 8][4] = {};
      const Span keys = item.tiles(row, TILE);
#pragma unroll 1
      for (int tile = keys.start; tile < keys.end; ++tile) {
        uint32_t a[1][4];
        ldmatrix_x4_trans(a[0], address_x4<false>(logits_tile, tile * TILE, row / PIECE));
        add_product<T, K>(sums_q, a, k_tile, tile * TILE);
      }
      write_sums<T, K>(grad_q, grads, Item(grouping, anew(index)), row, sums_q[0], scale, place);
    }
    // Before the next item takes the place of anything.
    __syncthreads();
  }
}

}  // namespace vmae_fast
