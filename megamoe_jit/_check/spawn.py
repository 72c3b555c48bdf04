"""Several ranks on one host: one fresh process each, watched by their parent.

The parent keeps the rendezvous store, so that no rank takes it along when it dies.  Ranks talk to the parent through
files that they only append to: what a rank said before it was killed is not lost.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

POLL_S = 0.05
LOG_TAIL = 6000  #: characters of a rank's output that a report shows
CHILD = "from megamoe_jit._check.spawn import child; child()"


@dataclass(frozen=True)
class World:
    """This process's place among the ranks; the default process group is initialised."""

    rank: int
    ranks: int
    device: Any  #: torch.device
    report: Callable[[Any], None]  #: says something to the parent, as JSON


@dataclass
class RankEnd:
    """What became of one rank."""

    rank: int
    returncode: int | None = None  #: None: it was still running when it was killed by its parent
    messages: list[Any] = field(default_factory=list)  #: what it reported
    result: Any = None  #: what the function returned
    finished: bool = False  #: the function returned
    error: str = ""  #: traceback, if it raised
    log: str = ""  #: end of what it printed

    @property
    def ok(self) -> bool:
        """The function returned and the process ended by itself with code 0."""
        return self.finished and self.returncode == 0


def describe(ends: Sequence[RankEnd]) -> str:
    """Every rank's end in words, with what the failed ones said; for a report."""
    parts = []
    for end in ends:
        if end.ok:
            parts.append(f"rank {end.rank}: finished")
            continue
        how = "did not end and was killed" if end.returncode is None else f"ended with code {end.returncode}"
        text = "\n".join(part for part in (end.error.strip(), end.log.strip()) if part)
        parts.append(f"rank {end.rank}: {how}" + (f"\n{text}" if text else ""))
    return "\n".join(parts)


class _Child:
    """One rank's process, its message file read as it grows."""

    def __init__(self, folder: Path, rank: int, environment: Mapping[str, str]) -> None:
        self.end = RankEnd(rank)
        self._messages, self._log = folder / f"messages.{rank}", folder / f"log.{rank}"
        self._messages.touch()
        self._position = 0
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", CHILD, str(folder), str(rank)],
                stdin=subprocess.PIPE,  # its end tells the rank that the parent is gone
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**environment},
                start_new_session=True,  # an interrupt reaches the parent alone, which then ends the ranks
            )

    def read(self) -> list[Any]:
        """New reports."""
        with self._messages.open("rb") as file:
            file.seek(self._position)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._position += len(whole)
        reports = []
        for line in whole.splitlines():
            kind, value = json.loads(line)
            if kind == "report":
                self.end.messages.append(value)
                reports.append(value)
            elif kind == "result":
                self.end.result, self.end.finished = value, True
            else:
                self.end.error = value
        return reports

    def close(self) -> None:
        """Note how it ended; kill it if it has not."""
        self.end.returncode = self.process.poll()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.read()
        self.end.log = self._log.read_text(errors="replace")[-LOG_TAIL:]


def _environment(extra: Mapping[str, str]) -> dict[str, str]:
    path = os.pathsep.join(dict.fromkeys(part or os.getcwd() for part in sys.path))
    alone = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {**{k: v for k, v in os.environ.items() if k not in alone}, "PYTHONPATH": path, **extra}


