"""The thread by which a rank says that it lives."""

from __future__ import annotations

import subprocess
import sys

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
