// Expert ids and router weights of this rank's pairs, wherever a launch has its inputs from: from the buffer, or from the caller's own
// tensors (integers of 32 or 64 bits, floats of three formats).  Read by the sort and by combine; the staging kernel uses the raw forms.
//
// Shared experts exist in this file alone.  What comes after sees more slots per token and more experts.
#pragma once
#include "layout/params.cuh"
#include "stage/quantise.cuh"

namespace megamoe {

/// Bits of `Params::raw_formats` and `StageParams::formats`: what is not int32 or float.
enum RawFormats : u32 {
    kRawIds64 = 1,
    kRawWeightsBf16 = 2,
    kRawWeightsF16 = 4,
    // scales are bytes, exponents; or words of four exponents, of consecutive k-blocks of a row
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

/// Slots of a token that the router fills.  Behind them each token has one slot for each shared expert of its own rank.  The router
/// knows nothing of shared experts: its ids and weights have no slots for them, and it numbers experts without them.
template <class C> constexpr u32 kRoutedSlots = C::kTopK - C::kShared;
/// Routed experts of a rank, which come before its shared ones.
template <class C> constexpr u32 kLocalRouted = C::kLocalExperts - C::kShared;

/// The router's expert id, and weight, for `pair` = token * routed slots + slot.
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

/// The expert of pair `pair` = token * topk + slot, as the kernel numbers experts: each rank's shared ones follow its routed ones.
/// Negative, or kExperts or more: masked.
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
/// The weight with which combine adds its row.
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
