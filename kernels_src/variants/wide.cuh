// wide: as decode, with tiles of up to 80 rows, for weights that are expanded on their way into a product: once for all of them.
#pragma once
#include "variants/decode.cuh"

namespace megamoe {

struct Wide : Decode {
    static constexpr u32 kBlockM = 80;
    static constexpr u32 kColumnsAtOnce = 0;   // few tiles have so few, and it would take longer to compile

    /// 32, 64, 80.
    MEGA_DEVICE static constexpr u32 wider(u32 columns) {
        return columns < 64 ? columns + 32 : columns + 16;
    }
};

}   // namespace megamoe
