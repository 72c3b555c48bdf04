// The pools as rings: the wait before the rows of a pool block are overwritten (sched/experts.cuh).  Dispatch waits so for GEMM 1,
// and the activations lane for GEMM 2.
#pragma once
#include "comm/fault.cuh"
#include "sched/experts.cuh"

namespace megamoe {

/// Waits until `counters` are `expected` for the whole pool block that `row` belongs to, not just for the half that it is in.  A
/// pool block with 64 rows or fewer has no tile of 64 rows in its second half.  If each tile waited for its own half alone, the tile
/// that is there a lap later would find nothing to wait for, and nobody in between would have waited for the readers of the lap
/// before.
MEGA_DEVICE void wait_block(const Params& p, const ExpertTable& table, Wait what,
                            const u32* counters, u32 expected, u32 row) {
    const u32 block = row / kPoolAlign * kPoolAlign,
              rows = table.rows_from(table.expert_at(row / kPoolAlign), block);
    for (u32 r = 0; r < min_u32(rows, kPoolAlign); r += kCounterRows)
        wait_counter(p, what, counters + (block + r) / kCounterRows, expected,
                     (block + r) / kCounterRows);
}

}   // namespace megamoe
