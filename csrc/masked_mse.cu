// Masked reconstruction loss: pixels, predictions and differences each pass the chip once.
//
// Lanes hold units of 8 pixels with all their channels. Predictions come as (pixel, channel) and
// differences leave as (channel, pixel): within a unit that is a matter of which register, and 16
// bytes of 16-bit differences a lane are 512 contiguous bytes a warp. Pixels are loaded by the row,
// 16 bytes a lane and channel; two lanes then swap halves of their rows, which gives each a unit of
// both.
//
// A warp has 32 rows of a token, two units a lane: a token of more rows has a block of its own.
#include <cmath>
#include <stdexcept>
#include <string>

#include "device.h"
#include "masked_mse.h"

namespace vmae_fast {
namespace {

constexpr int UNIT = 8;
constexpr int UNITS = 2;
constexpr int ROWS_OF_WARP = 32;
// Of a block whose warps have a token each. Not yet measured.
constexpr int TOKENS_OF_BLOCK = 4;
constexpr int MOST_THREADS = MOST_ROWS;
// So that numbers of tokens are ints.
constexpr int64_t MOST_TOKENS = int64_t{1} << 30;

// What is given, and what follows from it.
struct Work {
  MaskedMSE given;
  int first_row, rows, rows_per_clip;
  int grid_h, grid_w;
  // Rows of pixels and pixels of a channel of a token; units of them; warps for a token.
  int lines, pixels, units, warps;
  // 1 / (pixels * (pixels - 1)).
  float per_pair;
};

// Eight values that lie together; in memory an array of these, 16-byte aligned.
template <typename T>
struct Eight {
  uint4 words;

  __device__ __forceinline__ void load(const void* from, int64_t number) {
    words = load_global(static_cast<const uint4*>(from) + number);
  }
  __device__ __forceinline__ float operator[](int i) const {
    const uint32_t word = i < 2 ? words.x : i < 4 ? words.y : i < 6 ? words.z : words.w;
    const float2 both = unpack<T>(word);
    return i % 2 ? both.y : both.x;
  }
  __device__ __forceinline__ static void store(void* to, int64_t number, const float (&x)[UNIT]) {
    store_global(static_cast<uint4*>(to) + number,
                 make_uint4(pack<T>(x[0], x[1]), pack<T>(x[2], x[3]), pack<T>(x[4], x[5]),
                            pack<T>(x[6], x[7])));
  }
};

template <>
struct Eight<float> {
  float4 low, high;

