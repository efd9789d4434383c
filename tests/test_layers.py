"""The folder tree is the architecture: imports run one way, and the light modules stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "trl_dynamics"

# What every unit may import, and what imports nothing of ours.
FLOOR = {"errors", "lazy", "moved", "plain", "places", "progress", "versions"}
# Who may import whom: unit -> units or modules of this package. A unit may always import itself and the floor.
ALLOWED: dict[str, set[str]] = {
    **{unit: set() for unit in FLOOR},
    "ops": set(),
    "statistics": set(),
    "compat": set(),
    "loading": {"compat"},
    "probing": {"compat", "loading"},
    "embedded": {"probing"},
    "stats_head": {"ops", "compat"},
    "store": set(),
    "chapters": set(),
    "findings": {"statistics", "chapters", "store"},
    "drawing": {"probing.schema"},
    "scoring": {"probing", "stats_head", "ops", "store", "findings", "compat"},
    "paths": {"store", "findings", "drawing", "statistics", "probing.schema", "probing.io"},
    "influence": {"store", "findings", "drawing", "statistics", "probing.schema"},
    # A subject's mathematics may run a model; the rest of the subject's room loads without torch.
    "paths.checkpoints": {"paths", "scoring", "loading", "probing", "stats_head", "store"},
    "influence.single_steps": {"influence", "akg", "stats_head", "probing", "compat"},
    "tracking": {"store", "findings", "chapters", "probing", "statistics", "compat"},
    "akg": {"statistics", "stats_head", "ops", "compat"},
    "tokens": {"akg", "stats_head", "ops", "compat"},
    "tokens.screening": {"tokens", "stats_head", "probing"},
    "judging": {"loading", "probing", "embedded", "stats_head", "store"},
    "trainers": {
        "tracking",
        "scoring",
        "stats_head",
        "store",
        "paths",
        "influence",
        "akg",
        "tokens",
        "probing",
        "ops",
        "compat",
    },
    "report": {"chapters", "store", "findings", "drawing", "probing.schema", "probing.io"},
}
ALLOWED["cli"] = set(ALLOWED)
# Arrows that still run back, and what will turn them round.
OWED: dict[str, dict[str, str]] = {
    "tracking": {
        "paths": "the probe recorder in paths/",
        "scoring": "the probe recorder in paths/",
    },
}
# Units that load on a laptop without torch.
TORCH_FREE = {"report", "store", "chapters", "findings", "drawing", "paths", "influence", "statistics", *FLOOR}
# Third-party roots that only these units may import.
FENCED = {
    "torch": set(ALLOWED) - TORCH_FREE,
    "transformers": set(ALLOWED) - TORCH_FREE - {"ops"},
    "trl": {"compat", "trainers", "cli", "probing"},
}
# All that these units may import of third-party code, by root and by module.
OPS_ROOTS = sys.stdlib_module_names | {"torch"}
PROBING_TRL = {"trl.data_utils"}
# Submodules that the libraries' own documentation imports from.
DOCUMENTED = {
    "accelerate.commands.launch",
    "accelerate.logging",
    "accelerate.utils",
    "transformers.integrations",
    "transformers.utils",
    "trl.data_utils",
    "trl.rewards",
}
HOSTS = ("trl", "transformers", "accelerate")


def imports(source: str) -> list[tuple[str, str]]:
    """Every import as (module, name); name is "" for `import module`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found += [(node.module, alias.name) for alias in node.names]
    return found


def violations(unit: str, source: str) -> list[str]:
    """What is wrong with the imports of one file of `unit`."""
    if unit not in ALLOWED:
        return [f"{unit} has no place in the import graph: add it to ALLOWED and to the design"]
    wrong = []
    for module, name in imports(source):
        root, *rest = module.split(".")
        if root == "trl_dynamics":
            target = ".".join([*rest, name]) if name else ".".join(rest)
            own = {unit.split(".")[0], *FLOOR, *OWED.get(unit, {})}
            inside = target.split(".")[0] in own and unit not in FLOOR
            if not inside and not any(target == a or target.startswith(a + ".") for a in ALLOWED[unit]):
                wrong.append(f"{unit} may not import {module} {name}")
        elif root in FENCED and unit not in FENCED[root]:
            wrong.append(f"{unit} may not import {root}")
        elif unit == "ops" and root not in OPS_ROOTS:
            wrong.append(f"ops may import torch only, not {root}")
        elif unit == "probing" and root == "trl" and module not in PROBING_TRL:
            wrong.append(f"probing may import {PROBING_TRL} of trl, not {module}")
        if root in HOSTS and unit != "compat" and is_private(module, name):
            wrong.append(f"{unit} imports the private name {module}.{name}; it belongs into compat.py")
    return wrong


