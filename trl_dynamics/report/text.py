"""Texts as a page shows them: no text can turn its surroundings round, and no number breaks its JSON."""

import math
import re
from typing import Any

# Overrides of the reading direction (U+202E writes what follows backwards), and controls but tab and line ends.
_CONTROLS = re.compile("[\u202a-\u202e\u2066-\u2069\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


def shown(text: str) -> str:
    """A text with its control characters and direction overrides written out, as ⟨U+202E⟩."""
    return _CONTROLS.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", text)


def page_value(value: Any) -> Any:
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