  __device__ __forceinline__ void load(const void* from, int64_t number) {
    low = load_global(static_cast<const float4*>(from) + 2 * number);
    high = load_global(static_cast<const float4*>(from) + 2 * number + 1);
  }
  __device__ __forceinline__ float operator[](int i) const {
    const float4& half = i < 4 ? low : high;
    return i % 4 == 0 ? half.x : i % 4 == 1 ? half.y : i % 4 == 2 ? half.z : half.w;
  }
  __device__ __forceinline__ static void store(void* to, int64_t number, const float (&x)[UNIT]) {
    store_global(static_cast<float4*>(to) + 2 * number, make_float4(x[0], x[1], x[2], x[3]));
    store_global(static_cast<float4*>(to) + 2 * number + 1, make_float4(x[4], x[5], x[6], x[7]));
  }
};

// Four pixels of one channel from three words of (pixel, channel).
__device__ __forceinline__ uint32_t take_channel(uint32_t a, uint32_t b, uint32_t c, int channel) {
  constexpr uint32_t FIRST[3] = {0x0630, 0x0741, 0x0052}, REST[3] = {0x5210, 0x6210, 0x7410};
  return __byte_perm(__byte_perm(a, b, FIRST[channel]), c, REST[channel]);
}

// A unit's pixels, four to a word, channel by channel.
template <int CHANNELS>
struct Pixels {
  uint32_t words[CHANNELS][UNIT / 4];
};

// The first pixel of a token's tubelet.
__device__ __forceinline__ const uint8_t* find_tubelet(const Work& work, int row) {
  const MaskedMSE& given = work.given;
  const int clip = (work.first_row + row) / work.rows_per_clip;
  const int number = (work.first_row + row) % work.rows_per_clip;
  const int64_t at = clip * given.idx_stride[0] + number * given.idx_stride[1];
  const int token = given.idx_int64
                        ? static_cast<int>(load_global(static_cast<const int64_t*>(given.idx) + at))
                        : load_global(static_cast<const int32_t*>(given.idx) + at);
  const int frame = token / work.grid_w / work.grid_h * given.tubelet[0];
  const int top = token / work.grid_w % work.grid_h * given.tubelet[1];
  const int left = token % work.grid_w * TUBELET_WIDTH;
  return given.video + clip * given.stride[0] + frame * given.stride[2] + top * given.stride[3] +
         left * given.stride[4];
}

// Loads row `line`, zeros where there is none, and swaps so that lane 2g + j has half j of rows g
// and 16 + g of the warp's; lane 2g + j must have been given row 16j + g.
template <int CHANNELS, bool INTERLEAVED>
__device__ __forceinline__ void load_pixels(Pixels<CHANNELS> (&units)[UNITS], const Work& work,
                                            const uint8_t* tubelet, int line, bool odd) {
  uint32_t row[CHANNELS * 4] = {};
  if (line < work.lines) {
    const MaskedMSE& given = work.given;
    const uint8_t* from = tubelet + line / given.tubelet[1] * given.stride[2] +
                          line % given.tubelet[1] * given.stride[3];
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
      // Interleaved, a third of the row with all channels.
      const int64_t offset = INTERLEAVED ? c * TUBELET_WIDTH : c * given.stride[1];
      const uint4 loaded = load_global(reinterpret_cast<const uint4*>(from + offset));
      row[4 * c] = loaded.x, row[4 * c + 1] = loaded.y;
      row[4 * c + 2] = loaded.z, row[4 * c + 3] = loaded.w;
    }
  }
  uint32_t halves[UNITS][CHANNELS * 2];
#pragma unroll
  for (int i = 0; i < CHANNELS * 2; ++i) {
    const int low = INTERLEAVED ? i : i / 2 * 4 + i % 2;
    const uint32_t left = row[low], right = row[low + (INTERLEAVED ? CHANNELS * 2 : 2)];
    const uint32_t got = __shfl_xor_sync(FULL_WARP, odd ? left : right, 1);
    halves[0][i] = odd ? got : left;
    halves[1][i] = odd ? right : got;
  }
#pragma unroll
  for (int k = 0; k < UNITS; ++k) {
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
#pragma unroll
      for (int i = 0; i < UNIT / 4; ++i) {
        units[k].words[c][i] = INTERLEAVED ? take_channel(halves[k][3 * i], halves[k][3 * i + 1],
                                                          halves[k][3 * i + 2], c)
                                           : halves[k][2 * c + i];
      }
    }
  }
}

// How pixels of a channel become targets: (pixel * count - sum) * scale.
struct Normalisation {
  float count, sum, scale;
};

// Adds up what the block's warps have, in their order; all lanes of a warp have the same.
template <typename T, int COUNT>
__device__ __forceinline__ void sum_warps(T (&mine)[COUNT], T* shared, int warps) {
  if (warps == 1) {
    return;
  }
  if (threadIdx.x % 32 == 0) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      store_shared(shared + threadIdx.x / 32 * COUNT + i, mine[i]);
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    mine[i] = 0;
#pragma unroll 1
    for (int warp = 0; warp < warps; ++warp) {
      mine[i] += load_shared(shared + warp * COUNT + i);
    }
  }
}

// Sums are exact, in integers: a flat tubelet's targets are exactly zero.
__device__ __forceinline__ Normalisation normalisation(const Work& work, uint32_t sum,
                                                       uint32_t squares) {
  const float count = static_cast<float>(work.pixels);
  const int64_t spread = static_cast<int64_t>(squares) * work.pixels -
                         static_cast<int64_t>(sum) * static_cast<int64_t>(sum);
  const float variance = static_cast<float>(spread) * work.per_pair;
  const float scale = 1.0f / (count * (sqrtf(variance) + 255.0f * work.given.eps));
  // No more than 4096 * 255, as is count times a pixel: exact in fp32.
  return {count, static_cast<float>(sum), scale};
}

