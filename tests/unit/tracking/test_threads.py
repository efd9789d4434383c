"""A hint at OMP_NUM_THREADS where threads are more than free cores, and nowhere else."""

import logging
import os

import pytest
import torch

from trl_dynamics.tracking import threads
from trl_dynamics.tracking.threads import tell_threads, thread_hint


@pytest.mark.parametrize(
    ("given", "fitting"),
    [
        ({"threads": 2, "num_processes": 1, "cores": 2, "load": 0.5}, None),
        ({"threads": 2, "num_processes": 1, "cores": 2, "load": 2.1}, 1),
        ({"threads": 1, "num_processes": 1, "cores": 2, "load": 9.0}, None),
        ({"threads": 2, "num_processes": 2, "cores": 2, "load": 0.0}, 1),
        ({"threads": 4, "num_processes": 2, "cores": 8, "load": 1.0}, None),
        ({"threads": 8, "num_processes": 2, "cores": 8, "load": 0.0}, 4),
        ({"threads": 64, "num_processes": 1, "cores": 64, "load": 3.0}, None),
        ({"threads": 64, "num_processes": 1, "cores": 64, "load": 40.0}, 24),
    ],
)
def test_the_hint_names_how_many_threads_fit(given, fitting):
    hint = thread_hint(**given)
    assert (hint is None) == (fitting is None)
    assert fitting is None or f"OMP_NUM_THREADS={fitting} in the environment" in hint


@pytest.mark.parametrize(("device", "told"), [("cpu", 1), ("cuda", 0)])
def test_it_is_told_on_a_busy_cpu_unless_somebody_chose(device, told, monkeypatch, caplog):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "getloadavg", lambda: (1000.0, 0.0, 0.0))
    monkeypatch.setattr(threads.torch, "get_num_threads", lambda: 4)
    with caplog.at_level(logging.INFO, "trl_dynamics"):
        tell_threads(torch.device(device), 1)
        assert len(caplog.records) == told
        monkeypatch.setenv("OMP_NUM_THREADS", "4")
        tell_threads(torch.device(device), 1)
        assert len(caplog.records) == told
