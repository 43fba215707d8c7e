// Attention within short sequences, forward and backward, for 16-bit values.
#pragma once

#include <cstdint>

#include "runtime.h"

namespace vmae_fast {

enum class DType { float16, bfloat16 };

// The most tokens of a sequence.
constexpr int LONGEST_SEQUENCE = 256;

// How a clip's tokens form the sequences that attend to each other: token i of sequence s is
// s * step + i * stride of the clip's.
struct Sequences {
  int count;
  int length;
  int64_t step;
  int64_t stride;
};

// Where the tokens of all clips are, each with its heads side by side; distances in values.
struct Layout {
  int64_t clip;
  int64_t token;
};

// What both passes are about. Everything is 16-byte aligned, distances are multiples of 8.
struct Attention {
  DType dtype;
  int clips;
  int heads;
  int head_width;
  Sequences sequences;
  float scale;
  // (clips, tokens, heads, head_width) each, at the same distances.
  const void* q;
  const void* k;
  const void* v;
  Layout given;
  // (clips, tokens, heads, head_width); the backward pass reads its gradient only.
  void* out;
  Layout result;
  // Log-sum-exp of the logits, (clips * count, heads, length).
  float* lse;
};

// The gradients of q, k and v, at the same distances, from that of out, laid out as out.
struct Gradients {
  const void* out;
  void* q;
  void* k;
  void* v;
  Layout given;
};

// Whether a pass of such a length and width is written for this device: its shared memory and the
// registers hold a whole sequence. (The current device.)
bool short_attention_fits(int length, int head_width, bool backward);

// Writes out and lse.
void short_attention(const Attention& attention, Stream stream);

// Writes the gradients, without atomics: the same from run to run.
void short_attention_backward(const Attention& attention, const Gradients& gradients,
                              Stream stream);

}  // namespace vmae_fast
