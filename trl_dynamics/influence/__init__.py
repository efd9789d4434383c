"""influence: what single steps were predicted to do, and did; the subject of the chapter "influence".

kind.py says what is recorded. summary.py reads it step by step, series.py over a run. Rules are in rules.py. The
section of the page is in sections.py, its parts in charts.py, maps.py, strips.py and strips.js. chapter.py hands all
of it on. Torch-free; this room may import store, findings, drawing, statistics and probing.schema.
"""

from typing import TYPE_CHECKING

from trl_dynamics import lazy

if TYPE_CHECKING:
    from trl_dynamics.influence.kind import load_influence
    from trl_dynamics.influence.series import accumulated_influence, influence_stability
    from trl_dynamics.influence.summary import InfluenceSummary, summarise_influence

__getattr__, __dir__, __all__ = lazy.exports(
    __name__,
    {
        "InfluenceSummary": "summary",
        "accumulated_influence": "series",
        "influence_stability": "series",
        "load_influence": "kind",
        "summarise_influence": "summary",
    },
)
