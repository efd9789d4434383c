"""The lock: one writer per output_dir, and none left behind by the dead."""

import errno
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import textwrap

import pytest

from small_stores import columns, fail, make_store, write_records
from trl_dynamics.paths.kinds import RECORDS
from trl_dynamics.paths.records import read_records
from trl_dynamics.store import lock as lock_module
from trl_dynamics.store.lock import LOCK_NAME, LockedError
from trl_dynamics.store.store import DynamicsStore

OWNER = """
    import os, sys, time
    from trl_dynamics.store.store import DynamicsStore
    store = DynamicsStore(sys.argv[1])
    store.open()
    if sys.argv[2] == "fork" and os.fork() == 0:
        print("held", os.getpid(), flush=True)
        time.sleep(60)
    elif sys.argv[2] == "alone":
        print("held", os.getpid(), flush=True)
    time.sleep(60)
"""


@pytest.fixture
def start_owner(tmp_path):
    """Start a process that opens the store in tmp_path and then sleeps; it dies with the test."""
    started = []

    def start(kind: str = "alone"):
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(OWNER), str(tmp_path), kind],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        word, pid = process.stdout.readline().split()
        assert word == "held"
        started.append(int(pid))
        started.append(process.pid)
        return process

    yield start
    for pid in started:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def test_another_process_is_refused_and_told_who_is_there(start_owner, tmp_path):
    process = start_owner()
    with pytest.raises(LockedError) as error:
        DynamicsStore(tmp_path).open()
    said = str(error.value)
    assert f"process {process.pid} on {socket.gethostname()} since 20" in said
    assert "Wait for it to end, stop it, or use another output_dir" in said
    process.kill()
    process.wait()
    with DynamicsStore(tmp_path):
        pass
    assert not (tmp_path / LOCK_NAME).exists()


def test_a_worker_that_outlives_its_parent_does_not_hold_the_lock(start_owner, tmp_path):
    process = start_owner("fork")
    with pytest.raises(LockedError):
        DynamicsStore(tmp_path).open()
    process.kill()
    process.wait()
    DynamicsStore(tmp_path).open()


def test_one_writer_at_a_time_within_a_process(tmp_path):
    first, second = DynamicsStore(tmp_path), DynamicsStore(tmp_path)
    with first:
        first.open()
        with pytest.raises(LockedError, match=f"process {os.getpid()} on"):
            second.open()
        first.create({}, {}, {})
        assert json.loads((tmp_path / LOCK_NAME).read_text()).keys() == {"host", "pid", "since"}
    second.open()
    with pytest.raises(LockedError):
        first.open()
    second.close()
    second.close()
    first.open()
    first.close()


def test_the_lock_is_given_back_when_the_block_raises(tmp_path):
    with pytest.raises(RuntimeError), DynamicsStore(tmp_path):
        raise RuntimeError
    with DynamicsStore(tmp_path):
        pass


def test_reading_needs_no_lock(tmp_path):
    make_store(tmp_path)
    with DynamicsStore(tmp_path) as writer:
        assert len(read_records(DynamicsStore(tmp_path))) == 12
        write_records(writer, RECORDS.table(columns(30)), step=30)
        assert DynamicsStore(tmp_path).steps(RECORDS, 0) == [0, 10, 20, 30]


def test_a_lock_file_released_while_another_waits_to_lock_it_does_not_count(tmp_path, monkeypatch):
    """Opened before the owner removed it, locked after: such a lock is on a file that is no longer there."""
    owner, other = DynamicsStore(tmp_path), DynamicsStore(tmp_path)
    owner.open()
    lock, turns = other._lock._lock, []

    def lock_late(descriptor):
        if not turns:
            owner.close()
        turns.append(descriptor)
        lock(descriptor)

    monkeypatch.setattr(other._lock, "_lock", lock_late)
    other.open()
    assert len(turns) == 2
    with pytest.raises(LockedError):
        owner.open()


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"host": "elsewhere", "pid": 7, "since": "then"}'])
def test_what_a_lock_file_says_locks_nothing(text, tmp_path, caplog):
    (tmp_path / LOCK_NAME).write_text(text)
    with DynamicsStore(tmp_path):
        with pytest.raises(LockedError, match=f"process {os.getpid()}"):
            DynamicsStore(tmp_path).open()
    told = "process 7 on elsewhere took" in caplog.text and "does not lock across hosts" in caplog.text
    assert told == ("elsewhere" in text)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP])
def test_without_locks_a_run_is_warned_and_not_refused(code, tmp_path, monkeypatch, caplog):
    def unsupported(descriptor, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(lock_module.fcntl, "flock", unsupported)
    with caplog.at_level(logging.WARNING), DynamicsStore(tmp_path) as store:
        store.create({}, {}, {})
    assert "file system without locks" in caplog.text


def test_a_place_that_cannot_be_locked_is_an_error_of_writing(tmp_path, monkeypatch):
    fail(monkeypatch, errno.EROFS, operation="open", name=LOCK_NAME)
    with pytest.raises(OSError, match="cannot write probe records .*Read-only file system"):
        DynamicsStore(tmp_path).open()
