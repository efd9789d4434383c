"""report: runs -> one offline page, PNG pictures or CSV tables, of whatever chapters have something to show.

load.py reads runs, sections.py collects the sections of all chapters, page.py, cards.py and glossary.py make the page
(templates/), export.py the other formats; extra.py asks for the packages of the `report` extra, text.py keeps texts
harmless. squeeze_demo.py is a page of its own. A chart of one subject belongs to the subject's room. This room may
import chapters, store, findings, drawing, probing.schema and probing.io.
"""

from typing import TYPE_CHECKING

from trl_dynamics import lazy

if TYPE_CHECKING:
    from trl_dynamics.report.export import export_csv, export_png
    from trl_dynamics.report.page import build_page

__getattr__, __dir__, __all__ = lazy.exports(
    __name__, {"build_page": "page", "export_csv": "export", "export_png": "export"}
)
