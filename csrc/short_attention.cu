// Which of the kernels, each compiled in a file of its own by head width, a call is for.
#include <stdexcept>
#include <string>

#include "attention_tiles.cuh"
#include "short_attention.h"

namespace vmae_fast {

template <int K>
bool fits(int tiles, bool backward);
template <typename T, int K>
void forward(const Attention& given, Stream stream);
template <typename T, int K>
void backward(const Attention& given, const Gradients& into, Stream stream);

namespace {

template <int K>
struct Width {
  static constexpr int WIDTH = K;
};

// Calls with the width, which it is compiled for.
template <typename Call>
bool with_width(int head_width, const Call& call) {
  switch (head_width) {
    case 64:
      call(Width<64>());
      return true;
    case 80:
      call(Width<80>());
      return true;
    case 88:
      call(Width<88>());
      return true;
    default:
      return false;
  }
}

void refuse(int head_width) {
  throw std::invalid_argument("heads of width " + std::to_string(head_width) +
                              ", only of 64, 80 and 88");
}

}  // namespace

bool short_attention_fits(int length, int head_width, bool backward) {
  if (length < 1 || length > LONGEST_SEQUENCE) {
    return false;
  }
  const int tiles = grouping_of({LONGEST_SEQUENCE, length, 0, 1}, 1).tiles();
  bool found = false;
  with_width(head_width,
             [&](auto width) { found = fits<decltype(width)::WIDTH>(tiles, backward); });
  return found;
}

void short_attention(const Attention& attention, Stream stream) {
  const bool known = with_width(attention.head_width, [&](auto width) {
    constexpr int K = decltype(width)::WIDTH;
    attention.dtype == DType::float16 ? forward<half, K>(attention, stream)
                                      : forward<bfloat16, K>(attention, stream);
  });
  if (!known) {
    refuse(attention.head_width);
  }
}

void short_attention_backward(const Attention& attention, const Gradients& gradients,
                              Stream stream) {
  const bool known = with_width(attention.head_width, [&](auto width) {
    constexpr int K = decltype(width)::WIDTH;
    attention.dtype == DType::float16 ? backward<half, K>(attention, gradients, stream)
                                      : backward<bfloat16, K>(attention, gradients, stream);
  });
  if (!known) {
    refuse(attention.head_width);
  }
}

}  // namespace vmae_fast
