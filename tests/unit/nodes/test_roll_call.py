"""The thread by which a rank says that it lives."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
import weakref

from megamoe_jit._nodes import roll_call

PROGRAM = """
import time
from datetime import timedelta
from types import SimpleNamespace
from torch.distributed import TCPStore
from megamoe_jit._nodes import roll_call

store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

def beat(key, value):  # code of C++ from which a thread comes back a little later
    print("beat", flush=True)
    store.wait(["never"], timedelta(seconds=0.4))

roll_call.gather = lambda group, mine: [mine, mine]
roll_call.group_rank, roll_call.group_size = lambda group: 0, lambda group: 2
roll_call._store = lambda prefix: SimpleNamespace(set=beat)

class Late:  # what the interpreter takes its time for, after all programs of its own have ended
    def __del__(self):
        time.sleep(1)

ranks, late = roll_call.RollCall(None), Late()
time.sleep(0.1)
"""


def test_a_program_that_keeps_its_ranks_ends_well():
    """A thread that comes out of C++ while the interpreter is torn down would abort the process."""
    end = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60)
    assert (end.returncode, end.stdout) == (0, "beat\n"), end.stderr


def test_ranks_of_many_groups_wait_no_longer_for_a_store_that_is_lost(monkeypatch):
    answer = threading.Event()
    threads = [threading.Thread(target=answer.wait, daemon=True) for _ in range(20)]
    monkeypatch.setattr(roll_call, "_beating", weakref.WeakKeyDictionary({each: threading.Event() for each in threads}))
    monkeypatch.setattr(roll_call, "LAST_BEAT_S", 0.1)
    for each in threads:
        each.start()
    begin = time.monotonic()
    roll_call._fall_silent()
    assert time.monotonic() - begin < 1
    assert all(over.is_set() for over in roll_call._beating.values())
    answer.set()
