"""The vocabulary of batches: positions that predict a label, rows, sums by row, label log-probabilities."""

from pathlib import Path

import pytest
import torch

from trl_dynamics import akg
from trl_dynamics.akg import task

LABELS = torch.tensor([[7, -100, 3, 4], [-100, -100, -100, -100], [1, 2, -100, -100]])


def test_the_column_before_a_label_predicts_it():
    row_N, column_N = task.predicting(LABELS)
    assert (row_N.tolist(), column_N.tolist()) == ([0, 0, 2], [1, 2, 0])
    batch = {"input_ids": LABELS, "labels": LABELS}
    assert task.causal_lm_labels(batch).tolist() == [3, 4, 2] and task.row_of_label(batch).tolist() == [0, 0, 2]


def test_sums_by_row_leave_rows_without_labels_at_zero():
    row_N = torch.tensor([0, 0, 2])
    assert task.row_sums(torch.tensor([1.0, 2.0, 4.0]), row_N, 3).tolist() == [3.0, 0.0, 4.0]
    assert task.row_sums(torch.ones(3, 2), row_N, 4).tolist() == [[2.0, 2.0], [0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]


@pytest.mark.parametrize("batch", [{"labels": LABELS, "scale": 2.0}, (LABELS, 2.0)])
def test_rows_of_a_batch_cut_what_has_a_value_per_row(batch):
    assert task.num_rows(batch) == 3
    part = task.rows_of(batch, slice(1, 3))
    labels, scale = part.values() if isinstance(part, dict) else part
    assert torch.equal(labels, LABELS[1:]) and scale == 2.0


@pytest.mark.parametrize("batch", [3, [], {"labels": [1, 2]}])
def test_what_has_no_rows_is_refused(batch):
    with pytest.raises(ValueError, match="a mapping or a tuple of tensors"):
        task.num_rows(batch)


@pytest.mark.parametrize("sizes", [[5], [2, 3], [1, 1, 3]])
def test_label_log_probabilities_do_not_depend_on_the_tiles(sizes):
    logits_NV = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    label_N = torch.tensor([5, 0, 3, 3, 1])
    expected_N = logits_NV.log_softmax(-1)[torch.arange(5), label_N]
    found = list(task.label_logp_tiles(logits_NV.split(sizes), label_N))
    assert [len(logp_n) for logp_n in found] == sizes and torch.equal(torch.cat(found), expected_N)


def test_ignored_labels_are_known_in_one_file():
    files = Path(akg.__file__).parent.rglob("*.py")
    assert {path.name for path in files if "IGNORED" in path.read_text()} == {"task.py"}
