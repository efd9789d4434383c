"""Numbers in words, and prompts as turns, for charts and tables."""

import math

from trl_dynamics.probing.schema import Prompt

NOT_FINITE = "not finite"
NOT_RECORDED = "not recorded"
# Larger numbers are written with an exponent.
LARGE = 1e6
# Characters of a text that a page holds.
MAX_TEXT = 4000


def number(value: float | None, form: str = ".4g") -> str:
    """A number in this format; without a value a dash, and words where it is not finite."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return NOT_FINITE
    return format(value, form if abs(value) < LARGE else f"{'+' if form.startswith('+') else ''}.3g")


def percent(value: float) -> str:
    """A share as per cent; beyond ten times the whole its digits say nothing."""
    return f"{value:.0%}" if abs(value) <= 10 else "more than 1000%"


def with_error(value: float, error: float, form: str) -> str:
    """A mean with its standard error, which a single probe does not have."""
    if not math.isfinite(value):
        return NOT_FINITE
    if not math.isfinite(error):
        return f"{number(value, form)} (one probe)"
    return f"{number(value, form)} ± {number(error, form.lstrip('+'))}"


def capital(text: str) -> str:
    """The text with a capital first letter; the rest as it is."""
    return text[:1].upper() + text[1:]


def counted(value: int | None, noun: str) -> str | None:
    """`1,234 probes`; None without a value."""
    return None if value is None else f"{value:,} {noun}"


def joined(*parts) -> str:
    """What there is of the parts, as a list."""
    return ", ".join(str(part) for part in parts if part) or NOT_RECORDED


def cut(text: str) -> str:
    """The text, or its first [`MAX_TEXT`] characters and a note."""
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + " … [shortened in this report]"


def messages(prompt: Prompt) -> list[dict[str, str]]:
    """The turns of a prompt as role and text; a plain prompt is one turn without a role."""
    messages = [{"role": "", "content": prompt}] if isinstance(prompt, str) else prompt
    return [{"role": str(m["role"]), "text": cut(_content(m["content"]))} for m in messages]


def _content(content) -> str:
    """Text of a message; a message made of parts shows its text parts."""
    if isinstance(content, list):
        return " ".join(str(part.get("text", "")) if isinstance(part, dict) else str(part) for part in content)
    return str(content)