def is_private(module: str, name: str) -> bool:
    submodule = "." in module and module not in DOCUMENTED
    return name.startswith("_") or any(part.startswith("_") for part in module.split(".")) or submodule


def unit_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts) if ".".join(parts) in ALLOWED else parts[0]


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_follow_the_graph(path):
    assert violations(unit_of(path), path.read_text()) == []


def test_the_checker_sees_violations():
    assert violations("ops", "from trl_dynamics.store.store import load_records")
    assert violations("report", "def f():\n    from trl_dynamics.scoring.engine import ProbeEngine")
    assert violations("report", "import torch") and violations("ops", "import trl")
    assert violations("trainers", "from trl.trainer.utils import maybe_gather_lm_head_ctx")
    assert violations("tracking", "from trl_dynamics import trainers")
    assert violations("ops", "import pandas") and violations("ops", "import transformers")
    assert violations("probing", "from trl import SFTConfig")
    assert violations("nowhere", "")
    assert violations("influence", "import torch") and not violations("influence.single_steps", "import torch")
    assert violations("influence.single_steps", "from trl_dynamics.trainers import sft")
    assert not violations("ops", "import math\nimport torch.nn.functional as F")
    assert not violations("probing", "from trl.data_utils import common_prefix_length")
    assert not violations("scoring", "from trl_dynamics import stats_head\nimport torch")


def find_cycle(sources: dict[str, str]) -> list[str]:
    """Module names along one circle of imports that run at load time; empty if there is none."""
    done: set[str] = set()

    def visit(name: str, trail: list[str]) -> list[str]:
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name not in done:
            for target in sorted(load_time_imports(sources[name], set(sources))):
                if cycle := visit(target, [*trail, name]):
                    return cycle
            done.add(name)
        return []

    return next((cycle for name in sources if (cycle := visit(name, []))), [])


def load_time_imports(source: str, modules: set[str]) -> set[str]:
    """Which of `modules` the file imports when it is loaded: not in functions, not for type checkers only."""

    def strip(node: ast.AST) -> list[ast.stmt]:
        if isinstance(node, ast.Import | ast.ImportFrom):
            return [node]
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return []
        type_checking = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        children = node.orelse if type_checking else ast.iter_child_nodes(node)
        return [found for child in children for found in strip(child)]

    top_level = ast.unparse(ast.Module(strip(ast.parse(source)), []))
    targets = {f"{m}.{n}" if f"{m}.{n}" in modules else m for m, n in imports(top_level)}
    return targets & modules


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_modules_do_not_import_each_other_in_a_circle():
    assert find_cycle({module_name(path): path.read_text() for path in FILES}) == []


def test_the_cycle_finder_sees_a_circle():
    back = {"p.b": "from p.c import x", "p.c": "if True:\n    from p import a"}
    assert find_cycle({"p.a": "import p.b", **back}) == ["p.a", "p.b", "p.c", "p.a"]
    assert find_cycle({"p.a": "def f():\n    import p.b", **back}) == []
    assert find_cycle({"p.a": "if TYPE_CHECKING:\n    import p.b", **back}) == []


def test_no_catch_all_modules():
    assert not [path for path in PACKAGE.rglob("*.py") if path.stem in ("utils", "helpers", "common")]


@pytest.mark.parametrize(
    "module",
    ["trl_dynamics", "trl_dynamics.report.page", "trl_dynamics.store.store", "trl_dynamics.embedded.world"]
    + ["trl_dynamics.versions", "trl_dynamics.cli.env"],
)
def test_light_modules_load_neither_torch_nor_trl(module):
    code = f"import {module}, sys; print(sorted({{'torch', 'trl', 'transformers'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=["lint", "format"])
def test_style(command):
    result = subprocess.run([sys.executable, "-m", "ruff", *command, "."], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
