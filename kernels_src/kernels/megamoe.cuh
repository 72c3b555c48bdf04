// One MoE layer in one launch: what all warps of a block do first (the head), and then which role each warp has.  Called by the kernel
// that kernels/entry.cuh.j2 renders.
//
//   head      all warps   sort pairs by expert, expert table, first dispatch          dispatch/; of prefill also expand/ahead.cuh
//   warp 0    1 lane      activations and their scales into the stages                roles/load.cuh
//   warp 1    1 lane      weights into the stages; draws tickets, publishes tiles     roles/load.cuh, sched/
//   warp 2    all lanes   the rest of dispatch                                        dispatch/pull.cuh, dispatch/gather.cuh
//   warp 3    1 lane      announces finished tiles, watches the math warps            roles/publish.cuh
//             all lanes   then the last meeting of blocks and ranks                   roles/combine.cuh
//   warps 4-11            two math warpgroups: WGMMA, then SwiGLU and requantisation,  roles/math.cuh or roles/swapped_math.cuh,
//                         or scatter                                                  mma/, epilogue/
//                         then combine, once all blocks and ranks are done            roles/combine.cuh
//   warps 12-15           of unpack alone: helpers, which unpack weights              expand/beside.cuh
//
// Blocks are persistent and all resident (cooperative launch), one per SM.  Variants differ in the policy that `Config` names
// (variants/).
#pragma once
#include "comm/barriers.cuh"
#include "comm/sides.cuh"
#include "comm/timeline.cuh"
#include "dispatch/pull.cuh"
#include "dispatch/sort.cuh"
#include "roles/combine.cuh"
#include "roles/load.cuh"
#include "roles/math.cuh"
#include "roles/publish.cuh"
#include "stage/quantise.cuh"

