// The module of the emulator's own tests.
#include <pybind11/pybind11.h>

#include <map>
#include <string>

#include "emulated_module.h"
#include "faults.h"
#include "runtime.h"
#include "values.h"

namespace vmae_fast {
namespace {

// Who came when, which no kernel could tell.
int arrivals = 0;

void arrive(const char*, char* out) {
  store_global(reinterpret_cast<int*>(out) + blockIdx.x * blockDim.x + threadIdx.x, arrivals++);
}

// A name that ends in ! has a fault.
const std::map<std::string, Kernel> KERNELS = {
    {"read_other_warp", read_other_warp<true>},
    {"read_other_warp!", read_other_warp<false>},
    {"overwrite_other_warp", overwrite_other_warp<true>},
    {"overwrite_other_warp!", overwrite_other_warp<false>},
    {"overwrite_what_all_read", overwrite_what_all_read<true>},
    {"overwrite_what_all_read!", overwrite_what_all_read<false>},
    {"write_same", write_same<true>},
    {"write_same!", write_same<false>},
    {"read_other_lane", read_other_lane<true>},
    {"read_other_lane!", read_other_lane<false>},
    {"overwrite_other_lane", overwrite_other_lane<true>},
    {"overwrite_other_lane!", overwrite_other_lane<false>},
    {"ldmatrix_of_own_stores", ldmatrix_of_own_stores<true>},
    {"ldmatrix_of_own_stores!", ldmatrix_of_own_stores<false>},
    {"copy_and_read", copy_and_read<0, true>},
    {"copy_and_read_too_early!", copy_and_read<1, true>},
    {"copy_and_read_uncommitted!", copy_and_read<0, false>},
    {"copy_and_end", copy_and_end<true>},
    {"copy_and_end!", copy_and_end<false>},
    {"store_into_copy", store_into_copy<true>},
    {"store_into_copy!", store_into_copy<false>},
    {"copy_over_what_was_read", copy_over_what_was_read<true>},
    {"copy_over_what_was_read!", copy_over_what_was_read<false>},
    {"touch_shared_last", touch_shared<1020, 4>},
    {"touch_shared_past!", touch_shared<1024, 4>},
    {"touch_shared_before!", touch_shared<-4, 4>},
    {"touch_shared_half", touch_shared<6, 2>},
    {"touch_shared_askew!", touch_shared<6, 4>},
    {"copy_askew!", touch_shared<8, 16>},
    {"copy_past!", touch_shared<1024, 16>},
    {"misaligned_rows!", misaligned_rows},
    {"read_directly", read_directly},
    {"read_global", read_global<4>},
    {"read_global_past!", read_global<1024>},
    {"read_global_before!", read_global<-4>},
    {"read_global_askew!", read_global<2>},
    {"write_global", write_global<1020>},
    {"write_global_past!", write_global<1024>},
    {"write_input_of_other_block!", write_input_of_other_block},
    {"copy_from_nowhere", copy_from_nowhere},
    {"part_at_operations!", part_at_operations},
    {"part_at_lines!", part_at_lines},
    {"part_at_barrier!", part_at_barrier},
    {"part_at_barriers!", part_at_barriers},
    {"end_before_product", end_before_product<true>},
    {"end_before_product!", end_before_product<false>},
    {"end_before_barrier", end_before_barrier},
    {"take_from_ended!", take_from_ended},
    {"name_few_lanes!", name_few_lanes},
    {"load_rows_128", load_rows<128>},
    {"load_rows_144", load_rows<144>},
    {"load_rows_32", load_rows<32>},
    {"load_rows_0", load_rows<0>},
    {"load_apart_4", load_apart<float, 4>},
    {"load_apart_8", load_apart<float2, 8>},
    {"load_apart_16", load_apart<float4, 16>},
    {"load_apart_128", load_apart<float4, 128>},
    {"read_unwritten", read_unwritten},
    {"shuffle_all", shuffle_all},
    {"convert_float16", convert<half>},
    {"convert_bfloat16", convert<bfloat16>},
    {"take_bytes", take_bytes},
    {"load_fragments", load_fragments},
    {"multiply_by_formula_float16_16", multiply_by_formula<half, 16>},
    {"multiply_by_formula_float16_8", multiply_by_formula<half, 8>},
    {"multiply_by_formula_bfloat16_16", multiply_by_formula<bfloat16, 16>},
    {"multiply_by_formula_bfloat16_8", multiply_by_formula<bfloat16, 8>},
    {"multiply_tiles_float16_16", multiply_tiles<half, 16>},
    {"multiply_tiles_float16_8", multiply_tiles<half, 8>},
    {"multiply_tiles_bfloat16_16", multiply_tiles<bfloat16, 16>},
    {"multiply_tiles_bfloat16_8", multiply_tiles<bfloat16, 8>},
    {"arrive", arrive},
};

// Runs one with both buffers allowed.
void run(const std::string& name, pybind11::buffer in, pybind11::buffer out, int64_t blocks,
         int threads, int shared_bytes) {
  const pybind11::buffer_info from = in.request(), to = out.request(true);
  struct Forget {
    ~Forget() { forget_memory(); }
  } forget;
  allow_memory(from.ptr, from.size * from.itemsize);
  allow_memory(to.ptr, to.size * to.itemsize);
  arrivals = 0;
  launch(KERNELS.at(name), blocks, threads, shared_bytes, Stream{},
         static_cast<const char*>(from.ptr), static_cast<char*>(to.ptr));
}

}  // namespace
}  // namespace vmae_fast

PYBIND11_MODULE(samples, module) {
  module.def("run", &vmae_fast::run);
  module.def("names", [] {
    pybind11::list names;
    for (const auto& entry : vmae_fast::KERNELS) {
      names.append(entry.first);
    }
    return names;
  });
  module.def("resident_blocks",
             [] { return vmae_fast::resident_blocks(vmae_fast::misaligned_rows, 32, 0); });
  module.def("most_shared_bytes", &vmae_fast::most_shared_bytes);
  vmae_fast::add_emulator(module);
}
