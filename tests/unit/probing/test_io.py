"""Probe sets come back from files, folders and `datasets` as they went in; the published files are read by name."""

import json
import logging

import pytest
import yaml
from datasets import Dataset, DatasetDict, IterableDatasetDict

from trl_dynamics import ProbeSet
from trl_dynamics.probing.flat_rows import PUBLISHED_NAMES, clean_self_rephrase, from_rows
from trl_dynamics.probing.io import CARD_FILE, DATA_FILE, load, read_jsonl, to_dataset
from trl_dynamics.probing.schema import RESPONSE_TYPES, Probe, order_types

ROW = {"prompt": "Why?", "chosen": " Because.", "rejected": " No idea."}
PUBLISHED_TYPES = order_types(PUBLISHED_NAMES.values())
# Line separators that must not split a line of the file, characters outside the basic plane, quotes and tabs.
ODD = ' naïve "é"\u2028Zeile\x85\t\r\n\\ 漢字 🙂'
CHAT = [{"role": "system", "content": "Sei kurz."}, {"role": "user", "content": "Größe? 🙂"}]


def mixed_set() -> ProbeSet:
    probes = (
        Probe("erste", "Why?" + ODD, {"chosen": ODD, "rejected": " No."}),
        Probe("2", CHAT, {"chosen": " Yes.", "rejected": " No.", "my own type": " Paris."}),
    )
    return ProbeSet(probes, name="größen", metadata={"licence": "MIT", "origin": "von Hand, 手"})


def chat_set() -> ProbeSet:
    return ProbeSet(tuple(Probe(str(i), CHAT, {"chosen": f" {i}", "rejected": " No."}) for i in range(3)))


def plain_set() -> ProbeSet:
    probes = [Probe(str(i), f"{i}?{ODD}", {"chosen": f" {i}", "rejected": ODD}) for i in range(3)]
    probes.append(Probe("last", "?", {"chosen": " c", "rejected": " r", "zebra": " z"}))
    return ProbeSet(tuple(probes))


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def warnings(caplog):
    """Messages of the module so far, as a function."""
    caplog.set_level(logging.WARNING, logger="trl_dynamics.probing")
    return lambda: caplog.messages


def test_folder_round_trip(tmp_path, warnings):
    given = mixed_set()
    given.save(tmp_path / "deep" / "set")
    back = load(tmp_path / "deep" / "set")
    assert back == given and back.fingerprint == given.fingerprint
    assert load(str(tmp_path / "deep" / "set"), name="other").name == "other"
    card = yaml.safe_load((tmp_path / "deep" / "set" / CARD_FILE).read_text(encoding="utf-8"))
    assert (card["num_probes"], card["fingerprint"]) == (2, given.fingerprint)
    assert card["response_types"] == {"chosen": 2, "rejected": 2, "my own type": 1}
    assert warnings() == []


def test_folder_without_a_card_takes_the_folders_name(tmp_path):
    mixed_set().save(tmp_path / "mine")
    (tmp_path / "mine" / CARD_FILE).unlink()
    assert load(tmp_path / "mine").name == "mine"


def test_saving_twice_gives_the_same_bytes(tmp_path):
    mixed_set().save(tmp_path / "a")
    load(tmp_path / "a").save(tmp_path / "b")
    for name in (DATA_FILE, CARD_FILE):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_what_an_import_dropped_survives_the_round_trip(tmp_path, warnings):
    imported = from_rows([ROW | {"other_test": " "}, ROW])
    imported.save(tmp_path)
    assert load(tmp_path).metadata == {"dropped": {"other_test": 1}}
    assert len(warnings()) == 1


def test_jsonl_round_trip(tmp_path):
    given = mixed_set()
    given.save(tmp_path)
    path = (tmp_path / DATA_FILE).rename(tmp_path / "probes.jsonl")
    for read in (read_jsonl, ProbeSet.from_jsonl, ProbeSet.load, load):
        back = read(path, types=["my own type"])
        assert (back.probes, back.name, back.fingerprint) == (given.probes, "probes", given.fingerprint)
        assert read(path).response_types == ["chosen", "rejected"]
    assert read_jsonl(path, name="mine").name == "mine"


