// WGMMA of FP8 with FP32 accumulators, D = A . B^T, each call one k-block (128) deep in four instructions.  Operands in shared
// memory are K-major under the 128-byte swizzle.
//   multiply           A: activations, e4m3, in shared memory or registers    B: weights, e4m3 or e5m2
//   multiply_weights   operands swapped.  A: weights, e4m3 in shared memory or e5m2 in registers    B: activations
// Accumulators belong to the tensor cores from the issue until `wgmma_wait`.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#asynchronous-warpgroup-level-matrix-instructions
#pragma once
#include "base/types.cuh"

namespace megamoe::ptx {

MEGA_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
MEGA_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
/// Waits until at most kPending committed groups are still running.
template <u32 kPending> MEGA_DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
/// Makes the compiler compute two descriptors here and not where they are first used.  Emits no instruction.
MEGA_DEVICE void pin(u64& a, u64& b) { asm volatile("" : "+l"(a), "+l"(b)); }

/// Writes four zeros here, and not where the optimiser would.
MEGA_DEVICE void write_zeros(float* d) {
    asm volatile("mov.b32 %0, 0;\nmov.b32 %1, 0;\nmov.b32 %2, 0;\nmov.b32 %3, 0;"
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3]));
}

/// Matrix descriptor of a tile of 128-byte rows in atoms of 8 rows, 128-byte swizzle, 1024-byte aligned:
///   bits 0-13 address / 16 | 16-29 leading offset (unused, 1) | 32-45 1024 B between atoms / 16 | 62-63 swizzle 128 B
/// 32 elements further along K adds 2; 8 rows further add 64.
MEGA_DEVICE u64 matrix_descriptor(u32 address) {
    return (u64(1) << 62) | (u64(1024 / 16) << 32) | (u64(1) << 16) | ((address & 0x3FFFF) >> 4);
}
constexpr u32 kDescriptorRows64 = 512;

/// Number format of an operand's codes.
enum class Codes : u32 { e4m3, e5m2 };

// clang-format off
#define MEGA_D                                                                                              \
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27," \
    "%28,%29,%30,%31}"
#define MEGA_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define MEGA_D8(i) MEGA_D4(i), MEGA_D4(i + 4)
#define MEGA_D16(i) MEGA_D8(i), MEGA_D8(i + 8)
#define MEGA_A4(k) "r"(a[k][0]), "r"(a[k][1]), "r"(a[k][2]), "r"(a[k][3])
#define MEGA_A16 MEGA_A4(0), MEGA_A4(1), MEGA_A4(2), MEGA_A4(3)
#define MEGA_BEGIN "{\n.reg .pred fresh, more;\n.reg .b64 a<4>, b<4>;\nsetp.ne.b32 fresh, 0, 0;\nsetp.eq.b32 more, 0, 0;\n"
#define MEGA_DESCRIPTORS(x, of)                                                                             \
    "mov.b64 " x "0, " of ";\nadd.s64 " x "1, " of ", 2;\nadd.s64 " x "2, " of ", 4;\nadd.s64 " x "3, " of ", 6;\n"
#define MEGA_COLUMNS(n, types, d, a, k, accumulate)                                                         \
    "wgmma.mma_async.sync.aligned.m64n" n "k32.f32." types " " d ", " a ", b" #k ", " accumulate ", 1, 1;\n"
// the four steps from descriptors in a<4> and b<4>, which each user makes in the order that its machine code was measured with;
// `types`: of A and B
#define MEGA_FROM_SHARED(n, types, d)                                                                       \
    MEGA_COLUMNS(n, types, d, "a0", 0, "fresh") MEGA_COLUMNS(n, types, d, "a1", 1, "more")                  \
    MEGA_COLUMNS(n, types, d, "a2", 2, "more") MEGA_COLUMNS(n, types, d, "a3", 3, "more") "}\n"
#define MEGA_FROM_REGISTERS(n, types, d, a0, a1, a2, a3, b)                                                 \
    MEGA_BEGIN MEGA_DESCRIPTORS("b", b)                                                                     \
    MEGA_COLUMNS(n, types, d, "{" a0 "}", 0, "fresh") MEGA_COLUMNS(n, types, d, "{" a1 "}", 1, "more")      \
    MEGA_COLUMNS(n, types, d, "{" a2 "}", 2, "more") MEGA_COLUMNS(n, types, d, "{" a3 "}", 3, "more") "}\n"
#define MEGA_R4 "{%0,%1,%2,%3}"
#define MEGA_R8 "{%0,%1,%2,%3,%4,%5,%6,%7}"
#define MEGA_R16 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}"
#define MEGA_R40 \
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26," \
    "%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39}"
