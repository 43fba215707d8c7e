// Backward pass: a block has q, k and the gradient of its item in shared memory, a warp 16 of its
// keys at a time. First the weights and dV come of the logits, and what the gradients of the logits
// are to sum up to for each query; then, from the weights in shared memory, those gradients and dK;
// then dQ. Six products of matrices: the gradients of the weights are computed twice, because their
// sums from the rounded output, as FlashAttention has them, are off by far where weights are
// near 1. No atomics; everything is read and written once, but for v where a warp has two tiles of
// keys.
//
// Where one block fills a multiprocessor it stays for several items and has the next one's memory
// on the way while it computes.
#pragma once

#include "attention_tiles.cuh"

namespace vmae_fast {

// Up to so many tiles each has a warp of its own; of more each warp has two, one after the other.
// As many as leave no register spilt; they fill a multiprocessor. Not yet measured.
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

// Has 16 rows of an item fetched into the second-level cache.
template <typename T, int K>
__device__ __forceinline__ void announce_rows(const T* from, const Layout& layout, const Item& item,
                                              int row) {
  const int lane = threadIdx.x % 32, here = row + lane % TILE;
  if (here < item.rows) {
    // A row may lie in two lines, of which a lane takes one.
    prefetch(from + item.at(layout, K, here) + lane / TILE * (K - 1));
  }
}

// The log-sum-exp of a warp's 16 queries.
__device__ __forceinline__ void load_lse(Statistics* statistics, const float* lse, const Item& item,
                                         int row) {
  const int lane = threadIdx.x % 32, here = row + lane;
  if (lane < TILE) {
    // Where there is no query the weights are masked.
    const float value = here < item.rows ? load_global(lse + item.at_lse(here)) : 0.0f;
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

// Where a block has what of an item.
template <typename T, int K>
struct Work {
  const BackwardPlan<K>& plan;
  const Item& item;
  const Tile<K> q, k, grad;
  const WideTile weights;
  Statistics* const statistics;
  Part* const parts;
  const Tile<K> place;
  const float scale;

  __device__ __forceinline__ Work(const BackwardPlan<K>& plan, const Item& item, int stage,
                                  float scale)
      : plan(plan),
        item(item),
        q(stage_of(plan, stage)),
        k(q.from(plan.rows())),
        grad(k.from(plan.rows())),
        weights(shared_memory() + plan.weights(), plan.rows()),
        statistics(reinterpret_cast<Statistics*>(shared_memory() + plan.statistics())),
        parts(reinterpret_cast<Part*>(shared_memory() + plan.parts())),
        place(place_of(plan)),
        scale(scale) {}

  static __device__ __forceinline__ Tile<K> stage_of(const BackwardPlan<K>& plan, int stage) {
    return {shared_memory() + stage * plan.stage()};
  }
  static __device__ __forceinline__ Tile<K> place_of(const BackwardPlan<K>& plan) {
    const int warp = static_cast<int>(threadIdx.x) / 32;
    return {shared_memory() + plan.places() + warp * Tile<K>::bytes(TILE)};
  }

  // This thread's two values of the matrix of weights: of 8 keys (down) by 8 queries (along).
  __device__ __forceinline__ uint32_t* weights_at(int row, int tile, int down, int along) const {
    const int lane = threadIdx.x % 32;
    char* const piece = weights.at(row + 8 * down + lane / 4, 2 * tile + along);
    return reinterpret_cast<uint32_t*>(piece + 4 * (lane % 4));
  }

  // dV of 16 keys; leaves their weights in shared memory, and what they add to delta.
  __device__ __forceinline__ void values(float (&sums)[1][K / 8][4],
                                         const RowsInRegisters<K> (&values)[1], int row,
                                         bool more) const {
    const RowsInRegisters<K> keys[1] = {RowsInRegisters<K>(RowsInShared<K>{k, row})};
    Span spans[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int key = row + static_cast<int>(threadIdx.x) % 32 / 4 + 8 * half;
      spans[half] = key < item.rows ? item.span(key) : Span{0, 0};
    }
    Part* const own = parts + threadIdx.x / 32 * plan.rows();
    const Span queries = item.tiles(row, TILE);
#pragma unroll 1
    for (int tile = queries.start; tile < queries.end; ++tile) {
      float logits[1][2][4] = {}, gradients[1][2][4] = {};
      add_inner<T, K>(logits, 0, keys, q, tile * TILE);
      add_inner<T, K>(gradients, 0, values, grad, tile * TILE);
      to_weights(logits[0], statistics, tile * TILE, spans, item.masked(), scale * LOG2_E);
      add_part(own + tile * TILE, logits[0], gradients[0], more);
      uint32_t a[1][4];
      as_weights<T>(a[0], logits[0], 0);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        store_shared(weights_at(row, tile, i % 2, i / 2), a[0][i]);
      }
      add_product<T, K>(sums, a, grad, tile * TILE);
    }
  }

  // dK of 16 keys; leaves the gradients of their logits where their weights were.
  __device__ __forceinline__ void keys(float (&sums)[1][K / 8][4],
                                       const RowsInRegisters<K> (&values)[1], int row) const {
    const Span queries = item.tiles(row, TILE);
#pragma unroll 1
    for (int tile = queries.start; tile < queries.end; ++tile) {
      float2 weights[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        weights[i] = unpack<T>(load_shared(weights_at(row, tile, i % 2, i / 2)));
      }
      float gradients[1][2][4] = {};
      add_inner<T, K>(gradients, 0, values, grad, tile * TILE);
      to_logits(gradients[0], weights, statistics, tile * TILE);
      uint32_t a[1][4];
      as_weights<T>(a[0], gradients[0], 0);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        store_shared(weights_at(row, tile, i % 2, i / 2), a[0][i]);
      }
      add_product<T, K>(sums, a, q, tile * TILE);
    }
  }

  // dQ of 16 queries.
  __device__ __forceinline__ void queries(float (&sums)[1][K / 8][4], int row) const {
    const Span keys = item.tiles(row, TILE);
#pragma unroll 1
    for (int tile = keys.start; tile < keys.end; ++tile) {
      uint32_t a[1][4];
      ldmatrix_x4_trans(a[0], address_x4<false>(weights, tile * TILE, row / PIECE));
      add_product<T, K>(sums, a, k, tile * TILE);
    }
  }
};

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
  const int first_row = static_cast<int>(threadIdx.x) / 32 * TILE, step = plan.warps * TILE;
  const bool several = step < plan.rows();
  int number = 0;
  for (int index = blockIdx.x; index < items; index += gridDim.x, ++number) {
    const Item item(grouping, index);
    const Work<T, K> work(plan, item, number % plan.stages, scale);
    if (plan.stages == 1 || number == 0) {
      bring<T, K>(work.q, plan, item, q, k, given, grad, result);
      cp_async_commit();
    }
    bring_rows<T, K>(work.place, v, given, item, first_row);
    cp_async_commit();
    for (int row = first_row; row < plan.rows(); row += step) {
      load_lse(work.statistics, lse, item, row);
    }
    if (plan.stages == 2) {
      const int next = index + static_cast<int>(gridDim.x);
      if (next < items) {
        const Item coming(grouping, next);
        const Tile<K> other = Work<T, K>::stage_of(plan, (number + 1) % 2);
        bring<T, K>(other, plan, coming, q, k, given, grad, result);
        announce_rows<T, K>(v, given, coming, first_row);
      }
      cp_async_commit();
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    __syncthreads();

    RowsInRegisters<K> values[1] = {RowsInRegisters<K>(RowsInShared<K>{work.place, 0})};
    for (int row = first_row; row < item.rows; row += step) {
      if (row != first_row) {
        take_rows<T, K>(values[0], work.place, v, given, item, row);
      }
      float sums[1][K / 8][4] = {};
      work.values(sums, values, row, row != first_row);
      write_sums<T, K>(grad_v, grads, item, row, sums[0], 1.0f, work.place);
    }
    __syncthreads();
    for (int row = first_row; row < item.rows; row += step) {
      // Sequences so long that a warp has more than one tile are alone: all keys are theirs.
      const Span warps = several ? Span{0, plan.warps} : item.tiles(row, TILE);
      add_parts(work.statistics, work.parts, plan.rows(), warps, row);
    }
    __syncthreads();
    for (int row = first_row; row < item.rows; row += step) {
      if (several) {
        take_rows<T, K>(values[0], work.place, v, given, item, row);
      }
      float sums[1][K / 8][4] = {};
      work.keys(sums, values, row);
      write_sums<T, K>(grad_k, grads, item, row, sums[0], scale, work.place);
    }
    __syncthreads();
    for (int row = first_row; row < item.rows; row += step) {
      float sums[1][K / 8][4] = {};
      work.queries(sums, row);
      write_sums<T, K>(grad_q, grads, item, row, sums[0], scale, work.place);
    }
    // Before the next item takes the place of anything.
    __syncthreads();
  }
}

}  // namespace vmae_fast
