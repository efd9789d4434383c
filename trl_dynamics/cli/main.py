"""trl-dynamics: the command line. Every command is a module of this package with `run(argv) -> int`."""

import atexit
import logging
import os
import sys
import threading
import warnings
from typing import NoReturn

from trl_dynamics.cli.dispatch import HELP, Group
from trl_dynamics.errors import crosses_user_code, first_line, from_outside, raised_here
from trl_dynamics.tracking.console import OUR_LOGGER, ConsoleHandler

COMMANDS = {
    "sft": "fine-tune with TRL's SFTTrainer while a probe set is tracked",
    "dpo": "train with TRL's DPOTrainer while a probe set is tracked",
    "grpo": "train with TRL's GRPOTrainer while a probe set is tracked",
    "track": "score models or a run's checkpoints on a probe set, without training",
    "probes": "make, check, read and share probe sets; screen preference pairs before training",
    "diagnose": "say in plain words what happened in runs, finished or not; exit status for CI",
    "judge": "let two models, or two files of answers, compete: win rate with its interval",
    "akg": "what one training step on one answer does to every answer of a probe set, predicted and checked",
    "report": "turn runs into one offline HTML page, PNG charts or CSV",
    "squeeze-demo": "draw what one negative gradient step does to a flat and to a peaked distribution",
    "quickstart": "see the squeezing effect on the embedded model, in minutes on a CPU",
    "env": "print versions for a bug report",
}
GROUP = Group(
    "trl_dynamics.cli",
    "command",
    COMMANDS,
    "usage: trl-dynamics COMMAND [options]      (trl-dynamics COMMAND --help for the options)",
    (
        "Errors are one line; set TRL_DYNAMICS_DEBUG=1 for the traceback. Exit status: 0 done, 1 wrong input or",
        "environment, 2 wrong usage, 4 numbers that are not finite (track, akg, probes screen); diagnose has more",
    ),
)


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status, 0 if all went well; `--help` says what the others mean."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] not in (*COMMANDS, *HELP):
        print(f"trl-dynamics: {GROUP.unknown(argv[0])}", file=sys.stderr)
        return 2
    logging.basicConfig(format="%(message)s", level=logging.WARNING, handlers=[ConsoleHandler()])
    logging.getLogger(OUR_LOGGER).setLevel(logging.INFO)
    # TRL sets options by names that transformers is about to rename, which is nothing a user here can act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    try:
        # Versions are refused when a command is imported.
        return GROUP.run(argv)
    except Exception as error:
        message = one_line(error)
        if os.environ.get("TRL_DYNAMICS_DEBUG") or message is None:
            raise
        print(f"trl-dynamics {argv[0]}: error: {message}", file=sys.stderr)
        return 1


def run_and_exit(argv: list[str] | None = None) -> NoReturn:
    """Run one command as the whole of a process, and end the process with its status."""
    status = main(argv)
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        # Gloo's threads outlive their process group under DDP. One that frees a tensor while the interpreter is taken
        # down aborts the process, and with it the launch (pytorch/pytorch#179291): leave with the interpreter whole.
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def one_line(error: Exception) -> str | None:
    """What a user reads of an error; None where it is a fault of this package or of the user's own code, such as a
    reward function: its traceback is then wanted."""
    # A missing package is one, wherever it is imported.
    if crosses_user_code(error) and not isinstance(error, ImportError):
        return None
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{str(error.filename)!r}: {error.strerror}; check the path and its permissions"
    if isinstance(error, ValueError | OSError | ImportError) and raised_here(error):
        return str(error)
    if from_outside(error):
        return f"{first_line(error)} (TRL_DYNAMICS_DEBUG=1 shows where)"
    return None


if __name__ == "__main__":
    run_and_exit()
