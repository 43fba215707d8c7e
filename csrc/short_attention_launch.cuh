// Launches of both passes for one head width.
#pragma once

#include "short_attention_backward.cuh"
#include "short_attention_forward.cuh"

namespace vmae_fast {

template <int K>
BackwardPlan<K> backward_plan(int tiles, int stages) {
  return {tiles, tiles <= BACKWARD_WARPS ? tiles : (tiles + 1) / 2, stages};
}

template <int K>
bool fits(int tiles, bool backward) {
  const int bytes = backward ? backward_plan<K>(tiles, 1).bytes() : forward_bytes<K>(tiles);
  return bytes <= most_shared_bytes();
}

template <typename T, int K, int M>
void launch_forward(const Attention& given, const Grouping& grouping, Stream stream) {
  const int tiles = grouping.tiles(), parts = (tiles + M - 1) / M;
  // As few rounds as there must be, and then no more warps than these keep busy.
  const int rounds = (parts + FORWARD_WARPS - 1) / FORWARD_WARPS;
  launch(short_attention_kernel<T, K, M>, grouping.items(given.clips),
         32 * ((parts + rounds - 1) / rounds), forward_bytes<K>(tiles), stream,
         static_cast<const T*>(given.q), static_cast<const T*>(given.k),
         static_cast<const T*>(given.v), given.given, static_cast<T*>(given.out), given.result,
         given.lse, grouping, tiles, given.scale * LOG2_E);
}

template <typename T, int K>
void forward(const Attention& given, Stream stream) {
  const Grouping grouping = grouping_of(given.sequences, given.heads);
  // 32 queries a warp halve the reading of keys and values, where there are so many and the
  // registers allow it. Not yet measured.
  if constexpr (K <= 64) {
    if (grouping.per_group == 1 && grouping.tiles() > 4) {
      return launch_forward<T, K, 2>(given, grouping, stream);
    }
  }
  launch_forward<T, K, 1>(given, grouping, stream);
}

template <typename T, int K>
void backward(const Attention& given, const Gradients& into, Stream stream) {
  const Grouping grouping = grouping_of(given.sequences, given.heads);
  constexpr auto kernel = short_attention_backward_kernel<T, K>;
  BackwardPlan<K> plan = backward_plan<K>(grouping.tiles(), 1);
  const int items = grouping.items(given.clips);
  const int threads = 32 * plan.warps, most = most_shared_bytes();
  int blocks = items;
  // Two blocks side by side, where shared memory and registers have room for them, hide each
  // other's memory accesses as well as two stages would.
  const bool alone = 2 * plan.bytes() > most || 2 * plan.warps > BACKWARD_WARPS;
  if (alone && backward_plan<K>(plan.tiles, 2).bytes() <= most) {
    plan.stages = 2;
    const int room = resident_blocks(kernel, threads, plan.bytes());
    blocks = room < 1 || items < room ? items : room;
  }
  launch(kernel, blocks, threads, plan.bytes(), stream, static_cast<const T*>(into.out),
         static_cast<const T*>(given.q), static_cast<const T*>(given.k),
         static_cast<const T*>(given.v), static_cast<const float*>(given.lse),
         static_cast<T*>(into.q), static_cast<T*>(into.k), static_cast<T*>(into.v), given.given,
         given.result, into.given, grouping, items, plan, given.scale);
}

}  // namespace vmae_fast
