// What both passes of attention within short sequences share: which rows a block has, and tiles of
// them in shared memory.
//
// A block works on one head of a group: so many whole sequences of one clip, their tokens its rows,
// one sequence after the other. Rows are padded to tiles of 16 with zeros. A group is of one clip
// because a weight of zero times a value that is not finite is not zero: nothing of one clip may
// reach another.
#pragma once

#include <climits>
#include <stdexcept>

#include "device.h"
#include "short_attention.h"

namespace vmae_fast {

// Rows of a tile, the height of a product of matrices.
constexpr int TILE = 16;
constexpr int MOST_TILES = LONGEST_SEQUENCE / TILE;
// Short sequences are gathered into groups of up to so many rows. Not yet measured.
constexpr int GROUP_ROWS = 64;
// Values that are moved at once, 16 bytes.
constexpr int PIECE = 8;
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LOG_2 = 0.6931471805599453f;

// How the sequences of a launch are divided into groups.
struct Grouping {
  Sequences sequences;
  int heads;
  int per_group;
  int groups;  // of a clip

  int tiles() const { return (per_group * sequences.length + TILE - 1) / TILE; }
  // Throws where they are too many for a launch.
  int items(int clips) const {
    const int64_t number = int64_t{clips} * groups * heads;
    if (number > INT_MAX) {
      throw std::runtime_error("more than 2^31 - 1 groups of sequences in one launch");
    }
    return static_cast<int>(number);
  }
};

inline Grouping grouping_of(const Sequences& sequences, int heads) {
  int per_group = GROUP_ROWS / sequences.length;
  per_group = per_group < 1 ? 1 : per_group;
  per_group = per_group > sequences.count ? sequences.count : per_group;
  return {sequences, heads, per_group, (sequences.count + per_group - 1) / per_group};
}

// The rows that attend to a row, and are attended to by it: those of its sequence.
struct Span {
  int start;
  int end;

  __device__ __forceinline__ bool has(int row) const { return row >= start && row < end; }
};

// One head of one group.
struct Item {
  Sequences sequences;
  int64_t clip;
  int heads;
  int head;
  int first;  // sequence of the clip
  int rows;
  bool alone;  // one sequence, no division to find it

  // Heads run fastest: theirs are neighbours in memory.
  __device__ __forceinline__ Item(const Grouping& grouping, int index)
      : sequences(grouping.sequences), heads(grouping.heads), alone(grouping.per_group == 1) {
    const int group = index / heads;
    head = index % heads;
    clip = group / grouping.groups;
    first = group % grouping.groups * grouping.per_group;
    rows = min(grouping.per_group, sequences.count - first) * sequences.length;
  }

  __device__ __forceinline__ Span span(int row) const {
    if (alone) {
      return {0, rows};
    }
    const int start = row < rows ? row / sequences.length * sequences.length : 0;
    return {start, start + sequences.length};
  }

  // The tiles that have rows of the same sequences as a tile.
  __device__ __forceinline__ Span tiles(int first_row, int num_rows) const {
    const int last_row = min(first_row + num_rows, rows) - 1;
    return {span(first_row).start / TILE, (span(last_row).end + TILE - 1) / TILE};
  }

  // Whether the rows of whole tiles do not all attend to each other.
  __device__ __forceinline__ bool masked() const { return !alone || rows % TILE != 0; }

  // Offset in values of a row of this head.
  __device__ __forceinline__ int64_t at(const Layout& layout, int width, int row) const {
    const int sequence = alone ? first : first + row / sequences.length;
    const int position = alone ? row : row % sequences.length;
    const int64_t token = sequence * sequences.step + position * sequences.stride;
    return clip * layout.clip + token * layout.token + head * width;
  }

