// Backward pass: a block has q, k and the gradient of its item in shared memory, a warp 16 of its
// keys at a time. First the weights and dV come of the logits, and what the gradients of the logits
// are to sum up to for each query; then, from the weights in shared memory, those gradients and dK;
// then dQ. Six products of matrices: the gradients of the weights are computed twice, because their
// sums from the rounded output, as FlashAttention has them, are off by far where weights are
// near 1. No atomics, everything read and written once.
//
// Where one block fills a multiprocessor it stays for several items and has the next one's memory
// on the way while it computes.
#pragma once

#include "attention_tiles.cuh"

namespace vmae_fast {

// Up to so many tiles each has a warp of its own; of more each warp has two, one after the other.
// As many as leave no register spilt. Not yet measured.
constexpr int BACKWARD_WARPS = 12;

// Of a query: the log-sum-exp in units of log 2, and the mean gradient of its weights, by these
// weights, which is taken from each of them to have that of a logit.
struct Statistics {
  float lse;
  float delta;
};

// What a warp's keys add to this mean of a query: weights times gradients, and weights. Their sum
// is 1 but for what the log-sum-exp was rounded by, which is not little where logits are large.
struct Part {
  float gradients;
  float weights;
};

// How a block is laid out: its warps, and by offset in bytes its shared memory, which holds stages
// of q, k and the gradient, a matrix of weights, later of the logits' gradients, the statistics,
// what the keys of each warp add to delta, and a place for each warp by itself.
template <int K>
struct BackwardPlan {
  int tiles;
  int warps;
  int stages;

  __host__ __device__ constexpr int rows() const { return tiles * TILE; }
  __host__ __device__ constexpr int stage() const { return 3 * Tile<K>::bytes(rows()); }
  __host__ __device__ constexpr int weights() const { return stages * stage(); }
  __host__ __device__ constexpr int statistics() const {
    return weights() + WideTile::bytes(rows(), rows());
  }
  __host__ __device__ constexpr int parts() const {
    return statistics() + rows() * static_cast<int>(sizeof(Statistics));
  }
  __host__ __device__ constexpr int places() const {
    return parts() + warps * rows() * static_cast<int>(sizeof(Part));
  }
  __host__ __device__ constexpr int bytes() const {
    return places() + warps * Tile<K>::bytes(TILE);
  }
};

// Has 16 rows of an item brought to a place of the warp's own.
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
}

// The same, and takes them from there.
template <typename T, int K>
__device__ __forceinline__ void take_rows(RowsInRegisters<K>& rows, const Tile<K>& place,
                                          const T* from, const Layout& layout, const Item& item,
                                          int row) {
  __syncwarp();
  bring_rows<T, K>(place, from, layout, item, row);
  cp_async_commit();
  cp_async_wait<0>();
  __syncwarp();
  rows = RowsInRegisters<K>(RowsInShared<K>{place, 0});
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
    cp_async_16(here + Tile<K>::bytes(plan.rows()), k + at, there);
    cp_async_16(here + 2 * Tile<K>::bytes(plan.rows()), grad + at_grad, there);
  }
}

// The log-sum-exp of a warp's 16 queries.
__device__ __forceinline__ void load_lse(Statistics* statistics, const float* lse, const Item& item,
                                         int row) {
  const int lane = threadIdx.x % 32, here = row + lane;
  if (lane < TILE) {
    // No query: weights of exp(-inf).
    const float value = here < item.rows ? load_global(lse + item.at_lse(here)) : INFINITY;
    store_shared(&statistics[here].lse, value * LOG2_E);
  }
}

// Weights of 16 keys by 16 queries from their logits, in their place; 0 where they do not attend.
__device__ __forceinline__ void to_weights(float (&logits)[2][4], const Statistics* statistics,
                                           int row, const Span (&keys)[2], bool masked,
                                           float scale_log2) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const int query = row + 8 * n + 2 * t;
    // Of two queries that follow each other.
    const float4 both = load_shared(reinterpret_cast<const float4*>(statistics + query));
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float weight =
          exp2_approximate(fmaf(logits[n][j], scale_log2, j % 2 == 0 ? -both.x : -both.z));
      logits[n][j] = !masked || keys[j / 2].has(query + j % 2) ? weight : 0.0f;
    }
  }
}