def run_ranks(
    target: str,
    ranks: int,
    arguments: Mapping[str, Any] | None = None,
    *,
    device: str = "cuda",
    timeout_s: float = 600.0,
    grace_s: float = 30.0,
    group_timeout_s: float = 300.0,
    environment: Mapping[int, Mapping[str, str]] | None = None,
    on_report: Callable[[int, Any], None] = lambda _, __: None,
    losses: int = 0,
) -> list[RankEnd]:
    """Run a function on every rank, each in a process of its own; never waits longer than `timeout_s`.

    Args:
        target: `module:function`; called as ``function(world, **arguments)``, returns what JSON can hold.
        ranks: how many.
        arguments: what JSON can hold.
        device: `cuda` (rank r has GPU r) or `cpu`.
        timeout_s: after this all ranks are killed.
        grace_s: how long the others may go on when one rank has failed.
        group_timeout_s: of collectives on the process group.
        environment: more variables, by rank.
        on_report: called here with rank and report as they come.
        losses: how many ranks may die without the others being ended for it.

    Returns:
        How each rank ended, by rank; nothing is raised for a rank that failed.
    """
    deadline = time.monotonic() + timeout_s
    with tempfile.TemporaryDirectory(prefix="megamoe-jit-ranks-") as name:
        store = _tcp_store()("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        job = {
            "target": target,
            "ranks": ranks,
            "arguments": dict(arguments or {}),
            "device": device,
            "port": store.port,
            "group_timeout_s": group_timeout_s,
        }
        Path(name, "job.json").write_text(json.dumps(job), encoding="utf-8")
        children: list[_Child] = []
        try:
            for rank in range(ranks):
                children.append(_Child(Path(name), rank, _environment((environment or {}).get(rank, {}))))
            _watch(children, deadline, grace_s, losses, on_report)
        finally:
            for child in children:
                child.close()
        del store
    return [child.end for child in children]


def _watch(
    children: Sequence[_Child],
    deadline: float,
    grace_s: float,
    losses: int,
    on_report: Callable[[int, Any], None],
) -> None:
    shortened = False
    while True:
        codes = [child.process.poll() for child in children]  # before reading: what an ended rank said is all there
        for child in children:
            for report in child.read():
                on_report(child.end.rank, report)
        if all(code is not None for code in codes) or time.monotonic() > deadline:
            return
        if not shortened and sum(code not in (None, 0) for code in codes) > losses:
            shortened, deadline = True, min(deadline, time.monotonic() + grace_s)
        time.sleep(POLL_S)


def target_function(target: str) -> Callable[..., Any]:
    """The function that `module:name` means."""
    module, _, name = target.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


def child() -> None:
    """Entry point of a rank's process: folder and rank are the arguments of the command line."""
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    threading.Thread(target=_end_with_parent, daemon=True).start()
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    with (folder / f"messages.{rank}").open("a", encoding="utf-8") as out:

        def say(kind: str, value: Any) -> None:
            out.write(json.dumps([kind, value]) + "\n")
            out.flush()

        try:
            import torch.distributed as dist

            world = _start(rank, job, lambda value: say("report", value))
            say("result", target_function(job["target"])(world, **job["arguments"]))
            gc.collect()  # a group that an old traceback still holds would be torn down at exit, and may abort
            dist.destroy_process_group()
            gc.collect()
        except BaseException:
            say("error", traceback.format_exc())
            sys.stderr.flush()
            os._exit(1)  # after a failure, the teardown of NCCL or of a broken CUDA context may wait for ever


def _end_with_parent() -> None:
    os.read(0, 1)  # nothing is ever written: this returns when the parent is gone
    os._exit(1)


def _start(rank: int, job: Mapping[str, Any], report: Callable[[Any], None]) -> World:
    timeout_s, ranks = job["group_timeout_s"], job["ranks"]
    store = _tcp_store()("127.0.0.1", job["port"], is_master=False, timeout=timedelta(seconds=timeout_s))
    device = join_group(job["device"], rank, timeout_s, store=store, rank=rank, world_size=ranks)
    return World(rank, ranks, device, report)


def own_gpu(local_rank: int) -> int:
    """The GPU of a rank among those its process sees: the only one, where `CUDA_VISIBLE_DEVICES` leaves it one."""
    import torch

    return local_rank if torch.cuda.device_count() > 1 else 0


def _tcp_store() -> Any:
    import torch.distributed as dist

    return vars(dist)["TCPStore"]  # torch's stubs do not export it


def join_group(device: str, local_rank: int, timeout_s: float, **more: Any) -> Any:
    """Join the default process group: gloo for what is said on the host, NCCL (begun when first used) for tensors.

    Gives the torch device of this rank, `cuda` or `cpu`; a GPU is the current one from then on.
    """
    import torch
    import torch.distributed as dist

    own, backends = torch.device("cpu"), "gloo"
    if device == "cuda":
        own, backends = torch.device("cuda", own_gpu(local_rank)), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(own)
    dist.init_process_group(backends, timeout=timedelta(seconds=timeout_s), **more)
    return own
