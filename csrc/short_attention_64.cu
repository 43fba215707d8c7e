#include "short_attention_launch.cuh"

namespace vmae_fast {

template bool fits<64>(int tiles, bool backward);
template void forward<half, 64>(const Attention& given, Stream stream);
template void forward<bfloat16, 64>(const Attention& given, Stream stream);
template void backward<half, 64>(const Attention& given, const Gradients& into, Stream stream);
template void backward<bfloat16, 64>(const Attention& given, const Gradients& into, Stream stream);

}  // namespace vmae_fast