template <int CHANNELS>
__device__ __forceinline__ void normalise(Normalisation (&how)[CHANNELS],
                                          const Pixels<CHANNELS> (&units)[UNITS], const Work& work,
                                          uint32_t* shared) {
  uint32_t sums[2 * CHANNELS] = {};
#pragma unroll
  for (int c = 0; c < CHANNELS; ++c) {
#pragma unroll
    for (int i = 0; i < UNITS * UNIT / 4; ++i) {
      const uint32_t four = units[i / (UNIT / 4)].words[c][i % (UNIT / 4)];
      sums[2 * c] = __dp4a(four, 0x01010101u, sums[2 * c]);
      sums[2 * c + 1] = __dp4a(four, four, sums[2 * c + 1]);
    }
  }
#pragma unroll
  for (int i = 0; i < 2 * CHANNELS; ++i) {
    sums[i] = __reduce_add_sync(FULL_WARP, sums[i]);
  }
  sum_warps(sums, shared, work.warps);
#pragma unroll
  for (int c = 0; c < CHANNELS; ++c) {
    how[c] = normalisation(work, sums[2 * c], sums[2 * c + 1]);
  }
}

// A warp's share of one token.
//
// Grid: tokens, one a warp, or one a block. Writes one loss a token and its differences, which may
// take the place of channel-major predictions: a lane computes what it writes from what it read
// there, and no other lane reads it.
template <typename T, int CHANNELS, bool INTERLEAVED, bool CHANNEL_MAJOR>
__global__ void __launch_bounds__(MOST_THREADS, 2) masked_mse_kernel(const Work work) {
  const MaskedMSE& given = work.given;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const bool alone = work.warps == 1;
  const int row = alone ? blockIdx.x * TOKENS_OF_BLOCK + warp : blockIdx.x;
  if (row >= work.rows) {
    return;
  }
  const int first_line = alone ? 0 : warp * ROWS_OF_WARP;
  // Predictions first: they need not wait for the position.
  const int64_t row_at = static_cast<int64_t>(row) * CHANNELS * work.units;
  Eight<T> pred[UNITS][CHANNELS] = {};
  int at[UNITS];
#pragma unroll
  for (int k = 0; k < UNITS; ++k) {
    at[k] = first_line * 2 + k * 32 + lane;
    if (at[k] < work.units && given.pred != nullptr) {
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c) {
        const int number = CHANNEL_MAJOR ? c * work.units + at[k] : CHANNELS * at[k] + c;
        pred[k][c].load(given.pred, row_at + number);
      }
    }
  }
  const float weight = given.weight == nullptr ? 1.0f : load_global(given.weight + row);

  Pixels<CHANNELS> pixels[UNITS];
  load_pixels<CHANNELS, INTERLEAVED>(pixels, work, find_tubelet(work, row),
                                     first_line + lane % 2 * (ROWS_OF_WARP / UNITS) + lane / 2,
                                     lane % 2 == 1);

  uint32_t* sums = reinterpret_cast<uint32_t*>(shared_memory());
  Normalisation how[CHANNELS];
  if (given.norm_pix) {
    normalise(how, pixels, work, sums);
  } else {
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
      how[c] = {1.0f, 0.0f, 1.0f / 255.0f};
    }
  }

  float total[1] = {0.0f};
#pragma unroll
  for (int k = 0; k < UNITS; ++k) {
    if (at[k] >= work.units) {
      continue;
    }
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
      float kept[UNIT];
#pragma unroll
      for (int i = 0; i < UNIT; ++i) {
        const int place = CHANNEL_MAJOR ? c * UNIT + i : i * CHANNELS + c;
        const uint32_t pixel = pixels[k].words[c][i / 4] >> (i % 4 * 8) & 0xffu;
        const float centred = fmaf(static_cast<float>(pixel), how[c].count, -how[c].sum);
        const float difference = fmaf(-centred, how[c].scale, pred[k][place / UNIT][place % UNIT]);
        total[0] = fmaf(difference, difference, total[0]);
        kept[i] = difference * weight;
      }
      if (given.difference != nullptr) {
        Eight<T>::store(given.difference, row_at + c * work.units + at[k], kept);
      }
    }
  }
