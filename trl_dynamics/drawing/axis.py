"""The x axis: which steps are drawn, linear or stretched at the start."""

import math
from collections.abc import Sequence

_MAX_DOTS = 30


def thin(steps: Sequence[int], limit: int) -> list[int]:
    """At most `limit` of `steps`: the first, the last and evenly spaced ones in order, and before the second of these
    the 1st, 2nd, 4th, ... after the first, for early training moves most (at most a quarter of `limit`)."""
    ordered = sorted({int(step) for step in steps})
    if len(ordered) <= limit:
        return ordered
    last = len(ordered) - 1
    gap = last / (limit - 1)
    early = [2**power for power in range(math.ceil(math.log2(gap)))][: limit // 4]
    even = [round(index * last / (limit - len(early) - 1)) for index in range(limit - len(early))]
    return [ordered[index] for index in sorted({*early, *even})]


def titled(title: str, drawn: int, recorded: int) -> str:
    """A chart's title, which says so when not every step is drawn."""
    return title if drawn == recorded else f"{title} ({drawn:,} of {recorded:,} steps drawn)"


def is_log_spaced(steps: Sequence[int]) -> bool:
    """Whether half of the steps lie in the first tenth of the run, so that a linear axis would hide them."""
    ordered = sorted(steps)
    span = ordered[-1] - ordered[0]
    return len(ordered) > 3 and ordered[len(ordered) // 2] - ordered[0] < 0.12 * span


def log_steps(steps: Sequence[int]) -> dict:
    """The parameter that switches the x axis to log(1 + step)."""
    return {"name": "log_steps", "value": is_log_spaced(steps)}


def step_axis(steps: Sequence[int]) -> dict:
    """The x channel over `step`; needs the `x` field that [`step_transform`] adds."""
    first, last = min(steps), max(steps)
    logs = [round(math.log1p(step), 6) for step in _log_ticks(first, last)]
    return {
        "field": "x",
        "type": "quantitative",
        "scale": {"zero": False, "nice": False},
        "axis": {
            "title": "step",
            "grid": False,
            "values": {"expr": f"log_steps ? {logs} : {_linear_ticks(first, last)}"},
            "labelExpr": "format(log_steps ? round(exp(datum.value) - 1) : datum.value, '~s')",
        },
    }


def step_transform() -> list[dict]:
    """What the x channel of [`step_axis`] reads."""
    return [{"calculate": "log_steps ? log(1 + datum.step) : datum.step", "as": "x"}]


def _linear_ticks(first: int, last: int) -> list[int]:
    raw = max((last - first) / 6, 1)
    power = 10 ** math.floor(math.log10(raw))
    gap = next(int(power * factor) for factor in (1, 2, 5, 10) if power * factor >= raw)
    ticks = list(range(math.ceil(first / gap) * gap, last + 1, gap))
    return ticks or [first]


def _log_ticks(first: int, last: int) -> list[int]:
    factors = (1, 2, 5) if last < 200 else (1, 3) if last < 5000 else (1,)
    powers = range(math.ceil(math.log10(last + 1)) + 1)
    inner = [factor * 10**power for power in powers for factor in factors]
    return [tick for tick in [0, *inner] if first <= tick <= last] or [first]


def dots(steps: Sequence[int], color: str | None = None, *, gaps: bool = False) -> bool | dict:
    """Marks on a line at its points, as long as they are few; with gaps always, for a point alone has no line."""
    if len(steps) > _MAX_DOTS and not gaps:
        return False
    return {"size": 22, "filled": True} | ({"color": color} if color else {})
