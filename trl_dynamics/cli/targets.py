"""What `trl-dynamics track` scores: models or checkpoints, at which step, and which method trained them."""

import itertools
import json
import re
from collections.abc import Iterable
from pathlib import Path

import yaml

from trl_dynamics.cli import sources
from trl_dynamics.paths.checkpoints import Target
from trl_dynamics.paths.kinds import RECORDS
from trl_dynamics.store.aside import is_tracked
from trl_dynamics.store.store import DynamicsStore

METHODS = ("sft", "dpo", "grpo")


def find_targets(models: list[str], checkpoints: str | None, base: str | None = None) -> list[Target]:
    """What to score, in order: each model once, or its checkpoints by ascending step.

    With `base`, step 0 of every model is `base`, and a model without checkpoints follows at its last training step.

    Raises:
        ValueError: If a local path does not exist, no checkpoint matches, a model is given twice, two of its
            checkpoints have the same step, or a step 0 is there besides `base`.
    """
    # However they are written: runs/a, ./runs/a and runs/a/ are one folder.
    places = [Path(model).resolve() for model in models]
    if len(set(places)) < len(places):
        raise ValueError(f"a model is given twice: {models}")
    if base is not None and Path(base).resolve() in places:
        raise ValueError(f"--base {base} is among the models to score; give it once, as --base")
    start = sources.find_model(base) if base is not None else None
    targets = []
    for index, (name, model) in enumerate(zip(_short_names(models), models, strict=True)):
        found = _of_model(model, checkpoints, name, index, alone=start is None)
        if start is not None:
            if found[0].step == 0:
                raise ValueError(f"{found[0].path} is step 0 already, the place of --base; leave one of them out")
            targets.append(Target(start, name, index, 0))
        targets += found
    return targets


def trained_with(targets: Iterable[Target], given: str | None = None) -> dict[str, str]:
    """Which method trained each model, by name; a model where it is not known is left out.

    In this order: `given`; the run's meta.json; the tags of the model card that TRL writes.
    """
    found: dict[str, str] = {}
    for target in targets:
        method = given or _method_of(Path(target.path))
        # The last target decides: what is at step 0 may have been trained otherwise.
        found.pop(target.model, None)
        if method is not None:
            found[target.model] = method
    return found


def _of_model(model: str, checkpoints: str | None, name: str, index: int, *, alone: bool) -> list[Target]:
    folder = sources.find_model(model)
    if checkpoints is None:
        return [Target(folder, name, index, 0 if alone else _last_step(Path(folder)))]
    found = [path for path in Path(model).glob(checkpoints) if path.is_dir() and _step_of(path) is not None]
    if not found:
        raise ValueError(f"no folder {checkpoints!r} with a step number in {model!r}")
    found = sorted(found, key=_step_of)
    for path, following in itertools.pairwise(found):
        if _step_of(path) == _step_of(following):
            raise ValueError(
                f"{str(path)!r} and {str(following)!r} are both of step {_step_of(path)} by their names; give a "
                "narrower --checkpoints"
            )
    return [Target(str(path), name, index, _step_of(path)) for path in found]


def _last_step(folder: Path) -> int:
    """The step that a model was trained to: by its name, trainer_state.json or records; 1 where none says."""
    state = _read_json(folder / "trainer_state.json").get("global_step")
    step = _step_of(folder) if folder.name.startswith("checkpoint-") else state
    if not step and (store := _run_in(folder)) is not None:
        step = max(store.steps(RECORDS), default=None)
    return int(step or 1)


def _method_of(path: Path) -> str | None:
    for folder in (path, path.parent) if path.name.startswith("checkpoint-") else (path,):
        store = _run_in(folder)
        methods = {store.read_meta().get("method")} if store is not None else _card_tags(folder)
        known = methods & set(METHODS)
        if len(known) == 1:
            return known.pop()
    return None


def _run_in(folder: Path) -> DynamicsStore | None:
    """The records of the training run whose output this is."""
    store = DynamicsStore(folder)
    return store if store.exists and not is_tracked(store.read_meta()) else None


def _card_tags(folder: Path) -> set[str]:
    """Tags in the front matter of a model card; none where there is no card, or a broken one."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
        head = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else {}
    except (OSError, ValueError, IndexError, yaml.YAMLError):
        return set()
    tags = head.get("tags") if isinstance(head, dict) else None
    return {tag for tag in tags if isinstance(tag, str)} if isinstance(tags, list) else set()


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _short_names(models: list[str]) -> list[str]:
    named = [Path(model) for model in models]
    parts = [(path.resolve() if path.name in ("", "..") else path).parts for path in named]
    depth = 1
    while len({part[-depth:] for part in parts}) < len(parts):
        depth += 1
    return ["/".join(part[-depth:]) for part in parts]


def _step_of(path: Path) -> int | None:
    match = re.search(r"(\d+)$", path.name)
    return int(match[1]) if match else None
