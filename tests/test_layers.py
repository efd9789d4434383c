"""The folder tree is the architecture: imports run one way, and the light modules stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "trl_dynamics"

# Who may import whom: unit -> units or modules of this package. A unit may always import itself.
ALLOWED: dict[str, set[str]] = {
    "ops": set(),
    "compat": set(),
    "probing": set(),
    "embedded": {"probing"},
    "stats_head": {"ops", "compat"},
    "akg": {"stats_head", "ops", "compat"},
    "tokens": {"akg", "stats_head", "ops", "compat"},
    "tracking": {"probing", "stats_head", "ops", "compat"},
    "classification": {"akg", "ops", "tracking.store"},
    "adaptation": {"akg", "ops", "tracking.store"},
    "simplicity": {"akg", "ops", "tracking.store"},
    "trainers": {"tracking", "akg", "tokens", "probing", "stats_head", "ops", "compat"},
    "report": {
        "tracking.records",
        "tracking.store",
        "tracking.metrics",
        "tracking.effects",
        "tracking.findings",
        "probing.schema",
        "probing.io",
    },
    "cli": {
        "trainers",
        "report",
        "tracking",
        "akg",
        "tokens",
        "probing",
        "embedded",
        "stats_head",
        "ops",
        "compat",
        "classification",
        "adaptation",
        "simplicity",
    },
}
# Third-party roots that only these units may import.
FENCED = {"torch": set(ALLOWED) - {"report"}, "trl": {"compat", "trainers", "cli", "probing"}}
# Submodules that the libraries' own documentation imports from.
DOCUMENTED = {
    "accelerate.commands.launch",
    "accelerate.logging",
    "accelerate.utils",
    "transformers.utils",
    "trl.data_utils",
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
    wrong = []
    for module, name in imports(source):
        root, *rest = module.split(".")
        if root == "trl_dynamics":
            target = ".".join([*rest, name]) if name else ".".join(rest)
            inside = target.split(".")[0] == unit
            if not inside and not any(target == a or target.startswith(a + ".") for a in ALLOWED[unit]):
                wrong.append(f"{unit} may not import {module} {name}")
        elif root in FENCED and unit not in FENCED[root]:
            wrong.append(f"{unit} may not import {root}")
        if root in HOSTS and unit != "compat" and is_private(module, name):
            wrong.append(f"{unit} imports the private name {module}.{name}; it belongs into compat.py")
    return wrong


def is_private(module: str, name: str) -> bool:
    submodule = "." in module and module not in DOCUMENTED
    return name.startswith("_") or any(part.startswith("_") for part in module.split(".")) or submodule


def unit_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_follow_the_graph(path):
    assert violations(unit_of(path), path.read_text()) == []


def test_the_checker_sees_violations():
    assert violations("ops", "from trl_dynamics.tracking.store import load_records")
    assert violations("report", "def f():\n    from trl_dynamics.tracking.engine import ProbeEngine")
    assert violations("report", "import torch") and violations("ops", "import trl")
    assert violations("trainers", "from trl.trainer.utils import maybe_gather_lm_head_ctx")
    assert violations("tracking", "from trl_dynamics import trainers")
    assert not violations("tracking", "from trl_dynamics import stats_head\nimport torch")


def test_modules_do_not_import_each_other_in_a_circle():
    graph = {module_name(path): module_imports(path) for path in FILES}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"import cycle: {' -> '.join([*trail, name])}"
        if name in graph and name not in done:
            for target in graph[name]:
                visit(target, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def module_imports(path: Path) -> set[str]:
    top_level = ast.Module([n for n in ast.parse(path.read_text()).body if "Import" in type(n).__name__], [])
    targets = {candidate for m, n in imports(ast.unparse(top_level)) for candidate in (m, f"{m}.{n}")}
    return {target for target in targets if target.startswith("trl_dynamics.")}


def test_no_catch_all_modules():
    assert not [path for path in PACKAGE.rglob("*.py") if path.stem in ("utils", "helpers", "common")]


@pytest.mark.parametrize(
    "module",
    ["trl_dynamics", "trl_dynamics.report.page", "trl_dynamics.tracking.store", "trl_dynamics.embedded.world"],
)
def test_light_modules_load_neither_torch_nor_trl(module):
    code = f"import {module}, sys; print(sorted({{'torch', 'trl', 'transformers'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=["lint", "format"])
def test_style(command):
    result = subprocess.run([sys.executable, "-m", "ruff", *command, "."], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
