// An emulator of CUDA's blocks on the CPU: what emulated_device.h and emulated_runtime.h rest on.
//
// Every thread is a fiber. A warp runs until all its lanes wait for the same operation; a block's
// warps take turns at __syncthreads, in an order drawn from a seed; blocks run one after another,
// in such an order too. What a GPU would leave undefined, and much that it would do slowly, is an
// exception that says who did what where.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <string>

// The last parameter of a device function: the line that calls it.
#define VMAE_FAST_LINE ::vmae_fast::emulator::Line line = {__builtin_FILE(), __builtin_LINE()}

namespace vmae_fast::emulator {

constexpr int WARP = 32;

struct Line {
  const char* file = "";
  int number = 0;
};

// A device function, and the line of the kernel that calls it.
struct Operation {
  const char* name = "";
  Line line;
};

struct Settings {
  unsigned seed = 0;
  // What a block may have on compute capability 9.0.
  int most_shared_bytes = 232448;
  // Few, so that blocks which loop over their work do so.
  int resident_blocks = 2;
};

// Since they were last set to zero.
struct Counts {
  int64_t launches = 0;
  int64_t blocks = 0;
  int64_t mma = 0;
  int64_t ldmatrix = 0;
  // Turns of shared memory beyond the one that each 8 rows take.
  int64_t ldmatrix_conflicts = 0;
  // Of other accesses, beyond the one that each 128 bytes take, as far as lanes' accesses can be
  // told to be of the same instruction.
  int64_t shared_conflicts = 0;
};

extern Settings settings;
extern Counts counts;
// Both kinds of conflicts by what has them.
extern std::map<std::string, int64_t> conflicts;

// Whose turn it is: a warp's operation is its lanes' in turn.
struct Turn {
  int64_t block = 0;
  int warp = 0;
  int lane = 0;
  // Operations of the warp so far, and those among them that order memory.
  int64_t step = 0;
  int64_t fence = 0;
};

extern Turn turn;

std::string describe(const Operation& what);

// Throws std::runtime_error: block, warp and lane, what they did, and what is wrong with it.
[[noreturn]] void fail(const Operation& what, const std::string& wrong);

// ---- launches -------------------------------------------------------------------------------

// Runs kernel once for every thread.
void run(int64_t blocks, int threads, int shared_bytes, const std::function<void()>& kernel);

// ---- what threads do ------------------------------------------------------------------------

char* shared_memory();
void load_shared(void* into, const void* shared, int bytes, const Operation& what);
void store_shared(void* shared, const void* from, int bytes, const Operation& what);
void load_global(void* into, const void* global, int bytes, const Operation& what);
void store_global(void* global, const void* from, int bytes, const Operation& what);

void prefetch(const void* global, const Operation& what);

void copy(void* shared, const void* global, int bytes, bool there, const Operation& what);
void commit_copies();
void wait_for_copies(int groups);

void sync_threads(const Operation& what);

// Parts of warps are not emulated.
void demand_full_warp(unsigned mask, const Operation& what);

// Computes for all lanes from their arguments; null for lanes that have ended.
using WarpFunction = void (*)(void* const* lanes, const Operation& what);

enum class Lanes { all, alive };

// Waits for the warp's lanes to come to the same line with an argument each, and has run() do the
// work for all of them. Lanes that have ended are an error where all are needed.
void together(const Operation& what, WarpFunction run, void* argument, Lanes needed);

struct Product {
  uint32_t a[4];
  uint32_t b[2];
  float* d;
};

struct Rows {
  const void* row;
  uint32_t* r;
};

struct Shuffle {
  uint32_t value;
  int source;
};

struct Sum {
  uint32_t value;
};

// WarpFunctions on these.
template <bool BFLOAT16, int DEPTH>
void multiply(void* const* lanes, const Operation& what);
template <int MATRICES, bool TRANSPOSED>
void load_matrices(void* const* lanes, const Operation& what);
void shuffle(void* const* lanes, const Operation& what);
void add_up(void* const* lanes, const Operation& what);
void sync_warp(void* const* lanes, const Operation& what);

}  // namespace vmae_fast::emulator
