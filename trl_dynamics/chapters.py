"""The chapters of a report, in order: name of a subject -> `"module:NAME"` of its [`findings.chapter.Chapter`].

A new subject is one line here. A module is loaded when its chapter is asked for, so this one imports nothing of ours.
"""

import importlib

CHAPTERS: dict[str, str] = {
    "paths": "trl_dynamics.paths.chapter:CHAPTER",
    "influence": "trl_dynamics.influence.chapter:CHAPTER",
}


def load_all() -> list:
    """Every [`findings.chapter.Chapter`], in order."""
    return [load(where) for where in CHAPTERS.values()]


def load(where: str) -> object:
    """What `"module:NAME"` names."""
    module, _, name = where.partition(":")
    return getattr(importlib.import_module(module), name)
