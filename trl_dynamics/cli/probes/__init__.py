"""trl-dynamics probes: make, check, read and share probe sets; every action is a module with `run(argv) -> int`."""

from trl_dynamics.cli.dispatch import Group

ACTIONS = {
    "build": "make a probe set from preference or prompt/completion data",
    "import": "turn the published layout, or any table of yours, into a probe set",
    "check": "look for what would make a model's numbers on a probe set wrong",
    "show": "read a probe set in the terminal",
    "screen": "score pairs before training: log-probabilities at step 0 and likelihood-displacement risk",
    "push": "upload a probe set to the hub",
}
run = Group(
    __name__, "action", ACTIONS, "usage: trl-dynamics probes ACTION [options]   (--help after the action for them)"
).run
