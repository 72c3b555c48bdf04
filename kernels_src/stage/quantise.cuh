// Quantises input rows to e4m3 codes with one scale for 128 columns, bit for bit as `quantize_activations` in Python does:
//
//   scale = max(largest magnitude, 1e-10) / 448        code = e4m3(value / scale), both divisions rounded to nearest
//
// Called by the staging kernel (kernels/stage.cuh), and by the head of a launch that stages its own inputs (kernels/megamoe.cuh).
//
// Half a warp works on a group of 128 columns, eight numbers a lane, and on a few groups at a time, so that enough loads are in
// flight.  Magnitudes are compared as integers: the bits of infinity are above those of all finite numbers, and those of NaN above
// both, so the largest is NaN if any is.
#pragma once
#include "base/constants.cuh"
#include "epilogue/quotient.cuh"
#include "ptx/convert.cuh"
#include "ptx/control.cuh"
#include "ptx/memory.cuh"

namespace megamoe {

/// Formats of numbers: how many bytes, and a number's value as a float.
struct Bf16 {
    static constexpr u32 kBytes = 2;
    MEGA_DEVICE static float value(u32 bits) { return __uint_as_float(bits << 16); }
};
struct F16 {
    static constexpr u32 kBytes = 2;
    MEGA_DEVICE static float value(u32 bits) { return ptx::float_of_f16(bits); }
};
struct F32 {
    static constexpr u32 kBytes = 4;
    MEGA_DEVICE static float value(u32 bits) { return __uint_as_float(bits); }
};

/// Eight numbers of a row as they lie in memory.
template <class T> struct Eight {
    static constexpr u32 kVectors = T::kBytes / 2;
    static constexpr u32 kOfWord = 4 / T::kBytes;   // numbers in a word
    Vec16 v[kVectors];

    MEGA_DEVICE u32 word(u32 i) const { return v[i / 4].w[i % 4]; }
    MEGA_DEVICE float operator[](u32 i) const {
        if constexpr (kOfWord == 1) return T::value(word(i));
        return T::value(i % 2 ? word(i / 2) >> 16 : word(i / 2) & 0xFFFF);
    }
    /// By whole vectors if rows are aligned to 16 bytes, else number by number.
    MEGA_DEVICE void load(const u8* p, bool aligned) {
        if (aligned) {
#pragma unroll
            for (u32 i = 0; i < kVectors; ++i) v[i] = ptx::load16(p + 16 * i);
        } else {
#pragma unroll
            for (u32 i = 0; i < 4 * kVectors; ++i) {
                if constexpr (kOfWord == 1) v[i / 4].w[i % 4] = reinterpret_cast<const u32*>(p)[i];
                else
                    v[i / 4].w[i % 4] = reinterpret_cast<const u16*>(p)[2 * i] |
                                        u32(reinterpret_cast<const u16*>(p)[2 * i + 1]) << 16;
            }
        }
    }
    /// The largest magnitude; of numbers of 16 bits, that of all even ones and that of all odd ones.
    MEGA_DEVICE u32 largest() const {
        constexpr u32 kMask = kOfWord == 1 ? 0x7FFFFFFF : 0x7FFF7FFF;
        u32 m = word(0) & kMask;
#pragma unroll
        for (u32 i = 1; i < 4 * kVectors; ++i) {
            const u32 other = word(i) & kMask;
            m = kOfWord == 2 ? ptx::max_u16x2(m, other) : other > m ? other : m;
        }
        return m;
    }
};

/// The largest magnitude of each group: a half warp holds group j in `in[j]`.  All lanes of the warp must call it.
template <class T, u32 kCount> MEGA_DEVICE void largest_of_groups(const Eight<T> (&in)[kCount],
                                                                  float (&largest)[kCount]) {
    if constexpr (T::kBytes == 2) {   // two groups at a time, one in either half of a word
#pragma unroll
        for (u32 j = 0; j < kCount; j += 2) {
            const u32 a = in[j].largest(),
                      b = j + 1 < kCount ? in[j + 1 < kCount ? j + 1 : j].largest() : 0;
            u32 m = ptx::max_u16x2(ptx::choose_bytes(a, b, 0x5410), ptx::choose_bytes(a, b, 0x7632));
#pragma unroll
            for (u32 d = kWarp / 4; d > 0; d /= 2)
                m = ptx::max_u16x2(m, __shfl_xor_sync(~0u, m, d));
            largest[j] = T::value(m & 0xFFFF);
            if (j + 1 < kCount) largest[j + 1] = T::value(m >> 16);
        }
    } else {
#pragma unroll
        for (u32 j = 0; j < kCount; ++j) {
            u32 m = in[j].largest();
#pragma unroll
            for (u32 d = kWarp / 4; d > 0; d /= 2) {
                const u32 other = __shfl_xor_sync(~0u, m, d);
                m = other > m ? other : m;
            }
            largest[j] = T::value(m);
        }
    }
}

/// The scale of a group, and the division by it.
struct Divisor {
    float scale, inverse, correct;

