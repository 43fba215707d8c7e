// What a warp's lanes do together.
#include <cstring>
#include <vector>

#include "emulated_device.h"
#include "memory.h"

namespace vmae_fast::emulator {
namespace {

// The low and the high value of a register.
template <typename T>
void split(uint32_t both, float& low, float& high) {
  const float2 values = unpack<T>(both);
  low = values.x;
  high = values.y;
}

}  // namespace

template <bool BFLOAT16, int DEPTH>
void multiply(void* const* lanes, const Operation&) {
  using T = std::conditional_t<BFLOAT16, bfloat16, half>;
  // By PTX's tables of fragments: see csrc/device.h.
  float a[16][DEPTH], b[DEPTH][8], d[16][8] = {};
  for (int lane = 0; lane < WARP; ++lane) {
    const auto& mine = *static_cast<const Product*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int part = 0; part < DEPTH / 8; ++part) {
      const int k = 8 * part + 2 * t;
      split<T>(mine.a[2 * part], a[g][k], a[g][k + 1]);
      split<T>(mine.a[2 * part + 1], a[g + 8][k], a[g + 8][k + 1]);
      split<T>(mine.b[part], b[k][g], b[k + 1][g]);
    }
  }
  for (int m = 0; m < 16; ++m) {
    for (int k = 0; k < DEPTH; ++k) {
      for (int n = 0; n < 8; ++n) {
        d[m][n] += a[m][k] * b[k][n];
      }
    }
  }
  for (int lane = 0; lane < WARP; ++lane) {
    float* mine = static_cast<const Product*>(lanes[lane])->d;
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      mine[i] += d[g + 8 * (i / 2)][2 * t + i % 2];
    }
  }
  ++counts.mma;
}

template void multiply<false, 8>(void* const*, const Operation&);
template void multiply<false, 16>(void* const*, const Operation&);
template void multiply<true, 8>(void* const*, const Operation&);
template void multiply<true, 16>(void* const*, const Operation&);

template <int MATRICES, bool TRANSPOSED>
void load_matrices(void* const* lanes, const Operation& what) {
  constexpr int ROW_BYTES = 16;
  for (int matrix = 0; matrix < MATRICES; ++matrix) {
    uint16_t values[8][8];
    std::vector<int> offsets;
    for (int row = 0; row < 8; ++row) {
      turn.lane = matrix * 8 + row;
      const void* from = static_cast<const Rows*>(lanes[turn.lane])->row;
      shared.load(values[row], from, ROW_BYTES, what, true);
      offsets.push_back(static_cast<int>(static_cast<const char*>(from) - shared.address()));
    }
    counts.ldmatrix_conflicts += extra_turns(offsets, ROW_BYTES, what);
    for (int lane = 0; lane < WARP; ++lane) {
      const int g = lane / 4, t = lane % 4;
      const uint32_t low = TRANSPOSED ? values[2 * t][g] : values[g][2 * t];
      const uint32_t high = TRANSPOSED ? values[2 * t + 1][g] : values[g][2 * t + 1];
      static_cast<const Rows*>(lanes[lane])->r[matrix] = low | high << 16;
    }
  }
  ++counts.ldmatrix;
}

template void load_matrices<2, false>(void* const*, const Operation&);
template void load_matrices<2, true>(void* const*, const Operation&);
template void load_matrices<4, false>(void* const*, const Operation&);
template void load_matrices<4, true>(void* const*, const Operation&);

void shuffle(void* const* lanes, const Operation& what) {
  uint32_t values[WARP] = {};
  for (int lane = 0; lane < WARP; ++lane) {
    if (lanes[lane]) {
      values[lane] = static_cast<const Shuffle*>(lanes[lane])->value;
    }
  }
  for (int lane = 0; lane < WARP; ++lane) {
    if (!lanes[lane]) {
      continue;
    }
    auto& mine = *static_cast<Shuffle*>(lanes[lane]);
    turn.lane = lane;
    if (!lanes[mine.source]) {
      fail(what, "takes the value of lane " + std::to_string(mine.source) + ", which has ended");
    }
    mine.value = values[mine.source];
  }
}

void add_up(void* const* lanes, const Operation&) {
  uint32_t sum = 0;
  for (int lane = 0; lane < WARP; ++lane) {
    sum += lanes[lane] ? static_cast<const Sum*>(lanes[lane])->value : 0;
  }
  for (int lane = 0; lane < WARP; ++lane) {
    if (lanes[lane]) {
      static_cast<Sum*>(lanes[lane])->value = sum;
    }
  }
}

}  // namespace vmae_fast::emulator
