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

/// Slots of a token that the router fills.  Those behind them are for the shared experts of the token's own rank, of which the
/// router knows nothing: its ids and weights come without them, and its experts are numbered without them.
template <class C> constexpr u32 kRoutedSlots = C::kTopK - C::kShared;
template <class C> constexpr u32
    kLocalRouted = C::kLocalExperts -
                   C::kShared;   // each rank's experts that are not shared, which come first

/// What the router says of a pair of token and routed slot of this rank, wherever the launch has its inputs from.
template <class C> MEGA_DEVICE i64 routed_id(const Params& p, u32 pair) {
    if constexpr (C::kInputs != Inputs::raw)
        return symmetric<const i64>(p, p.rank, p.topk_ids)[pair];
    else
        return raw_id(p.raw_ids,
                      u64(pair / kRoutedSlots<C>) * p.raw_ids_stride + pair % kRoutedSlots<C>,
                      p.raw_formats);
}
template <class C> MEGA_DEVICE float routed_weight(const Params& p, u32 pair) {
    if constexpr (C::kInputs != Inputs::raw)
        return symmetric<const float>(p, p.rank, p.topk_weights)[pair];
    else
        return raw_weight(
                   p.raw_weights,
                   u64(pair / kRoutedSlots<C>) * p.raw_weights_stride + pair % kRoutedSlots<C>,
                   p.raw_formats) *
               p.weight_factor;
}

/// Expert of a (token, slot) pair of this rank, as the kernel numbers them: each rank's shared ones
/// follow its routed ones.
template <class C> MEGA_DEVICE i64 input_id(const Params& p, u32 pair) {
    if constexpr (C::kShared == 0) {
        return routed_id<C>(p, pair);
    } else {
        const u32 token = pair / C::kTopK, slot = pair - token * C::kTopK;
        if (slot >= kRoutedSlots<C>)
            return p.rank * C::kLocalExperts + kLocalRouted<C> + slot - kRoutedSlots<C>;
        const i64 id = routed_id<C>(p, token * kRoutedSlots<C> + slot);
        const bool real = static_cast<u64>(id) < kLocalRouted<C> * C::kRanks;
        return real ? id + static_cast<u32>(id) / kLocalRouted<C> * C::kShared : -1;
    }
}
/// The weight of its row.
template <class C> MEGA_DEVICE float input_weight(const Params& p, u32 pair) {
    if constexpr (C::kShared == 0) {
        return routed_weight<C>(p, pair);
    } else {
        const u32 token = pair / C::kTopK, slot = pair - token * C::kTopK;
        return slot >= kRoutedSlots<C> ? p.shared_weight
                                       : routed_weight<C>(p, token * kRoutedSlots<C> + slot);
    }
}

}   // namespace megamoe
