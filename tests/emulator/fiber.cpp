#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstring>
#include <new>

namespace vmae_fast::emulator {
namespace {

// Kernels keep a few KiB; throwing an exception takes the most.
constexpr size_t STACK_BYTES = 128 * 1024;
constexpr uint64_t MARK = 0x5afe57acc0debeefull;

// The fiber that starts.
Fiber* starting = nullptr;

}  // namespace

#ifdef __x86_64__

// Keeps the registers that a function must preserve, and the stack pointer in *from; goes on at to.
extern "C" void vmae_fast_switch_stack(void** from, void* to);
asm(R"(
  .text
  .hidden vmae_fast_switch_stack
  .globl vmae_fast_switch_stack
  .type vmae_fast_switch_stack, @function
vmae_fast_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size vmae_fast_switch_stack, . - vmae_fast_switch_stack
)");

#endif

Fiber::Fiber() {
  // Not touched, so not taken, before it is used.
  void* stack = mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stack == MAP_FAILED) {
    throw std::bad_alloc();
  }
  stack_ = static_cast<char*>(stack);
  std::memcpy(stack_, &MARK, sizeof(MARK));
}

Fiber::~Fiber() { munmap(stack_, STACK_BYTES); }

bool Fiber::overflowed() const { return std::memcmp(stack_, &MARK, sizeof(MARK)) != 0; }

void Fiber::enter() {
  Fiber* fiber = starting;
  fiber->body_(fiber->argument_);
  for (;;) {
    fiber->give_way();
  }
}

void Fiber::start(void (*body)(void*), void* argument) {
  body_ = body;
  argument_ = argument;
#ifdef __x86_64__
  // As if enter() had been called (16-byte aligned but for the return address, which is null) and
  // had given way before its first instruction: six registers and the address to go on at.
  auto* top = reinterpret_cast<uint64_t*>(stack_ + STACK_BYTES) - 1;
  *top = 0;
  *--top = reinterpret_cast<uint64_t>(&Fiber::enter);
  for (int i = 0; i < 6; ++i) {
    *--top = 0;
  }
  mine_ = top;
#else
  getcontext(&mine_);
  mine_.uc_stack.ss_sp = stack_;
  mine_.uc_stack.ss_size = STACK_BYTES;
  mine_.uc_link = nullptr;
  makecontext(&mine_, &Fiber::enter, 0);
#endif
}

void Fiber::resume() {
  starting = this;
#ifdef __x86_64__
  vmae_fast_switch_stack(&caller_, mine_);
#else
  swapcontext(&caller_, &mine_);
#endif
}

void Fiber::give_way() {
#ifdef __x86_64__
  vmae_fast_switch_stack(&mine_, caller_);
#else
  swapcontext(&mine_, &caller_);
#endif
}

}  // namespace vmae_fast::emulator
