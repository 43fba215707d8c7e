// What tests say to the emulator and ask of it.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "machine.h"

namespace vmae_fast {

inline void add_emulator(pybind11::module_& module) {
  using emulator::counts;
  using emulator::settings;
  auto made = module.def_submodule("emulator");
  made.def("set_seed", [](int seed) { settings.seed = static_cast<unsigned>(seed); });
  made.def("set_most_shared_bytes", [](int bytes) { settings.most_shared_bytes = bytes; });
  made.def("set_resident_blocks", [](int blocks) { settings.resident_blocks = blocks; });
  made.def("reset", [] {
    counts = emulator::Counts();
    emulator::conflicts.clear();
  });
  made.def("conflicts", [] { return emulator::conflicts; });
  made.def("counts", [] {
    pybind11::dict found;
    found["launches"] = counts.launches;
    found["blocks"] = counts.blocks;
    found["mma"] = counts.mma;
    found["ldmatrix"] = counts.ldmatrix;
    found["ldmatrix_conflicts"] = counts.ldmatrix_conflicts;
    found["shared_conflicts"] = counts.shared_conflicts;
    return found;
  });
}

}  // namespace vmae_fast
