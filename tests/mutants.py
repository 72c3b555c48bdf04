"""Mistakes put into a copy of the product, one at a time: a named test must fail for each.

    python -m tests.mutants [WORD ...]     those whose name has one of the words; all of them by default

A suite that passes says little about a line that no assertion depends on.  These are spot checks in every part of the
package, most of them of tests that once let such a mistake live.  Ends with 1 if a mutant lives, if its text is no
longer there exactly once, or if its test does not pass without it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

REPO = Path(__file__).resolve().parents[1]
NOT_COPIED = shutil.ignore_patterns(".git", ".venv*", "__pycache__", ".*_cache", "build", "dist", "bench-results")
SECONDS = 300  #: most that the tests of one mutant may take
PASSED, FAILED = 0, 1  #: exit codes of pytest


class Mutant(NamedTuple):
    """One mistake."""

    name: str  #: part of the package, and what goes wrong
    file: str
    old: str  #: is there exactly once
    new: str
    test: str  #: below tests/unit; fails


MUTANTS = (
    Mutant(
        "settings: a file wins over the environment",
        "megamoe_jit/_settings/settings.py",
        "if field not in values:",
        "if True:",
        "settings/test_settings_file.py::test_environment_wins_over_file_wins_over_default",
    ),
    Mutant(
        "compile: options of ptxas are not passed on",
        "megamoe_jit/_compile/toolchain.py",
        "for option in get_settings().ptxas_options)",
        "for option in ())",
        "compile/test_nvrtc.py::test_options",
    ),
    Mutant(
        "cache: the binary's digest is not compared",
        "megamoe_jit/_cache/entry.py",
        '    _check_digest(CUBIN, cubin, meta["cubin_sha256"])\n',
        "",
        "cache/test_store_damage.py::test_damage_is_quarantined_with_one_warning_and_heals",
    ),
    Mutant(
        "cache: the most recently used goes first",
        "megamoe_jit/_cache/evict.py",
        "(is_current(i), i.used_at, i.key)",
        "(is_current(i), -i.used_at, i.key)",
        "cache/test_evict.py::test_eviction_takes_the_least_recently_used_first_and_no_young_one",
    ),
    Mutant(
        "jit: failures are not remembered",
        "megamoe_jit/_jit/registry.py",
        "life.failure = error",
        "pass",
        "jit/test_runtime.py::test_failure_is_remembered_until_retry",
    ),
    Mutant(
        "jit: a forked child waits for a lock of its parent",
        "megamoe_jit/_jit/registry.py",
        "        self._lock = threading.Lock()\n        for life",
        "        for life",
        "jit/test_runtime_threads.py::test_child_of_a_fork_needs_no_lock_that_a_thread_of_its_parent_held",
    ),
    Mutant(
        "jit: a forked child waits for a compilation of its parent",
        "megamoe_jit/_jit/registry.py",
        "values():\n            life.running = None",
        "values():\n            pass",
        "jit/test_runtime_threads.py::test_child_of_a_fork_compiles_what_a_thread_of_its_parent_was_compiling",
    ),
    Mutant(
        "device: a forked child waits for a load of its parent",
        "megamoe_jit/_device/load.py",
        'release the lock."""\n        self.lock = threading.Lock()',
        'release the lock."""',
        "cache/test_locks.py::test_child_forked_while_a_thread_holds_a_lock_can_take_it",
    ),
    Mutant(
        "device: tensor maps with a swizzle of 64 bytes",
        "megamoe_jit/_device/tensor_map.py",
        "_SWIZZLE_128B = 3",
        "_SWIZZLE_128B = 2",
        "device/test_tensor_map.py::test_a_descriptor_is_of_bytes_in_boxes_as_wide_as_the_swizzle",
    ),
    Mutant(
        "device: a launch that is not cooperative",
        "megamoe_jit/_device/launch.py",
        "attributes[-1].value.cooperative = 1",
        "attributes[-1].value.cooperative = 0",
        "device/test_launch.py::test_launch_passes_config_and_parameters",
    ),
    Mutant(
        "device: a ring that ends within a block of rows",
        "megamoe_jit/_device/layout.py",
        "_up(max(max_pool_rows, MIN_POOL_ROWS), POOL_ALIGN)",
        "max(max_pool_rows, MIN_POOL_ROWS)",
        "device/test_layout.py::test_rows_of_every_array_can_be_moved_by_sixteen_bytes",
    ),
    Mutant(
        "layer: a call on another stream waits for nothing",
        "megamoe_jit/_layer/stream_order.py",
        "            stream.wait_stream(last.stream)",
        "            pass",
        "layer/test_calls.py::test_a_call_on_another_stream_waits_for_the_last_one",
    ),
    Mutant(
        "layer: steady options that equal right ones are right",
        "megamoe_jit/_layer/steady.py",
        "not all(map(is_, options, known.options))",
        "options != known.options",
        "layer/test_steady.py::test_what_equals_a_right_option_is_refused_after_it_as_before",
    ),
    Mutant(
        "layer: weights at a known address are the known ones",
        "megamoe_jit/_layer/bound_kernel.py",
        "known() is not tensor or ",
        "",
        "layer/test_calls.py::test_weights_at_a_known_address_are_checked_unless_they_are_the_same_tensors",
    ),
    Mutant(
        "layer: a branch of a graph is not remembered",
        "megamoe_jit/_layer/stream_order.py",
        "        last.handle = None  # from here on every launch has to ask\n",
        "",
        "layer/test_calls.py::test_branches_of_a_graph_take_turns",
    ),
    Mutant(
        "layer: ranks prepare only the kernel of their own call",
        "megamoe_jit/_layer/kernel_set.py",
        "        if self._place.ranks == 1:",
        "        if True:",
        "layer/test_calls_first.py::test_once_prepared_or_in_a_capture_ranks_do_not_meet",
    ),
    Mutant(
        "heuristics: a choice reads the settings behind the caller's back",
        "heuristics/select.py",
        "    if not isinstance(variant, str) or variant != AUTO:\n",
        "    from megamoe_jit._settings.settings import get_settings\n"
        "    if cooperative_threshold is None:\n"
        "        cooperative_threshold = get_settings().cooperative_threshold\n"
        "    if not isinstance(variant, str) or variant != AUTO:\n",
        "heuristics/test_select.py::test_a_choice_depends_on_nothing_but_its_arguments",
    ),
    Mutant(
        "check: a row passes if one of its numbers is finite",
        "megamoe_jit/_check/verify.py",
        "bad = ~y.isfinite().all(dim=-1)",
        "bad = ~y.isfinite().any(dim=-1)",
        "check/test_verify.py::test_judge_looks_at_every_number_of_a_row",
    ),
    Mutant(
        "bench: of several ranks the experts that all of them touch count",
        "megamoe_jit/_bench/rows.py",
        "sum(count > 0 for count in rows[first : first + own])",
        "sum(count > 0 for count in rows)",
        "bench/test_unfused.py::test_the_weights_that_a_rank_reads_are_those_that_the_tokens_of_any_rank_need",
    ),
    Mutant(
        "bench: a measurement does not say that files were changed",
        "benchmarks/checkout.py",
        'return f"{head}-dirty" if',
        "return head if",
        "benchmarks/test_bench.py::test_a_measurement_names_the_commit_it_was_made_of",
    ),
    Mutant(
        "bench: the first calls of a burst count too",
        "megamoe_jit/_bench/clock.py",
        "in pairs[len(pairs) // 2 :]]",
        "in pairs]",
        "bench/test_measure.py::test_only_the_later_half_of_a_burst_counts",
    ),
    Mutant(
        "command line: an interrupt ends as a failure does",
        "megamoe_jit/_cli/app.py",
        "ctx.exit(ExitCode.INTERRUPTED)",
        "ctx.exit(ExitCode.FAILED)",
        "cli/test_cli_terminal.py::test_ctrl_c_at_a_question_removes_nothing",
    ),
    Mutant(
        "kernels: rows of a ring are loaded before the second GEMM is done with those they replace",
        "kernels_src/roles/load.cuh",
        "if (first && tile.row >= p.pool_rows)",
        "if (first && tile.row >= 2 * p.pool_rows)",
        "kernels/test_protocol_sim.py::test_any_interleaving_gives_the_right_result[1]",
    ),
    Mutant(
        "kernels: results of many tokens are scattered at offsets of 32 bits",
        "kernels_src/epilogue/scatter.cuh",
        "u64(pair) * (C::kHidden * 2)",
        "pair * (C::kHidden * 2)",
        "kernels/test_addresses.py::test_offsets_beyond_4_gib_do_not_wrap",
    ),
    Mutant(
        "kernels: a rank signals in a word of its neighbour",
        "kernels_src/comm/barriers.cuh",
        "* kMaxRanks + p.rank, epoch);",
        "* kMaxRanks + r, epoch);",
        "kernels/test_protocol_sim.py::test_any_interleaving_gives_the_right_result[2]",
    ),
    Mutant(
        "nodes: a gather form that leaves ids as all ranks count them",
        "megamoe_jit/_nodes/along_rails.py",
        "        if first_expert:",
        "        if not rows:",
        "nodes/test_layer.py::test_every_route_has_the_bits_that_the_definition_says",
    ),
    Mutant(
        "nodes: a call that masks no rows past its tokens",
        "megamoe_jit/_nodes/buffer.py",
        "        if rows > tokens:",
        "        if rows > tokens + rows:",
        "nodes/test_layer.py::test_rows_past_the_tokens_are_masked_on_every_call",
    ),
    Mutant(
        "nodes: nodes are summed from the last one",
        "megamoe_jit/_nodes/passes.py",
        "torch.split(back, len(back) // nodes)]",
        "torch.split(back, len(back) // nodes)][::-1]",
        "nodes/test_layer.py::test_nodes_are_summed_in_order_in_fp32_and_rounded_once",
    ),
    Mutant(
        "nodes: nodes are summed in bf16",
        "megamoe_jit/_nodes/passes.py",
        "total = parts[0].float()",
        "total = parts[0]",
        "nodes/test_layer.py::test_every_route_has_the_bits_that_the_definition_says",
    ),
    Mutant(
        "nodes: an exact form that looks at the first slot alone",
        "megamoe_jit/_nodes/passes.py",
        "(node == every_node).any(dim=2)",
        "(node[:, :1] == every_node).any(dim=2)",
        "nodes/test_layer.py::test_every_route_has_the_bits_that_the_definition_says",
    ),
    Mutant(
        "nodes: an exact form that sends rows everywhere",
        "megamoe_jit/_nodes/passes.py",
        "(node == every_node).any(dim=2)",
        "(node >= 0 * every_node).any(dim=2)",
        "nodes/test_layer.py::test_64_ranks_and_every_byte",
    ),
    Mutant(
        "nodes: an exact form that sums what was never sent",
        "megamoe_jit/_nodes/passes.py",
        "back.new_zeros(1, back.shape[1])",
        "back.new_ones(1, back.shape[1])",
        "nodes/test_layer.py::test_every_route_has_the_bits_that_the_definition_says",
    ),
    Mutant(
        "nodes: an exact form that packs rows after the host has waited",
        "megamoe_jit/_nodes/along_rails.py",
        "        packed = passes.pack",
        "        counts()\n        packed = passes.pack",
        "nodes/test_one_node.py::test_rows_are_packed_before_the_host_waits_for_counts",
    ),
    Mutant(
        "nodes: a pass that unpacks leaves ids as all ranks count them",
        "megamoe_jit/_nodes/pass_kernels.py",
        '"first_expert": first_expert',
        '"first_expert": 0',
        "nodes/test_passes.py::test_a_pass_is_a_launch_with_the_bits_of_its_definition",
    ),
    Mutant(
        "nodes: chunks leave nothing to what travels",
        "megamoe_jit/_nodes/buffer.py",
        "self._experts.sms_beside(self.comm_ctas)",
        "self._experts.sms_beside(0)",
        "nodes/test_layer.py::test_chunks_leave_blocks_to_what_travels",
    ),
    Mutant(
        "nodes: a rank without tokens makes no call",
        "megamoe_jit/_nodes/buffer.py",
        "                self._run_across(y, rows, l1, l2, options)",
        "                tokens and self._run_across(y, rows, l1, l2, options)",
        "nodes/test_layer.py::test_every_route_has_the_bits_that_the_definition_says",
    ),
    Mutant(
        "nodes: the variant is that of the rows that arrive",
        "megamoe_jit/_nodes/buffer.py",
        "variant=self._experts.variant_for(rows, options))",
        "variant=options.variant)",
        "nodes/test_one_node.py::test_the_variant_is_that_of_a_ranks_rows_in_every_form",
    ),
    Mutant(
        "nodes: one node goes by way of an exchange",
        "megamoe_jit/_nodes/memory.py",
        "self._alone = topology.nodes == 1 and whole",
        "self._alone = topology.nodes == 0 and whole",
        "nodes/test_one_node.py::test_one_node_is_the_launch_of_the_node_and_nothing_else",
    ),
    Mutant(
        "nodes: a loss poisons nothing",
        "megamoe_jit/_nodes/memory.py",
        "        self._broken = error\n        for experts",
        "        for experts",
        "nodes/test_one_node.py::test_a_loss_names_node_and_rank_poisons_and_destroy_asks_nobody",
    ),
    Mutant(
        "nodes: a loss leaves the node's buffer as it was",
        "megamoe_jit/_nodes/memory.py",
        "            experts.buffer.poison(error)",
        "            experts.has_fault()",
        "nodes/test_one_node.py::test_a_loss_names_node_and_rank_poisons_and_destroy_asks_nobody",
    ),
    Mutant(
        "nodes: what waits for the host is captured",
        "megamoe_jit/_nodes/choice.py",
        "if capturing and not one.capturable:",
        "if not capturing and not one.capturable:",
        "nodes/test_one_node.py::test_a_capture_needs_what_can_be_captured_and_what_is_prepared",
    ),
    Mutant(
        "nodes: packed weights by a kernel of others",
        "megamoe_jit/_nodes/experts.py",
        "options.num_sms, weights=options.weights)",
        "options.num_sms)",
        "nodes/test_one_node.py::test_packed_weights_are_another_kernel",
    ),
    Mutant(
        "nodes: results in float32 by a kernel of bf16",
        "megamoe_jit/_nodes/experts.py",
        "wide = dtype is torch.float32",
        "wide = dtype is torch.float16",
        "nodes/test_one_node.py::test_partials_in_float32_are_another_kernel",
    ),
    Mutant(
        "nodes: the row after the last one counts",
        "megamoe_jit/_layer/memory.py",
        "(row >= num_rows.to(torch.int64))",
        "(row > num_rows.to(torch.int64))",
        "nodes/test_local_experts.py::test_rows_past_the_count_are_zeros_whatever_lies_there",
    ),
    Mutant(
        "nodes: rows between experts count",
        "megamoe_jit/_layer/local_experts.py",
        "(row - first < counts[known])",
        "(row >= first)",
        "nodes/test_local_experts.py::test_rows_by_expert_get_their_ids_on_the_device",
    ),
    Mutant(
        "nodes: ids that are no expert reach DeepEP",
        "megamoe_jit/_nodes/deep_ep.py",
        "ids = torch.where((mine.topk_idx >= 0) & (mine.topk_idx < all_experts), mine.topk_idx, -1)",
        "ids = mine.topk_idx",
        "nodes/test_adapters.py::test_deep_ep",
    ),
    Mutant(
        "nodes: DeepEP's count is not taken",
        "megamoe_jit/_nodes/deep_ep.py",
        "count = None if self._wait else",
        "count = None if not self._wait else",
        "nodes/test_adapters.py::test_deep_ep",
    ),
    Mutant(
        "nodes: a roll call misses those who are there",
        "megamoe_jit/_nodes/roll_call.py",
        "if old[0] == new[0]:",
        "if old[0] != new[0]:",
        "nodes/test_gloo.py::test_every_other_rank_says_in_time_which_node_and_rank_is_lost",
    ),
    Mutant(
        "nodes: a roll call misses those who gave notice",
        "megamoe_jit/_nodes/roll_call.py",
        "if rank == self.rank or noticed[rank]:",
        "if rank == self.rank:",
        "nodes/test_gloo.py::test_who_has_given_notice_is_not_missed",
    ),
    Mutant(
        "nodes: ranks mean different calls in debug mode",
        "megamoe_jit/_nodes/buffer.py",
        '{"padded_tokens": rows if not self._alone else 0}',
        '{"padded_tokens": 0}',
        "nodes/test_gloo.py::test_what_one_rank_does_wrong_is_refused_on_all",
    ),
    Mutant(
        "nodes: a rail waits longer than a kernel",
        "megamoe_jit/_nodes/calls.py",
        "min(PATIENCE_S, PATIENCE * deadline)",
        "PATIENCE_S",
        "nodes/test_one_node.py::test_a_rail_gives_up_before_a_kernel_does",
    ),
    Mutant(
        "nodes: nobody asks the rail while the device works",
        "megamoe_jit/_nodes/memory.py",
        "        if not self._alone and not faults and not is_capturing():",
        "        if self._alone and not faults and not is_capturing():",
        "nodes/test_check.py::test_a_rank_that_is_lost_is_named_and_nothing_waits_after_that",
    ),
    Mutant(
        "nodes: what travels waits for kernels to end",
        "megamoe_jit/_nodes/rail.py",
        "    options.config.cga_cluster_size = 1\n",
        "",
        "nodes/test_ranks.py::test_what_travels_fits_beside_a_kernel",
    ),
    Mutant(
        "nodes: a small call is cut as a large one",
        "megamoe_jit/_nodes/choice.py",
        "        if not self._cut_by_rule:",
        "        if chunks:",
        "nodes/test_layer.py::test_the_rule_cuts_a_call_by_its_rows",
    ),
    Mutant(
        "nodes: nodes are cut anywhere",
        "megamoe_jit/_nodes/ranks.py",
        "places[i] != places[i - i % size]",
        "places[i] != places[i]",
        "nodes/test_ranks.py::test_nodes_of_different_sizes_and_other_orders_are_refused",
    ),
    Mutant(
        "checkpoints: an index may name files elsewhere",
        "megamoe_jit/checkpoints/files.py",
        " or not stays_inside(file)",
        "",
        "checkpoints/test_refusals.py::test_damaged_files",
    ),
    Mutant(
        "checkpoints: a later expert of other sizes is taken",
        "megamoe_jit/checkpoints/stored.py",
        "if (kind, shape) != (self.kind, self._shapes[part]):",
        "if False:",
        "checkpoints/test_refusals.py::test_experts_that_are_not_there",
    ),
    Mutant(
        "checkpoints: what is finished is believed",
        "megamoe_jit/checkpoints/convert.py",
        "            _verify(path, known)\n",
        "            pass\n",
        "checkpoints/test_convert.py::test_a_finished_file_that_changed_is_an_error",
    ),
    Mutant(
        "transformers: weights do not come back to another implementation",
        "megamoe_jit/transformers/adapter.py",
        "    module.register_forward_pre_hook(_before_forward)\n",
        "",
        "transformers/test_in_place.py::test_whoever_wants_the_weights_gets_them",
    ),
    Mutant(
        "transformers: a write in place is not seen",
        "megamoe_jit/transformers/adapter.py",
        "            and self.version == _version_of(parameter)\n",
        "",
        "transformers/test_models.py::test_values_that_change_are_the_layers_from_the_next_call_on",
    ),
    Mutant(
        "transformers: a gate is believed",
        "megamoe_jit/transformers/experts.py",
        "if found.shape == wanted.shape and torch.allclose(found, wanted, rtol=_TOLERANCE, atol=_TOLERANCE):",
        "if True:",
        "transformers/test_models.py::test_an_experts_module_is_refused_with_the_reason",
    ),
)


