"""`kill -9` at random moments of training runs: at most the probing step in progress is lost, nothing else."""

import json
import os
import subprocess
import sys
from pathlib import Path

WORKER = Path(__file__).parents[1] / "support/kill_worker.py"
SEED, NUM_KILLS, TIME_LIMIT = 20261125, 20, 600


def test_twenty_kills_lose_at_most_the_step_in_progress(tmp_path, record_property, capsys):
    path = os.pathsep.join([str(WORKER.parents[2]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(WORKER), str(tmp_path), str(SEED), str(NUM_KILLS)]
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=TIME_LIMIT)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for name, value in found.items():
        record_property(name, json.dumps(value))
    with capsys.disabled():
        print(
            f"\nkill -9: {found['kills']} kills, {found['runs']} runs, {found['seconds']} s (seed {found['seed']}), "
            f"in phases {found['phases']}; {found['steps_lost']} probing steps in progress were lost and taken again; "
            f"every run ended with the {found['steps']} steps of the run left alone, bit for bit"
        )
    assert found["kills"] == NUM_KILLS and found["steps_lost"] <= NUM_KILLS
    assert len(found["phases"]) >= 3, "the kills are spread over a run"
