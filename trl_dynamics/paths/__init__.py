"""paths: learning paths and squeezing, from the records of a probe set; the subject of the chapter "paths".

kinds.py and records.py say what is recorded and how it is read. Records become tables per step (step_table.py),
changes (changes.py), metrics (metrics.py; greedy answers: samples.py) and a summary (summary.py; live.py while a run
trains; pairs.py for models that were scored once each; training.py for the trainer's log). rules/ judges it,
comparison.py compares runs, page/ shows them; chapter.py hands all of it on. lbk.py and card.py are by themselves.
Torch-free; this room may import store, findings, drawing, statistics, probing.schema and probing.io.
"""

from typing import TYPE_CHECKING

from trl_dynamics import lazy

if TYPE_CHECKING:
    from trl_dynamics.paths.changes import Changes
    from trl_dynamics.paths.lbk import lower_bounds
    from trl_dynamics.paths.records import load_records
    from trl_dynamics.paths.samples import load_samples
    from trl_dynamics.paths.summary import Summary, summarise, summarise_store

__getattr__, __dir__, __all__ = lazy.exports(
    __name__,
    {
        "Changes": "changes",
        "Summary": "summary",
        "load_records": "records",
        "load_samples": "samples",
        "lower_bounds": "lbk",
        "summarise": "summary",
        "summarise_store": "summary",
    },
)
