"""What `track` scores, at which step, and which method trained it."""

import json

import pytest

from trl_dynamics.cli.targets import Target, find_targets, trained_with


@pytest.fixture
def folders(tmp_path):
    card = "---\ntags:\n- trl\n- {}\n---\n# Card\n"
    files = {
        "sft": {"README.md": card.format("sft")},
        "dpo": {"README.md": card.format("dpo"), "trainer_state.json": json.dumps({"global_step": 9})},
        "dpo/checkpoint-4": {},
        "dpo/checkpoint-9": {},
        "plain": {"README.md": "---\ntags: [sft\n---\n"},
        "both": {"README.md": "---\ntags: [sft, dpo]\n---\n"},
    }
    for name, content in files.items():
        (tmp_path / name).mkdir()
        for file, text in ({"config.json": "{}"} | content).items():
            (tmp_path / name / file).write_text(text)
    return {name: str(tmp_path / name) for name in files}


def test_a_base_is_step_0_of_every_model(folders):
    found = find_targets([folders["dpo"]], "checkpoint-*", folders["sft"])
    assert [(t.path, t.model, t.step) for t in found] == [
        (folders["sft"], "dpo", 0),
        (folders["dpo/checkpoint-4"], "dpo", 4),
        (folders["dpo/checkpoint-9"], "dpo", 9),
    ]
    models = [folders[name] for name in ("dpo", "dpo/checkpoint-4", "plain")]
    found = find_targets(models, None, folders["sft"])
    assert [(t.model_index, t.step) for t in found] == [(0, 0), (0, 9), (1, 0), (1, 4), (2, 0), (2, 1)]
    assert [t.step for t in find_targets(models, None)] == [0, 0, 0]


def test_a_base_given_twice_is_refused(folders, tmp_path):
    with pytest.raises(ValueError, match="--base"):
        find_targets([folders["sft"], folders["dpo"]], None, folders["sft"])
    (tmp_path / "dpo/checkpoint-0").mkdir()
    with pytest.raises(ValueError, match="step 0"):
        find_targets([folders["dpo"]], "checkpoint-*", folders["sft"])


@pytest.mark.parametrize(
    ("name", "method"),
    [("sft", "sft"), ("dpo", "dpo"), ("dpo/checkpoint-4", "dpo"), ("plain", None), ("both", None)],
)
def test_the_method_is_that_of_the_model_card(folders, name, method):
    # The base at step 0 has a card, too.
    targets = [Target(folders["sft"], "m", 0, 0), Target(folders[name], "m", 0, 4)]
    assert trained_with(targets).get("m") == method
    assert trained_with(targets, "grpo") == {"m": "grpo"}


def test_a_folder_is_the_same_however_it_is_written(folders, monkeypatch):
    monkeypatch.chdir(folders["plain"])
    for same in (folders["dpo"], folders["dpo"] + "/", "../dpo"):
        with pytest.raises(ValueError, match="given twice"):
            find_targets([folders["dpo"], same], None)
        with pytest.raises(ValueError, match="--base"):
            find_targets([folders["dpo"]], None, same)


def test_the_working_directory_has_the_name_of_its_folder(folders, monkeypatch):
    monkeypatch.chdir(folders["dpo/checkpoint-4"])
    assert [target.model for target in find_targets([".", ".."], None)] == ["checkpoint-4", "dpo"]


def test_two_checkpoints_of_one_step_are_refused(folders, tmp_path):
    (tmp_path / "dpo/merged_9").mkdir()
    with pytest.raises(ValueError, match="both of step 9"):
        find_targets([folders["dpo"]], "*", None)
