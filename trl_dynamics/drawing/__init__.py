"""drawing: parts of any chart and of any page, whatever the subject.

What every chart's spec has in common (spec.py), the axis over steps (axis.py), one look per run and response type
(style.py), a line per run (lines.py), numbers in words (text.py), terms of the glossary (terms.py), and what a chapter
hands to a page (section.py). A chart of one subject belongs to the subject's room. This room may import
probing.schema.
"""

from typing import TYPE_CHECKING

from trl_dynamics import lazy

if TYPE_CHECKING:
    from trl_dynamics.drawing.section import Card, Panel, Section, Sections, Shown, Table
    from trl_dynamics.drawing.style import Looks
    from trl_dynamics.drawing.terms import Term

__getattr__, __dir__, __all__ = lazy.exports(
    __name__,
    {
        "Card": "section",
        "Looks": "style",
        "Panel": "section",
        "Section": "section",
        "Sections": "section",
        "Shown": "section",
        "Table": "section",
        "Term": "terms",
    },
)
