"""How a process of the command line ends: one of several without taking its interpreter down."""

import os
import subprocess
import sys

import pytest

# A command that leaves a thread, an exit handler and an object that the interpreter frees as it is taken down.
PROCESS = """
import atexit, sys, threading, time
from trl_dynamics.cli import main

class Left:
    def __del__(self):
        print("interpreter taken down", flush=True)

left = Left()
atexit.register(lambda: print("exit handler"))
late = threading.Thread(target=lambda: (time.sleep(0.2), print("thread finished")))
main.main = lambda argv: (late.start(), print(argv), int(argv[0]))[-1]
main.run_and_exit(sys.argv[1:])
"""


@pytest.mark.parametrize("status", [0, 4])
@pytest.mark.parametrize("world_size", [None, "", "1", "2"])
def test_the_status_and_all_that_was_begun_survive(world_size, status):
    env = {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"}
    env |= {"WORLD_SIZE": world_size} if world_size is not None else {}
    command = [sys.executable, "-c", PROCESS, str(status)]
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    lines = [str([str(status)]), "thread finished", "exit handler"]
    if world_size != "2":
        lines.append("interpreter taken down")
    assert (ended.returncode, ended.stdout.splitlines(), ended.stderr) == (status, lines, "")
