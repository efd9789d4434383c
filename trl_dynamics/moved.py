"""Modules that were public under another path: the old import still works, and warns once with the new path."""

import importlib
import sys
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
    """An old path: attributes are those of the new module, which is imported when one is asked for."""

    def __getattr__(self, name: str) -> object:
        # Libraries look for such names in every loaded module.
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        import warnings  # which importing this package has no use for

        new = MOVED[self.__name__]
        value = getattr(importlib.import_module(new), name)
        warnings.warn(f"{self.__name__} has moved to {new}; import from there", FutureWarning, stacklevel=2)
        return value


def install() -> None:
    """Let the old paths be imported. They are put where imports look first: a finder would be asked for every module
    that is missing, by TRL at every training step."""
    for name in MOVED:
        sys.modules.setdefault(name, MovedModule(name))
