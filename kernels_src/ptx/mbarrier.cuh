// mbarrier: arrive, expect bytes, test a phase.  Addresses are 32-bit shared-memory addresses.  A phase is complete when all
// arrivals have come and no announced byte is missing.  Waiters name it by its parity, so they must never be more than one phase
// behind.  An arrival releases, and a successful test acquires, at the scope of the block.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-mbarrier
#pragma once
#include "base/types.cuh"

namespace megamoe::ptx {

MEGA_DEVICE void mbarrier_init(u32 bar, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(arrivals) : "memory");
}
/// Makes initialised barriers visible to the async proxy.
MEGA_DEVICE void mbarrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

MEGA_DEVICE void mbarrier_arrive(u32 bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
/// Announces `bytes` of asynchronous copies to the current phase, before they are issued.  An arrival of the same thread must
/// follow: until then the phase cannot complete.
MEGA_DEVICE void mbarrier_expect(u32 bar, u32 bytes) {
    asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(bytes)
                 : "memory");
}
/// Whether the phase of the given parity is complete, without waiting.
MEGA_DEVICE bool mbarrier_test(u32 bar, u32 parity) {
    u32 done;
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}\n"
        : "=r"(done)
        : "r"(bar), "r"(parity)
        : "memory");
    return done != 0;
}
/// True once the phase of the given parity is complete.  May suspend the thread for a while before it says no.
MEGA_DEVICE bool mbarrier_try_wait(u32 bar, u32 parity) {
    u32 done;
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}\n"
        : "=r"(done)
        : "r"(bar), "r"(parity)
        : "memory");
    return done != 0;
}

}   // namespace megamoe::ptx
