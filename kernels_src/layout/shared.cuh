// The map of a block's dynamic shared memory, which begins at a multiple of 1024.  `KernelSpec.shared_bytes` in Python is the
// same sum; the template asserts that they agree.
//
//   stages         activations [stages] | weights [stages] | exponents of packed weights [stages]
//   packed ring    codes and exponents of as many k-blocks (unpack alone)
//   staging        2 KB per math warp
//   dispatch       kDispatchSlots chunks
//   scales         [stages]: one float per activation row, then four of the weights, of unpack twice
//   mbarriers      full, empty [stages] | tile_full, tile_empty, tile_stored [4] | dispatched [dispatch slots]
//                  | packed_full, packed_empty [stages] (unpack alone)
//   tile slots     [4] of 32 bytes
//   expert table   counts and this block's side, rows, bases, items, active experts (sched/experts.cuh)
//
// What comes before `staging` has other uses while no tile is under way: the head sorts pairs there (`scratch`), prefill expands
// weights there, and combine keeps result rows there.
#pragma once
#include "layout/params.cuh"
#include "ptx/memory.cuh"

namespace megamoe {

/// Bytes of exponents in a stage: one for each `group` weights along K; 0 for a format without groups.
constexpr u32 group_bytes(u32 group) { return group == 0 ? 0 : kBlockN * kBlockK / group; }

template <class C> struct Shared {
    static constexpr u32 kActBytes = C::kBlockM * kBlockK,
                         kWeightBytes = kBlockN * kBlockK * C::Weights::kBits / 8,
                         kExponentBytes = group_bytes(C::Weights::kGroup),
                         kActScaleBytes = C::kBlockM * 4;
    // places of the packed ring; and of a stage's four scales of weights, which with that ring are written before the stage is free
    static constexpr u32 kPackedPlaces = kHasHelpers<C> ? C::kStages : 0,
                         kWeightScales = kHasHelpers<C> ? 2 : 1;
    static constexpr u32 kScaleBytes = kActScaleBytes + kWeightScales * 16;

    static constexpr u32 kWeightAt = C::kStages * kActBytes;
    static constexpr u32 kExponentAt = kWeightAt + C::kStages * kWeightBytes;
    static constexpr u32 kPackedAt = kExponentAt + C::kStages * kExponentBytes;
    static constexpr u32 kPackedCodes = kBlockN * kBlockK * kPackedBits / 8,
                         kPackedBytes = kPackedCodes + group_bytes(kPackedGroup);
    static constexpr u32 kStagingAt = kPackedAt + kPackedPlaces * kPackedBytes;
    static constexpr u32 kDispatchAt = kStagingAt + kMathWarps * kStagingBytes;
    static constexpr u32 kScaleAt = kDispatchAt + C::kDispatchSlots * kDispatchChunk;
    static constexpr u32 kBarrierAt = kScaleAt + C::kStages * kScaleBytes;
    static constexpr u32 kTileBarrierAt = kBarrierAt + C::kStages * 16;
    static constexpr u32 kDispatchBarrierAt = kTileBarrierAt + kTileSlots * 24;
    static constexpr u32 kPackedBarrierAt = kDispatchBarrierAt + C::kDispatchSlots * 8;
    static constexpr u32 kTileSlotAt = kPackedBarrierAt + kPackedPlaces * 16;
    static constexpr u32 kActiveCountAt = kTileSlotAt + kTileSlots * kTileSlotBytes;
    static constexpr u32 kRowsAt = kActiveCountAt + 64;
    static constexpr u32 kBasesAt = kRowsAt + C::kLocalExperts * 4;
    static constexpr u32 kItemsAt = kBasesAt + (C::kLocalExperts + 1) * 4;
    static constexpr u32 kActiveAt = kItemsAt + (C::kLocalExperts + 1) * 4;
    static constexpr u32 kBytes = (kActiveAt + C::kLocalExperts * 2 + 15) / 16 * 16;
    static_assert(kBytes <= kSharedLimit, "more shared memory than SM90 has (232448 bytes)");
    static_assert(kActBytes % 1024 == 0 && kWeightAt % 1024 == 0 && kWeightBytes % 1024 == 0,
                  "a stage must begin at an atom of the swizzle");
    static_assert(kStagingAt >= 12 * C::kExperts, "the head's sort does not fit into the stages");

    u8* base;
    u32 address;   // of `base`, as a 32-bit address in the shared window

    MEGA_DEVICE explicit Shared(u8* raw) : base(raw), address(ptx::shared_address(raw)) {}

    MEGA_DEVICE u32 acts(u32 stage) const { return address + stage * kActBytes; }
    MEGA_DEVICE u32 weights(u32 stage) const { return address + kWeightAt + stage * kWeightBytes; }
    MEGA_DEVICE u32 exponents(u32 stage) const {
        return address + kExponentAt + stage * kExponentBytes;
    }
    MEGA_DEVICE u32 packed(u32 i) const { return address + kPackedAt + i * kPackedBytes; }
    MEGA_DEVICE u32 act_scales(u32 stage) const { return address + kScaleAt + stage * kScaleBytes; }
    /// `parity` of the stage's use: with a packed ring, two uses in a row have theirs in two places.
    MEGA_DEVICE u32 weight_scales(u32 stage, u32 parity) const {
        return act_scales(stage) + kActScaleBytes + parity * (kWeightScales - 1) * 16;
    }
    /// Of all uses, where they have one place.
    MEGA_DEVICE u32 weight_scales(u32 stage) const {
        static_assert(kWeightScales == 1, "with a packed ring, which place depends on the use");
        return weight_scales(stage, 0);
    }
    MEGA_DEVICE u32 staging(u32 math_warp) const {
        return address + kStagingAt + math_warp * kStagingBytes;
    }

    MEGA_DEVICE u32 dispatch_slot(u32 s) const {
        return address + kDispatchAt + s * kDispatchChunk;
    }

    MEGA_DEVICE u32 full(u32 stage) const { return address + kBarrierAt + stage * 16; }
    MEGA_DEVICE u32 empty(u32 stage) const { return full(stage) + 8; }
    MEGA_DEVICE u32 tile_full(u32 slot) const { return address + kTileBarrierAt + slot * 24; }
    MEGA_DEVICE u32 tile_empty(u32 slot) const { return tile_full(slot) + 8; }
    MEGA_DEVICE u32 tile_stored(u32 slot) const { return tile_full(slot) + 16; }

    MEGA_DEVICE u32 packed_full(u32 i) const { return address + kPackedBarrierAt + i * 16; }
    MEGA_DEVICE u32 packed_empty(u32 i) const { return packed_full(i) + 8; }
    MEGA_DEVICE u32 dispatched(u32 s) const { return address + kDispatchBarrierAt + s * 8; }

    MEGA_DEVICE u8* tile_slot(u32 s) const { return base + kTileSlotAt + s * kTileSlotBytes; }
    MEGA_DEVICE u32 tile_slot_address(u32 s) const {
        return address + kTileSlotAt + s * kTileSlotBytes;
    }
    MEGA_DEVICE u32& active_count() const { return *reinterpret_cast<u32*>(base + kActiveCountAt); }
    MEGA_DEVICE u32& two_sides() const {
        return *reinterpret_cast<u32*>(base + kActiveCountAt + 4);
    }
    // of the L2 that this block has counted itself on (comm/sides.cuh)
    MEGA_DEVICE u32& side() const { return *reinterpret_cast<u32*>(base + kActiveCountAt + 8); }
    MEGA_DEVICE u32* expert_rows() const { return reinterpret_cast<u32*>(base + kRowsAt); }
    MEGA_DEVICE u32* expert_bases() const { return reinterpret_cast<u32*>(base + kBasesAt); }
    MEGA_DEVICE u32* expert_items() const { return reinterpret_cast<u32*>(base + kItemsAt); }
    MEGA_DEVICE u16* active_experts() const { return reinterpret_cast<u16*>(base + kActiveAt); }
    // three words for each expert in the room of the stages, during the sort
    MEGA_DEVICE u32* scratch() const { return reinterpret_cast<u32*>(base); }
};

}   // namespace megamoe