def test_blank_lines_are_skipped_and_ids_count_rows(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text("\n" + json.dumps(ROW) + "\n  \n" + json.dumps(ROW | {"prompt": "How?"}))
    assert [(p.probe_id, p.prompt) for p in read_jsonl(path)] == [("0", "Why?"), ("1", "How?")]


@pytest.mark.parametrize("make", [plain_set, chat_set])
def test_datasets_round_trip(make, tmp_path):
    given = make()
    dataset = to_dataset(given)
    assert dataset.column_names == ["probe_id", "prompt", *given.response_types]
    dataset.to_parquet(str(tmp_path / "set.parquet"))
    dataset.save_to_disk(str(tmp_path / "disk"))
    sources = (dataset, dataset.to_list(), tmp_path / "set.parquet", tmp_path / "disk")
    for source in sources:
        assert load(source, types=["zebra"]).probes == given.probes
    assert load(tmp_path / "set.parquet").name == "set"


def test_rows_without_ids_are_numbered():
    assert [p.probe_id for p in load([ROW, ROW | {"probe_id": "x"}, ROW])] == ["0", "x", "2"]
    assert [p.probe_id for p in load(Dataset.from_list([ROW, ROW]))] == ["0", "1"]


def test_a_set_is_returned_as_it_is():
    given = plain_set()
    assert load(given) is given


@pytest.mark.parametrize(
    ("split", "dropped"),
    [
        ("train", {"chosen_initial": 21, "chosen_self_rephrase": 2, "rows with a blank rejected": 1}),
        ("test", {"chosen_initial": 28, "chosen_self_rephrase": 9, "rows with a blank rejected": 1}),
    ],
)
def test_the_published_files(split, dropped, data_dir, tmp_path, warnings):
    path = data_dir / "probing_helpful_base" / f"formal_prob_{split}.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    given = read_jsonl(path)
    assert len(rows) == 500 and len(given) == 499
    assert given.response_types == PUBLISHED_TYPES
    for probe in given:
        assert all(t[0] == " " and t[1:] and t[1:] == t[1:].strip() for t in probe.responses.values())
        row = rows[int(probe.probe_id)]
        assert probe.prompt == row["prompt"]
        for theirs, ours in PUBLISHED_NAMES.items():
            if theirs != "chosen_selfr" and ours in probe.responses:
                assert probe.responses[ours] == " " + row[theirs].strip()
    assert len(warnings()) == 1
    given.save(tmp_path)
    assert load(tmp_path).fingerprint == given.fingerprint
    assert len(warnings()) == 1, "what was dropped is reported when it is dropped, not again"
    assert given.counts == {name: 499 - dropped.get(name, 0) for name in PUBLISHED_TYPES}
    assert given.metadata == {"dropped": dropped}


def test_every_published_name_is_mapped():
    assert set(RESPONSE_TYPES) - set(PUBLISHED_NAMES.values()) == {"greedy", "random_words"}
    published = {"prompt": "Why?"} | {name: f"{name} text" for name in PUBLISHED_NAMES}
    (probe,) = from_rows([published])
    assert probe.responses == {ours: f" {theirs} text" for theirs, ours in PUBLISHED_NAMES.items()}


def test_our_own_layout_is_not_touched():
    row = ROW | {"chosen": "no space", "chosen_self_rephrase": "@@@ kept", "reject": "  custom "}
    (probe,) = from_rows([row], types=["reject"])
    assert probe.responses == {name: text for name, text in row.items() if name != "prompt"}


def test_what_is_counted_does_not_depend_on_the_order_of_columns():
    row = ROW | {"irr_hum": "fluent"}
    bad = {"irr_test": " ", "rejected": " "}
    counts = [
        from_rows([row, {"prompt": "How?", "chosen": "x", **dict(items)}]).metadata["dropped"]
        for items in (bad.items(), reversed(bad.items()))
    ]
    assert counts[0] == counts[1]


def test_blank_optional_response_is_dropped_and_counted(warnings):
    given = [ROW | {"other_test": " \n", "zebra": ""}, ROW | {"other_test": " Paris."}, ROW]
    given = from_rows(given, name="mine", types=["zebra"])
    assert given.counts == {"chosen": 3, "rejected": 3, "other_test": 1}
    assert given.metadata == {"dropped": {"other_test": 1, "zebra": 1}}
    assert warnings() == ["probe set 'mine': blank responses were dropped (other_test: 1, zebra: 1)"]


def test_null_is_an_absent_type_and_nothing_to_report(warnings):
    assert from_rows([ROW | {"other_test": None}]).metadata == {}
    assert warnings() == []


def test_blank_rejected_drops_the_row_of_the_published_layout_only(warnings):
    blank = {"prompt": "How?", "chosen": " x", "rejected": " "}
    published = from_rows([blank | {"irr_hum": "y"}, ROW | {"irr_hum": "z"}])
    assert [p.probe_id for p in published] == ["1"]
    assert published.metadata["dropped"]["rows with a blank rejected"] == 1
    with pytest.raises(ValueError, match="row 1.*rejected"):
        from_rows([ROW, blank])


def test_a_missing_column_is_named_with_those_found():
    row = {"prompt": "Why?", "rejected": " No idea.", "zebra": " z"}
    with pytest.raises(ValueError, match="'mine' has no response type 'chosen'; found columns .*zebra.*add that"):
        from_rows([row], name="mine")
    with pytest.raises(ValueError, match="'mine' has no response type 'greedy'; found columns"):
        from_rows([ROW], name="mine", required_types=("chosen", "greedy"))


def test_rejected_answers_are_in_every_row_or_in_none(tmp_path):
    rows = [{"prompt": "Why?", "chosen": " Because."}, {"prompt": "How?", "chosen": " So.", "rejected": None}]
    given = load(rows)
    assert given.required_types == ("chosen",) and given.counts == {"chosen": 2}
    given.save(tmp_path)
    assert load(tmp_path) == given
    assert load(write_jsonl(tmp_path / "p.jsonl", rows)).probes == given.probes
    with pytest.raises(ValueError, match="row 0.*has no response type 'rejected'"):
        load([rows[0], ROW])


METADATA = {"source": "web", "score": 0.5, "id": 7, "tags": ["a"], "turns": None}


@pytest.mark.parametrize("through", ["rows", "dataset", "jsonl", "parquet", "csv"])
def test_columns_that_are_no_response_type_are_named_once_and_left_out(through, tmp_path, warnings):
    plain = {name: value for name, value in METADATA.items() if name not in ("tags", "turns")}
    more = plain if through == "csv" else METADATA
    rows = [ROW | more | {"sampled_2": " Maybe.", "mine": " Own."}, ROW | more | {"sampled_2": " So.", "mine": " My."}]
    dataset = Dataset.from_list(rows)
    if through == "parquet":
        dataset.to_parquet(str(tmp_path / "p.parquet"))
    elif through == "csv":
        dataset.to_csv(str(tmp_path / "p.csv"))
    sources = {"rows": rows, "dataset": dataset, "jsonl": write_jsonl(tmp_path / "p.jsonl", rows)}
    given = load(sources.get(through, tmp_path / f"p.{through}"), types=["mine"])
    assert given.response_types == ["chosen", "rejected", "mine", "sampled_2"]
    assert given.metadata == {"columns_left_out": sorted(more)}
    assert len(warnings()) == 1 and all(name in warnings()[0] for name in more)


def test_a_set_is_the_same_with_and_without_metadata_columns():
    assert load([ROW | METADATA]).fingerprint == load([ROW]).fingerprint


@pytest.mark.parametrize("value", [1, 0.5, True, ["a"], [{"role": "assistant", "content": "x"}]])
@pytest.mark.parametrize("column", ["chosen", "rejected", "greedy", "mine"])
def test_what_is_no_text_under_a_column_of_answers_is_refused(column, value):
    with pytest.raises(ValueError, match=rf"row 1: response '{column}' is .*expected text.*--columns"):
        load([ROW, ROW | {column: value}], types=["mine"])


def test_a_card_declares_the_types_of_its_folder(tmp_path, warnings):
    given = ProbeSet((Probe("0", "Why?", {"chosen": " c", "rejected": " r", "mine": " m"}),))
    given.save(tmp_path / "set")
    with open(tmp_path / "set" / DATA_FILE, "a", encoding="utf-8") as lines:
        lines.write(json.dumps(ROW | {"probe_id": "1", "source": "web"}) + "\n")
    back = load(tmp_path / "set")
    assert back.counts == {"chosen": 2, "rejected": 2, "mine": 1} and len(warnings()) == 1


def test_a_card_on_the_hub_declares_types_too(tmp_path, monkeypatch):
    given = ProbeSet((Probe("0", "Why?", {"chosen": " c", "rejected": " r", "mine": " m"}),))
    given.save(tmp_path)
    monkeypatch.setattr("datasets.load_dataset", lambda name, split: to_dataset(given))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda name, file, repo_type: str(tmp_path / file))
    assert load("someone/probes").fingerprint == given.fingerprint
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda name, file, repo_type: str(tmp_path / "absent"))
    assert load("someone/probes").response_types == ["chosen", "rejected"]