#pragma unroll
  for (int apart = 16; apart > 0; apart /= 2) {
    total[0] += __shfl_xor_sync(FULL_WARP, total[0], apart);
  }
  // Behind the integers, which other warps may still be reading.
  sum_warps(total, reinterpret_cast<float*>(sums + 2 * CHANNELS * work.warps), work.warps);
  if (lane == 0 && (alone || warp == 0)) {
    store_global(given.loss + row, total[0] / static_cast<float>(CHANNELS * work.pixels));
  }
}

void check(bool fits, const std::string& what) {
  if (!fits) {
    throw std::invalid_argument("masked_mse takes " + what);
  }
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Whether the three channels of a pixel lie together.
bool interleaved(const MaskedMSE& given) {
  return given.shape[1] == 3 && given.stride[1] == 1 && given.stride[4] == 3;
}

void check_layout(const MaskedMSE& given) {
  const int lines = given.tubelet[0] * given.tubelet[1];
  check(given.tubelet[2] == TUBELET_WIDTH, "tubelets of 16 pixels' width");
  check(lines > 0 && lines <= MOST_ROWS, "tubelets of 1 to 256 rows of pixels");
  check(given.shape[1] > 0 && given.shape[1] <= MOST_CHANNELS, "1 to 4 channels");
  check(given.first_row + given.rows < MOST_TOKENS, "fewer than 2^30 tokens");
  check(aligned(given.pred) && aligned(given.difference) && aligned(given.video),
        "16-byte aligned tensors");
  check(given.pred == nullptr || given.pred != given.difference || given.channel_major,
        "predictions in place if channel-major");
  const bool together = interleaved(given);
  check(together || given.stride[4] == 1, "pixels side by side, or with three channels between");
  for (int i = 0; i < 4; ++i) {
    check(given.shape[i] <= 1 || given.stride[i] % 16 == 0 || (together && i == 1),
          "video strides that are multiples of 16");
  }
}

template <typename T, int CHANNELS, bool INTERLEAVED>
void launch_for(const Work& work, Stream stream) {
  const bool alone = work.warps == 1;
  launch(work.given.channel_major ? masked_mse_kernel<T, CHANNELS, INTERLEAVED, true>
                                  : masked_mse_kernel<T, CHANNELS, INTERLEAVED, false>,
         alone ? (work.rows + TOKENS_OF_BLOCK - 1) / TOKENS_OF_BLOCK : work.rows,
         32 * (alone ? TOKENS_OF_BLOCK : work.warps),
         alone ? 0 : (2 * CHANNELS + 1) * work.warps * static_cast<int>(sizeof(float)), stream,
         work);
}

template <typename T>
void launch_as(const Work& work, Stream stream) {
  switch (work.given.shape[1]) {
    case 1:
      return launch_for<T, 1, false>(work, stream);
    case 2:
      return launch_for<T, 2, false>(work, stream);
    case 3:
      return interleaved(work.given) ? launch_for<T, 3, true>(work, stream)
                                     : launch_for<T, 3, false>(work, stream);
    default:
      return launch_for<T, 4, false>(work, stream);
  }
}

}  // namespace

void masked_mse(const MaskedMSE& given, Stream stream) {
  check_layout(given);
  if (given.rows == 0) {
    return;
  }
  Work work = {};
  work.given = given;
  work.first_row = static_cast<int>(given.first_row);
  work.rows = static_cast<int>(given.rows);
  work.rows_per_clip = static_cast<int>(given.rows_per_clip);
  work.grid_h = static_cast<int>(given.shape[3] / given.tubelet[1]);
  work.grid_w = static_cast<int>(given.shape[4] / given.tubelet[2]);
  work.lines = given.tubelet[0] * given.tubelet[1];
  work.pixels = work.lines * TUBELET_WIDTH;
  work.units = work.pixels / UNIT;
  work.warps = (work.lines + ROWS_OF_WARP - 1) / ROWS_OF_WARP;
  work.per_pair = static_cast<float>(1.0 / (work.pixels * (work.pixels - 1.0)));
  switch (given.stored) {
    case Stored::float16:
      return launch_as<half>(work, stream);
    case Stored::bfloat16:
      return launch_as<bfloat16>(work, stream);
    case Stored::float32:
      return launch_as<float>(work, stream);
  }
}

}  // namespace vmae_fast
