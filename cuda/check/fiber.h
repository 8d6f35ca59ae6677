// A fiber: one thread of a kernel, as a stack of its own that runs until it yields.
// Owns the stack and the switch between it and the scheduler, about 20 ns each way (setjmp; ucontext only makes the
// first entry, because its switch makes a system call). Tells AddressSanitizer about every switch. A fiber that is
// dropped before its end runs no destructors: kernels own nothing. It knows neither kernels nor scheduling.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <memory>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace check {

class Fiber {
 public:
  static constexpr size_t stack_bytes = 256 << 10;  // AddressSanitizer's frames are several times larger

  Fiber() : stack_(new unsigned char[stack_bytes]) {}

  // Makes the fiber begin at `entry` with its next resume. `entry` must end in `finish`, never return.
  void prepare(void (*entry)()) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_.get();
    context_.uc_stack.ss_size = stack_bytes;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
    started_ = false;
  }

  // Runs the fiber until it yields or finishes.
  void resume() {
    if (_setjmp(scheduler_) != 0) {
      arrive_in_scheduler();
      return;
    }
    leave_scheduler();
    if (started_) _longjmp(here_, 1);
    started_ = true;
    setcontext(&context_);
  }

  // To be called first in `entry`.
  void arrive() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack_, &scheduler_stack_, &scheduler_stack_bytes_);
#endif
  }

  // From within the fiber: back to whoever resumed it.
  void yield() {
    if (_setjmp(here_) == 0) {
#if defined(__SANITIZE_ADDRESS__)
      __sanitizer_start_switch_fiber(&fake_stack_, scheduler_stack_, scheduler_stack_bytes_);
#endif
      _longjmp(scheduler_, 1);
    }
    arrive();
  }

  // From within the fiber: the same, for good.
  [[noreturn]] void finish() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(nullptr, scheduler_stack_, scheduler_stack_bytes_);
#endif
    _longjmp(scheduler_, 1);
  }

 private:
  void leave_scheduler() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&scheduler_fake_stack_, stack_.get(), stack_bytes);
#endif
  }
  void arrive_in_scheduler() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(scheduler_fake_stack_, nullptr, nullptr);
#endif
  }

  std::unique_ptr<unsigned char[]> stack_;
  ucontext_t context_{};
  jmp_buf here_{};
  jmp_buf scheduler_{};
  bool started_ = false;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack_ = nullptr;
  void* scheduler_fake_stack_ = nullptr;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_bytes_ = 0;
#endif
};

}  // namespace check
