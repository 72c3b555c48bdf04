"""Locks of a module in a child that was forked while another thread held them."""

from __future__ import annotations

import os
import threading
from typing import Any

_REENTRANT = type(threading.RLock())


def renew_after_fork(namespace: dict[str, Any], *names: str) -> None:
    """Give every forked child locks of its own: it has none of the threads that would release the old ones.

    Args:
        namespace: the module's `globals()`.
        names: of its locks, each a `threading.Lock` or `threading.RLock`, and so in the child.
    """
    make = {name: threading.RLock if isinstance(namespace[name], _REENTRANT) else threading.Lock for name in names}
    os.register_at_fork(after_in_child=lambda: namespace.update({name: new() for name, new in make.items()}))
