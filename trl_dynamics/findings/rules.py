"""A rule: a function of a subject and its run that gives a finding or none, and says which ones it can give."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from trl_dynamics.findings.finding import Finding, by_severity


@dataclass(frozen=True)
class Run:
    """What a rule may know of the run, apart from its subject. Each judgement of one model has its own.

    Args:
        method (`str`): How the model was trained: `"dpo"`, `"sft"`, `"grpo"`, or `"track"` where that is not known.
        meta (`Mapping`): The run's meta.json.
    """

    method: str = "track"
    meta: Mapping = field(default_factory=dict)
    # What rules gave in this judgement, by rule and identity of the subject, which is kept alive with it.
    _given: dict[tuple["Rule", int], tuple[object, Finding | None]] = field(
        default_factory=dict, repr=False, compare=False
    )

    @classmethod
    def of(cls, meta: Mapping, model: str | None = None) -> "Run":
        """The run of a store. `trained_with` in its meta.json says how each model was trained that `track` scored."""
        return cls(meta.get("trained_with", {}).get(model) or meta.get("method", "track"), meta)


@dataclass(frozen=True, eq=False)
class Rule:
    """Calling it judges a subject; rules that call each other are computed once per judgement.

    Args:
        function (`Callable`): Of a subject and its [`Run`]; its docstring says what it looks for.
        gives (`Mapping[str, tuple[str, ...]]`): Names of the findings it can give, each with its severities.
        at_once (`bool`, *optional*): In a run that trains, one step is enough to raise the alarm.
        phase (`Callable`, *optional*): Of a subject and its [`Run`]; in a run that trains, the same finding is raised
            again in another phase, which this names.
    """

    function: Callable[..., Finding | None]
    gives: Mapping[str, tuple[str, ...]]
    at_once: bool = False
    phase: Callable[..., str] = lambda subject, run: ""

    def __call__(self, subject: object, run: Run) -> Finding | None:
        key = (self, id(subject))
        if key not in run._given:
            found = self.function(subject, run)
            assert found is None or found.severity in self.gives.get(found.name, ()), (found, self.gives)
            run._given[key] = (subject, found)
        return run._given[key][1]


def rule(
    *, at_once: bool = False, phase: Callable[..., str] | None = None, **gives: str | tuple[str, ...]
) -> Callable[[Callable[..., Finding | None]], Rule]:
    """Make a function a [`Rule`]: `@rule(squeezing=(WARNING, ALERT))`."""
    severities = {name: (given,) if isinstance(given, str) else given for name, given in gives.items()}
    more = {} if phase is None else {"phase": phase}
    return lambda function: Rule(function, MappingProxyType(severities), at_once, **more)


def found_by(rules: Iterable[Rule], subject: object, run: Run) -> list[Finding]:
    """What the rules say of a subject, the most severe first."""
    return by_severity(found for rule in rules if (found := rule(subject, run)))
