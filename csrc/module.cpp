// The Python module vmae_fast._C. Checks what comes from Python, then launches.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "masked_mse.h"
#include "short_attention.h"
#include "view.h"

#ifdef VMAE_FAST_EMULATED
#include "emulated_module.h"
#endif

namespace py = pybind11;

namespace {

using vmae_fast::ALIGNMENT;
using vmae_fast::Allowed;
using vmae_fast::check_device;
using vmae_fast::check_dimensions;
using vmae_fast::fail;
using vmae_fast::Named;
using vmae_fast::Stream;
using vmae_fast::text;
using vmae_fast::value_bytes;
using vmae_fast::View;

// What the kernels count in.
constexpr int64_t MOST = std::numeric_limits<int>::max();

Stream as_stream(uintptr_t stream) { return reinterpret_cast<Stream>(stream); }

// ---- attention within short sequences -------------------------------------------------------

constexpr const char* HEADS = "(clips, tokens, heads, head width)";

// (clips, tokens, heads, head width) with its heads dense and rows that start at 16 bytes.
void check_heads(const Named& given, const View& like) {
  const View& view = given.view;
  check_aligned(given);
  check_dimensions(given, 4, HEADS);
  check_shape(given, like.shape);
  check_dtype(given, like.dtype);
  if (view.shape[3] > 1 && view.strides[3] != 1) {
    fail(given.name, "contiguous in its last dimension", strides_of(given));
  }
  if (view.shape[2] > 1 && view.strides[2] != view.shape[3]) {
    fail(given.name, "dense in its heads, " + std::to_string(view.shape[3]) + " apart",
         strides_of(given));
  }
  const int64_t values = ALIGNMENT / value_bytes(view.dtype);
  for (const size_t i : {0, 1}) {
    if (view.distance(i) % values != 0) {
      fail(given.name, "at distances that are multiples of " + std::to_string(values) + " values",
           strides_of(given));
    }
  }
}

void check_distances(const Named& given, const Named& like) {
  for (const size_t i : {0, 1}) {
    if (given.view.distance(i) != like.view.distance(i)) {
      fail(given.name,
           std::string("at the strides of ") + like.name + ", " + text(like.view.strides),
           text(given.view.strides));
    }
  }
}

// What is written must not lie over itself.
void check_apart(const Named& given) {
  const View& view = given.view;
  const int64_t row = view.shape[2] * view.shape[3];
  const int64_t clip = view.distance(0), token = view.distance(1);
  const bool tokens = view.shape[1] <= 1 || token >= row;
  // Clips beside each other, or each in between the tokens of the others.
  const bool clips = view.shape[0] <= 1 || clip >= (view.shape[1] - 1) * token + row ||
                     (clip >= row && token >= (view.shape[0] - 1) * clip + row);
  if (!tokens || !clips) {
    fail(given.name, "without tokens over each other", strides_of(given));
  }
}

vmae_fast::Sequences checked_sequences(int count, int length, int64_t step, int64_t stride,
                                       int64_t tokens) {
  if (tokens > MOST) {
    fail("q", "of at most " + std::to_string(MOST) + " tokens", std::to_string(tokens));
  }
  const auto outside = [&](const char* name, int lowest, int64_t got) {
    fail(name, std::to_string(lowest) + " to " + std::to_string(tokens) + ", the tokens of a clip",
         std::to_string(got));
  };
  if (length < 1 || length > vmae_fast::LONGEST_SEQUENCE) {
    fail("length", "1 to " + std::to_string(vmae_fast::LONGEST_SEQUENCE), std::to_string(length));
  }
  if (count < 1 || count > tokens) {
    outside("count", 1, count);
  }
  if (step < 0 || step > tokens) {
    outside("step", 0, step);
  }
  if (stride < 0 || stride > tokens) {
    outside("stride", 0, stride);
  }
  const int64_t across = (count - 1) * step, along = (length - 1) * stride;
  const auto wrong = [&](const std::string& expected) {
    fail("count, length, step and stride", expected,
         std::to_string(count) + ", " + std::to_string(length) + ", " + std::to_string(step) +
             " and " + std::to_string(stride));
  };
  if (across + along >= tokens) {
    wrong("sequences within the " + std::to_string(tokens) + " tokens of a clip");
  }
  const bool tokens_apart = length == 1 || stride > 0;
  const bool sequences_apart = count == 1 || step > along || (stride > across && step > 0);
  if (!tokens_apart || !sequences_apart) {
    wrong("sequences that share no token");
  }
  return {count, length, step, stride};
}

vmae_fast::Attention checked_attention(const Named& q, const Named& k, const Named& v,
                                       const Named& out, const Named& lse, int count, int length,
                                       int64_t step, int64_t stride, double scale) {
  if (q.view.dtype != "float16" && q.view.dtype != "bfloat16") {
    fail(q.name, "float16 or bfloat16", q.view.dtype);
  }
  check_device({q, k, v, out, lse});
  check_aligned(lse);
  for (const Named& given : {q, k, v, out}) {
    check_heads(given, q.view);
  }
  check_distances(k, q);
  check_distances(v, q);
  const std::vector<int64_t>& shape = q.view.shape;
  if (shape[2] == 0 || shape[3] == 0) {
    fail(q.name, "of at least one head and value", "shape " + text(shape));
  }
  const vmae_fast::Sequences sequences = checked_sequences(count, length, step, stride, shape[1]);
  if (shape[3] > MOST || shape[2] > MOST / count || shape[0] > MOST / count / shape[2]) {
    fail(q.name, "of at most " + std::to_string(MOST) + " heads of sequences",
         "shape " + text(shape) + " with " + std::to_string(count) + " sequences a clip");
  }
  check_dtype(lse, "float32");
  check_shape(lse, {shape[0] * count, shape[2], length});
  check_contiguous(lse);
  const auto factor = static_cast<float>(scale);
  if (!(factor > 0 && std::isfinite(factor))) {
    fail("scale", "positive and finite in float32", std::to_string(scale));
  }
  return {
      q.view.dtype == "float16" ? vmae_fast::DType::float16 : vmae_fast::DType::bfloat16,
      static_cast<int>(shape[0]),
      static_cast<int>(shape[2]),
      static_cast<int>(shape[3]),
      sequences,
      factor,
      q.view.data,
      k.view.data,
      v.view.data,
      {q.view.distance(0), q.view.distance(1)},
      out.view.data,
      {out.view.distance(0), out.view.distance(1)},
      reinterpret_cast<float*>(lse.view.data),
  };
}

void check_fits(const vmae_fast::Attention& attention, bool backward) {
  const int length = attention.sequences.length, width = attention.head_width;
  if (!vmae_fast::short_attention_fits(length, width, backward)) {
    fail("length and head width",
         "such as the " + std::string(backward ? "backward" : "forward") +
             " kernels are written for on this device",
         std::to_string(length) + " and " + std::to_string(width));
  }
}

void short_attention(const View& q, const View& k, const View& v, const View& out, const View& lse,
                     int count, int length, int64_t step, int64_t stride, double scale,
                     uintptr_t stream) {
  const vmae_fast::Attention attention = checked_attention(
      {"q", q}, {"k", k}, {"v", v}, {"out", out}, {"lse", lse}, count, length, step, stride, scale);
  check_apart({"out", out});
  const vmae_fast::DeviceGuard guard(q.device);
  check_fits(attention, false);
  const Allowed allowed({{"q", q}, {"k", k}, {"v", v}, {"out", out}, {"lse", lse}});
  vmae_fast::short_attention(attention, as_stream(stream));
}

void short_attention_backward(const View& grad_out, const View& q, const View& k, const View& v,
                              const View& lse, const View& grad_q, const View& grad_k,
                              const View& grad_v, int count, int length, int64_t step,
                              int64_t stride, double scale, uintptr_t stream) {
  // The output itself is not needed.
  vmae_fast::Attention attention =
      checked_attention({"q", q}, {"k", k}, {"v", v}, {"grad_out", grad_out}, {"lse", lse}, count,
                        length, step, stride, scale);
  attention.out = nullptr;
  const Named grads[] = {{"grad_q", grad_q}, {"grad_k", grad_k}, {"grad_v", grad_v}};
  check_device({{"q", q}, grads[0], grads[1], grads[2]});
  for (const Named& grad : grads) {
    check_heads(grad, q);
    check_distances(grad, grads[0]);
    check_apart(grad);
  }
  const vmae_fast::Gradients gradients = {grad_out.data,
                                          grad_q.data,
                                          grad_k.data,
                                          grad_v.data,
                                          {grad_q.distance(0), grad_q.distance(1)}};
  const vmae_fast::DeviceGuard guard(q.device);
  check_fits(attention, true);
  const Allowed allowed({{"q", q},
                         {"k", k},
                         {"v", v},
                         {"lse", lse},
                         {"grad_out", grad_out},
                         grads[0],
                         grads[1],
                         grads[2]});
  vmae_fast::short_attention_backward(attention, gradients, as_stream(stream));
}

bool short_attention_fits(int length, int head_width, bool backward, int device) {
  const vmae_fast::DeviceGuard guard(device);
  return vmae_fast::short_attention_fits(length, head_width, backward);
}

// ---- masked reconstruction loss -------------------------------------------------------------

vmae_fast::Stored stored_as(const Named& given) {
  const std::string& dtype = given.view.dtype;
  if (dtype == "float16") {
    return vmae_fast::Stored::float16;
  }
  if (dtype == "bfloat16") {
    return vmae_fast::Stored::bfloat16;
  }
  if (dtype != "float32") {
    fail(given.name, "float16, bfloat16 or float32", dtype);
  }
  return vmae_fast::Stored::float32;
}

// The video and which of its tubelets.
vmae_fast::MaskedMSE checked_targets(const Named& video, const Named& idx,
                                     const std::array<int, 3>& tubelet) {
  check_dimensions(video, 5, "(clips, channels, frames, height, width)");
  check_dtype(video, "uint8");
  check_aligned(video);
  vmae_fast::MaskedMSE targets = {};
  targets.video = reinterpret_cast<const uint8_t*>(video.view.data);
  for (size_t i = 0; i < 5; ++i) {
    if (video.view.shape[i] > MOST) {
      fail(video.name, "of sizes up to " + std::to_string(MOST), "shape " + text(video.view.shape));
    }
    targets.shape[i] = video.view.shape[i];
    targets.stride[i] = video.view.distance(i);
  }
  for (size_t i = 0; i < 3; ++i) {
    if (tubelet[i] < 1 || video.view.shape[2 + i] % tubelet[i] != 0) {
      fail("tubelet", "sizes that divide the video's " + text(video.view.shape),
           text({tubelet[0], tubelet[1], tubelet[2]}));
    }
    targets.tubelet[i] = tubelet[i];
  }
  check_dimensions(idx, 2, "(clips, tokens)");
  if (idx.view.dtype != "int32" && idx.view.dtype != "int64") {
    fail(idx.name, "int32 or int64", idx.view.dtype);
  }
  check_aligned(idx, value_bytes(idx.view.dtype));
  if (idx.view.shape[0] != video.view.shape[0] || idx.view.shape[1] > MOST) {
    fail(idx.name,
         "of " + std::to_string(video.view.shape[0]) + " clips as the video is, and at most " +
             std::to_string(MOST) + " tokens",
         "shape " + text(idx.view.shape));
  }
  targets.idx = idx.view.data;
  targets.idx_int64 = idx.view.dtype == "int64";
  targets.idx_stride[0] = idx.view.distance(0);
  targets.idx_stride[1] = idx.view.distance(1);
  return targets;
}

void masked_mse(const View* pred, const View& video, const View& idx, const View* weight,
                const View& loss, const View* difference, int64_t first_row, int64_t rows_per_clip,
                const std::array<int, 3>& tubelet, bool norm_pix, bool channel_major, double eps,
                uintptr_t stream) {
  vmae_fast::MaskedMSE given = checked_targets({"video", video}, {"idx", idx}, tubelet);
  if (rows_per_clip != idx.shape[1]) {
    fail("rows_per_clip", std::to_string(idx.shape[1]) + ", the tokens of idx",
         std::to_string(rows_per_clip));
  }
  check_dimensions({"loss", loss}, 1, "(tokens,)");
  const int64_t rows = loss.shape[0], all = idx.shape[0] * rows_per_clip;
  if (first_row < 0 || rows > all || first_row > all - rows) {
    fail("first_row",
         "0 to " + std::to_string(all) + ", the tokens of all clips, less " + std::to_string(rows) +
             " of loss",
         std::to_string(first_row));
  }
  const int64_t values = video.shape[1] * tubelet[0] * tubelet[1] * tubelet[2];
  for (const Named& row : {Named{"loss", loss}, Named{"weight", weight ? *weight : loss}}) {
    check_shape(row, {rows});
    check_dtype(row, "float32");
    check_contiguous(row);
    check_aligned(row, sizeof(float));
    check_device({{"video", video}, {"idx", idx}, row});
  }
  const View* const stored = pred ? pred : difference;
  if (stored) {
    given.stored = stored_as({pred ? "pred" : "difference", *stored});
    for (const Named& row : {Named{"pred", pred ? *pred : *stored},
                             Named{"difference", difference ? *difference : *stored}}) {
      check_shape(row, {rows, values});
      check_dtype(row, stored->dtype);
      check_contiguous(row);
      check_aligned(row);
      check_device({{"video", video}, row});
    }
  }
  const auto small = static_cast<float>(eps);
  if (!(small >= 0 && std::isfinite(small))) {
    fail("eps", "at least 0 and finite in float32", std::to_string(eps));
  }
  given.pred = pred ? pred->data : nullptr;
  given.channel_major = channel_major;
  given.norm_pix = norm_pix;
  given.eps = small;
  given.rows_per_clip = rows_per_clip;
  given.first_row = first_row;
  given.rows = rows;
  given.weight = weight ? reinterpret_cast<const float*>(weight->data) : nullptr;
  given.loss = reinterpret_cast<float*>(loss.data);
  given.difference = difference ? difference->data : nullptr;
  const vmae_fast::DeviceGuard guard(video.device);
  // Where there is none, the loss once more.
  const View& any = loss;
  const Allowed allowed({{"video", video},
                         {"idx", idx},
                         {"loss", loss},
                         {"weight", weight ? *weight : any},
                         {"pred", pred ? *pred : any},
                         {"difference", difference ? *difference : any}});
  vmae_fast::masked_mse(given, as_stream(stream));
}

// ---- the build and the driver ---------------------------------------------------------------

#ifdef VMAE_FAST_EMULATED
constexpr bool EMULATED = true;
constexpr int CUDA_VERSION_BUILT_WITH = 0;
constexpr const char* ARCHITECTURES = "";

int driver_version() { return 0; }
#else
constexpr bool EMULATED = false;
constexpr int CUDA_VERSION_BUILT_WITH = CUDART_VERSION;
constexpr const char* ARCHITECTURES = VMAE_FAST_ARCHITECTURES;

int driver_version() {
  int version = 0;
  vmae_fast::check_cuda(cudaDriverGetVersion(&version), "asking for the driver's version");
  return version;
}
#endif

py::dict about() {
  py::dict said;
  said["architectures"] = ARCHITECTURES;
  said["cuda"] = CUDA_VERSION_BUILT_WITH;
  said["emulated"] = EMULATED;
  return said;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
#ifdef VMAE_FAST_EMULATED
  // One launch at a time.
  using Unlocked = py::call_guard<>;
#else
  using Unlocked = py::call_guard<py::gil_scoped_release>;
#endif
  using py::arg;
  module.doc() = "CUDA C++ kernels on tensors' memory; vmae_fast.ops calls them.";
  // Local: the emulated module may be loaded beside the one for GPUs.
  py::class_<View>(module, "View", py::module_local(), "A tensor's memory, kept alive elsewhere.")
      .def(py::init(&vmae_fast::make_view), arg("data_ptr"), arg("dtype"), arg("shape"),
           arg("strides"), arg("device"));
  module.def("short_attention", &short_attention, Unlocked(), arg("q"), arg("k"), arg("v"),
             arg("out"), arg("lse"), arg("count"), arg("length"), arg("step"), arg("stride"),
             arg("scale"), arg("stream"),
             "Write out and the log-sum-exp of attention within sequences of tokens.");
  module.def("short_attention_backward", &short_attention_backward, Unlocked(), arg("grad_out"),
             arg("q"), arg("k"), arg("v"), arg("lse"), arg("grad_q"), arg("grad_k"), arg("grad_v"),
             arg("count"), arg("length"), arg("step"), arg("stride"), arg("scale"), arg("stream"),
             "Write the gradients of q, k and v.");
  module.def("short_attention_fits", &short_attention_fits, arg("length"), arg("head_width"),
             arg("backward"), arg("device"),
             "Whether the kernels of a pass hold sequences of such a length on the device.");
  module.def("masked_mse", &masked_mse, Unlocked(), arg("pred").none(true), arg("video"),
             arg("idx"), arg("weight").none(true), arg("loss"), arg("difference").none(true),
             arg("first_row"), arg("rows_per_clip"), arg("tubelet"), arg("norm_pix"),
             arg("channel_major"), arg("eps"), arg("stream"),
             "Write the squared error of each token, and the differences.");
  module.def("about", &about, "What the module was built for: architectures, cuda, emulated.");
  module.def("driver_version", &driver_version,
             "The CUDA version that the driver knows, 13000 for 13.0; 0 without a driver.");
#ifdef VMAE_FAST_EMULATED
  vmae_fast::add_emulator(module);
#endif
}
