"""What this package says on the console: info included, above the progress bar.

Python's logging shows warnings only as long as nobody configures it, and good news is none: without this, a run from
Python would end in silence unless something is wrong.
"""

import logging
import sys

OUR_LOGGER = "trl_dynamics"


class ConsoleHandler(logging.Handler):
    """Writes messages to stderr on lines of their own, where a progress bar may be in the way."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            from tqdm import tqdm  # here, so that `trl-dynamics env` can say that it is missing

            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:  # as in logging's own handlers
            self.handleError(record)


def show_messages() -> None:
    """Let this package's info messages be seen, unless logging is set up otherwise.

    A level that somebody gave the logger `trl_dynamics`, or a root logger that is stricter than warnings, stays. Where
    the messages would reach no handler, this adds one that writes them to stderr, and falls silent once there is
    another. To be called on the main process; a second call changes nothing.
    """
    logger = logging.getLogger(OUR_LOGGER)
    if logger.level == logging.NOTSET and logging.root.level <= logging.WARNING:
        logger.setLevel(logging.INFO)
    if not logger.hasHandlers():
        handler = ConsoleHandler()
        handler.addFilter(_reaches_no_other)
        logger.addHandler(handler)


def _reaches_no_other(record: logging.LogRecord) -> bool:
    """Whether nobody has set up logging since: a message would stand there twice."""
    logger = logging.getLogger(OUR_LOGGER)
    return len(logger.handlers) == 1 and not (logger.propagate and logging.root.handlers)
