"""Paths and hub names: which is which, and that a missing path is refused before anything is asked of the hub."""

import pytest

from trl_dynamics import places


@pytest.fixture
def hub(monkeypatch):
    """Names that the hub was asked for, and those that it has."""

    class Hub:
        asked, has = [], set()

        def repo_info(self, name, *, repo_type, timeout):
            self.asked.append((name, repo_type))
            if name not in self.has:
                raise OSError("not found")

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    Hub.asked, Hub.has = [], set()
    return Hub


@pytest.mark.parametrize(
    "name", ["./x", "../x", "/x", "~/x", "a/b/c", "runs/", "x.jsonl", "org/x.parquet", "x.JSON.gz", "my model", "a:b"]
)
def test_a_path_that_does_not_exist_is_refused_without_asking(name, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="does not exist; expected a folder") as refusal:
        places.refuse_missing(name, "model", "a folder")
    assert repr(name) in str(refusal.value) and not hub.asked


@pytest.mark.parametrize("name", ["gpt2", "org/name", "Org-1/name_2.5", "there", "runs/there"])
def test_what_exists_or_may_be_on_the_hub_passes(name, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/there").mkdir(parents=True)
    (tmp_path / "there").mkdir()
    places.refuse_missing(name, "model", "a folder")
    assert not hub.asked


def test_a_name_below_an_existing_folder_is_both_until_the_hub_has_spoken(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "runs").mkdir()
    with pytest.raises(ValueError, match="neither a path here .* nor a dataset that the hub returned"):
        places.refuse_missing("runs/sft", "dataset", "a file", kind="dataset")
    assert hub.asked == [("runs/sft", "dataset")]
    hub.has.add("runs/sft")
    places.refuse_missing("runs/sft", "model", "a folder")
    assert hub.asked[-1] == ("runs/sft", "model")
    (tmp_path / "cache/models--runs--old").mkdir(parents=True)
    places.refuse_missing("runs/old", "model", "a folder")
    assert len(hub.asked) == 2


def test_the_missing_folder_of_a_path_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"there is no folder '.*/deep' either"):
        places.refuse_missing(str(tmp_path / "deep/x"), "model", "a folder")
    with pytest.raises(ValueError) as refusal:
        places.refuse_missing(str(tmp_path / "x"), "model", "a folder")
    assert "either" not in str(refusal.value)


def test_a_home_folder_that_the_shell_left_alone_is_written_out(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    with pytest.raises(ValueError, match=f"write '{tmp_path}/model'"):
        places.refuse_missing("~/model", "model", "a folder")


def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / "empty").touch()
    (tmp_path / "full").write_text("x")
    for name, message in (("", "is a folder"), ("gone", "does not exist"), ("empty", "is empty")):
        with pytest.raises(ValueError, match=message):
            places.require_file(tmp_path / name, "file")
    places.require_file(tmp_path / "full", "file")
    monkeypatch.setattr(places.os, "access", lambda path, mode: False)  # root may read everything
    with pytest.raises(ValueError, match="permission denied"):
        places.require_file(tmp_path / "full", "file")
