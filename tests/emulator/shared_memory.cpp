#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <new>
#include <tuple>
#include <utility>

#include "memory.h"

namespace vmae_fast::emulator {
namespace {

constexpr int EVERY_LANE = -1;
constexpr size_t MOST_BYTES = 1 << 20;
constexpr int BANKS = 32;
constexpr int BANK_BYTES = 4;

std::string bytes_from(int offset, int bytes) {
  return "shared bytes " + std::to_string(offset) + " to " + std::to_string(offset + bytes - 1);
}

}  // namespace

SharedMemory shared;

void SharedMemory::start_launch(int bytes) {
  if (address_ == nullptr) {
    void* address =
        mmap(nullptr, MOST_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (address == MAP_FAILED) {
      throw std::bad_alloc();
    }
    address_ = static_cast<char*>(address);
  }
  bytes_ = bytes;
  content_.resize(bytes);
  shadow_.assign(bytes, Byte());
  accesses_.clear();
  first_ = 1;
  step_began_ = 0;
}

void SharedMemory::start_block() {
  end_phase();
  std::fill(content_.begin(), content_.end(), static_cast<char>(0xff));
}

void SharedMemory::end_phase() {
  first_ += static_cast<int64_t>(accesses_.size());
  accesses_.clear();
  step_began_ = 0;
}

int SharedMemory::offset_of(const void* shared, int bytes, const Operation& what) const {
  const auto offset = static_cast<int64_t>(reinterpret_cast<intptr_t>(shared)) -
                      static_cast<int64_t>(reinterpret_cast<intptr_t>(address_));
  if (offset < 0 || offset + bytes > bytes_) {
    fail(what, "shared byte " + std::to_string(offset) + " and on, " + std::to_string(bytes) +
                   " bytes, is out of bounds: the block has " + std::to_string(bytes_));
  }
  if (offset % bytes != 0) {
    fail(what, "shared byte " + std::to_string(offset) + " is misaligned for " +
                   std::to_string(bytes) + " bytes");
  }
  return static_cast<int>(offset);
}

const SharedMemory::Access* SharedMemory::known(int64_t number) const {
  return number < first_ ? nullptr : &accesses_[number - first_];
}

void SharedMemory::check_writer(const Byte& byte, const Access& access, const char* does) const {
  if (byte.copied_by != 0) {
    const int thread = byte.copied_by - 1;
    fail(access.what, bytes_from(access.offset, access.bytes) + ": " + does + " what lane " +
                          std::to_string(thread % WARP) + " of warp " +
                          std::to_string(thread / WARP) +
                          " copies there, for which no cp_async_wait has waited");
  }
  const Access* writer = known(byte.written);
  if (writer == nullptr) {
    return;
  }
  if (writer->warp != access.warp) {
    fail(access.what, bytes_from(access.offset, access.bytes) + ": " + does + " what warp " +
                          std::to_string(writer->warp) + " wrote by " + describe(writer->what) +
                          ", without __syncthreads in between");
  }
  if (writer->lane != access.lane && writer->fence == access.fence) {
    fail(access.what, bytes_from(access.offset, access.bytes) + ": " + does + " what lane " +
                          std::to_string(writer->lane) + " of this warp wrote by " +
                          describe(writer->what) + ", without __syncwarp in between");
  }
}

void SharedMemory::check_readers(const Byte& byte, const Access& access) const {
  const Access* reader = known(byte.read);
  if (reader == nullptr) {
    return;
  }
  if (byte.read_by_warps || reader->warp != access.warp) {
    const bool other = reader->warp != access.warp;
    fail(access.what, bytes_from(access.offset, access.bytes) + ": overwrites what " +
                          (other ? "warp " + std::to_string(reader->warp) : "another warp") +
                          " read by " + describe(reader->what) +
                          ", without __syncthreads in between");
  }
  if (reader->step == access.step && (byte.read_by_lanes || reader->lane != access.lane)) {
    fail(access.what, bytes_from(access.offset, access.bytes) +
                          ": overwrites what another lane of this warp read by " +
                          describe(reader->what) + ", without __syncwarp in between");
  }
}

void SharedMemory::note(const Access& access, bool writes) {
  const int64_t number = first_ + static_cast<int64_t>(accesses_.size());
  for (int i = access.offset; i < access.offset + access.bytes; ++i) {
    Byte& byte = shadow_[i];
    check_writer(byte, access, writes ? "overwrites" : "reads");
    if (writes) {
      check_readers(byte, access);
      byte.written = number;
      continue;
    }
    const Access* before = known(byte.read);
    byte.read_by_warps = before && (byte.read_by_warps || before->warp != access.warp);
    byte.read_by_lanes = before && before->warp == access.warp && before->step == access.step &&
                         (byte.read_by_lanes || before->lane != access.lane);
    byte.read = number;
  }
  accesses_.push_back(access);
}

void SharedMemory::load(void* into, const void* from, int bytes, const Operation& what,
                        bool by_warp) {
  const int offset = offset_of(from, bytes, what);
  note({what, turn.warp, by_warp ? EVERY_LANE : turn.lane, turn.step, turn.fence, offset, bytes,
        !by_warp},
       false);
  std::memcpy(into, &content_[offset], bytes);
}

void SharedMemory::store(void* into, const void* from, int bytes, const Operation& what) {
  const int offset = offset_of(into, bytes, what);
  note({what, turn.warp, turn.lane, turn.step, turn.fence, offset, bytes, true}, true);
  std::memcpy(&content_[offset], from, bytes);
}

void SharedMemory::begin_copy(const void* into, int bytes, const Operation& what) {
  const int offset = offset_of(into, bytes, what);
  note({what, turn.warp, turn.lane, turn.step, turn.fence, offset, bytes, true}, true);
  for (int i = offset; i < offset + bytes; ++i) {
    shadow_[i].copied_by = static_cast<int16_t>(turn.warp * WARP + turn.lane + 1);
  }
}

void SharedMemory::end_copy(const void* into, const void* from, int bytes, const Operation& what) {
  const int offset = offset_of(into, bytes, what);
  const int64_t number = first_ + static_cast<int64_t>(accesses_.size());
  accesses_.push_back({what, turn.warp, turn.lane, turn.step, turn.fence, offset, bytes, false});
  for (int i = offset; i < offset + bytes; ++i) {
    shadow_[i].copied_by = 0;
    shadow_[i].written = number;
  }
  if (from != nullptr) {
    std::memcpy(&content_[offset], from, bytes);
  } else {
    std::memset(&content_[offset], 0, bytes);
  }
}

int extra_turns(const std::vector<int>& offsets, int bytes, const Operation& what) {
  // Lanes that want the same word get it in the same turn.
  std::vector<int> words;
  for (const int offset : offsets) {
    for (int i = 0; i < bytes; i += BANK_BYTES) {
      words.push_back((offset + i) / BANK_BYTES);
    }
  }
  std::sort(words.begin(), words.end());
  words.erase(std::unique(words.begin(), words.end()), words.end());
  int turns[BANKS] = {};
  for (const int word : words) {
    ++turns[word % BANKS];
  }
  const int extra = std::max(*std::max_element(turns, turns + BANKS) - 1, 0);
  if (extra > 0) {
    conflicts[describe(what)] += extra;
  }
  return extra;
}

void SharedMemory::end_step() {
  // The warp's accesses since its last operation. A lane's nth from a line goes with the other
  // lanes' nth from there, as many lanes together as make 128 bytes.
  using Instruction = std::tuple<int, int, int, int>;  // line, bytes, nth, group of lanes
  std::vector<std::pair<Instruction, size_t>> slots;
  std::map<std::pair<int, int>, int> seen;
  int lane = EVERY_LANE;
  for (size_t i = step_began_; i < accesses_.size(); ++i) {
    const Access& access = accesses_[i];
    if (!access.takes_banks) {
      continue;
    }
    if (access.lane != lane) {
      lane = access.lane;
      seen.clear();
    }
    const int line = access.what.line.number;
    const int nth = seen[{line, access.bytes}]++;
    const int together = std::min(WARP, BANKS * BANK_BYTES / access.bytes);
    slots.push_back({{line, access.bytes, nth, lane / together}, i});
  }
  step_began_ = accesses_.size();
  std::sort(slots.begin(), slots.end());
  std::vector<int> offsets;
  for (size_t i = 0; i < slots.size(); ++i) {
    const Access& access = accesses_[slots[i].second];
    offsets.push_back(access.offset);
    if (i + 1 == slots.size() || slots[i + 1].first != slots[i].first) {
      counts.shared_conflicts += extra_turns(offsets, access.bytes, access.what);
      offsets.clear();
    }
  }
}

}  // namespace vmae_fast::emulator
