"""Processes killed at random moments of a compile and a publish never leave an entry that is used and wrong."""

from __future__ import annotations

import json
import random
import subprocess
import sys

from tests.stubs import child_environment, write_rooms

ROUNDS = 200

#: Forks a process per round that gets a kernel with a compiler that sleeps, and kills it; then looks at the cache.
NURSERY = """
import json, logging, os, random, signal, sys, time
from megamoe_jit._jit import obtain as _obtain
from megamoe_jit._cache.cache import KernelCache
from megamoe_jit._compile.nvrtc import compile_source
from megamoe_jit._compile.render import render
from megamoe_jit._jit.lookup import Wanted
from megamoe_jit._jit.obtain import get_kernel
from megamoe_jit._cache.cache import user_cache
from megamoe_jit._spec import KernelSpec, MoEShape, Variant
from megamoe_jit._compile.toolchain import find_toolchain

rounds, seed = int(sys.argv[1]), int(sys.argv[2])
random.seed(seed)
spec = KernelSpec(MoEShape(256, 128, 8, 2), Variant.PINGPONG)
good = compile_source(render(spec).text, kernel_name=spec.kernel_name, toolchain=find_toolchain())
warned = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: warned.append(record.getMessage())
logging.getLogger("megamoe_jit").addHandler(handler)

def stub(text, *, kernel_name, toolchain):
    time.sleep(random.uniform(0, 0.004))
    return good

_obtain.compile_source = stub
key = Wanted.of(spec).key
cache = user_cache()

def child():
    random.seed(os.urandom(8))
    kernel = get_kernel(spec)
    os._exit(0 if kernel.cubin == good.cubin else 1)

def run(delay):
    pid = os.fork()
    if pid == 0:
        child()
    if delay is not None:
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]

spans = []
for _ in range(5):
    begin = time.perf_counter()
    assert run(None) == 0
    spans.append(time.perf_counter() - begin)
    cache.remove([key])
span = sorted(spans)[2]
counts = {"killed": 0, "finished": 0, "published": 0, "bad": 0}
for _ in range(rounds):
    status = run(random.uniform(0, 1.1 * span))
    counts["killed" if os.WIFSIGNALED(status) else "finished"] += 1
    counts["bad"] += not os.WIFSIGNALED(status) and status != 0
    entry = KernelCache(cache.root).load(key)
    if entry is not None:
        counts["published"] += 1
        counts["bad"] += entry.cubin != good.cubin
        cache.remove([key])
counts["left"] = len(os.listdir(cache.path / ".tmp"))
counts["quarantined"] = len(cache.quarantined())
begin = time.perf_counter()
assert run(None) == 0
counts["after"] = time.perf_counter() - begin
counts["warned"], counts["seed"] = warned, seed
print(json.dumps(counts))
"""


def test_kill_during_compile_and_publish(tmp_path):
    write_rooms(tmp_path / "src")
    seed = str(random.randrange(1000))
    run = subprocess.run(
        [sys.executable, "-c", NURSERY, str(ROUNDS), seed],
        capture_output=True,
        text=True,
        env=child_environment(tmp_path),
        timeout=240,
    )
    assert run.returncode == 0, run.stderr
    counts = json.loads(run.stdout)
    assert counts["killed"] + counts["finished"] == ROUNDS
    assert counts["bad"] == counts["quarantined"] == 0, counts
    assert counts["warned"] == [], counts  # nobody found anything damaged
    assert counts["killed"] > ROUNDS / 4, counts
    assert counts["left"] > 0, "no kill fell into a publish; the test proves nothing"
    assert counts["after"] < 5, "a killed process left a lock behind"
