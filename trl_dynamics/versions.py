"""Which versions of other packages this one works with, and which of their private names it needs.

Importing this loads no other package, so that `trl-dynamics env` can say what is wrong where they are broken.
"""

import importlib
import inspect
from importlib.metadata import PackageNotFoundError, version

# The ranges of setup.cfg; constraints.txt holds the tested set.
ACCEPTED = {
    "torch": ">=2.13,<3",
    "transformers": ">=5.23,<6",
    "trl": ">=1.16,<2",
    "accelerate": ">=1.15,<2",
    "datasets": ">=5.2,<6",
    "peft": ">=0.21,<1",
}
# The newest minor version the tests have passed with, of each package whose private names are used.
TESTED = {"trl": "1.16", "transformers": "5.24", "accelerate": "1.15"}
# module -> what must be there; "Class.__init__:name" is an attribute that the constructor sets.
PRIVATE_NAMES = {
    "trl": (
        "RichProgressCallback",
        "SFTTrainer._prepare_dataset",
        "SFTTrainer._tag_names",
        "SFTTrainer.__init__:_metrics",
        "DPOTrainer._compute_loss",
        "DPOTrainer._tag_names",
        "DPOTrainer.__init__:_metrics",
        "DPOTrainer.__init__:loss_types",
        "DPOTrainer.__init__:loss_weights",
        "DPOTrainer.__init__:precompute_ref_logps",
        "GRPOTrainer._tag_names",
    ),
    "trl.trainer.utils": ("add_fused_lm_head", "maybe_gather_lm_head_ctx"),
    "transformers": (
        "PrinterCallback",
        "ProgressCallback",
        "PreTrainedConfig._attn_implementation",
        "PreTrainedModel._is_stateful",
        "Trainer._get_grad_norm",
    ),
    "transformers.cache_utils": ("Cache", "DynamicLayer.update"),
    "transformers.integrations.deepspeed": ("_hf_deepspeed_config_weak_ref",),
    "accelerate.commands.launch": ("launch_command_parser",),
}
VERSIONED = ("trl-dynamics", "trl", "transformers", "torch", "accelerate", "peft", "datasets", "deepspeed")


def check_versions(installed: dict[str, str | None]) -> None:
    """Refuse versions outside the accepted ranges, all of them named in one message.

    Args:
        installed (`dict[str, str | None]`): Version per package, None where it is not installed.

    Raises:
        ImportError: If a package is missing or outside its range.
    """
    from packaging.specifiers import SpecifierSet

    wrong = {
        name: wanted
        for name, wanted in ACCEPTED.items()
        if not installed.get(name) or not SpecifierSet(wanted, prereleases=True).contains(installed[name])
    }
    if wrong:
        found = ", ".join(f"{name}{wanted} (found {installed.get(name) or 'none'})" for name, wanted in wrong.items())
        remedy = " ".join(f"'{name}{wanted}'" for name, wanted in wrong.items())
        raise ImportError(f"trl-dynamics needs {found}. To install what fits: pip install {remedy}")


def installed_versions(names: tuple[str, ...]) -> dict[str, str | None]:
    """Installed version of each package, None where it is missing."""
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def check_private_names(installed: dict[str, str | None]) -> None:
    """Refuse packages that lack one of [`PRIVATE_NAMES`]; names of trainers that cannot be loaded are left out.

    Raises:
        ImportError: Names the first one that is missing, and the command that installs a version that has it.
    """
    for module, names in PRIVATE_NAMES.items():
        package = module.split(".")[0]
        for name in names:
            try:
                found = has_name(module, name)
            except RuntimeError:
                # A trainer that TRL loads on first use, and cannot: vLLM may be broken where GRPO is not wanted. Using
                # it gives TRL's own error.
                continue
            except Exception as error:
                reason = " ".join(str(error).split())
                raise ImportError(f"trl-dynamics cannot import {module} {installed.get(package)}: {reason}") from error
            if not found:
                raise ImportError(
                    f"trl-dynamics uses {module}.{name}, which {package} {installed.get(package)} does not have. To "
                    f"install a version that has it: pip install '{package}=={TESTED[package]}.*'"
                )


def has_name(module: str, name: str) -> bool:
    """Whether `module` exists and has `name`, written as in [`PRIVATE_NAMES`]; errors of importing it are raised."""
    path, _, attribute = name.partition(":")
    try:
        holder = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if module.startswith(error.name or "none"):
            return False
        raise
    try:
        for part in path.removesuffix(".__init__").split("."):
            holder = getattr(holder, part)
    except AttributeError:
        return False
    return not attribute or any(attribute in _names_used(base) for base in inspect.getmro(holder))


def _names_used(owner: type) -> tuple[str, ...]:
    """The attributes that a class's own constructor touches."""
    code = getattr(inspect.unwrap(owner.__init__), "__code__", None)
    return code.co_names if code else ()


def untested(installed: dict[str, str | None]) -> str | None:
    """A sentence about packages of a newer minor version than [`TESTED`]; None where there is none."""
    from packaging.version import Version

    newer = [
        f"{name} {installed[name]} (tested up to {tested})"
        for name, tested in TESTED.items()
        if installed.get(name) and Version(installed[name]).release[:2] > Version(tested).release
    ]
    if not newer:
        return None
    return (
        f"trl-dynamics has not been tested with {', '.join(newer)}: every private name that it uses is there, but "
        "numbers may differ; constraints.txt of trl-dynamics holds the tested versions"
    )
