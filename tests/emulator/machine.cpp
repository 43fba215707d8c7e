#include "machine.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>

#include "cuda_names.h"
#include "fiber.h"
#include "memory.h"

emulated_index threadIdx, blockIdx, blockDim, gridDim;

namespace vmae_fast::emulator {
namespace {

struct Copy {
  void* into;
  const void* from;
  int bytes;
  Operation what;
};

enum class State { ready, waiting, ended };

struct Thread {
  Fiber fiber;
  State state = State::ended;
  // What it waits for; __syncthreads where there is no function.
  Operation what;
  WarpFunction function = nullptr;
  void* argument = nullptr;
  Lanes needed = Lanes::alive;
  // Copies: of the group that is open, and of those that were closed and not waited for.
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
};

struct Warp {
  int64_t step = 0;
  int64_t fence = 0;
};

// Launches take turns: threads of the host may run backward passes at once.
std::mutex one_launch;
std::vector<std::unique_ptr<Thread>> threads;
std::vector<Warp> warps;
const std::function<void()>* kernel = nullptr;
std::exception_ptr thrown;
std::mt19937 random_numbers;

Thread& this_thread() { return *threads[turn.warp * WARP + turn.lane]; }

void wait_here() {
  Thread& thread = this_thread();
  thread.state = State::waiting;
  thread.fiber.give_way();
}

// A thread's whole life.
void live(void*) {
  try {
    (*kernel)();
    const Thread& thread = this_thread();
    for (const auto& group : thread.groups) {
      if (!group.empty()) {
        fail(group[0].what, "the thread ended without cp_async_wait for this copy");
      }
    }
    if (!thread.open.empty()) {
      fail(thread.open[0].what, "the thread ended without cp_async_commit of this copy");
    }
  } catch (...) {
    thrown = std::current_exception();
  }
  this_thread().state = State::ended;
}

void take_turn(int warp, int lane) {
  turn.warp = warp;
  turn.lane = lane;
  turn.step = warps[warp].step;
  turn.fence = warps[warp].fence;
  threadIdx.x = static_cast<unsigned>(warp * WARP + lane);
}

bool same(const Operation& a, const Operation& b) {
  return a.line.number == b.line.number && std::strcmp(a.name, b.name) == 0 &&
         std::strcmp(a.line.file, b.line.file) == 0;
}

[[noreturn]] void fail_in_block(const std::string& wrong) {
  throw std::runtime_error("block " + std::to_string(turn.block) + ": " + wrong);
}

// Until all lanes have ended or wait at __syncthreads.
void run_warp(int warp) {
  for (;;) {
    const int first = static_cast<int>(random_numbers() % WARP);
    for (int i = 0; i < WARP; ++i) {
      const int lane = (first + i) % WARP;
      Thread& thread = *threads[warp * WARP + lane];
      if (thread.state != State::ready) {
        continue;
      }
      take_turn(warp, lane);
      thread.fiber.resume();
      if (thrown) {
        std::rethrow_exception(std::exchange(thrown, nullptr));
      }
      if (thread.fiber.overflowed()) {
        fail_in_block("the stack of a thread was too small");
      }
    }
    shared.end_step();
    void* arguments[WARP] = {};
    const Thread* waiting = nullptr;
    int ended = 0;
    for (int lane = 0; lane < WARP; ++lane) {
      const Thread& thread = *threads[warp * WARP + lane];
      if (thread.state == State::ended) {
        ++ended;
        continue;
      }
      waiting = waiting ? waiting : &thread;
      if (!same(waiting->what, thread.what)) {
        fail_in_block("lanes of warp " + std::to_string(warp) + " wait at " +
                      describe(waiting->what) + " and at " + describe(thread.what));
      }
      arguments[lane] = thread.argument;
    }
    if (!waiting || !waiting->function) {
      return;
    }
    if (ended && waiting->needed == Lanes::all) {
      fail_in_block(std::to_string(ended) + " lanes of warp " + std::to_string(warp) +
                    " have ended, the others wait at " + describe(waiting->what));
    }
    take_turn(warp, 0);
    waiting->function(arguments, waiting->what);
    ++warps[warp].step;
    for (int lane = 0; lane < WARP; ++lane) {
      Thread& thread = *threads[warp * WARP + lane];
      thread.state = thread.state == State::waiting ? State::ready : thread.state;
    }
  }
}

void run_block(int64_t block, int num_threads) {
  turn = Turn();
  turn.block = block;
  blockIdx.x = static_cast<unsigned>(block);
  warps.assign(num_threads / WARP, Warp());
  shared.start_block();
  for (int i = 0; i < num_threads; ++i) {
    Thread& thread = *threads[i];
    thread.open.clear();
    thread.groups.clear();
    thread.state = State::ready;
    thread.fiber.start(live, nullptr);
  }
  std::vector<int> order(warps.size());
  std::iota(order.begin(), order.end(), 0);
  for (;;) {
    std::shuffle(order.begin(), order.end(), random_numbers);
    for (const int warp : order) {
      run_warp(warp);
    }
    // Whoever has not ended is at __syncthreads.
    const Thread* waiting = nullptr;
    for (int i = 0; i < num_threads; ++i) {
      Thread& thread = *threads[i];
      if (thread.state == State::ended) {
        continue;
      }
      waiting = waiting ? waiting : &thread;
      if (!same(waiting->what, thread.what)) {
        fail_in_block("warps wait at " + describe(waiting->what) + " and at " +
                      describe(thread.what));
      }
      thread.state = State::ready;
    }
    shared.end_phase();
    if (!waiting) {
      return;
    }
  }
}

}  // namespace

Settings settings;
Counts counts;
std::map<std::string, int64_t> conflicts;
Turn turn;

std::string describe(const Operation& what) {
  const char* slash = std::strrchr(what.line.file, '/');
  return std::string(what.name) + " (" + (slash ? slash + 1 : what.line.file) + ":" +
         std::to_string(what.line.number) + ")";
}

void fail(const Operation& what, const std::string& wrong) {
  throw std::runtime_error("block " + std::to_string(turn.block) + ", warp " +
                           std::to_string(turn.warp) + ", lane " + std::to_string(turn.lane) +
                           ", " + describe(what) + ": " + wrong);
}

void run(int64_t blocks, int num_threads, int shared_bytes, const std::function<void()>& given) {
  if (blocks == 0) {
    return;
  }
  if (blocks < 0 || blocks > INT32_MAX) {
    throw std::runtime_error("a grid has 1 to 2147483647 blocks, got " + std::to_string(blocks));
  }
  if (num_threads <= 0 || num_threads > 1024 || num_threads % WARP != 0) {
    throw std::runtime_error("blocks have 1 to 32 whole warps, got " + std::to_string(num_threads) +
                             " threads");
  }
  if (shared_bytes < 0 || shared_bytes > settings.most_shared_bytes) {
    throw std::runtime_error("a block may have " + std::to_string(settings.most_shared_bytes) +
                             " bytes of shared memory, got " + std::to_string(shared_bytes));
  }
  const std::lock_guard<std::mutex> lock(one_launch);
  while (threads.size() < static_cast<size_t>(num_threads)) {
    threads.push_back(std::make_unique<Thread>());
  }
  kernel = &given;
  thrown = nullptr;
  random_numbers.seed(settings.seed);
  blockDim = {static_cast<unsigned>(num_threads), 1, 1};
  gridDim = {static_cast<unsigned>(blocks), 1, 1};
  shared.start_launch(shared_bytes);
  global.start_launch();
  ++counts.launches;
  std::vector<int64_t> order(blocks);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random_numbers);
  for (const int64_t block : order) {
    run_block(block, num_threads);
    ++counts.blocks;
  }
}

