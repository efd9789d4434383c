"""The model card's section on training dynamics: what moved between the first and the last probe."""

import math

import pandas as pd

from trl_dynamics.paths.summary import Summary, summarise


def model_card_section(records: pd.DataFrame | Summary) -> str:
    """Markdown table per response type: log-probability per token at the first and last step, and the paired change.

    A mean over no finite value says so.

    Args:
        records (`pandas.DataFrame` or [`Summary`]): Records of one run and one model.
    """
    summary = summarise(records)
    path, change = summary.path(), summary.change_since_start()
    first, last = path.index[0], path.index[-1]
    rows = [
        f"| {name} | {_number(path[name].iloc[0], '.3f')} | {_number(path[name].iloc[-1], '.3f')} | "
        f"{_number(change[name].iloc[-1] if name in change else math.nan, '+.3f')} |"
        for name in path.columns
    ]
    return "\n".join(
        [
            "## Training dynamics",
            "",
            f"Mean log-probability per token (nats) of a fixed probe set, step {first} against step {last}, tracked "
            "with trl-dynamics.",
            "",
            f"| response | step {first} | step {last} | change |",
            "| --- | --- | --- | --- |",
            *rows,
            "",
        ]
    )


def _number(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "not finite"
