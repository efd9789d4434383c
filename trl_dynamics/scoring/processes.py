"""Several processes that do one thing: files are looked at, and written, by the main one."""

from collections.abc import Callable

from accelerate import PartialState
from accelerate.utils import broadcast_object_list


def on_main(work: Callable[[], object]) -> object:
    """Run `work` on the main process; its result, or its error, reaches every process."""
    state, outcome = PartialState(), [None, None]
    if state.is_main_process:
        try:
            outcome[0] = work()
        except Exception as error:
            outcome[1] = error
    if state.num_processes > 1:
        broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