def test_missing_prompt_column_and_no_rows():
    with pytest.raises(ValueError, match="'mine' has no column 'prompt'; found \\['chosen', 'rejected'\\]"):
        from_rows([{"chosen": " x", "rejected": " y"}], name="mine")
    with pytest.raises(ValueError, match="has no probes"):
        from_rows([])


@pytest.mark.parametrize(("line", "said"), [("{oops", "is not JSON"), ("[1]", "is a list; expected one object")])
def test_a_bad_line_is_named(line, said, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(ROW) + "\n\n" + line + "\n")
    with pytest.raises(ValueError, match=f"p.jsonl, line 3 {said}"):
        load(path)


@pytest.mark.parametrize("name", ["absent.jsonl", "absent.parquet", "absent/deep/folder"])
def test_a_missing_path_is_named(name, tmp_path):
    for source in (tmp_path / name, f"./{name}"):
        with pytest.raises(ValueError, match=f"{name}' does not exist; expected a folder with {DATA_FILE}"):
            load(source)
    with pytest.raises(ValueError, match="does not exist"):
        read_jsonl(tmp_path / name)


def test_a_file_of_another_kind(tmp_path):
    (tmp_path / "p.txt").write_text("x")
    with pytest.raises(ValueError, match="p.txt' is a .txt; expected .jsonl, .json, .parquet or .csv"):
        load(tmp_path / "p.txt")


