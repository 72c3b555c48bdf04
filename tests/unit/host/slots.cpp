// Expert and weight of every slot, by the code of the kernels.  Arguments: which sizes, the rank, and where the inputs come from:
// the buffer, or the caller with ids of 64 or 32 bits.  Standard input: tokens * routed slots ids of 64 bits.  The n-th has the
// weight n.  Standard output: for each slot its expert, 64 bits, and its weight, a float.
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "base/types.cuh"
#include "intrinsics.h"

template <class T> static T __shfl_xor_sync(unsigned, T value, unsigned) { return value; }

#include "stage/inputs.cuh"

using namespace megamoe;

template <u32 routed, u32 shared, u32 ranks, u32 topk, Inputs inputs> struct Config {
    static constexpr u32 kLocalExperts = routed + shared, kRanks = ranks, kExperts = kLocalExperts * ranks;
    static constexpr u32 kTopK = topk + shared, kShared = shared;
    static constexpr Inputs kInputs = inputs;
};

template <class C> static void run(Params& p, const std::vector<i64>& ids, bool narrow) {
    constexpr u32 kRouted = kRoutedSlots<C>, kStride = kRouted + 3;   // of rows of the caller
    const u32 tokens = ids.size() / kRouted;
    std::vector<float> weights(ids.size()), far_weights(tokens * kStride);
    std::vector<i64> far_ids(tokens * kStride, 0x7777777777777777);
    for (u32 i = 0; i < ids.size(); ++i) {
        const u32 at = i / kRouted * kStride + i % kRouted;
        weights[i] = i, far_weights[at] = i / 2.0f;
        std::memcpy(reinterpret_cast<u8*>(far_ids.data()) + at * (narrow ? 4 : 8), &ids[i], narrow ? 4 : 8);
    }
    p.peers[p.rank] = reinterpret_cast<u64>(ids.data());
    p.topk_weights = reinterpret_cast<u64>(weights.data()) - p.peers[p.rank];
    p.raw_ids = reinterpret_cast<const u8*>(far_ids.data()), p.raw_weights = reinterpret_cast<const u8*>(far_weights.data());
    p.raw_ids_stride = p.raw_weights_stride = kStride, p.raw_formats = narrow ? 0 : kRawIds64;
    p.weight_factor = 2, p.shared_weight = -0.5f;
    for (u32 pair = 0; pair < tokens * C::kTopK; ++pair) {
        const i64 id = input_id<C>(p, pair);
        const float weight = input_weight<C>(p, pair);
        std::fwrite(&id, 8, 1, stdout);
        std::fwrite(&weight, 4, 1, stdout);
    }
}

template <u32 routed, u32 shared, u32 ranks, u32 topk> static void sizes(Params& p, const std::vector<i64>& ids, const std::string& from) {
    if (from == "buffer") run<Config<routed, shared, ranks, topk, Inputs::staged>>(p, ids, false);
    else run<Config<routed, shared, ranks, topk, Inputs::raw>>(p, ids, from == "32");
}

int main(int, char** arguments) {
    static Params p;
    p.rank = std::stoul(arguments[2]);
    std::vector<i64> ids;
    for (i64 id; std::fread(&id, 8, 1, stdin) == 1;) ids.push_back(id);
    const std::string which = arguments[1], from = arguments[3];
    if (which == "4 0 2 3") sizes<4, 0, 2, 3>(p, ids, from);
    else if (which == "1 1 1 1") sizes<1, 1, 1, 1>(p, ids, from);
    else if (which == "3 5 4 2") sizes<3, 5, 4, 2>(p, ids, from);
    else if (which == "32 1 8 6") sizes<32, 1, 8, 6>(p, ids, from);
    else if (which == "5 24 2 8") sizes<5, 24, 2, 8>(p, ids, from);
    else return 1;
}
