"""A dozen architectures of the sweep: each is scored as its own logits say, by the way that its head allows."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import sweep_architectures as sweep  # noqa: E402
import tiny_architectures  # noqa: E402

MATRIX = (
    "llama",
    "gpt2",
    "gpt_neox",
    "gemma2",  # caps its logits
    "gemma3_text",
    "cohere",  # scales them
    "granite",  # divides them
    "qwen3",
    "opt",
    "mamba",
)
OWN_FORWARD = (
    "bert",  # a network before its last matrix
    "modernbert-decoder",
    "recurrent_gemma",  # caps its logits under another name
    "xlstm",
    "llama4_text",  # its backbone is not where others have it
)


@pytest.fixture(autouse=True)
def room_for_rounding(monkeypatch):
    """Instruction sets add up in other orders: 1e-5 became 1.1e-5 with AVX2. A wrong head is off by 1e-2."""
    monkeypatch.setattr(sweep, "GOAL", 1e-4)


@pytest.mark.parametrize("name", MATRIX)
def test_plain_heads_are_right(name):
    found = sweep.examine(name)
    assert (found.outcome, found.note) == (sweep.RIGHT, "")
    assert found.adapter is not None and found.worst <= sweep.GOAL
    assert (found.shared_prefix is None) == (name == "mamba")


@pytest.mark.parametrize("name", OWN_FORWARD)
def test_other_heads_run_the_models_own_forward(name):
    found = sweep.examine(name)
    assert found.outcome == sweep.SLOWER and found.worst <= sweep.GOAL, found


def test_a_projection_before_the_head_belongs_to_the_backbone():
    model = tiny_architectures.build("opt", word_embed_proj_dim=16)
    assert model.get_output_embeddings().in_features == 16
    assert sweep.compare("opt", model).outcome == sweep.RIGHT


def test_a_cache_that_a_model_does_not_know_gives_up_shared_prompts():
    found = sweep.examine("openai-gpt")
    assert (found.outcome, found.shared_prefix, found.note) == (sweep.RIGHT, None, "shared prompts are given up")


def test_a_model_whose_numbers_depend_on_what_follows_is_refused():
    found = sweep.examine("xlnet")
    assert found.outcome == sweep.REFUSED and "not causal" in found.note


def test_a_wrong_head_would_be_seen(monkeypatch):
    """The sweep itself: without the check before scoring, a cap under another name is wrong."""
    monkeypatch.setattr(sweep, "settle_head", lambda *args, **kwargs: None)
    assert sweep.examine("recurrent_gemma").outcome == sweep.WRONG


def test_the_table_and_the_status(tmp_path, capsys):
    path = tmp_path / "table.md"
    assert sweep.main(["--only", "llama", "xlnet", "--output", str(path)]) == 0
    assert '"right": 1, "slower path": 0, "refused": 1' in capsys.readouterr().out
    rows = [line for line in path.read_text().splitlines() if line.startswith(("| llama |", "| xlnet |"))]
    assert [row.split(" | ")[1] for row in rows] == ["right", "refused"]
    with pytest.raises(SystemExit):
        sweep.main(["--only", "no_such_model"])
