"""Numbers and texts as a page shows them: what is not finite is named, and no text can turn its surroundings round."""

import math
import re

NOT_FINITE = "not finite"
# Larger numbers are written with an exponent.
LARGE = 1e6
# Overrides of the reading direction (U+202E writes what follows backwards), and controls but tab and line ends.
_CONTROLS = re.compile("[\u202a-\u202e\u2066-\u2069\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


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


def shown(text: str) -> str:
    """A text with its control characters and direction overrides written out, as ⟨U+202E⟩."""
    return _CONTROLS.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", text)


def page_value(value):
    """Data of a page, ready for JSON: texts as [`shown`], None for numbers that are not finite."""
    if isinstance(value, str):
        return shown(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {page_value(name): page_value(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [page_value(entry) for entry in value]
    return value
