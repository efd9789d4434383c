"""Kills training runs at random moments and continues them; prints what was found as one line of JSON.

usage: kill_worker.py FOLDER SEED NUM_KILLS

Runs are forked from this process, which has everything imported, and killed by SIGKILL some time after they opened
their records. After each kill the records are checked against those of a run that was left alone; every run is
continued, up to four kills later, to its end, and has to hold exactly the same records then.
"""

import contextlib
import json
import mmap
import os
import random
import signal
import struct
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import torch

from tiny_runs import PROBES, make_trainer
from trl_dynamics.paths.kinds import RECORDS
from trl_dynamics.paths.records import read_baseline, read_records
from trl_dynamics.scoring.engine import ProbeEngine
from trl_dynamics.store import files
from trl_dynamics.store.store import DynamicsStore
from trl_dynamics.tracking.series import Series

OPTIONS = {"probes": PROBES, "max_steps": 24, "probe_every": 2, "save_strategy": "steps", "save_steps": 3}
ROWS_PER_STEP = len(PROBES) * 3
KILLS_PER_RUN = 4
PHASES = ("starting", "opening", "training", "scoring", "writing", "checkpoint", "merging", "ended")


class Progress:
    """What a run has come to, in memory that it shares with its parent: phase, step begun, last step recorded."""

    def __init__(self):
        self._memory = mmap.mmap(-1, 12)
        self.clear()

    def clear(self) -> None:
        self._memory[:] = struct.pack("3i", 0, -1, -1)

    def __getitem__(self, name: str) -> int:
        return struct.unpack("3i", self._memory)[("phase", "begun", "recorded").index(name)]

    def __setitem__(self, name: str, value: int) -> None:
        index = ("phase", "begun", "recorded").index(name)
        struct.pack_into("i", self._memory, 4 * index, value)

    @property
    def phase(self) -> str:
        return PHASES[self["phase"]]

    @contextlib.contextmanager
    def within(self, phase: str) -> Iterator[None]:
        before, self["phase"] = self["phase"], PHASES.index(phase)
        yield
        self["phase"] = before


def watch(trainer, progress: Progress) -> None:
    """Let a run note its phases; only to be called in a process of its own."""

    def noted(phase: str, function: Callable, *, step: Callable | None = None, done: bool = False) -> Callable:
        def wrapper(*args, **kwargs):
            if progress.phase == "starting":  # the layout is tried out before the records are opened
                return function(*args, **kwargs)
            with progress.within(phase):
                if step:
                    progress["begun"] = trainer.state.global_step
                result = function(*args, **kwargs)
                if done:
                    progress["recorded"] = trainer.state.global_step
                return result

        return wrapper

    ProbeEngine.score = noted("scoring", ProbeEngine.score, step=True)
    Series.add = noted("writing", Series.add, done=True)
    DynamicsStore.compact = noted("merging", DynamicsStore.compact)
    trainer._save_checkpoint = noted("checkpoint", trainer._save_checkpoint)
    begin = Series.begin

    def begin_noted(*args, **kwargs):
        progress["phase"] = PHASES.index("opening")
        begin(*args, **kwargs)
        progress["phase"] = PHASES.index("training")

    Series.begin = begin_noted


