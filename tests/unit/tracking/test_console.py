"""What is said on the console where logging is as Python starts it, and where somebody set it up."""

import contextlib
import io
import logging
import math
import sys

import pytest
from tqdm import tqdm

from trl_dynamics.tracking.callback import console_line
from trl_dynamics.tracking.console import ConsoleHandler, show_messages


@contextlib.contextmanager
def fresh_logging(monkeypatch):
    """Loggers as in a new process, without pytest's; gives our logger."""
    ours = logging.getLogger("trl_dynamics")
    level, root_level = ours.level, logging.root.level
    with monkeypatch.context() as patch:
        patch.setattr(logging.root, "handlers", [])
        patch.setattr(ours, "handlers", [])
        ours.setLevel(logging.NOTSET)
        logging.root.setLevel(logging.WARNING)
        yield ours
        ours.setLevel(level)
        logging.root.setLevel(root_level)


def said(capsys) -> str:
    logging.getLogger("trl_dynamics.tracking.series").info("good news")
    return capsys.readouterr().err


def test_good_news_is_said_once_where_nobody_set_up_logging(monkeypatch, capsys):
    with fresh_logging(monkeypatch):
        assert said(capsys) == ""
        show_messages()
        show_messages()
        assert said(capsys) == "good news\n"


def test_a_root_handler_gets_it_instead(monkeypatch, capsys):
    own = io.StringIO()
    with fresh_logging(monkeypatch):
        logging.basicConfig(stream=own, format="%(name)s %(message)s")
        show_messages()
        assert said(capsys) == ""
    assert own.getvalue() == "trl_dynamics.tracking.series good news\n"


@pytest.mark.parametrize("name", ["trl_dynamics", None])
def test_logging_that_is_set_up_later_gets_it_alone(monkeypatch, capsys, name):
    own = io.StringIO()
    with fresh_logging(monkeypatch):
        show_messages()
        logging.getLogger(name).addHandler(logging.StreamHandler(own))
        assert said(capsys) == ""
    assert own.getvalue() == "good news\n"


@pytest.mark.parametrize("quiet", ["trl_dynamics", "root"])
def test_who_asked_for_less_gets_less(monkeypatch, capsys, quiet):
    with fresh_logging(monkeypatch) as ours:
        (ours if quiet == "trl_dynamics" else logging.root).setLevel(logging.ERROR)
        show_messages()
        assert said(capsys) == ""


def test_a_message_does_not_continue_the_line_of_a_progress_bar(monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stderr", terminal)
    with tqdm(total=2, file=terminal):
        ConsoleHandler().handle(logging.makeLogRecord({"msg": "good news"}))
    assert "\rgood news\n" in terminal.getvalue()


def test_a_probing_step_is_one_line_that_speaks_of_other_fluent_answers():
    chosen = {"probe/chosen/logp_mean": -1.0, "squeeze/third_party_logp": -2.0}
    line = console_line(5, chosen | {"squeeze/other_fluent_logp": -0.125})
    assert line == "probe at step 5: chosen -1.000, other fluent answers since start -0.125 (nats per token)"
    assert console_line(5, chosen | {"probe/not_finite": 0.0}) == "probe at step 5: chosen -1.000 (nats per token)"


def test_a_probing_step_says_what_is_not_finite():
    line = console_line(5, {"probe/chosen/logp_mean": math.nan, "probe/not_finite": 0.875})
    assert line == "probe at step 5: chosen not finite (nats per token); 88% of the scored answers are NaN or infinite"
