"""Learning paths of a run that is still training: what is known of it when a step has just been scored."""

import pandas as pd

from trl_dynamics.paths.samples import Samples
from trl_dynamics.paths.step_table import StepTable
from trl_dynamics.paths.summary import StepSummary, Summary, summarise_step


class LivePaths:
    """Keeps the start, the step before and this one; not the trainer's log."""

    def __init__(self):
        self._kept: list[tuple[StepTable, StepSummary, pd.DataFrame | None]] = []

    def add(self, table: StepTable, samples: pd.DataFrame | None = None) -> Summary:
        """The run as of this step, against the start.

        Args:
            table ([`StepTable`]): The step's records.
            samples (`pandas.DataFrame`, *optional*): Its greedy answers, with the columns of [`samples.NUMBERS`].
        """
        start = self._kept[0][0] if self._kept else table
        kept = [*self._kept, (table, summarise_step(start, table), samples)]
        tables, parts, answers = zip(*kept, strict=True)
        taken = [rows for rows in answers if rows is not None and len(rows)]
        own = Samples(pd.concat(taken, ignore_index=True)) if taken else None
        self._kept = [kept[0], *kept[1:][-1:]]
        return Summary(list(parts), start, {one.step: one for one in tables}.__getitem__, own)