    MEGA_DEVICE explicit Divisor(float largest) {
        const bool finite = __float_as_uint(largest) < 0x7F800000;
        // else infinity, or the NaN that arithmetic makes of a NaN
        scale = finite ? quant_scale(fmaxf(largest, kLeastMagnitude)) : largest + largest;
        inverse = finite ? reciprocal_rn(scale) : ptx::reciprocal_approx(scale);
        correct = finite ? scale
                         : 0;   // division by infinity gives zero or NaN, and must not be corrected
    }
    /// value / scale, correctly rounded, as `inverse` is correctly rounded (Markstein's theorem): the FMA gives the first quotient's error
    /// exactly.  Signs are placed so that -0 stays -0.
    MEGA_DEVICE float operator()(float value) const {
        const float near = value * inverse;
        return __fmaf_rn(-__fmaf_rn(near, correct, -value), inverse, near);
    }
};

/// Where the rows to quantise lie, and where their codes and scales go, rows of which follow each other without gaps.
struct RowsToQuantise {
    const u8* x;
    u64 stride;   // bytes from row to row
    u8* codes;
    float* scales;
    u32 per_row;    // groups of 128 columns
    u32 groups;     // of all rows
    bool aligned;   // rows begin at multiples of 16
};

/// Groups `first` to `first` + 2 * kCount - 1, as far as there are so many, by a warp.
template <class T, u32 kCount> MEGA_DEVICE void quantise_groups(const RowsToQuantise& rows,
                                                                u32 first) {
    const u32 lane = ptx::lane_id() % (kWarp / 2), begin = first + ptx::lane_id() / (kWarp / 2);
    u32 row = begin / rows.per_row, column = begin - row * rows.per_row;
    Eight<T> in[kCount];
#pragma unroll
    for (u32 j = 0; j < kCount; ++j) {
        const u8* p = rows.x + row * rows.stride + (column * kQuantBlock + lane * 8) * T::kBytes;
        if (begin + 2 * j < rows.groups) in[j].load(p, rows.aligned);
        else in[j] = {};
        column += 2;
        if (column >= rows.per_row) column -= rows.per_row, ++row;
        if (column >= rows.per_row) column -= rows.per_row, ++row;   // with one group a row
    }
    float largest[kCount];
    largest_of_groups(in, largest);
#pragma unroll
    for (u32 j = 0; j < kCount; ++j) {
        const u32 group = begin + 2 * j;
        const Divisor by(largest[j]);
        const u32 a = ptx::pack_e4m3(by(in[j][0]), by(in[j][1]), by(in[j][2]), by(in[j][3]));
        const u32 b = ptx::pack_e4m3(by(in[j][4]), by(in[j][5]), by(in[j][6]), by(in[j][7]));
        if (group >= rows.groups) continue;
        ptx::store8(rows.codes + u64(group) * kQuantBlock + lane * 8, a, b);
        if (lane == 0) rows.scales[group] = by.scale;
    }
}

/// All groups, shared out among `workers` warps of which this is number `worker`.
template <class T, u32 kCount> MEGA_DEVICE void quantise_rows(const RowsToQuantise& rows,
                                                              u32 worker, u32 workers) {
    if (rows.groups <= 4 * workers) {   // few groups: spread over as many warps as possible
#pragma unroll 1
        for (u32 g = 2 * worker; g < rows.groups; g += 2 * workers) quantise_groups<T, 1>(rows, g);
    } else {
#pragma unroll 1
        for (u32 g = 2 * kCount * worker; g < rows.groups; g += 2 * kCount * workers)
            quantise_groups<T, kCount>(rows, g);
    }
}

}   // namespace megamoe
