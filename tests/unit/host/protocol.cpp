// Runs the kernels on virtual ranks: several launches with inputs of chance, each rank's host as fast as the dice let it.
//
//   protocol KEY=VALUE ...     exit code 0 and a line of counts, or 1 and what went wrong
//
// configs.h is made by the test: the `Config` of every variant, each in a namespace of its own.
#include "sim/engine.h"
#include "sim/model.h"

#include "kernels/megamoe.cuh"

#include "configs.h"

#include "sim/host.h"

void megamoe::ptx::gave_up(u32 who, u32 which, u32 expected, u32 seen) {
    char line[160];
    std::snprintf(line, sizeof line, "fault %u %u %u %u %u\n", sim::now->warp->block->rank, who, which, expected, seen);
    sim::story += line;
    while (true) sim::sleep("gone");
}

void sim::run_kernel(Block& block) {
    const auto& launch = *static_cast<const Launch*>(block.launch);
    with_config(launch.variant, [&](auto config) { megamoe::run<decltype(config)>(launch.params, block.shared); });
}

int main(int count, char** arguments) {
    sim::Run run;
    for (int i = 1; i < count; ++i) run.option(arguments[i]);
    run.start();
    sim::run_all([&] { return run.hosts(); });
    run.finish();
}
