"""Modules that were public under another path: the old import still works, and warns once with the new path."""

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "trl_dynamics.akg.cheap": "trl_dynamics.akg.proxies",
    "trl_dynamics.akg.gram.gram": "trl_dynamics.akg.gram.products",
    "trl_dynamics.akg.influence": "trl_dynamics.akg.one_step",
    "trl_dynamics.akg.several": "trl_dynamics.akg.batched",
    "trl_dynamics.akg.verify": "trl_dynamics.akg.real_step",
    "trl_dynamics.tracking.lbk": "trl_dynamics.paths.lbk",
    "trl_dynamics.tracking.metrics": "trl_dynamics.paths.metrics",
}


class MovedModule(ModuleType):
    """An old path: attributes are those of the new module.

    Importing it also binds it in its package, over a function of the same name that the package exports
    (`akg.influence`), so calling it calls that function.
    """

    def __getattr__(self, name: str):
        return getattr(importlib.import_module(MOVED[self.__name__]), name)

    def __call__(self, *args, **kwargs):
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **kwargs)


class MovedFinder:
    """Finds and loads the old paths; it comes last, so that a file of that name wins."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return MovedModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        import warnings  # which importing this package has no use for

        new = MOVED[module.__name__]
        warnings.warn(f"{module.__name__} has moved to {new}; import from there", FutureWarning, stacklevel=2)


def install() -> None:
    """Let the old paths be found, once per process."""
    if not any(isinstance(finder, MovedFinder) for finder in sys.meta_path):
        sys.meta_path.append(MovedFinder())
