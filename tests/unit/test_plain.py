"""Whatever an argument holds, JSON and YAML hold its plain form, and name what has none."""

import dataclasses
import enum
import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import SchedulerType

from trl_dynamics.plain import NotPlainError, finite_or_none, json_text, plain, yaml_text


class Color(enum.StrEnum):
    RED = "red"


@dataclasses.dataclass
class Options:
    dtype: torch.dtype = torch.bfloat16
    sizes: tuple = (1, np.int64(2))


class WithDict:
    def to_dict(self):
        return {"r": np.int32(8), "modules": {"q", "k"}}


CASES = [
    (np.float64(1e-5), 1e-5),
    (np.float32(0.5), 0.5),
    (np.int64(3), 3),
    (np.bool_(True), True),
    (np.str_("a"), "a"),
    (np.array([[1, 2]]), [[1, 2]]),
    (torch.tensor(2.5), 2.5),
    (torch.float16, "float16"),
    (torch.device("cuda:1"), "cuda:1"),
    (np.dtype("float32"), "float32"),
    (Path("a") / "b", "a/b"),
    (Color.RED, "red"),
    (SchedulerType.COSINE, "cosine"),
    ((1, (2,)), [1, [2]]),
    ({"b", "a"}, ["a", "b"]),
    (Options(), {"dtype": "bfloat16", "sizes": [1, 2]}),
    (WithDict(), {"r": 8, "modules": ["k", "q"]}),
    ({"dtype": torch.float16, 1: None}, {"dtype": "float16", 1: None}),
]


@pytest.mark.parametrize(("value", "expected"), CASES, ids=lambda value: type(value).__name__)
def test_plain_forms(value, expected):
    found = plain(value)
    assert found == expected and type(found) is type(expected)
    assert yaml.safe_load(yaml.safe_dump(found)) == expected
    assert plain(found) == found


@pytest.mark.parametrize("value", [print, Options, object(), {(1, 2): 3}, [functools.partial(print)]])
def test_what_has_no_plain_form_is_refused(value):
    with pytest.raises(NotPlainError, match="no plain value"):
        plain(value)


def test_yaml_names_what_it_leaves_out():
    text = yaml_text({"beta": np.float64(0.2), "optimizer": Options, "hooks": {"a": print}, "name": "größe"})
    assert yaml.safe_load(text) == {"beta": 0.2, "name": "größe"}
    assert text.splitlines()[0] == "# Left out, having no plain value: hooks, optimizer"
    assert not yaml_text({"beta": 0.2}).startswith("#")


def test_json_keeps_the_rest_of_what_it_cannot_write():
    found = json.loads(json_text({"seed": np.int64(1), "more": [torch.float16, print], (1, 2): "x"}))
    assert found["seed"] == 1 and found["more"] == ["float16", repr(print)] and found["(1, 2)"] == "x"


def test_json_has_none_for_what_is_not_finite():
    assert [finite_or_none(value) for value in (1.5, 0.0, float("nan"), float("inf"), None)] == [
        1.5,
        0.0,
        None,
        None,
        None,
    ]