// Sums over 16 keys for 16 queries. By halves: of four sums over 8 threads each ends in two of
// them.
__device__ __forceinline__ float sum_of_keys(const float (&values)[4]) {
  const int lane = threadIdx.x % 32;
  const bool upper = lane & 16, right = lane & 8;
  float halves[2];
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const float other = __shfl_xor_sync(FULL_WARP, upper ? values[j] : values[2 + j], 16);
    halves[j] = (upper ? values[2 + j] : values[j]) + other;
  }
  const float other = __shfl_xor_sync(FULL_WARP, right ? halves[0] : halves[1], 8);
  const float sum = (right ? halves[1] : halves[0]) + other;
  return sum + __shfl_xor_sync(FULL_WARP, sum, 4);
}

// What 16 keys add for 16 queries; to what is there already, if anything is.
__device__ __forceinline__ void add_part(Part* parts, const float (&weights)[2][4],
                                         const float (&grads)[2][4], bool more) {
  float products[4], plain[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int n = i / 2, j = i % 2;
    products[i] = weights[n][j] * grads[n][j] + weights[n][j + 2] * grads[n][j + 2];
    plain[i] = weights[n][j] + weights[n][j + 2];
  }
  Part part{sum_of_keys(products), sum_of_keys(plain)};
  const int lane = threadIdx.x % 32;
  if ((lane & 4) == 0) {
    auto* const here =
        reinterpret_cast<float2*>(parts + lane / 16 * 8 + 2 * (lane % 4)) + (lane & 8 ? 1 : 0);
    if (more) {
      const float2 before = load_shared(here);
      part = {part.gradients + before.x, part.weights + before.y};
    }
    store_shared(here, make_float2(part.gradients, part.weights));
  }
}

// Delta of a warp's 16 queries, from the parts of the warps that have their keys.
__device__ __forceinline__ void add_parts(Statistics* statistics, const Part* parts, int rows,
                                          const Span& warps, int row) {
  const int lane = threadIdx.x % 32;
  if (lane < TILE) {
    float gradients = 0, weights = 0;
    for (int warp = warps.start; warp < warps.end; ++warp) {
      const auto* const here = reinterpret_cast<const float2*>(parts + warp * rows + row + lane);
      const float2 part = load_shared(here);
      gradients += part.x;
      weights += part.y;
    }
    store_shared(&statistics[row + lane].delta, gradients / weights);
  }
}

