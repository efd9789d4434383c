"""Starts several processes for a test, under a time limit, and leaves none behind.

What is started here on the CPU are the recipes' own YAML files through `accelerate launch`; worker.py says what a CPU
needs besides.
"""

import json
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from scenarios import save_inputs

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "recipes/accelerate_configs"
WORKER = Path(__file__).with_name("worker.py")
# Seconds without a step forward after which a run counts as hanging. Starting means importing torch and TRL.
START_LIMIT, SCENARIO_LIMIT = 180.0, 120.0
_POLL = 0.1


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Launch:
    """How a run of the worker ended: one outcome per scenario that did, and everything that was printed."""

    folder: Path
    failure: str | None
    output: str
    outcomes: dict[str, dict]

    def outcome(self, name: str) -> dict:
        """What a scenario reported, an AssertionError with the reason if it did not come to its end."""
        assert name in self.outcomes, f"{name} did not end ({self.failure}):\n{self.output[-6000:]}"
        return self.outcomes[name]


def launch(
    config: str,
    scenarios: list[str],
    folder: Path,
    num_processes: int,
    *,
    start_limit: float = START_LIMIT,
    scenario_limit: float = SCENARIO_LIMIT,
    worker: Path = WORKER,
) -> Launch:
    """Run scenarios one after another in the same processes; never raises, so that each test sees its own scenario.

    Args:
        config (`str`): Name of a recipe's accelerate config; unused with one process.
        scenarios (`list[str]`): Names from scenarios.py, in this order.
        folder (`Path`): Where they write, a folder each.
        num_processes (`int`): One process is started without a launcher.
        start_limit (`float`, *optional*): Seconds until the first scenario begins.
        scenario_limit (`float`, *optional*): Seconds that each scenario may take.
        worker (`Path`, *optional*): Another program that takes the same arguments, with scenarios of its own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_inputs(folder)
    called = [str(worker), config.removesuffix("_multi_node"), str(folder), str(num_processes), *scenarios]
    if num_processes == 1:
        command = [sys.executable, *called]
    elif config.endswith("_multi_node"):
        command = on_two_machines(config, num_processes, called)
    else:
        command = accelerate(config, num_processes, free_port(), called)
    progress, output = folder / "progress", folder / "output.txt"
    progress.write_text("")

    def limit() -> float:
        return scenario_limit if progress.read_text() else start_limit

    failure = watch(command, output, limit, progress, {"SCENARIO_LIMIT": str(scenario_limit)})
    reports = {name: folder / f"{name}.json" for name in scenarios}
    outcomes = {name: json.loads(path.read_text()) for name, path in reports.items() if path.is_file()}
    return Launch(folder, failure, output.read_text(errors="replace"), outcomes)


def accelerate(config: str, num_processes: int, port: int, worker: list[str], *options: str) -> list[str]:
    """The command that starts `worker` with a recipe's config, unchanged but for the number of processes."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{config}.yaml")]
    return [*launcher, "--num_processes", str(num_processes), "--main_process_port", str(port), *options, *worker]


def on_two_machines(config: str, num_processes: int, worker: list[str]) -> list[str]:
    """A shell command that acts two machines: a launcher for each, which find each other by address."""
    port = free_port()
    first, second = (
        shlex.join(
            accelerate(config, num_processes, port, worker, "--machine_rank", rank, "--main_process_ip", "127.0.0.1")
        )
        for rank in "01"
    )
    return ["sh", "-c", f"{second} & {first}; status=$?; wait; exit $status"]


def watch(
    command: list[str],
    output: Path,
    limit: Callable[[], float] = lambda: START_LIMIT,
    progress: Path | None = None,
    variables: dict[str, str] | None = None,
) -> str | None:
    """Run a command to its end, or until `progress` was not written for `limit()` seconds; then end all its processes.

    Args:
        command (`list[str]`): What to start, in the project's root.
        output (`Path`): Where what it prints goes.
        limit (`Callable[[], float]`, *optional*): Asked again and again.
        progress (`Path`, *optional*): A file that every step forward writes. None: the limit is for the whole run.
        variables (`dict[str, str]`, *optional*): Further environment variables.

    Returns:
        `str | None`: What went wrong, None if nothing did.
    """
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests/support"), os.environ.get("PYTHONPATH", "")])
    # Earlier tests of this process may have left what their training arguments export.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    fixed = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    with output.open("w") as sink:
        env = inherited | fixed | (variables or {})
        process = subprocess.Popen(command, env=env, stdout=sink, stderr=subprocess.STDOUT, cwd=ROOT)
    began, family = time.time(), set()
    try:
        while process.poll() is None:
            # The launcher gives each process a session of its own, so no process group holds them all.
            family |= _descendants(process.pid)
            quiet = time.time() - max(began, progress.stat().st_mtime if progress else began)
            if quiet > limit():
                where = progress.read_text() if progress else ""
                return f"hang: no step forward for {quiet:.0f} s after {where or 'the start'}"
            time.sleep(_POLL)
        return f"exit status {process.returncode}" if process.returncode else None
    finally:
        for member in family | _descendants(process.pid):
            _kill(member)
        process.kill()
        process.wait()


def _descendants(pid: int) -> set[psutil.Process]:
    try:
        return set(psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return set()


def _kill(process: psutil.Process) -> None:
    # psutil compares start times, so a process that took over the id is safe.
    try:
        process.kill()
        process.wait(10)
    except psutil.NoSuchProcess:
        pass
