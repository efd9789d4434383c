"""A bar appears with work that takes long, on the process that shows one, and hands on what it is given."""

import functools

import pytest
from tqdm import tqdm

from trl_dynamics import progress
from trl_dynamics.progress import with_bar


@pytest.mark.parametrize("shown", [True, False])
def test_long_work_shows_a_bar(shown, monkeypatch, capsys):
    monkeypatch.setattr(progress, "DELAY", 1e-9)
    monkeypatch.setattr(progress, "tqdm", functools.partial(tqdm, mininterval=0, miniters=1))
    assert list(with_bar([3, 1, 2], 3, "scoring", shown=shown)) == [3, 1, 2]
    assert ("scoring" in capsys.readouterr().err) == shown


def test_short_work_shows_none(capsys):
    assert list(with_bar(iter("ab"), 2, "scoring")) == ["a", "b"]
    assert capsys.readouterr().err == ""