  // Offset of a row's log-sum-exp.
  __device__ __forceinline__ int64_t at_lse(int row) const {
    const int sequence = alone ? first : first + row / sequences.length;
    const int position = alone ? row : row % sequences.length;
    return ((clip * sequences.count + sequence) * heads + head) * sequences.length + position;
  }
};

// Where a piece of a row is placed so that one piece of 8 rows that follow each other lies in all
// banks: where the row is a multiple of 2, 4 or 8 pieces long, so many are exchanged within it.
__host__ __device__ constexpr int exchanged(int pieces) {
  return pieces % 8 == 0 ? 3 : pieces % 4 == 0 ? 2 : pieces % 2 == 0 ? 1 : 0;  // as power of two
}

__device__ __forceinline__ int placed(int exchanged, int row, int piece) {
  return piece ^ (row >> (3 - exchanged) & ((1 << exchanged) - 1));
}

// Rows of K values in shared memory.
template <int K>
struct Tile {
  static constexpr int PIECES = K / PIECE;
  char* base;

  static __host__ __device__ constexpr int bytes(int rows) { return rows * K * 2; }
  __device__ __forceinline__ char* at(int row, int piece) const {
    return base + (row * PIECES + placed(exchanged(PIECES), row, piece)) * 16;
  }
  __device__ __forceinline__ Tile from(int row) const { return {base + bytes(row)}; }
};

// The same of a width that only the launch knows.
struct WideTile {
  char* base;
  int pieces;
  int exchange;

  __device__ __forceinline__ WideTile(char* base, int width)
      : base(base), pieces(width / PIECE), exchange(exchanged(width / PIECE)) {}
  static __host__ __device__ constexpr int bytes(int width, int rows) { return rows * width * 2; }
  __device__ __forceinline__ char* at(int row, int piece) const {
    return base + (row * pieces + placed(exchange, row, piece)) * 16;
  }
};

// The address of this lane for ldmatrix_x4, of the 16 x 16 values at a row and a piece. The
// matrices run down first, as fragment a has them (and b, transposed), or along first, as two
// fragments b have them of rows that are their columns (and a, transposed).
template <bool DOWN_FIRST, typename Of>
__device__ __forceinline__ const char* address_x4(const Of& tile, int row, int piece) {
  const int lane = threadIdx.x % 32, first = lane / 8 % 2, second = lane / 16;
  const int down = DOWN_FIRST ? first : second, along = DOWN_FIRST ? second : first;
  return tile.at(row + down * 8 + lane % 8, piece + along);
}

// As address_x4, for ldmatrix_x2, of the 16 x 8 values.
template <typename Of>
__device__ __forceinline__ const char* address_x2(const Of& tile, int row, int piece) {
  return tile.at(row + threadIdx.x % 16, piece);
}

template <typename T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
  mma_16x8x16<T>(d, a[0], a[1], a[2], a[3], b0, b1);
}

// 16 rows of a tile as fragments a, K values wide, brought from shared memory as they are needed. K
// is a multiple of 8: the last may be half a fragment.
template <int K>
struct RowsInShared {
  Tile<K> tile;
  int row;

  __device__ __forceinline__ void whole(uint32_t (&a)[4], int i) const {
    ldmatrix_x4(a, address_x4<true>(tile, row, 2 * i));
  }
  __device__ __forceinline__ void half(uint32_t (&a)[2]) const {
    ldmatrix_x2(a, address_x2(tile, row, K / PIECE - 1));
  }
};

// The same held in registers.
template <int K>
struct RowsInRegisters {
  uint32_t pieces[K / PIECE][2];  // rows g and g + 8

  __device__ __forceinline__ explicit RowsInRegisters(const RowsInShared<K>& from) {
#pragma unroll
    for (int i = 0; i < K / 16; ++i) {
      uint32_t a[4];
      from.whole(a, i);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        pieces[2 * i + j / 2][j % 2] = a[j];
      }
    }
    if constexpr (K % 16 != 0) {
      from.half(pieces[K / PIECE - 1]);
    }
  }
  RowsInRegisters() = default;

  __device__ __forceinline__ void whole(uint32_t (&a)[4], int i) const {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      a[j] = pieces[2 * i + j / 2][j % 2];
    }
  }
  __device__ __forceinline__ void half(uint32_t (&a)[2]) const {
    a[0] = pieces[K / PIECE - 1][0];
    a[1] = pieces[K / PIECE - 1][1];
  }
};