// The gradients of logits (unscaled) of 16 keys by 16 queries from those of the weights, in their
// place.
__device__ __forceinline__ void to_logits(float (&grads)[2][4], const float2 (&weights)[4],
                                          const Statistics* statistics, int row) {
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const int query = row + 8 * n + 2 * (threadIdx.x % 4);
    const float4 both = load_shared(reinterpret_cast<const float4*>(statistics + query));
#pragma unroll
    for (int down = 0; down < 2; ++down) {
      const float2 weight = weights[2 * n + down];
      // A weight of 0 whatever the gradient, which may be of another sequence.
      float (&grad)[4] = grads[n];
      grad[2 * down] = weight.x == 0 ? 0.0f : weight.x * (grad[2 * down] - both.y);
      grad[2 * down + 1] = weight.y == 0 ? 0.0f : weight.y * (grad[2 * down + 1] - both.w);
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
// Blocks: as many as there is room for, each with every so many-th item, heads fastest. Writes the
// rows of the gradients that the items have.
template <typename T, int K>
__global__ void __launch_bounds__(32 * BACKWARD_WARPS, 1)
    short_attention_backward_kernel(const T* grad, const T* q, const T* k, const T* v,
                                    const float* lse, T* grad_q, T* grad_k, T* grad_v, Layout given,
                                    Layout result, Layout grads, Grouping grouping, int items,
                                    BackwardPlan<K> plan, float scale) {
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int first_row = warp * TILE, step = plan.warps * TILE;
  const WideTile weights_tile(shared_memory() + plan.weights(), plan.rows());
  auto* const statistics = reinterpret_cast<Statistics*>(shared_memory() + plan.statistics());
  auto* const parts = reinterpret_cast<Part*>(shared_memory() + plan.parts());
  const Tile<K> place{shared_memory() + plan.places() + warp * Tile<K>::bytes(TILE)};
  const bool several = step < plan.rows();
  int number = 0;
  for (int index = blockIdx.x; index < items; index += gridDim.x, ++number) {
    const Item item(grouping, index);
    const Tile<K> q_tile{shared_memory() + number % plan.stages * plan.stage()};
    const Tile<K> k_tile = q_tile.from(plan.rows()), grad_tile = k_tile.from(plan.rows());
    if (plan.stages == 1 || number == 0) {
      bring<T, K>(q_tile, plan, item, q, k, given, grad, result);
      cp_async_commit();
    }
    bring_rows<T, K>(place, v, given, item, first_row);
    cp_async_commit();
    for (int row = first_row; row < plan.rows(); row += step) {
      load_lse(statistics, lse, item, row);
    }
    if (plan.stages == 2) {
      const int next = index + static_cast<int>(gridDim.x);
      if (next < items) {
        const Tile<K> other{shared_memory() + (number + 1) % 2 * plan.stage()};
        bring<T, K>(other, plan, Item(grouping, next), q, k, given, grad, result);
      }
      cp_async_commit();
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    __syncthreads();

    RowsInRegisters<K> values[1] = {RowsInRegisters<K>(RowsInShared<K>{place, 0})};
    for (int row = first_row; row < item.rows; row += step) {
      if (row != first_row) {
        take_rows<T, K>(values[0], place, v, given, item, row);
      }
      const RowsInShared<K> keys[1] = {{k_tile, row}};
      Span spans[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int key = row + g + 8 * half;
        spans[half] = key < item.rows ? item.span(key) : Span{0, 0};
      }
      float sums[1][K / 8][4] = {};
      const Span queries = item.tiles(row, TILE);
#pragma unroll 1
      for (int tile = queries.start; tile < queries.end; ++tile) {
        float weights[1][2][4] = {}, gradients[1][2][4] = {};
        add_inner<T, K>(weights, 0, keys, q_tile, tile * TILE);
        add_inner<T, K>(gradients, 0, values, grad_tile, tile * TILE);
        to_weights(weights[0], statistics, tile * TILE, spans, item.masked(), scale * LOG2_E);
        add_part(parts + warp * plan.rows() + tile * TILE, weights[0], gradients[0],
                 row != first_row);
        uint32_t a[1][4];
        as_weights<T>(a[0], weights[0], 0);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          char* const here = weights_tile.at(row + g + i % 2 * 8, 2 * tile + i / 2) + 4 * t;
          store_shared(reinterpret_cast<uint32_t*>(here), a[0][i]);
        }
        add_product<T, K>(sums, a, grad_tile, tile * TILE);
      }
      write_sums<T, K>(grad_v, grads, Item(grouping, anew(index)), row, sums[0], 1.0f, place);
    }
    __syncthreads();
    for (int row = first_row; row < item.rows; row += step) {
      // Sequences so long that a warp has more than one tile are alone: all keys are theirs.
      const Span warps = several ? Span{0, plan.warps} : item.tiles(row, TILE);
      add_parts(statistics, parts, plan.rows(), warps, row);
    }
    __syncthreads();

    for (int row = first_row; row < item.rows; row += step) {
      if (several) {
        take_rows<T, K>(values[0], place, v, given, item, row);
      }
      float sums[1][K / 8][4] = {};
      const Span queries = item.tiles(row, TILE);
#pragma unroll 1
      for (int tile = queries.start; tile < queries.end; ++tile) {
        float2 weights[4];
        uint32_t* here[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          char* const at = weights_tile.at(row + g + i % 2 * 8, 2 * tile + i / 2) + 4 * t;
          here[i] = reinterpret_cast<uint32_t*>(at);
          weights[i] = unpack<T>(load_shared(here[i]));
        }
        float gradients[1][2][4] = {};
        add_inner<T, K>(gradients, 0, values, grad_tile, tile * TILE);
        to_logits(gradients[0], weights, statistics, tile * TILE);
        uint32_t a[1][4];
        as_weights<T>(a[0], gradients[0], 0);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          store_shared(here[i], a[0][i]);
        }
        add_product<T, K>(sums, a, q_tile, tile * TILE);
      }
      write_sums<T, K>(grad_k, grads, Item(grouping, anew(index)), row, sums[0], scale, place);
    }
    __syncthreads();
    for (int row = first_row; row < item.rows; row += step) {
      float sums[1][K / 8][4] = {};
      const Span keys = item.tiles(row, TILE);
#pragma unroll 1
      for (int tile = keys.start; tile < keys.end; ++tile) {
        uint32_t a[1][4];
        ldmatrix_x4_trans(a[0], address_x4<false>(weights_tile, tile * TILE, row / PIECE));
        add_product<T, K>(sums, a, k_tile, tile * TILE);
      }
      write_sums<T, K>(grad_q, grads, Item(grouping, anew(index)), row, sums[0], scale, place);
    }
    // Before the next item takes the place of anything.
    __syncthreads();
  }
}

}  // namespace vmae_fast
