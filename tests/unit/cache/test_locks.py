"""Locks save work and never stand in the way."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import stat
import subprocess
import sys
import threading
import time

import pytest

from megamoe_jit._cache import locks as _locks
from megamoe_jit._cache.locks import key_lock, lock_dir, try_lock
from megamoe_jit._device.load import Loaded
from megamoe_jit._jit.registry import registry
from megamoe_jit._settings import settings as _settings
from megamoe_jit._settings.settings import override
from tests.stubs import KEY, child_environment


def test_lock_excludes_times_out_and_is_released(tmp_path, warnings, monkeypatch):
    monkeypatch.setattr(_locks, "PATIENCE_S", 0.02)
    with override(lock_dir=tmp_path / "locks", lock_timeout_s=0.05):
        with key_lock(KEY, "kernel") as outer:
            assert outer is True
            with key_lock(KEY, "kernel") as inner:
                assert inner is False
            with key_lock("cd" * 32, "another") as free:
                assert free is True
        with key_lock(KEY, "kernel") as again:
            assert again is True
    text = "\n".join(w.getMessage() for w in warnings)
    assert f"waiting for process {os.getpid()}, which is compiling kernel" in text
    assert "compiling it here as well" in text
    assert len(warnings) == 2
    assert not _locks._held


def test_no_waiting_at_all(tmp_path, warnings):
    with override(lock_dir=tmp_path / "locks", lock_timeout_s=0), key_lock(KEY, "kernel"):
        begin = time.perf_counter()
        with key_lock(KEY, "kernel") as inner:
            assert inner is False
        assert time.perf_counter() - begin < 1


def test_waiting_ends_as_soon_as_there_is_nothing_to_wait_for(tmp_path, warnings):
    done = threading.Event()
    with override(lock_dir=tmp_path), key_lock(KEY, "kernel"):
        threading.Timer(0.05, done.set).start()
        begin = time.perf_counter()
        with key_lock(KEY, "kernel", done.is_set) as held:
            assert held is False
        assert time.perf_counter() - begin < 1
    assert not warnings


def test_lock_of_a_killed_process_is_free_at_once(tmp_path):
    code = (
        "import sys, time\nfrom megamoe_jit._cache.locks import key_lock\n"
        "with key_lock(sys.argv[1], 'k'):\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    environment = child_environment(tmp_path)
    holder = subprocess.Popen([sys.executable, "-c", code, KEY], env=environment, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with override(lock_dir=tmp_path / "locks", lock_timeout_s=20):
        with try_lock(KEY) as free:
            assert free is False
        holder.kill()
        begin = time.perf_counter()
        with key_lock(KEY, "kernel") as held:
            assert held is True
        assert time.perf_counter() - begin < 5
    holder.wait()
    holder.stdout.close()


def held_handle() -> int:
    """The file of the one lock that is held."""
    (lock,) = _locks._held
    return lock.handle


def test_forked_child_does_not_keep_the_lock(tmp_path):
    with override(lock_dir=tmp_path):
        with key_lock(KEY, "kernel"):
            handle = held_handle()
            pid = os.fork()
            if pid == 0:
                try:
                    os.fstat(handle)
                except OSError:
                    signal.pause()
                os._exit(1)
        try:
            with try_lock(KEY) as free:
                assert free is True
        finally:
            time.sleep(0.01)
            os.kill(pid, signal.SIGKILL)
            assert os.WIFSIGNALED(os.waitpid(pid, 0)[1]), "the child still has the handle"


def test_child_that_leaves_what_its_parent_locked_closes_no_file_of_its_own(tmp_path):
    """By the time it does, another file may have the number that the lock's had."""
    (tmp_path / "own").write_text("its")
    with override(lock_dir=tmp_path / "locks"):
        parent, copy, status = os.getpid(), -1, 1
        try:
            with key_lock(KEY, "kernel"):
                handle = held_handle()
                if os.fork() == 0:
                    copy = os.open(tmp_path / "own", os.O_RDONLY)
                    os.dup2(copy, handle)
            if os.getpid() != parent:
                status = 0 if os.pread(handle, 3, 0) == b"its" else 1
        finally:
            if os.getpid() != parent:
                os._exit(status)
        assert os.wait()[1] == 0


def test_copy_of_the_handle_does_not_keep_the_lock(tmp_path):
    """A child has one from the moment it is forked until its hook, or its exec, closes it."""
    with override(lock_dir=tmp_path):
        with key_lock(KEY, "kernel"):
            copy = os.dup(held_handle())
        with try_lock(KEY) as free:
            assert free is True
    os.close(copy)


LOCKS = {
    "settings": lambda: _settings._lock,
    "registry": lambda: registry()._lock,
    "loaded": lambda: registry().companion(Loaded).lock,
}


@pytest.mark.parametrize("lock", LOCKS.values(), ids=LOCKS)
def test_child_forked_while_a_thread_holds_a_lock_can_take_it(lock, monkeypatch):
    """The thread that would release it is not in the child."""
    monkeypatch.setattr(_settings, "_current", None)
    with lock():
        pid = os.fork()
        if pid == 0:
            try:
                signal.alarm(20)  # ends a child that waits for a thread it has not
                _settings.get_settings()
                with lock():
                    os._exit(0)
            finally:
                os._exit(1)
        status = os.waitpid(pid, 0)[1]
    assert status == 0


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EIO])
def test_file_system_without_locks(tmp_path, warnings, monkeypatch, number):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)
    with override(lock_dir=tmp_path / "locks"):
        with key_lock(KEY, "kernel") as held:
            assert held is False
        assert len(warnings) == 1
        with try_lock("name") as free:
            assert free is True
    assert len(warnings) == 1