// d += a b^T: M times 16 rows by the 16 rows from `row` on of a tile, K values wide each. Into two
// fragments d of each, from number `first` on.
template <typename T, int K, int M, int N, typename Rows>
__device__ __forceinline__ void add_inner(float (&d)[M][N][4], int first, const Rows (&rows)[M],
                                          const Tile<K>& tile, int row) {
  constexpr int PIECES = K / PIECE;
#pragma unroll
  for (int i = 0; i < K / 16; ++i) {
    uint32_t b[4];
    ldmatrix_x4(b, address_x4<false>(tile, row, 2 * i));
#pragma unroll
    for (int m = 0; m < M; ++m) {
      uint32_t a[4];
      rows[m].whole(a, i);
      mma<T>(d[m][first], a, b[0], b[1]);
      mma<T>(d[m][first + 1], a, b[2], b[3]);
    }
  }
  if constexpr (K % 16 != 0) {
    uint32_t b[2];
    ldmatrix_x2(b, address_x2(tile, row, PIECES - 1));
#pragma unroll
    for (int m = 0; m < M; ++m) {
      uint32_t a[2];
      rows[m].half(a);
      mma_16x8x8<T>(d[m][first], a[0], a[1], b[0]);
      mma_16x8x8<T>(d[m][first + 1], a[0], a[1], b[1]);
    }
  }
}

// d += a b: M times 16 x 16 weights by the 16 rows from `row` on of a tile, K values wide.
template <typename T, int K, int M>
__device__ __forceinline__ void add_product(float (&d)[M][K / 8][4], const uint32_t (&a)[M][4],
                                            const Tile<K>& tile, int row) {
  constexpr int PIECES = K / PIECE;
#pragma unroll
  for (int i = 0; i < PIECES / 2; ++i) {
    uint32_t b[4];
    ldmatrix_x4_trans(b, address_x4<true>(tile, row, 2 * i));
#pragma unroll
    for (int m = 0; m < M; ++m) {
      mma<T>(d[m][2 * i], a[m], b[0], b[1]);
      mma<T>(d[m][2 * i + 1], a[m], b[2], b[3]);
    }
  }
  if constexpr (PIECES % 2 != 0) {
    uint32_t b[2];
    ldmatrix_x2_trans(b, address_x2(tile, row, PIECES - 1));
#pragma unroll
    for (int m = 0; m < M; ++m) {
      mma<T>(d[m][PIECES - 1], a[m], b[0], b[1]);
    }
  }
}

// Two neighbouring fragments d, from number `first` on, as one fragment a.
template <typename T, int N>
__device__ __forceinline__ void as_weights(uint32_t (&a)[4], const float (&d)[N][4], int first) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float (&from)[4] = d[first + i / 2];
    a[i] = pack<T>(from[i % 2 * 2], from[i % 2 * 2 + 1]);
  }
}

// Puts 16 rows of sums, K wide, each row times its own of two factors, into a tile.
template <typename T, int K>
__device__ __forceinline__ void stage(const Tile<K>& tile, int row, const float (&d)[K / 8][4],
                                      float upper, float lower) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int i = 0; i < K / 8; ++i) {
    char* here = tile.at(row + g, i) + 4 * t;
    store_shared(reinterpret_cast<uint32_t*>(here), pack<T>(d[i][0] * upper, d[i][1] * upper));
    here = tile.at(row + g + 8, i) + 4 * t;
    store_shared(reinterpret_cast<uint32_t*>(here), pack<T>(d[i][2] * lower, d[i][3] * lower));
  }
}

// Writes 16 rows of an item, the first rows of a tile, to where they belong.
template <typename T, int K>
__device__ __forceinline__ void write_rows(T* to, const Layout& layout, const Item& item, int row,
                                           const Tile<K>& tile) {
  constexpr int PIECES = K / PIECE;
#pragma unroll 1
  for (int i = threadIdx.x % 32; i < TILE * PIECES; i += 32) {
    const int down = i / PIECES, piece = i % PIECES;
    if (row + down < item.rows) {
      const uint4 values = load_shared(reinterpret_cast<const uint4*>(tile.at(down, piece)));
      T* const at = to + item.at(layout, K, row + down) + piece * PIECE;
      store_global(reinterpret_cast<uint4*>(at), values);
    }
  }
}

}  // namespace vmae_fast
