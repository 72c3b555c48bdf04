// Conversions between number formats (e4m3, bf16, f16, e2m1 to e5m2), byte selection, approximate functions, and limits that keep
// NaN.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-cvt
#pragma once
#include "base/types.cuh"

namespace megamoe::ptx {

/// Four e4m3 codes of a, b times `first` and c, d times `second`, that of `a` in the lowest byte; saturates to +-448, NaN stays NaN.
MEGA_DEVICE u32 pack_e4m3(float a, float b, float c, float d, float first, float second) {
    u32 r;
    asm("{\n.reg .b16 lo, hi;\n.reg .f32 a, b, c, d;\n"
        "mul.f32 a, %1, %5;\nmul.f32 b, %2, %5;\nmul.f32 c, %3, %6;\nmul.f32 d, %4, %6;\n"
        "cvt.rn.satfinite.e4m3x2.f32 lo, b, a;\ncvt.rn.satfinite.e4m3x2.f32 hi, d, c;\n"
        "mov.b32 %0, {lo, hi};\n}"
        : "=r"(r)
        : "f"(a), "f"(b), "f"(c), "f"(d), "f"(first), "f"(second));
    return r;
}
MEGA_DEVICE u32 pack_e4m3(float a, float b, float c, float d) {
    u32 r;
    asm("{\n.reg .b16 lo, hi;\n"
        "cvt.rn.satfinite.e4m3x2.f32 lo, %2, %1;\ncvt.rn.satfinite.e4m3x2.f32 hi, %4, %3;\nmov.b32 %0, {lo, hi};\n}"
        : "=r"(r)
        : "f"(a), "f"(b), "f"(c), "f"(d));
    return r;
}
MEGA_DEVICE float float_of_f16(u32 bits) {
    float r;
    asm("{\n.reg .b16 h, unused;\nmov.b32 {h, unused}, %1;\ncvt.f32.f16 %0, h;\n}"
        : "=f"(r)
        : "r"(bits));
    return r;
}
/// The larger of both low halves and the larger of both high halves.
MEGA_DEVICE u32 max_u16x2(u32 a, u32 b) {
    u32 r;
    asm("max.u16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}
/// Two bf16, `lo` in the low half.
MEGA_DEVICE u32 pack_bf16(float lo, float hi) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
}
/// sum[i] += w * the i-th of the eight bf16 of `v`.
MEGA_DEVICE void add_scaled_bf16(float (&sum)[8], float w, const Vec16& v) {
    asm("{\n.reg .b32 t;\n"
        "shl.b32 t, %9, 16;\nfma.rn.f32 %0, %8, t, %0;\nand.b32 t, %9, 0xffff0000;\nfma.rn.f32 %1, %8, t, %1;\n"
        "shl.b32 t, %10, 16;\nfma.rn.f32 %2, %8, t, %2;\nand.b32 t, %10, 0xffff0000;\nfma.rn.f32 %3, %8, t, %3;\n"
        "shl.b32 t, %11, 16;\nfma.rn.f32 %4, %8, t, %4;\nand.b32 t, %11, 0xffff0000;\nfma.rn.f32 %5, %8, t, %5;\n"
        "shl.b32 t, %12, 16;\nfma.rn.f32 %6, %8, t, %6;\nand.b32 t, %12, 0xffff0000;\nfma.rn.f32 %7, %8, t, %7;\n}"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3]), "+f"(sum[4]), "+f"(sum[5]),
          "+f"(sum[6]), "+f"(sum[7])
        : "f"(w), "r"(v.w[0]), "r"(v.w[1]), "r"(v.w[2]), "r"(v.w[3]));
}
/// Unlike fminf and fmaxf these two give NaN when x is NaN, so that a broken row stays visibly broken.
MEGA_DEVICE float min_nan(float x, float limit) {
    float r;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(x), "f"(limit));
    return r;
}
/// x, but not above `limit` and not below -`limit`.
MEGA_DEVICE float clamp_nan(float x, float limit) {
    float r;
    asm("min.NaN.f32 %0, %1, %2;\nmax.NaN.f32 %0, %0, %3;"
        : "=&f"(r)
        : "f"(x), "f"(limit), "f"(-limit));
    return r;
}
MEGA_DEVICE float reciprocal_approx(float x) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}
/// x / (1 + e^-x) * u, where x is the gate, but not above `limit`, and u is `up` within both limits.  One asm statement, as everywhere where
/// a kernel has many: each costs compile time.
MEGA_DEVICE float swiglu_approx(float gate, float up, float limit) {
    float r;
    asm("{\n.reg .f32 x, t, u;\n"
        "min.NaN.f32 x, %1, %3;\n"
        "mul.f32 t, x, 0fBFB8AA3B;\n"   // -log2(e)
        "ex2.approx.ftz.f32 t, t;\nadd.f32 t, t, 0f3F800000;\nrcp.approx.ftz.f32 t, t;\n"
        "mul.f32 t, x, t;\n"
        "min.NaN.f32 u, %2, %3;\nmax.NaN.f32 u, u, %4;\nmul.f32 %0, t, u;\n}"
        : "=f"(r)
        : "f"(gate), "f"(up), "f"(limit), "f"(-limit));
    return r;
}
/// Four of the eight bytes of `low` (0 to 3) and `high` (4 to 7): nibble i of the low half of `select`, below 8, names byte i.
MEGA_DEVICE u32 choose_bytes(u32 low, u32 high, u32 select) {
    u32 r;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(low), "r"(high), "r"(select));
    return r;
}
/// Eight e2m1 codes to eight bytes.  The magnitude of code i, bits 4i to 4i + 2, selects one of the eight bytes of `low` and `high`.
/// Signs lie so that two masks fetch them: those of the first four codes in bits 8i + 7, of the others in bits 8 (i - 4) + 3.
MEGA_DEVICE void expand_e2m1(u32 codes, u32 low, u32 high, u32& first, u32& second) {
    asm("{\n.reg .b32 s, a, b, m;\n"
        "and.b32 s, %2, 0x77777777;\nprmt.b32 a, %3, %4, s;\nand.b32 m, %2, 0x80808080;\nor.b32 %0, a, m;\n"
        "shr.u32 s, s, 16;\nprmt.b32 b, %3, %4, s;\nshl.b32 m, %2, 4;\nand.b32 m, m, 0x80808080;\nor.b32 %1, b, m;\n}"
        : "=&r"(first), "=r"(second)
        : "r"(codes), "r"(low), "r"(high));
}

