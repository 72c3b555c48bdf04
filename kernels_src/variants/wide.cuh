// wide: as decode, with tiles of up to 128 rows, for weights that are expanded on their way into a product: once for all of them.
#pragma once
#include "variants/decode.cuh"

namespace megamoe {

struct Wide : Decode {
    static constexpr u32 kBlockM = 128;

    /// 32, 64, 80, 96, 128.
    MEGA_DEVICE static constexpr u32 wider(u32 columns) {
        return columns < 64 ? columns + 32 : columns < 96 ? columns + 16 : 128;
    }
    /// 64 columns are half of the loop of 128 (mma/one_by_one.cuh).
    MEGA_DEVICE static constexpr u32 next_loop(u32 columns) {
        return columns == 32 ? 80 : wider(columns);
    }
    MEGA_DEVICE static constexpr u32 needed(u32 rows) {
        return rows > 32 && rows <= 64 ? 128 : rows;
    }
    static constexpr bool kAtOnce = false;   // its tiles are seldom narrow
};

}   // namespace megamoe