#define MEGA_SHARED(n, d, a, b)                                                                             \
    MEGA_BEGIN MEGA_DESCRIPTORS("b", b) MEGA_DESCRIPTORS("a", a) MEGA_FROM_SHARED(n, "e4m3.e4m3", d)
#define MEGA_REGISTERS(n, d, a0, a1, a2, a3, b) MEGA_FROM_REGISTERS(n, "e5m2.e4m3", d, a0, a1, a2, a3, b)
#define MEGA_N4(i) "=f"(d[i]), "=f"(d[i + 1]), "=f"(d[i + 2]), "=f"(d[i + 3])
#define MEGA_N8(i) MEGA_N4(i), MEGA_N4(i + 4)
#define MEGA_N16(i) MEGA_N8(i), MEGA_N8(i + 8)
/// What a product is written to: kNumbers registers of each thread.  Nothing may read them before `wgmma_wait`.  A wait that had them as
/// operands would see to that, but takes long to compile: each operand costs as much as an instruction.  So they are private, and read by
/// volatile statements alone, which the compiler keeps behind the wait, a volatile statement too.
template <u32 kNumbers> class Accumulator {
    static constexpr u32 kN = kNumbers * 2;   // columns of the product
    float d[kNumbers];

public:
    Accumulator() = default;
    Accumulator(const Accumulator&) = delete;   // a copy would be a read
    Accumulator& operator=(const Accumulator&) = delete;

    /// Writes zeros where only the compiler needs a value.
    MEGA_DEVICE void clear() {
#pragma unroll
        for (u32 i = 0; i < kNumbers; ++i) d[i] = 0;
    }
    /// sums[i] += number i * its factor, for i = first, first + 1, second, second + 1, in the order of the factors.
    MEGA_DEVICE void add_to(float* sums, u32 first, u32 second, float a, float b, float c, float e) const {
        asm volatile("fma.rn.f32 %0, %4, %8, %0;\nfma.rn.f32 %1, %5, %9, %1;\nfma.rn.f32 %2, %6, %10, %2;\nfma.rn.f32 %3, %7, %11, %3;"
                     : "+&f"(sums[first]), "+&f"(sums[first + 1]), "+&f"(sums[second]), "+&f"(sums[second + 1])
                     : "f"(d[first]), "f"(d[first + 1]), "f"(d[second]), "f"(d[second + 1]),
                       "f"(a), "f"(b), "f"(c), "f"(e));
    }
    /// Multiplies number `first` and the next by `a`, and the two after them by `b`.
    MEGA_DEVICE void scale(u32 first, float a, float b) {
        asm volatile("mul.f32 %0, %0, %4;\nmul.f32 %1, %1, %4;\nmul.f32 %2, %2, %5;\nmul.f32 %3, %3, %5;"
                     : "+&f"(d[first]), "+&f"(d[first + 1]), "+&f"(d[first + 2]), "+&f"(d[first + 3]) : "f"(a), "f"(b));
    }

    /// d = A . B^T: 64 rows of A, 64 rows of B, 128 deep, in four steps, of which the first overwrites d.  One statement for the
    /// sake of compile time: 32 registers go into and out of each.
    template <Codes kB> MEGA_DEVICE void multiply(u64 a, u64 b) {
        static_assert(kN == 64, "columns of a product");
        if constexpr (kB == Codes::e4m3)
            asm volatile(MEGA_BEGIN MEGA_DESCRIPTORS("a", "%32") MEGA_DESCRIPTORS("b", "%33") MEGA_FROM_SHARED("64", "e4m3.e4m3", MEGA_D)
                         : MEGA_D16(0), MEGA_D16(16) : "l"(a), "l"(b) : "memory");
        else
            asm volatile(MEGA_BEGIN MEGA_DESCRIPTORS("a", "%32") MEGA_DESCRIPTORS("b", "%33") MEGA_FROM_SHARED("64", "e4m3.e5m2", MEGA_D)
                         : MEGA_D16(0), MEGA_D16(16) : "l"(a), "l"(b) : "memory");
    }
    /// The same with A in registers, and e5m2 in B.  Of each 32 of the depth lane t of a warp holds four words of the warp's 16 rows of
    /// A: rows t/4 and t/4 + 8 at columns 4(t%4) to 4(t%4) + 3, then both rows 16 columns further.
    MEGA_DEVICE void multiply(const u32 (&a)[4][4], u64 b) {
        static_assert(kN == 64, "columns of a product");
        asm volatile(MEGA_FROM_REGISTERS("64", "e4m3.e5m2", MEGA_D, "%32,%33,%34,%35", "%36,%37,%38,%39", "%40,%41,%42,%43",
                                         "%44,%45,%46,%47", "%48")
                     : MEGA_D16(0), MEGA_D16(16) : MEGA_A16, "l"(b) : "memory");
    }
    /// Operands swapped: 64 rows of A, weights, by kN rows of B, activations.  Lane t of a warp holds, of every 8 columns of d (tokens),
    /// 2(t%4) and the next, of rows t/4 (registers 4i, 4i+1) and t/4 + 8 (4i+2, 4i+3).  128 deep, as above.
    MEGA_DEVICE void multiply_weights(u64 a, u64 b) {
        static_assert(kN == 8 || kN == 16 || kN == 32 || kN == 64, "columns of a product");
        if constexpr (kN == 8)
            asm volatile(MEGA_SHARED("8", MEGA_R4, "%4", "%5") : MEGA_N4(0) : "l"(a), "l"(b) : "memory");
        else if constexpr (kN == 16)
            asm volatile(MEGA_SHARED("16", MEGA_R8, "%8", "%9") : MEGA_N8(0) : "l"(a), "l"(b) : "memory");
        else if constexpr (kN == 32)
            asm volatile(MEGA_SHARED("32", MEGA_R16, "%16", "%17") : MEGA_N16(0) : "l"(a), "l"(b) : "memory");
        else if constexpr (kN == 64)
            asm volatile(MEGA_SHARED("64", MEGA_D, "%32", "%33") : MEGA_N16(0), MEGA_N16(16) : "l"(a), "l"(b) : "memory");
    }
    /// The same of e5m2 weights in registers, which hold A as described above.  With 80 columns, whose loop has one accumulator alone, that
    /// is read here too to the compiler ("+f"), so that whatever uses the product before comes first: else it may postpone that use, and
    /// keep the old product in other registers meanwhile.
    MEGA_DEVICE void multiply_weights(const u32 (&a)[4][4], u64 b) {
        static_assert(kN == 8 || kN == 16 || kN == 32 || kN == 64 || kN == 80, "columns of a product");
        if constexpr (kN == 8)
            asm volatile(MEGA_REGISTERS("8", MEGA_R4, "%4,%5,%6,%7", "%8,%9,%10,%11", "%12,%13,%14,%15", "%16,%17,%18,%19", "%20")
                         : MEGA_N4(0) : MEGA_A16, "l"(b) : "memory");
        else if constexpr (kN == 16)
            asm volatile(MEGA_REGISTERS("16", MEGA_R8, "%8,%9,%10,%11", "%12,%13,%14,%15", "%16,%17,%18,%19", "%20,%21,%22,%23", "%24")
                         : MEGA_N8(0) : MEGA_A16, "l"(b) : "memory");
        else if constexpr (kN == 32)
            asm volatile(MEGA_REGISTERS("32", MEGA_R16, "%16,%17,%18,%19", "%20,%21,%22,%23", "%24,%25,%26,%27", "%28,%29,%30,%31", "%32")
                         : MEGA_N16(0) : MEGA_A16, "l"(b) : "memory");
        else if constexpr (kN == 64)
            asm volatile(MEGA_REGISTERS("64", MEGA_D, "%32,%33,%34,%35", "%36,%37,%38,%39", "%40,%41,%42,%43", "%44,%45,%46,%47", "%48")
                         : MEGA_N16(0), MEGA_N16(16) : MEGA_A16, "l"(b) : "memory");
        else if constexpr (kN == 80)
            asm volatile(MEGA_REGISTERS("80", MEGA_R40, "%40,%41,%42,%43", "%44,%45,%46,%47", "%48,%49,%50,%51", "%52,%53,%54,%55", "%56")
                         : MEGA_D16(0), MEGA_D16(16), MEGA_D8(32) : MEGA_A16, "l"(b) : "memory");
    }
};
#undef MEGA_N16
#undef MEGA_N8
#undef MEGA_N4
#undef MEGA_D16
#undef MEGA_D8
#undef MEGA_A16
#undef MEGA_A4
#undef MEGA_REGISTERS
#undef MEGA_FROM_REGISTERS
#undef MEGA_SHARED
#undef MEGA_FROM_SHARED
#undef MEGA_COLUMNS
#undef MEGA_DESCRIPTORS
#undef MEGA_BEGIN
#undef MEGA_R40
#undef MEGA_R16
#undef MEGA_R8
#undef MEGA_R4
#undef MEGA_D4
#undef MEGA_D
// clang-format on

}   // namespace megamoe::ptx
