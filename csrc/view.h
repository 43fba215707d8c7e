// Tensors as Python hands them over, and checks of them that name the argument.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

#include "runtime.h"

namespace vmae_fast {

// Bytes of the widest loads: what addresses and distances are multiples of.
constexpr int64_t ALIGNMENT = 16;

[[noreturn]] inline void fail(const std::string& name, const std::string& expected,
                              const std::string& got) {
  throw pybind11::value_error(name + " must be " + expected + ", got " + got);
}

inline std::string text(const std::vector<int64_t>& values) {
  std::string all;
  for (const int64_t value : values) {
    all += (all.empty() ? "" : ", ") + std::to_string(value);
  }
  return "(" + all + ")";
}

// Bytes of a value; 0 for a dtype that is not known.
inline int64_t value_bytes(const std::string& dtype) {
  if (dtype == "uint8") {
    return 1;
  }
  if (dtype == "float16" || dtype == "bfloat16") {
    return 2;
  }
  if (dtype == "float32" || dtype == "int32") {
    return 4;
  }
  if (dtype == "int64") {
    return 8;
  }
  return 0;
}

// A tensor's memory, owned by Python. Does not change once made, so it can be read without the GIL.
struct View {
  char* data;
  std::string dtype;
  std::vector<int64_t> shape;
  std::vector<int64_t> strides;
  int device;

  bool empty() const {
    for (const int64_t size : shape) {
      if (size == 0) {
        return true;
      }
    }
    return false;
  }
  // From one to the next along a dimension, in values; 0 where there is no next.
  int64_t distance(size_t dimension) const { return shape[dimension] > 1 ? strides[dimension] : 0; }
};

inline View make_view(uintptr_t data, std::string dtype, std::vector<int64_t> shape,
                      std::vector<int64_t> strides, int device) {
  if (value_bytes(dtype) == 0) {
    fail("dtype", "uint8, float16, bfloat16, float32, int32 or int64", dtype);
  }
  if (shape.size() != strides.size()) {
    fail("strides", "as many as sizes in " + text(shape), text(strides));
  }
  for (size_t i = 0; i < shape.size(); ++i) {
    if (shape[i] < 0) {
      fail("shape", "without negative sizes", text(shape));
    }
    if (strides[i] < 0) {
      fail("strides", "without negative ones", text(strides));
    }
  }
#ifdef VMAE_FAST_EMULATED
  if (device != -1) {
    fail("device", "-1, the CPU, which is all that the emulator takes", std::to_string(device));
  }
#else
  if (device < 0) {
    fail("device", "the index of a CUDA device", std::to_string(device));
  }
#endif
  View view{reinterpret_cast<char*>(data), std::move(dtype), std::move(shape), std::move(strides),
            device};
  if (data == 0 && !view.empty()) {
    fail("data_ptr", "an address", "null");
  }
  return view;
}

// An argument by its name.
struct Named {
  const char* name;
  const View& view;
};

inline std::string strides_of(const Named& given) { return "strides " + text(given.view.strides); }

inline void check_dimensions(const Named& given, size_t dimensions, const char* meaning) {
  if (given.view.shape.size() != dimensions) {
    fail(given.name, meaning, "shape " + text(given.view.shape));
  }
}

inline void check_shape(const Named& given, const std::vector<int64_t>& shape) {
  if (given.view.shape != shape) {
    fail(given.name, "of shape " + text(shape), text(given.view.shape));
  }
}

inline void check_dtype(const Named& given, const std::string& dtype) {
  if (given.view.dtype != dtype) {
    fail(given.name, dtype, given.view.dtype);
  }
}

inline void check_device(std::initializer_list<Named> all) {
  const Named& first = *all.begin();
  for (const Named& given : all) {
    if (given.view.device != first.view.device) {
      fail(given.name,
           "on the device of " + std::string(first.name) + ", " + std::to_string(first.view.device),
           "device " + std::to_string(given.view.device));
    }
  }
}

inline void check_aligned(const Named& given, int64_t bytes = ALIGNMENT) {
  const auto past = reinterpret_cast<uintptr_t>(given.view.data) % static_cast<uintptr_t>(bytes);
  if (past != 0) {
    fail(given.name, std::to_string(bytes) + "-byte aligned",
         "an address " + std::to_string(past) + " bytes past that");
  }
}

inline void check_contiguous(const Named& given) {
  int64_t dense = 1;
  for (size_t i = given.view.shape.size(); i-- > 0; dense *= given.view.shape[i]) {
    if (given.view.shape[i] > 1 && given.view.strides[i] != dense) {
      fail(given.name, "contiguous", strides_of(given));
    }
  }
}

// Makes memory known to the emulator while this lives; nothing to a GPU.
class Allowed {
 public:
  // Delegates, so that memory is forgotten even where the rest of this throws.
  explicit Allowed([[maybe_unused]] std::initializer_list<Named> all) : Allowed() {
#ifdef VMAE_FAST_EMULATED
    for (const auto& [name, view] : all) {
      if (view.empty()) {
        continue;
      }
      int64_t last = 0;
      for (size_t i = 0; i < view.shape.size(); ++i) {
        last += (view.shape[i] - 1) * view.distance(i);
      }
      allow_memory(view.data, static_cast<size_t>((last + 1) * value_bytes(view.dtype)));
    }
#endif
  }
  ~Allowed() {
#ifdef VMAE_FAST_EMULATED
    forget_memory();
#endif
  }
  Allowed(const Allowed&) = delete;
  Allowed& operator=(const Allowed&) = delete;

 private:
  Allowed() = default;
};

}  // namespace vmae_fast
