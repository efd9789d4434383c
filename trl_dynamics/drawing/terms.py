"""Words with their meanings: a term of the glossary, and a metric described once."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Term:
    """A word with its meaning; `formula` and `healthy` are empty where there is nothing to say."""

    title: str
    meaning: str
    formula: str = ""
    unit: str = ""
    healthy: str = ""


@dataclass(frozen=True)
class Metric(Term):
    """A metric: the function that computes it, and the one text that glossary, axes and help are made from.

    Calling it calls the function.

    Args:
        title, meaning, formula, unit, healthy (`str`): As of a [`Term`]; what follows the unit's first comma or
            semicolon is a remark that an axis leaves out.
        source (`str`, *optional*): The paper, and its name of the quantity.
        span (`float`, *optional*): The least that its axis covers, so that noise does not look like a trend.
    """

    source: str = ""
    span: float = 0.1
    function: Callable[..., float] = field(kw_only=True)

    def __call__(self, *args) -> float:
        return self.function(*args)

    @property
    def axis(self) -> str:
        """The title of its axis: the unit without remarks."""
        return re.split("[,;]", self.unit)[0]


def described(registry: dict[str, Metric], **texts) -> Callable[[Callable[..., float]], Callable[..., float]]:
    """Enter the function that follows into `registry`, under its name, with the fields of [`Metric`].

    The function's docstring is made from them, unless it has one.
    """

    def enter(function: Callable[..., float]) -> Callable[..., float]:
        metric = Metric(function=function, **texts)
        registry[function.__name__] = metric
        function.__doc__ = function.__doc__ or docstring(metric)
        return function

    return enter


def docstring(metric: Metric) -> str:
    """What `help` prints of a metric's function."""
    source = f" ({metric.source})" if metric.source else ""
    return f"{metric.meaning}\n\n{metric.formula}{source}.\n\nUnit: {metric.unit}. Healthy: {metric.healthy}."


def glossary(*groups: Mapping[str, Term]) -> tuple[Term, ...]:
    """The terms of several registries, in their order."""
    return tuple(term for group in groups for term in group.values())
