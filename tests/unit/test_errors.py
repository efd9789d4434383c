"""Whose an error is, and what of its message is shown."""

import json
from functools import partial

import pytest
import yaml

from trl_dynamics import errors
from trl_dynamics.probing.schema import check_amount


def caught(work) -> Exception:
    with pytest.raises(Exception) as error:
        work()
    return error.value


def chained() -> None:
    try:
        raise OSError("the disk\nis full")
    except OSError as error:
        raise ValueError("while reading") from error


def test_whose_an_error_is():
    ours = caught(lambda: check_amount(-1))
    assert errors.raised_here(ours) and not errors.from_outside(ours)
    for work in (
        lambda: open("/no/such"),
        lambda: json.loads("{"),
        lambda: yaml.safe_load("["),
        lambda: b"\xff".decode(),
    ):
        assert errors.from_outside(caught(work))
    from datasets import load_dataset

    assert errors.from_outside(caught(lambda: load_dataset("json", data_files="/no/such.jsonl")))
    assert not errors.from_outside(caught(lambda: {}["x"])) and not errors.from_outside(caught(lambda: int("x")))


def test_a_host_s_refusal_of_an_option_is_from_outside():
    from transformers import TrainingArguments

    assert errors.from_outside(caught(lambda: TrainingArguments(output_dir="x", eval_strategy="sometimes")))


def test_one_line_of_a_message():
    assert errors.first_line(ValueError("\n  a   b\nc")) == "a b"
    assert errors.first_line(ValueError("Errors:\n  first\n  second")) == "Errors: first"
    assert errors.first_line(KeyError()) == "KeyError"
    assert errors.root_cause(caught(chained)) == "the disk"


@pytest.mark.parametrize(
    "work", [partial(json.loads, "{"), partial(check_amount, -1), partial(yaml.safe_load, "["), partial(open, "/no")]
)
def test_code_of_the_user_is_what_is_installed_nowhere(work):
    error = caught(lambda: work())
    assert errors.crosses_user_code(error)
    # Without the frames of this file.
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename == __file__:
        frames = frames.tb_next
    assert not errors.crosses_user_code(error.with_traceback(frames))