def run_tests(folder: Path, names: Iterable[str], cache: str) -> tuple[int, str]:
    """Exit code of pytest, and the end of what it said."""
    tests = [f"tests/unit/{name}" for name in names]
    ours = {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "HYPOTHESIS_STORAGE_DIRECTORY": cache}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(
            command, cwd=folder, env={**os.environ, **ours}, capture_output=True, text=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        return -1, f"longer than {SECONDS} s"
    return done.returncode, "\n".join((done.stdout + done.stderr).splitlines()[-15:])


def judge(mutant: Mutant, folder: Path, cache: str) -> str:
    """What is wrong; empty if the test noticed the mutant."""
    path = folder / mutant.file
    text = path.read_text(encoding="utf-8")
    count = text.count(mutant.old)
    if count != 1:
        return f"{mutant.file} has {mutant.old!r} {count} times; adapt the mutant to its new text"
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        code, said = run_tests(folder, [mutant.test], cache)
    finally:
        path.write_text(text, encoding="utf-8")
    if code == FAILED:
        return ""
    return f"it lives: {mutant.test} passes" if code == PASSED else f"{mutant.test} did not run ({code}):\n{said}"


def main(words: Sequence[str]) -> int:
    """Judge those whose name has one of the words."""
    chosen = [mutant for mutant in MUTANTS if not words or any(word in mutant.name for word in words)]
    if not chosen:
        sys.stderr.write(f"no mutant has one of these words in its name: {' '.join(words)}\n")
        return 2
    with tempfile.TemporaryDirectory(prefix="megamoe-jit-mutants-") as place:
        folder = Path(place, "product")
        shutil.copytree(REPO, folder, symlinks=True, ignore=NOT_COPIED)
        code, said = run_tests(folder, dict.fromkeys(mutant.test for mutant in chosen), place)
        if code != PASSED:
            sys.stderr.write(f"the tests do not pass as it is ({code}):\n{said}\n")
            return 1
        problems = 0
        for mutant in chosen:
            problem = judge(mutant, folder, place)
            problems += bool(problem)
            sys.stdout.write(f"{mutant.name}: {problem or 'noticed'}\n")
            sys.stdout.flush()
    sys.stdout.write(f"{len(chosen) - problems} of {len(chosen)} mutants were noticed\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