def test_lock_directory_that_cannot_be(tmp_path, warnings):
    (tmp_path / "file").write_text("")
    with override(lock_dir=tmp_path / "file" / "locks"):
        with key_lock(KEY, "kernel") as held:
            assert held is False
        with try_lock("name") as free:
            assert free is True
    assert len(warnings) == 1


def test_lock_file_that_is_a_link_is_not_followed(tmp_path, warnings):
    (tmp_path / f"{KEY}.lock").symlink_to(tmp_path / "victim")
    with override(lock_dir=tmp_path), key_lock(KEY, "kernel") as held:
        assert held is False
    assert not (tmp_path / "victim").exists()
    assert len(warnings) == 1


def test_an_error_inside_the_lock_passes_through(tmp_path):
    with override(lock_dir=tmp_path):
        with pytest.raises(KeyError), key_lock(KEY, "kernel"):
            raise KeyError
        with key_lock(KEY, "kernel") as held:
            assert held is True


def test_no_file_is_left_behind(tmp_path):
    """In the memory of the node, as the default directory is."""
    with override(lock_dir=tmp_path, lock_timeout_s=0):
        for name in range(3):
            with key_lock(f"{name:064x}", "kernel") as held, key_lock(f"{name:064x}", "kernel") as again:
                assert (held, again) == (True, False)
                assert len(os.listdir(tmp_path)) == 1, "who waits in vain removes nothing"
            with try_lock("evict"):
                pass
        assert os.listdir(tmp_path) == []


def test_who_waits_at_a_file_that_its_owner_removes_looks_at_the_next_one(tmp_path):
    """Else a third process, which makes the file anew, would hold the lock at the same time."""
    with override(lock_dir=tmp_path):
        late = _locks._Lock(KEY)
        with key_lock(KEY, "kernel"):
            assert late.acquire() is False
        with key_lock(KEY, "kernel") as third:
            assert (third, late.acquire()) == (True, False)
        assert late.acquire() is True
        with try_lock(KEY) as free:
            assert free is False
        late.close()
        late.close()
    assert os.listdir(tmp_path) == []
    assert not _locks._held


def test_whose_file_somebody_has_removed_leaves_that_of_the_next_one(tmp_path):
    """As what cleans temporary directories up does."""
    with override(lock_dir=tmp_path):
        with key_lock(KEY, "kernel"):
            os.unlink(tmp_path / f"{KEY}.lock")
            next_one = _locks._Lock(KEY)
            assert next_one.acquire() is True
        with try_lock(KEY) as free:
            assert free is False
        next_one.close()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_who_gives_up_while_it_waits_keeps_no_file(tmp_path, error):
    def give_up() -> bool:
        raise error

    before = len(os.listdir("/proc/self/fd"))
    with override(lock_dir=tmp_path), key_lock(KEY, "kernel") as held:
        with pytest.raises(error), key_lock(KEY, "kernel", give_up):
            pass
        assert held is True
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("lock", [try_lock, lambda name: key_lock(name, "kernel")], ids=["try_lock", "key_lock"])
def test_interruption_behind_the_lock_leaves_it_free(tmp_path, monkeypatch, lock):
    """Ctrl-C may come between any two steps."""

    real = os.path.samestat

    def interrupt(*_):
        monkeypatch.setattr(os.path, "samestat", real)
        raise KeyboardInterrupt

    monkeypatch.setattr(os.path, "samestat", interrupt)
    with override(lock_dir=tmp_path):
        with pytest.raises(KeyboardInterrupt), lock(KEY):
            pass
        assert not _locks._held
        with try_lock(KEY) as free:
            assert free is True


def test_a_file_system_whose_files_have_no_lasting_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "samestat", lambda *_: False)
    with override(lock_dir=tmp_path), key_lock(KEY, "kernel") as held, try_lock(KEY) as free:
        assert (held, free) == (True, False)


def test_many_threads_and_names_are_one_at_a_time_each(tmp_path):
    inside, most = dict.fromkeys("ab", 0), []

    def work(name: str) -> None:
        for _ in range(50):
            with key_lock(name * 64, "kernel") as held:
                assert held
                inside[name] += 1
                most.append(inside[name])
                inside[name] -= 1

    with override(lock_dir=tmp_path, lock_timeout_s=60):
        threads = [threading.Thread(target=work, args=(name,)) for name in "ab" * 3]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert (set(most), len(most)) == ({1}, 300)


def test_holder_that_left_no_name(tmp_path, monkeypatch):
    path = tmp_path / "x"
    path.write_text("")
    handle = os.open(path, os.O_RDWR)
    assert _locks._owner(handle) == "another process"
    os.close(handle)
    assert _locks._owner(handle) == "another process"


def test_default_lock_directory_is_private_and_falls_through(tmp_path, monkeypatch):
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / f"megamoe-jit-{os.geteuid()}").mkdir(mode=0o700)
    (bad / f"megamoe-jit-{os.geteuid()}").chmod(0o777)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(bad))
    folder = lock_dir()
    assert not str(folder).startswith(str(bad))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setattr(_locks.Path, "is_dir", lambda _: False)
    with pytest.raises(FileNotFoundError, match="no directory for lock files"):
        lock_dir()
    monkeypatch.setattr(_locks.Path, "is_dir", lambda _: True)

    def refuse(path):
        raise PermissionError(f"no {path}")

    monkeypatch.setattr(_locks, "private_directory", refuse)
    with pytest.raises(PermissionError):
        lock_dir()