// clang-format off
#define MEGA_EXPAND_8(first, second, codes)                                                                 \
    "and.b32 s, " codes ", 0x77777777;\nprmt.b32 m, low, high, s;\n"                                        \
    "lop3.b32 " first ", " codes ", 0x80808080, m, 0xEA;\nshr.u32 s, s, 16;\nprmt.b32 m, low, high, s;\n"    \
    "shl.b32 s, " codes ", 4;\nlop3.b32 " second ", s, 0x80808080, m, 0xEA;\n"
#define MEGA_EXPAND(k, first, second, codes, exponents)                                                     \
    "prmt.b32 s, " exponents ", 0, 0x444" #k ";\nmad.lo.u32 low, s, %26, %27;\nmad.lo.u32 high, s, %28, %29;\n" \
    MEGA_EXPAND_8(first, second, codes)
#define MEGA_A4(k) "=&r"(a[k][0]), "=&r"(a[k][1]), "=&r"(a[k][2]), "=&r"(a[k][3])
#define MEGA_W4(v) "r"(v.w[0]), "r"(v.w[1]), "r"(v.w[2]), "r"(v.w[3])
/// The same of four times eight codes that share an exponent.  `Table` says how the table of magnitudes follows from it: both its words
/// from one product.  Written with one multiplication, ptxas keeps no register for the other factor.
template <class Table>
MEGA_DEVICE void expand_e2m1(Vec16& first, Vec16& second, const u32 (&codes)[4], u32 exponent) {
    static_assert(Table::kLowStep == Table::kHighStep << 8, "the lower word's step is the upper one's, a byte further left");
    asm("{\n.reg .b32 low, high, s, m;\nmul.lo.u32 s, %12, %13;\nshl.b32 low, s, 8;\nadd.u32 low, low, %14;\nadd.u32 high, s, %15;\n"
        MEGA_EXPAND_8("%0", "%4", "%8") MEGA_EXPAND_8("%1", "%5", "%9")
        MEGA_EXPAND_8("%2", "%6", "%10") MEGA_EXPAND_8("%3", "%7", "%11") "}"
        : "=&r"(first.w[0]), "=&r"(first.w[1]), "=&r"(first.w[2]), "=&r"(first.w[3]),
          "=&r"(second.w[0]), "=&r"(second.w[1]), "=&r"(second.w[2]), "=&r"(second.w[3])
        : "r"(codes[0]), "r"(codes[1]), "r"(codes[2]), "r"(codes[3]), "r"(exponent), "n"(Table::kHighStep),
          "n"(Table::kLow), "n"(Table::kHigh));
}
/// The same of the 64 codes that a thread holds of 64 rows of a k-block (mma/packed_rows.cuh), to the registers of a left operand
/// (ptx::Accumulator::multiply).  One statement for the sake of compile time; volatile, since an operand's registers must not be
/// written after the `wgmma_fence` of its product.
template <class Table>
MEGA_DEVICE void expand_e2m1(u32 (&a)[4][4], const Vec16 (&codes)[2], const u32 (&exponents)[2]) {
    asm volatile(
        "{\n.reg .b32 low, high, s, m;\n"
        MEGA_EXPAND(0, "%0", "%2", "%16", "%24") MEGA_EXPAND(0, "%1", "%3", "%17", "%25")
        MEGA_EXPAND(1, "%4", "%6", "%18", "%24") MEGA_EXPAND(1, "%5", "%7", "%19", "%25")
        MEGA_EXPAND(2, "%8", "%10", "%20", "%24") MEGA_EXPAND(2, "%9", "%11", "%21", "%25")
        MEGA_EXPAND(3, "%12", "%14", "%22", "%24") MEGA_EXPAND(3, "%13", "%15", "%23", "%25") "}"
        : MEGA_A4(0), MEGA_A4(1), MEGA_A4(2), MEGA_A4(3)
        : MEGA_W4(codes[0]), MEGA_W4(codes[1]), "r"(exponents[0]), "r"(exponents[1]),
          "n"(Table::kLowStep), "n"(Table::kLow), "n"(Table::kHighStep), "n"(Table::kHigh));
}
#undef MEGA_W4
#undef MEGA_A4
#undef MEGA_EXPAND
#undef MEGA_EXPAND_8
// clang-format on

}   // namespace megamoe::ptx
