"""A hang fails within its time limit, says where it stood, and leaves no process behind; an error is no hang."""

import time

import pandas as pd
import psutil
import pytest

from comparison import records
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


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    return launch("ddp", ["sft", "full_disk_stop", "dpo"], tmp_path_factory.mktemp("stopped"), 2, scenario_limit=60.0)


def test_an_error_in_a_process_is_told_and_later_scenarios_are_not_blamed(stopped):
    assert stopped.failure == "exit status 1"
    for name in ("full_disk_stop", "dpo"):
        with pytest.raises(AssertionError, match="OSError: .* cannot write probe records .No space left on device."):
            stopped.outcome(name)


def test_a_full_disk_of_the_main_process_stops_every_process_and_costs_no_record(stopped):
    """Each raised the error by itself: none was ended by the launcher, or by the time limit."""
    told = [(stopped.folder / f"full_disk_stop_error_{rank}").read_text() for rank in range(2)]
    assert told[0] == told[1] and "nothing already written was lost" in told[0]
    stopped.outcome("sft")
    kept, whole = records(stopped.folder / "full_disk_stop", [0, 1]), records(stopped.folder / "sft")
    pd.testing.assert_frame_equal(kept, whole.loc[[0, 1]], check_exact=True)
