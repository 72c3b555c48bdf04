// Expert ids and router weights as the caller has them: integers of 32 or 64 bits, floats of three formats.
#pragma once
#include "layout/params.cuh"
#include "stage/quantise.cuh"

namespace megamoe {

/// Bits of `Params::raw_formats` and `StageParams::formats`: what is not of 32 bits.
enum RawFormats : u32 {
    kRawIds64 = 1,
    kRawWeightsBf16 = 2,
    kRawWeightsF16 = 4,
    // exponents in bytes; four of a row, side by side, in a word
    kRawScalesE8m0 = 8,
    kRawScalesPacked = 16,
};

MEGA_DEVICE i64 raw_id(const u8* ids, u64 i, u32 formats) {
    if (formats & kRawIds64) return reinterpret_cast<const i64*>(ids)[i];
    return reinterpret_cast<const i32*>(ids)[i];
}
MEGA_DEVICE float raw_weight(const u8* weights, u64 i, u32 formats) {
    if (formats & kRawWeightsBf16) return Bf16::value(reinterpret_cast<const u16*>(weights)[i]);
    if (formats & kRawWeightsF16) return F16::value(reinterpret_cast<const u16*>(weights)[i]);
    return reinterpret_cast<const float*>(weights)[i];
}

/// Expert of a (token, slot) pair of this rank, wherever the launch has its inputs from.
template <class C> MEGA_DEVICE i64 input_id(const Params& p, u32 pair) {
    if constexpr (C::kInputs != Inputs::raw)
        return symmetric<const i64>(p, p.rank, p.topk_ids)[pair];
    else
        return raw_id(p.raw_ids, u64(pair / C::kTopK) * p.raw_ids_stride + pair % C::kTopK,
                      p.raw_formats);
}
/// Its router weight.
template <class C> MEGA_DEVICE float input_weight(const Params& p, u32 pair) {
    if constexpr (C::kInputs != Inputs::raw)
        return symmetric<const float>(p, p.rank, p.topk_weights)[pair];
    else
        return raw_weight(p.raw_weights,
                          u64(pair / C::kTopK) * p.raw_weights_stride + pair % C::kTopK,
                          p.raw_formats) *
               p.weight_factor;
}

}   // namespace megamoe
