// A switch between stacks: what a CUDA thread needs to stop at a barrier and go on later.
//
// On x86-64 it is a dozen instructions, some 20 times faster than swapcontext, which makes two system calls to save a
// signal mask that no kernel changes. Floating point control words are not saved either: kernels do not touch them.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__x86_64__) && !defined(LONAS_UCONTEXT)

extern "C" void lonas_switch_stack(void** save, void* resume);

namespace emulator {

// The stack pointer of a fiber that will run `entry`, which never returns, when it is switched to.
inline void* prepare_stack(unsigned char* top, void (*entry)()) {
    auto** slot = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t{15});
    *--slot = nullptr;  // the return address of `entry`: ends a debugger's backtrace
    *--slot = reinterpret_cast<void*>(entry);
    for (int saved_register = 0; saved_register < 6; ++saved_register) *--slot = nullptr;
    return slot;
}
inline void switch_stack(void** save, void* resume) { lonas_switch_stack(save, resume); }

}  // namespace emulator

#ifdef LONAS_FIBER_IMPLEMENTATION
asm(R"(
.text
.globl lonas_switch_stack
.hidden lonas_switch_stack
.type lonas_switch_stack, @function
lonas_switch_stack:
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
.size lonas_switch_stack, . - lonas_switch_stack
)");
#endif

#else

#include <ucontext.h>

namespace emulator {

// Elsewhere the saved "stack pointer" is the address of a ucontext_t: at the stack's top for a fiber, on the
// scheduler's own stack for the scheduler.
inline void* prepare_stack(unsigned char* top, void (*entry)()) {
    constexpr size_t kUsed = 32 << 10;  // of the stack below the context; the rest down to the guard page is spare
    auto* context = reinterpret_cast<ucontext_t*>((reinterpret_cast<uintptr_t>(top) - sizeof(ucontext_t)) & ~uintptr_t{63});
    getcontext(context);
    context->uc_stack.ss_sp = reinterpret_cast<unsigned char*>(context) - kUsed;
    context->uc_stack.ss_size = kUsed;
    context->uc_link = nullptr;
    makecontext(context, entry, 0);
    return context;
}
inline void switch_stack(void** save, void* resume) {
    ucontext_t here;
    *save = &here;
    swapcontext(&here, static_cast<ucontext_t*>(resume));
}

}  // namespace emulator

#endif
