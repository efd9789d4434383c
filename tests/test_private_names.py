"""No private name of TRL, transformers, accelerate or DeepSpeed is used outside compat/, but for a named list."""

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
import trl

from trl_dynamics import versions

PACKAGE = Path(versions.__file__).parent
CONTRACTS = Path(__file__).parent / "integration/test_compat.py"
HOSTS = ("accelerate", "deepspeed", "transformers", "trl")
# What a trainer of ours overrides, or wraps, by the name that its base class calls.
OVERRIDES = {
    ("trainers/sft.py", "_prepare_dataset"),
    ("trainers/sft.py", "_tag_names"),
    ("trainers/dpo.py", "_compute_loss"),
    ("trainers/dpo.py", "_tag_names"),
    ("trainers/grpo.py", "_tag_names"),
    ("trainers/mixin.py", "_get_grad_norm"),
}
# Names of Python and torch.
OTHER_LIBRARIES = {
    ("akg/gram/record.py", "_forward_pre_hooks"),
    ("akg/gram/record.py", "_version"),
    ("cli/main.py", "_exit"),
    ("cli/main.py", "_run_exitfuncs"),
    ("cli/main.py", "_shutdown"),
    ("cli/options.py", "_actions"),
    ("scoring/precision.py", "_parameters"),
    ("stats_head/module_state.py", "_buffers"),
    ("stats_head/module_state.py", "_version"),
}
LISTED = OVERRIDES | OTHER_LIBRARIES
# DeepSpeed's and transformers' internals without an underscore, and parameters' attributes that begin with `ds_`.
INTERNALS = {
    "bit16_groups",
    "empty_partition_cache",
    "fp16_groups",
    "fp32_partitioned_groups_flat",
    "get_lp_grad_fragment",
    "hp_fragment_address",
    "lp_fragment_address",
    "params_in_nvme_and_cpu",
    "single_partition_of_fp32_groups",
    "sub_group_to_group_id",
    "swap_optimizer",
    "zero_hpz_partition_size",
    "zero_quantized_nontrainable_weights",
    "zero_quantized_weights",
}
BY_NAME = {"getattr", "setattr", "hasattr", "delattr"}
# Classes that TRL's trainers inherit from or that inherit from them: their `self` is an object of TRL's too.
TRAINERS = {"DynamicsMixin", "SFTTrainer", "DPOTrainer", "GRPOTrainer"}


def is_private(name: str) -> bool:
    return name in INTERNALS or name.startswith("ds_") or (name.startswith("_") and not name.startswith("__"))


def names_of_trainers() -> set[str]:
    """Private methods of TRL's trainers, and private attributes that their constructors set."""
    classes = [base for name in TRAINERS & set(dir(trl)) for base in inspect.getmro(getattr(trl, name))]
    constructors = [inspect.unwrap(owner.__init__) for owner in classes]
    set_there = {name for one in constructors if hasattr(one, "__code__") for name in one.__code__.co_names}
    return {name for name in {*set_there, *(key for owner in classes for key in vars(owner))} if is_private(name)}


def defined(tree: ast.AST) -> set[str]:
    """Names that a file gives to functions, classes, variables, and attributes of `self`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_own(node.value):
            found.add(node.attr)
    return found


def is_own(node: ast.AST) -> bool:
    """Whether an expression is `self`, `cls` or `super()`."""
    called = node.func if isinstance(node, ast.Call) else None
    name = called.id if isinstance(called, ast.Name) else node.id if isinstance(node, ast.Name) else ""
    return name in ("self", "cls", "super")


def trainers_in(tree: ast.AST) -> list[ast.ClassDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name in TRAINERS]


def used(tree: ast.AST, of_trainers: set[str], inherited: set[str] = frozenset()) -> Iterator[str]:
    """Private names that are none of the file's own, once per use; `inherited` are those of our trainers' classes."""
    own = defined(tree) | (inherited if trainers_in(tree) else set())
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name in TRAINERS:
            yield from (name for name in defined(node) if name in of_trainers)
            inside = [part for part in ast.walk(node) if isinstance(part, ast.Attribute) and is_own(part.value)]
            yield from (part.attr for part in inside if part.attr in of_trainers)
        elif isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
            yield node.attr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in BY_NAME:
            strings = [part.value for part in node.args if isinstance(part, ast.Constant)]
            yield from (name for name in strings if isinstance(name, str) and is_private(name) and name not in own)
        elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in HOSTS:
            yield from (name for name in (*node.module.split("."), *(a.name for a in node.names)) if name[0] == "_")


@pytest.fixture(scope="module")
def of_trainers() -> set[str]:
    return names_of_trainers()


def test_private_names_are_used_in_compat_alone(of_trainers):
    trees = {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}
    inherited = {name for tree in trees.values() for one in trainers_in(tree) for name in defined(one)}
    found = {
        (place, name)
        for place, tree in trees.items()
        if not place.startswith("compat/")
        for name in used(tree, of_trainers, inherited)
    }
    assert found - LISTED == set(), "these belong into trl_dynamics/compat, with a contract test"
    assert LISTED - found == set(), "these are no longer used; take them off the list"


def test_what_is_overridden_has_a_contract():
    text = CONTRACTS.read_text()
    listed = {name.split(".")[-1] for names in versions.PRIVATE_NAMES.values() for name in names}
    assert {name for _, name in OVERRIDES} <= listed
    assert [name for _, name in OVERRIDES if name not in text] == []


@pytest.mark.parametrize(
    ("planted", "name"),
    [
        ("trainer._metrics['train']", "_metrics"),
        ("model.config._attn_implementation", "_attn_implementation"),
        ("getattr(parameter, '_hp_mapping')", "_hp_mapping"),
        ("engine.optimizer.fp16_groups", "fp16_groups"),
        ("hasattr(parameter, 'ds_status')", "ds_status"),
        ("from trl.trainer.dpo_trainer import _private", "_private"),
        ("from transformers._internal import name", "_internal"),
        ("class SFTTrainer:\n    def f(self):\n        self._metrics", "_metrics"),
        ("class GRPOTrainer:\n    def _generate_and_score_completions(self): ...", "_generate_and_score_completions"),
        ("class Ours:\n    def f(self):\n        self._signature_columns", "_signature_columns"),
    ],
)
def test_a_planted_name_is_found(planted, name, of_trainers):
    assert name in set(used(ast.parse(planted), of_trainers))


@pytest.mark.parametrize(
    "planted",
    [
        "class Ours:\n    def __init__(self):\n        self._kept = {}\n    def f(self):\n        return self._kept",
        "def _ours(case):\n    return case._ours",
        "value.__dict__",
        "class SFTTrainer:\n    def _add_sides_of_ours(self):\n        return self._add_sides_of_ours",
        "from trl_dynamics.akg import _private",
    ],
)
def test_what_is_the_package_s_own_is_left_alone(planted, of_trainers):
    assert set(used(ast.parse(planted), of_trainers)) == set()
