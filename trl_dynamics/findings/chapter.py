"""A chapter: what a subject gives so that its records are judged, compared and shown with those of all others."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from trl_dynamics.findings.finding import Finding
from trl_dynamics.findings.rules import Rule
from trl_dynamics.store.kind import Kind
from trl_dynamics.store.store import DynamicsStore

# What a chapter makes of the records of one model, e.g. a summary.
Subject = TypeVar("Subject")


@dataclass(frozen=True)
class Overview:
    """What was recorded of one model, in words, before any rule judges it.

    Args:
        scope (`str`): What there is, e.g. "7 probing steps, 0 to 320".
        calm (`str`): What it means that no rule fired.
        lack (`str`, *optional*): Why changes cannot be judged, as a sentence; empty where they can.
        moved (`str`, *optional*): What changed since the start, as a sentence.
        scored (`list[int]`, *optional*): The steps at which answers were scored.
        compared_with (`str`, *optional*): The model that this one is judged against, where that is another one.
    """

    scope: str
    calm: str
    lack: str = ""
    moved: str = ""
    scored: list[int] = field(default_factory=list)
    compared_with: str | None = None


@dataclass(frozen=True)
class Comparison:
    """Where runs differ from the first of them.

    Args:
        reference (`str`): The run that the others are compared with.
        findings (`list[Finding]`): The differences.
        compared (`list[str]`): The runs that were compared with it.
        left_out (`dict[str, str]`): The others, and why they cannot be.
    """

    reference: str
    findings: list[Finding]
    compared: list[str]
    left_out: dict[str, str]


class Live(Protocol[Subject]):
    """The subject of a run that is still training."""

    def add(self, *rows) -> Subject:
        """Take the rows of one more step; the subject as of now, against the start."""


@dataclass(frozen=True)
class Chapter(Generic[Subject]):
    """One subject, as judge, report and `diagnose` see it; [`chapters.CHAPTERS`] lists them.

    Args:
        name (`str`): As in the registry.
        kinds (`tuple[Kind, ...]`): The kinds of rows that it reads.
        open (`Callable`): A store -> model -> subject; empty where nothing of its kinds was recorded. Raises
            `ValueError` where rows are damaged.
        rules (`Mapping[str, Rule]`): What judges a subject, by name.
        overview (`Callable`): A subject -> its [`Overview`].
        sections (`str`): `"module:NAME"` of the [`drawing.section.Sections`] that show it; loaded when a page is made.
        live (`Callable`, *optional*): Makes a [`Live`] subject, for a run that trains.
        compare (`Callable`, *optional*): Label -> subject, in order -> a [`Comparison`] with the first one.
    """

    name: str
    kinds: tuple[Kind, ...]
    open: Callable[[DynamicsStore], dict[str, Subject]]
    rules: Mapping[str, Rule]
    overview: Callable[[Subject], Overview]
    sections: str
    live: Callable[[], Live[Subject]] | None = None
    compare: Callable[[Mapping[str, Subject]], Comparison] | None = None