char* shared_memory() { return shared.address(); }

void load_shared(void* into, const void* from, int bytes, const Operation& what) {
  shared.load(into, from, bytes, what, false);
}

void store_shared(void* into, const void* from, int bytes, const Operation& what) {
  shared.store(into, from, bytes, what);
}

void load_global(void* into, const void* from, int bytes, const Operation& what) {
  global.check_load(from, bytes, what);
  std::memcpy(into, from, bytes);
}

void store_global(void* into, const void* from, int bytes, const Operation& what) {
  global.store(into, from, bytes, what);
}

void prefetch(const void* from, const Operation& what) { global.check_load(from, 1, what); }

void copy(void* into, const void* from, int bytes, bool there, const Operation& what) {
  if (there) {
    global.check_load(from, bytes, what);
  }
  shared.begin_copy(into, bytes, what);
  this_thread().open.push_back({into, there ? from : nullptr, bytes, what});
}

void commit_copies() {
  Thread& thread = this_thread();
  thread.groups.push_back(std::move(thread.open));
  thread.open.clear();
}

void wait_for_copies(int groups) {
  Thread& thread = this_thread();
  while (thread.groups.size() > static_cast<size_t>(groups)) {
    for (const Copy& copy : thread.groups.front()) {
      shared.end_copy(copy.into, copy.from, copy.bytes, copy.what);
    }
    thread.groups.pop_front();
  }
}

void sync_threads(const Operation& what) {
  Thread& thread = this_thread();
  thread.what = what;
  thread.function = nullptr;
  wait_here();
}

void demand_full_warp(unsigned mask, const Operation& what) {
  if (mask != 0xffffffffu) {
    fail(what, "the mask must name all lanes");
  }
}

void together(const Operation& what, WarpFunction function, void* argument, Lanes needed) {
  Thread& thread = this_thread();
  thread.what = what;
  thread.function = function;
  thread.argument = argument;
  thread.needed = needed;
  wait_here();
}

void sync_warp(void* const*, const Operation&) { ++warps[turn.warp].fence; }

}  // namespace vmae_fast::emulator