namespace megamoe {

/// Initialises the block's mbarriers (docs/kernel.md lists them), and its share of what the launch counts in.
template <class C> MEGA_DEVICE void initialise(const Params& p, const Shared<C>& shared) {
    if (threadIdx.x == 0) {
        constexpr u32 kReaders = arrivals_of(kTileWarps<C>), kHelpers = arrivals_of(kHelperWarps<C>);
#pragma unroll 1
        for (u32 s = 0; s < C::kStages; ++s)
            ptx::mbarrier_init(shared.full(s), kHasHelpers<C> ? 1 + kHelpers : 2),
                ptx::mbarrier_init(shared.empty(s), kReaders);
#pragma unroll 1
        for (u32 s = 0; s < kTileSlots; ++s) {
            ptx::mbarrier_init(shared.tile_full(s), 1);
            ptx::mbarrier_init(shared.tile_empty(s), kReaders + 2 + kHelpers);
            ptx::mbarrier_init(shared.tile_stored(s), kReaders);
        }
#pragma unroll 1
        for (u32 s = 0; s < C::kDispatchSlots; ++s) ptx::mbarrier_init(shared.dispatched(s), 1);
        if constexpr (kHasHelpers<C>)
            for (u32 i = 0; i < Shared<C>::kPackedPlaces; ++i) {
                ptx::mbarrier_init(shared.packed_full(i), 1);
                ptx::mbarrier_init(shared.packed_empty(i), kHelpers);
            }
        ptx::mbarrier_init_fence();
        for (const ptx::TensorMap* map : {&p.act1, &p.act2, &p.act1_small, &p.act2_small})
            ptx::prefetch_tensor_map(map);
        shared.side() = count_side(p);
        // nobody draws a ticket, or adds to the counters below, before grid barrier 0
        if (blockIdx.x == 0)
            p.control[kControlTicket] = 0, p.control[kControlTicket + kControlTicketStride] = 0;
    }
    for (u32 i = blockIdx.x * kBlockThreads<C> + threadIdx.x; i < p.counters;
         i += gridDim.x * kBlockThreads<C>)
        p.act1_ready[i] = 0, p.act2_ready[i] = 0, p.act2_done[i] = 0;
    if constexpr (kKeepsPlaces<C>)
        for (u32 i = blockIdx.x * kBlockThreads<C> + threadIdx.x; i < Places<C>::words(p);
             i += gridDim.x * kBlockThreads<C>)
            p.row_places[i] = 0;
    if constexpr (C::Policy::kExpands)
        for (u32 i = blockIdx.x * kBlockThreads<C> + threadIdx.x;
             i < C::kLocalExperts * Expansion<C>::kColumns; i += gridDim.x * kBlockThreads<C>)
            p.expanded[i] = 0;
}

/// Quantises this rank's rows into the buffer, by all warps but the first, which waits in grid barrier 0 meanwhile; grid barrier 1 orders
/// them for all readers.  Work is dealt out from the last block back, since the first ones sort.
template <class C> MEGA_DEVICE void stage_rows(const Params& p) {
    // kGroups: groups of 128 columns in flight in each half of a warp
    constexpr u32 kBlocks = C::kHidden / kQuantBlock, kGroups = 2;
    const u32 warp = ptx::warp_id();
    if (warp == 0) return;
    const RowsToQuantise rows{p.raw_x,
                              p.raw_x_stride,
                              symmetric<u8>(p, p.rank, p.x),
                              symmetric<float>(p, p.rank, p.x_scales),
                              kBlocks,
                              p.tokens * kBlocks,
                              true};
    quantise_rows<Bf16, kGroups>(rows, (warp - 1) * gridDim.x + gridDim.x - 1 - blockIdx.x,
                                 (kBlockWarps<C> - 1) * gridDim.x);
}

/// By all threads of the block, for a record of thread 0.
template <class C> MEGA_DEVICE void did(Timeline<C>& timeline, Span what) {
    if (C::kTimeline && threadIdx.x == 0) timeline.done(what);
}

/// The head up to the expert table, by all threads of the block.  When it returns, the stages are free.
template <class C> MEGA_DEVICE void sort_and_meet(const Params& p, const Shared<C>& shared,
                                                  u32 epoch, Timeline<C>& timeline) {
    initialise<C>(p, shared);
    const Sort<C> sort(p, shared.scratch());
    sort.count();
    __syncthreads();
    did(timeline, Span::count);
    if (threadIdx.x == 0) grid_barrier(p, Wait::head_barrier, 0);
    if constexpr (C::kInputs == Inputs::raw) stage_rows<C>(p);
    __syncthreads();
    did(timeline, Span::count_barrier);
    sort.order();
    __syncthreads();
    did(timeline, Span::order);
    if (threadIdx.x < kMeetingThreads<C::kRanks>) meet<C::kRanks>(p, Meeting::inputs, epoch);
    __syncthreads();
    did(timeline, Span::order_barrier);
    if (ptx::warp_id() == 0) build_expert_table<C>(p, shared);
    ptx::fence_async_shared();   // the sort wrote the room of the stages by ordinary stores; TMA writes there next
    __syncthreads();
    did(timeline, Span::expert_table);
}

/// The end of the head, by all threads of the block: its warps copy the first rows, and expand weights where the variant does.
template <class C> MEGA_DEVICE void first_rows(const Gather<C>& gather, Timeline<C>& timeline) {
    gather.first_round();
    did(timeline, Span::first_round);
    if constexpr (C::Policy::kExpands) {
        Expansion<C>{gather.p, gather.shared, gather.table}.run();
        __syncthreads();   // all warps have waited for their bulk stores from the room of the stages
        did(timeline, Span::expand);
    }
}

template <class C> MEGA_DEVICE void run(const Params& p, u8* raw) {
    static_assert(C::kRanks <= kMaxRanks, "Params::peers has kMaxRanks");
    static_assert(C::kLocalExperts <= 1 << 16, "active experts have 16 bits");
    static_assert(C::kHidden % kBlockK == 0 && C::kIntermediate % kBlockK == 0, "whole k-blocks");
    static_assert(kGroup * (kProducerRegisters<C> + kMathGroups * kMathRegisters<C> +
                            C::Policy::kHelpers * kHelperRegisters<C>) <=
                      kBlockThreads<C> * kLaunchRegisters<C>,
                  "setmaxnreg would wait for ever for registers that the block does not have");
    const Shared<C> shared(raw);
    // block 0 stores the new epoch at the last meeting, when all blocks have read the old one
    const u32 epoch = C::kRanks > 1 ? p.control[kControlEpoch] + 1 : 0;
    Timeline<C> of_head(p, Role::head);
    sort_and_meet<C>(p, shared, epoch, of_head);
    const ExpertTable table = expert_table_of<C>(shared);
    // outlives the head: with several ranks what it found there serves warp 2
    const Gather<C> gather(p, shared, table);
    first_rows<C>(gather, of_head);
    const u32 warp = ptx::warp_id();
    if (warp < kGroupWarps) {
        ptx::registers_shrink<kProducerRegisters<C>>();
        const bool one = ptx::lane_id() == 0;
        // `else if`, not four `if`s: ptxas then sees that addresses in the math warps are uniform
        if (warp == 0) {
            if (one) LoadActivations<C>{p, shared, table}.run();
        } else if (warp == 1) {
            if (one) LoadWeights<C>{p, shared, table, table.two_sides ? shared.side() : 0}.run();
        } else if (warp == 2) {
            if constexpr (C::Policy::kExpands) {
                const ExpandShare share(p);
                if (share.dispatches())
                    dispatch_rest<C>(gather, share.dispatcher, share.dispatchers);
            } else {
                dispatch_rest<C>(gather, blockIdx.x, gridDim.x);
            }
        } else {
            Timeline<C> timeline(p, Role::publisher);
            if (one) publish_tiles<C>(p, shared, table, timeline);
            __syncwarp();
            Combine<C>{p, shared}.meet_all(epoch, timeline);
        }
    } else if (kHasHelpers<C> && warp >= kThreads / kWarp) {
        if constexpr (kHasHelpers<C>) {
            ptx::registers_shrink<kHelperRegisters<C>>();
            typename C::Policy::template Helper<C>{p, shared}.run();
        }
    } else {
        ptx::registers_grow<kMathRegisters<C>>();
        typename C::Policy::template Math<C>{p, shared, warp / kGroupWarps - 1}.run();
        Combine<C>{p, shared}.run();
    }
}

}   // namespace megamoe