def fork_run(folder: Path, checkpoint: Path | None, progress: Progress) -> int:
    """Start or continue a run in a process of its own; returns its id."""
    progress.clear()
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    try:
        with open(folder.with_suffix(".log"), "a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        trainer = make_trainer("sft", folder, **OPTIONS)
        watch(trainer, progress)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        progress["phase"] = PHASES.index("ended")
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def finish(pid: int, folder: Path) -> None:
    _, status = os.waitpid(pid, 0)
    if status:
        raise RuntimeError(f"a run failed with status {status}:\n{folder.with_suffix('.log').read_text()[-3000:]}")


def newest_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint that is whole: its trainer_state.json is written last. Not the one of the last step, from
    which transformers takes one step more."""
    for path in sorted(folder.glob("checkpoint-*"), key=step_of, reverse=True):
        if step_of(path) == OPTIONS["max_steps"]:
            continue
        with contextlib.suppress(OSError, ValueError):
            json.loads((path / "trainer_state.json").read_text())
            return path
    return None


def step_of(path: Path | None) -> int:
    return int(path.name.split("-")[1]) if path else -1


def check_survivor(
    folder: Path, whole: pd.DataFrame, before: set[int], checkpoint: Path | None, progress: Progress
) -> set[int]:
    """The records of a run that was killed are whole steps of the run left alone, with no step missing but the last
    one begun; returns the steps.

    Args:
        before: Steps that it had when it was started.
        checkpoint: Where it was continued.
    """
    store = DynamicsStore(folder)
    steps = set(store.steps(RECORDS, 0)) if store.exists else set()
    if steps:
        frame = read_records(store)
        assert (frame.groupby("step").size() == ROWS_PER_STEP).all(), "a step is there in part"
        pd.testing.assert_frame_equal(frame, rows(whole, steps), check_exact=True)
        read_baseline(store)
    due = set(whole["step"])
    recorded, start = progress["recorded"], step_of(checkpoint)
    # The probe of the checkpoint itself may not have been taken when the run before was killed.
    certain = {step for step in due if step <= recorded or step < start}
    possible = {step for step in due if step <= progress["begun"] or step <= start}
    if progress.phase in ("starting", "opening"):  # what comes after the checkpoint may still be there
        possible |= before
    assert certain <= steps <= possible, (certain, steps, possible, progress.phase)
    return steps


def rows(frame: pd.DataFrame, steps: set[int]) -> pd.DataFrame:
    return frame[frame["step"].isin(steps)].reset_index(drop=True)


def main(folder: Path, seed: int, num_kills: int) -> dict:
    """Kill `num_kills` times; what happened, in counts."""
    torch.set_num_threads(1)
    make_trainer("sft", folder / "warm", **OPTIONS)
    progress, choose, began = Progress(), random.Random(seed), time.monotonic()
    finish(fork_run(folder / "whole", None, progress), folder / "whole")
    started = time.monotonic()
    finish(fork_run(folder / "again", None, progress), folder / "again")
    seconds = time.monotonic() - started
    whole = read_records(DynamicsStore(folder / "whole"))
    pd.testing.assert_frame_equal(read_records(DynamicsStore(folder / "again")), whole, check_exact=True)
    kills, lost, phases, runs = [], 0, Counter(), 0
    while len(kills) < num_kills:
        run, runs = folder / f"run-{runs}", runs + 1
        steps: set[int] = set()
        for _ in range(min(KILLS_PER_RUN, num_kills - len(kills))):
            checkpoint = newest_checkpoint(run)
            pid = fork_run(run, checkpoint, progress)
            while progress.phase == "starting":
                time.sleep(0.001)
            share = 1 - max(step_of(checkpoint), 0) / OPTIONS["max_steps"]
            delay = choose.uniform(0, seconds * share)
            time.sleep(delay)
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            if status != signal.SIGKILL:
                assert status == 0, run.with_suffix(".log").read_text()[-3000:]
                break
            steps = check_survivor(run, whole, steps, checkpoint, progress)
            in_progress = progress.phase in ("scoring", "writing") and progress["begun"] not in steps
            lost += in_progress
            phases[progress.phase] += 1
            kills.append({"delay": round(delay, 3), "phase": progress.phase, "begun": progress["begun"]})
        checkpoint = newest_checkpoint(run)
        store = DynamicsStore(run)
        # A run may also be killed after its last record, while its files are merged: then it is left as it is.
        is_whole = store.exists and store.read_meta()["status"] == "finished"
        if not is_whole:
            finish(fork_run(run, checkpoint, progress), run)
        pd.testing.assert_frame_equal(read_records(store), whole, check_exact=True)
        left, listed = set((store.root / "records").iterdir()), set(store.files(RECORDS))
        assert left >= listed
        if not is_whole:
            assert left == listed and len(left) == 1
            assert not list(store.root.rglob(f"*{files.TEMPORARY}"))
    return {
        "seed": seed,
        "kills": len(kills),
        "runs": runs,
        "phases": dict(phases),
        "steps_lost": lost,
        "steps": len(set(whole["step"])),
        "seconds": round(time.monotonic() - began, 1),
        "moments": kills,
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
    sys.stdout.flush()
    os._exit(0)
