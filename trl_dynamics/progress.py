"""A progress bar for work that takes more than a few seconds."""

from collections.abc import Iterable, Iterator

from tqdm import tqdm

# Seconds before a bar appears: short work shows none.
DELAY = 3.0


def with_bar(items: Iterable, total: int, what: str, *, shown: bool = True) -> Iterator:
    """Hand on `items`, with a bar on stderr once they have taken [`DELAY`] seconds; it goes when they end.

    Args:
        items (`Iterable`): What the work goes through.
        total (`int`): How many they are.
        what (`str`): Stands before the bar.
        shown (`bool`, *optional*): False for no bar: on processes besides the main one, or with `disable_tqdm`.
    """
    return iter(tqdm(items, total=total, desc=what, unit="batch", delay=DELAY, leave=False, disable=not shown))
