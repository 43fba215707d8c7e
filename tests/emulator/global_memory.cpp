#include <algorithm>
#include <cstring>

#include "emulated_runtime.h"
#include "memory.h"

namespace vmae_fast::emulator {
namespace {

struct Span {
  uintptr_t begin;
  uintptr_t end;
};

// Apart from each other.
thread_local std::vector<Span> allowed;

}  // namespace

GlobalMemory global;

void GlobalMemory::start_launch() {
  ranges_.clear();
  for (const Span& span : allowed) {
    ranges_.push_back({span.begin, span.end, {}});
  }
}

size_t GlobalMemory::range_of(const void* global, int bytes, const Operation& what) const {
  const auto address = reinterpret_cast<uintptr_t>(global);
  for (size_t i = 0; i < ranges_.size(); ++i) {
    const Range& range = ranges_[i];
    if (range.begin <= address && address < range.end && range.end - address >= size_t(bytes)) {
      if (address % bytes != 0) {
        fail(what, "byte " + std::to_string(address - range.begin) +
                       " of a tensor is misaligned for " + std::to_string(bytes) + " bytes");
      }
      return i;
    }
  }
  // The nearest says most.
  std::string nearest = "no memory is allowed";
  uintptr_t distance = UINTPTR_MAX;
  for (const Range& range : ranges_) {
    const uintptr_t away = address < range.begin ? range.begin - address : address - range.begin;
    if (away < distance) {
      distance = away;
      nearest = "byte " + std::string(address < range.begin ? "-" : "") + std::to_string(away) +
                " of a tensor of " + std::to_string(range.end - range.begin) + " bytes";
    }
  }
  fail(what, "global memory out of bounds: " + std::to_string(bytes) + " bytes at " + nearest);
}

void GlobalMemory::check_load(const void* from, int bytes, const Operation& what) const {
  const Range& range = ranges_[range_of(from, bytes, what)];
  if (range.writers.empty()) {
    return;
  }
  const uintptr_t offset = reinterpret_cast<uintptr_t>(from) - range.begin;
  for (uintptr_t i = offset; i < offset + bytes; ++i) {
    if (range.writers[i] != 0) {
      fail(what, "reads global memory that block " + std::to_string(range.writers[i] - 1) +
                     " wrote in this launch");
    }
  }
}

void GlobalMemory::store(void* into, const void* from, int bytes, const Operation& what) {
  Range& range = ranges_[range_of(into, bytes, what)];
  if (range.writers.empty()) {
    range.writers.resize(range.end - range.begin);
  }
  const uintptr_t offset = reinterpret_cast<uintptr_t>(into) - range.begin;
  for (uintptr_t i = offset; i < offset + bytes; ++i) {
    int64_t& writer = range.writers[i];
    if (writer != 0 && writer != turn.block + 1) {
      fail(what, "writes global memory that block " + std::to_string(writer - 1) +
                     " wrote in this launch");
    }
    writer = turn.block + 1;
  }
  std::memcpy(into, from, bytes);
}

}  // namespace vmae_fast::emulator

namespace vmae_fast {

void allow_memory(const void* begin, size_t bytes) {
  if (bytes == 0) {
    return;
  }
  const auto first = reinterpret_cast<uintptr_t>(begin);
  emulator::Span added{first, first + bytes};
  // One with what it overlaps; what only touches it is memory of its own.
  const auto overlaps = [&](const emulator::Span& span) {
    const bool so = span.begin < added.end && added.begin < span.end;
    if (so) {
      added = {std::min(added.begin, span.begin), std::max(added.end, span.end)};
    }
    return so;
  };
  for (auto found = emulator::allowed.begin(); found != emulator::allowed.end();) {
    if (overlaps(*found)) {
      emulator::allowed.erase(found);
      found = emulator::allowed.begin();
    } else {
      ++found;
    }
  }
  emulator::allowed.push_back(added);
}

void forget_memory() { emulator::allowed.clear(); }

}  // namespace vmae_fast
