// Masked reconstruction loss of uint8 video whose tubelets are 16 pixels wide.
//
// As Python calls it, None where there is no such tensor:
//
//   masked_mse(pred: View | None, video: View, idx: View, weight: View | None, loss: View,
//              difference: View | None, first_row: int, rows_per_clip: int,
//              tubelet: tuple[int, int, int], norm_pix: bool, channel_major: bool, eps: float,
//              stream: int) -> None
//
// n = loss.shape[0] tokens, from number first_row on of the clips' B * M; M = rows_per_clip;
// q = pt * ph * pw pixels, P = C * q values a tubelet:
//   video               (B, C, T, H, W) uint8
//   idx                 (B, M) int32 or int64, any strides
//   pred, difference    (n, P) contiguous, of one dtype; difference may be pred if channel_major
//   weight, loss        (n,) float32 contiguous
#pragma once

#include <cstdint>

#include "runtime.h"

namespace vmae_fast {

// What predictions and differences are stored as.
enum class Stored { float16, bfloat16, float32 };

// The width of tubelets, and the most rows of so many pixels, over all frames of a tubelet.
constexpr int TUBELET_WIDTH = 16;
constexpr int MOST_ROWS = 256;
// The most channels; of them interleaved, exactly three.
constexpr int MOST_CHANNELS = 4;

struct MaskedMSE {
  // (n, P), 16-byte aligned: (pt ph pw c), or if channel_major (c pt ph pw). Null for zeros.
  const void* pred;
  Stored stored;
  bool channel_major;

  // (B, C, T, H, W), strides in bytes. 16-byte aligned, and every stride a multiple of 16 but for
  // two: 1 of W, or where the three channels are interleaved 3 of W and 1 of C. (What the strides
  // of dimensions of size 1 are does not matter.)
  const uint8_t* video;
  int64_t shape[5];
  int64_t stride[5];
  int tubelet[3];
  bool norm_pix;
  // Added to the standard deviation, for pixels in [0, 1].
  float eps;

  // (B, M) positions on the grid (T / pt, H / ph, W / pw); strides in values.
  const void* idx;
  bool idx_int64;
  int64_t idx_stride[2];
  int64_t rows_per_clip;
  int64_t first_row;
  int64_t rows;

  // (n,) factors of the differences, not of the loss; null for ones.
  const float* weight;
  // (n,) squared error averaged over each token's values.
  float* loss;
  // (n, P), prediction less target, 16-byte aligned, always (c pt ph pw); null if not wanted. In
  // place of channel-major predictions is fine.
  void* difference;
};

// Writes loss and difference, without atomics: the same from run to run. Throws
// std::invalid_argument for what it does not take.
void masked_mse(const MaskedMSE& given, Stream stream);

}  // namespace vmae_fast
