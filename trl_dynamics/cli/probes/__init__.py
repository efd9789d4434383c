"""trl-dynamics probes: make, check, read and share probe sets; every action is a module with `run(argv) -> int`."""

import importlib

ACTIONS = {
    "build": "make a probe set from preference or prompt/completion data",
    "import": "turn the published layout, or any table of yours, into a probe set",
    "check": "look for what would make a model's numbers on a probe set wrong",
    "show": "read a probe set in the terminal",
    "screen": "score pairs before training: log-probabilities at step 0 and likelihood-displacement risk",
    "push": "upload a probe set to the hub",
}
# `import` cannot be the name of a module.
_MODULES = {name: "import_" if name == "import" else name for name in ACTIONS}


def run(argv: list[str]) -> int:
    """Run one action.

    Raises:
        ValueError: If there is no such action.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] not in ACTIONS:
        raise ValueError(f"unknown action {argv[0]!r}; expected one of {', '.join(ACTIONS)}")
    module = importlib.import_module(f"trl_dynamics.cli.probes.{_MODULES[argv[0]]}")
    return module.run(argv[1:])


def usage() -> str:
    """The list of actions."""
    width = max(map(len, ACTIONS))
    lines = [f"  {name:<{width}}  {text}" for name, text in ACTIONS.items()]
    return "\n".join(["usage: trl-dynamics probes ACTION [options]   (--help after the action for them)", "", *lines])