def test_a_folder_that_holds_no_probe_set(tmp_path):
    with pytest.raises(ValueError, match=str(tmp_path)):
        load(tmp_path)


@pytest.mark.parametrize("name", ["absent-probes", "someone/absent-probes", "someone/absent-probes-v1.5"])
def test_a_hub_name_that_cannot_be_reached(name):
    with pytest.raises(ValueError, match=f"{name}' is neither a local folder or file nor a dataset that the hub"):
        load(name)


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("A plain answer.", "A plain answer."),
        ("@@@ One. @@@ Two.", "One."),
        ("@@@\n@@@@ Two.", "Two."),
        ("@@@ Original Sentence: One.\n@@@ Rephrase: Two.", "One."),
        ("Rephrase:\n\nTwo.", "Two."),
        ("@@@ Original Sentence:\n@@@ Two.", "Two."),
        ("Rephrase\nTwo.", "Two."),
        ("rewritten sentence : Three.", "Three."),
        ("Four.\n\nA:\n\nno more", "Four."),
        ("Five.\n\nHuman: And?\n\nAssistant: So.", "Five."),
        ("Six.\n\nSeven.", "Six.\n\nSeven."),
        ("A: stays within a line", "A: stays within a line"),
        ("@@ two are no separator", "@@ two are no separator"),
        ("\n\nHuman: only a next turn", ""),
        (" @@@ @@@ ", ""),
        ("", ""),
    ],
)
def test_clean_self_rephrase(raw, cleaned):
    assert clean_self_rephrase(raw) == cleaned


def test_a_rephrase_may_begin_with_a_labels_word():
    text = "Rephrasing your own question may help."
    assert clean_self_rephrase(text) == text


def test_what_is_not_made_of_rows_is_named():
    rows = Dataset.from_list([ROW])
    splits = r"probe_set is a \w*DatasetDict with the splits \['test', 'train'\]; pass one of them"
    for kind, data in ((DatasetDict, rows), (IterableDatasetDict, rows.to_iterable_dataset())):
        with pytest.raises(ValueError, match=splits):
            load(kind({"test": data, "train": data}))
    for source in ({"prompt": ["Why?"], "chosen": [" a"], "rejected": [" b"]}, rows.to_pandas(), 5, ["Why?"]):
        with pytest.raises(ValueError, match=f"probe_set is a {type(source).__name__}, which is not made of rows"):
            load(source)
    for source in (rows, rows.to_iterable_dataset(), iter([ROW])):
        assert len(load(source)) == 1
