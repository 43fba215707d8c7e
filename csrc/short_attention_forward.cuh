// Forward pass: a block has q, k and v of its item in shared memory, a warp 16 or 32 of its queries
// at a time, and goes over their keys 32 at a time, with the running maximum and sum of
// FlashAttention (arXiv 2205.14135).
#pragma once

#include "attention_tiles.cuh"

namespace vmae_fast {

// Keys that a warp has the logits of at once, in tiles.
constexpr int KEY_TILES = 2;
constexpr int FORWARD_WARPS = 8;

template <int K>
constexpr int forward_bytes(int tiles) {
  return 3 * Tile<K>::bytes(tiles * TILE);
}

// Of the rows g and g + 8 of 16 queries, the maximum so far in units of log 2, scaled, and the sum
// of this thread's weights.
struct Softmax {
  float top[2] = {-INFINITY, -INFINITY};
  float total[2] = {};
};

// Turns logits into weights, in their place, and scales what was summed up with the old maximum.
template <int K>
__device__ __forceinline__ void to_weights(float (&logits)[2 * KEY_TILES][4], Softmax& softmax,
                                           float (&out)[K / 8][4], float scale_log2) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float top = -INFINITY;
#pragma unroll
    for (int i = 0; i < 2 * KEY_TILES; ++i) {
      top = fmaxf(top, fmaxf(logits[i][2 * half], logits[i][2 * half + 1]));
    }
    top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, 1));
    top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, 2));
    const float before = softmax.top[half];
    const float now = fmaxf(before, top * scale_log2);
    // Where no key was seen yet: weights of 0, not of exp(-inf + inf).
    const float base = now == -INFINITY ? 0.0f : now;
    const float shrink = exp2_approximate(before - base);
    softmax.top[half] = now;
    softmax.total[half] *= shrink;
#pragma unroll
    for (int i = 0; i < K / 8; ++i) {
      out[i][2 * half] *= shrink;
      out[i][2 * half + 1] *= shrink;
    }
#pragma unroll
    for (int i = 0; i < 2 * KEY_TILES; ++i) {
#pragma unroll
      for (int j = 2 * half; j < 2 * half + 2; ++j) {
        logits[i][j] = exp2_approximate(fmaf(logits[i][j], scale_log2, -base));
        softmax.total[half] += logits[i][j];
      }
    }
  }
}

// Takes out the keys, from number `first` on, that two queries do not attend to.
__device__ __forceinline__ void mask(float (&logits)[2 * KEY_TILES][4], const Span (&spans)[2],
                                     int first) {
#pragma unroll
  for (int i = 0; i < 2 * KEY_TILES; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int key = first + 8 * i + 2 * (static_cast<int>(threadIdx.x) % 4) + j % 2;
      logits[i][j] = spans[j / 2].has(key) ? logits[i][j] : -INFINITY;
    }
  }
}

// Writes 16 rows of the output, by way of a tile that nothing else reads, and of lse.
template <typename T, int K>
__device__ __forceinline__ void finish(T* out, const Layout& result, float* lse, const Item& item,
                                       int row, const float (&sums)[K / 8][4],
                                       const Softmax& softmax, const Tile<K>& tile) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  float inverse[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float total = softmax.total[half];
    total += __shfl_xor_sync(FULL_WARP, total, 1);
    total += __shfl_xor_sync(FULL_WARP, total, 2);
    inverse[half] = 1.0f / total;
    const int here = row + g + 8 * half;
    if (t == 0 && here < item.rows) {
      store_global(lse + item.at_lse(here), (softmax.top[half] + log2f(total)) * LOG_2);
    }
  }
  stage<T, K>(tile, 0, sums, inverse[0], inverse[1]);
  __syncwarp();
  write_rows<T, K>(out, result, item, row, tile);
}

// Attention of one head of a group.
//
// Blocks: items, heads fastest. Writes the rows of out and lse that the item has.
template <typename T, int K, int M>
__global__ void __launch_bounds__(32 * FORWARD_WARPS, 1)
    short_attention_kernel(const T* q, const T* k, const T* v, Layout given, T* out, Layout result,
                           float* lse, Grouping grouping, int tiles, float scale_log2) {
  constexpr int PIECES = K / PIECE, ROWS = M * TILE;
  const Item item(grouping, blockIdx.x);
  const Tile<K> q_tile{shared_memory()};
  const Tile<K> k_tile = q_tile.from(tiles * TILE), v_tile = k_tile.from(tiles * TILE);
  for (int i = threadIdx.x; i < tiles * TILE * PIECES; i += blockDim.x) {
    const int row = i / PIECES, piece = i % PIECES;
    const bool there = row < item.rows;
    const int64_t at = there ? item.at(given, K, row) + piece * PIECE : 0;
    cp_async_16(q_tile.at(row, piece), q + at, there);
    cp_async_16(k_tile.at(row, piece), k + at, there);
    cp_async_16(v_tile.at(row, piece), v + at, there);
  }
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();

  const int g = static_cast<int>(threadIdx.x) % 32 / 4;
  const int first_row = static_cast<int>(threadIdx.x) / 32 * ROWS;
  const int step = static_cast<int>(blockDim.x) / 32 * ROWS;
  for (int row = first_row; row < item.rows; row += step) {
    RowsInRegisters<K> queries[M];
    float sums[M][K / 8][4] = {};
    Softmax softmax[M];
    Span spans[M][2];
#pragma unroll
    for (int m = 0; m < M; ++m) {
      // Where there is no further tile the last one once more, for nothing.
      const int here = min(row + m * TILE, (tiles - 1) * TILE);
      queries[m] = RowsInRegisters<K>(RowsInShared<K>{q_tile, here});
      spans[m][0] = item.span(row + m * TILE + g);
      spans[m][1] = item.span(row + m * TILE + g + 8);
    }
    const Span keys = item.tiles(row, ROWS);
    for (int tile = keys.start; tile < keys.end; tile += KEY_TILES) {
      float logits[M][2 * KEY_TILES][4] = {};
#pragma unroll
      for (int n = 0; n < KEY_TILES; ++n) {
        if (tile + n < keys.end) {
          add_inner<T, K>(logits, 2 * n, queries, k_tile, (tile + n) * TILE);
        }
      }
      if (item.masked() || tile + KEY_TILES > keys.end) {
#pragma unroll
        for (int m = 0; m < M; ++m) {
          mask(logits[m], spans[m], tile * TILE);
        }
      }
#pragma unroll
      for (int m = 0; m < M; ++m) {
        to_weights<K>(logits[m], softmax[m], sums[m], scale_log2);
      }
#pragma unroll
      for (int n = 0; n < KEY_TILES; ++n) {
        if (tile + n < keys.end) {
          uint32_t weights[M][4];
#pragma unroll
          for (int m = 0; m < M; ++m) {
            as_weights<T>(weights[m], logits[m], 2 * n);
          }
          add_product<T, K>(sums, weights, v_tile, (tile + n) * TILE);
        }
      }
    }
    // Results take the place of the queries, which no other warp reads.
    __syncwarp();
#pragma unroll
    for (int m = 0; m < M; ++m) {
      const int here = row + m * TILE;
      if (here < item.rows) {
        finish<T, K>(out, result, lse, item, here, sums[m], softmax[m], q_tile.from(here));
      }
    }
  }
}

}  // namespace vmae_fast
