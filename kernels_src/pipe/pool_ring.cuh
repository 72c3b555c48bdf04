// The pools as rings: what has to be over before the rows of a block may be written anew (sched/experts.cuh).
#pragma once
#include "comm/fault.cuh"
#include "sched/experts.cuh"

namespace megamoe {

/// Waits until `counters` say `expected` for the whole block of 128 rows of which `row` is one, not just for that half of
/// it: where the block has 64 rows or fewer, no tile of 64 rows ever wrote its second half, so none has waited for who
/// read it a ring before.
MEGA_DEVICE void wait_block(const Params& p, const ExpertTable& table, Wait what,
                            const u32* counters, u32 expected, u32 row) {
    const u32 block = row / kPoolAlign * kPoolAlign,
              rows = table.rows_from(table.expert_at(row / kPoolAlign), block);
    for (u32 r = 0; r < min_u32(rows, kPoolAlign); r += kCounterRows)
        wait_counter(p, what, counters + (block + r) / kCounterRows, expected,
                     (block + r) / kCounterRows);
}

}   // namespace megamoe
