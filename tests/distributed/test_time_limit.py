"""A hang fails within its time limit, says where it stood, and leaves no process behind."""

import time

import psutil
import pytest
from launcher import launch

pytestmark = pytest.mark.distributed


def test_a_process_that_reaches_no_collective_is_a_hang_and_all_of_them_are_ended(tmp_path):
    began = time.time()
    result = launch("ddp", ["hang"], tmp_path, 2, scenario_limit=5.0)
    assert result.failure.startswith("hang") and result.failure.endswith("after hang")
    assert time.time() - began < 120
    with pytest.raises(AssertionError, match="hang did not end"):
        result.outcome("hang")
    # Where they stood: one slept, the other waited for it.
    assert "wait_for_everyone" in result.output and "in main" in result.output
    pids = [int((tmp_path / f"pid_{rank}").read_text()) for rank in range(2)]
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_an_error_in_a_process_is_told_and_later_scenarios_are_not_blamed(tmp_path):
    result = launch("ddp", ["unknown"], tmp_path, 2)
    assert result.failure.startswith("exit status")
    with pytest.raises(AssertionError, match="KeyError: 'unknown'"):
        result.outcome("unknown")
