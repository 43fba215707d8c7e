// A function with a stack of its own, which runs until it gives way and goes on when it is resumed.
#pragma once

#include <cstddef>
#include <memory>

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace vmae_fast::emulator {

class Fiber {
 public:
  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The next resume() calls body(argument), which must not throw.
  void start(void (*body)(void*), void* argument);
  // Runs until the fiber gives way or its body returns.
  void resume();
  // To whoever resumed this fiber.
  void give_way();
  // Whether the stack was too small, so far as can be seen.
  bool overflowed() const;

 private:
  static void enter();

  char* stack_;
  void (*body_)(void*) = nullptr;
  void* argument_ = nullptr;
#ifdef __x86_64__
  void* mine_ = nullptr;
  void* caller_ = nullptr;
#else
  ucontext_t mine_;
  ucontext_t caller_;
#endif
};

}  // namespace vmae_fast::emulator
