"""Data files read by hand: what passes, and that every fault is one line that names the file and its line."""

import gzip
import json

import pytest
from datasets import Dataset, DatasetDict

from trl_dynamics.probing import files
from trl_dynamics.probing import io as probe_io

ROW = json.dumps({"prompt": "a é", "chosen": " b", "rejected": " c"}, ensure_ascii=False)


@pytest.mark.parametrize(
    "content",
    [ROW.encode(), f"{ROW}\n".encode(), f"\n{ROW}\r\n\r\n".encode(), b"\xef\xbb\xbf" + ROW.encode()],
    ids=["no end", "plain", "crlf and blanks", "byte order mark"],
)
def test_lines_are_read_however_they_end(content, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(content)
    assert files.read_lines(tmp_path / "rows.jsonl") == [json.loads(ROW)]
    assert len(probe_io.load(tmp_path / "rows.jsonl")) == 1


FAULTS = {
    "cut": (f'{ROW}\n{{"prompt": '.encode(), "line 2 is not JSON"),
    "text": (f'{ROW}\n"text"\n'.encode(), "line 2 is a str"),
    "array": (f"[{ROW}]".encode(), "is a list"),
    "latin": (ROW.encode("latin-1"), "is not UTF-8"),
    "gzip": (gzip.compress(ROW.encode()), "unpack it"),
    "empty": (b"", "is empty"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_with_its_line(name, tmp_path):
    content, message = FAULTS[name]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    for read in (files.read_lines, probe_io.load, probe_io.read_rows):
        with pytest.raises(ValueError, match=message) as refusal:
            read(path)
        assert "rows.jsonl" in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["cut.parquet", "cut.json", "cut.csv"])
def test_other_kinds_of_damaged_files(name, tmp_path):
    (tmp_path / name).write_text('prompt,chosen\n"a' if name.endswith("csv") else "{oops")
    with pytest.raises(ValueError, match=f"{name}' cannot be read as {name[4:]}") as refusal:
        probe_io.load(tmp_path / name)
    assert "\n" not in str(refusal.value)


def test_the_fault_of_a_folder_s_file_is_found(tmp_path):
    (tmp_path / "data.jsonl").write_text(f"{ROW}\n{{")
    assert "line 2" in str(files.refusal(tmp_path, ValueError("x")))
    (tmp_path / "data.jsonl").write_text("\n")
    assert "no rows" in str(files.refusal(tmp_path, ValueError("x")))


def test_bytes_that_are_no_text_are_found_by_their_line(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(f"{ROW}\n".encode() + ROW.encode("latin-1"))
    with pytest.raises(ValueError, match="line 2 is not UTF-8"):
        files.require_utf8(tmp_path / "rows.jsonl")
    (tmp_path / "packed.jsonl").write_bytes(gzip.compress(ROW.encode()))
    files.require_utf8(tmp_path / "packed.jsonl")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [1,\nb: 3\n", "line 3, column 1 is not YAML"),
        (b"a:\n\t- b\n", "line 2, column 1 is not YAML"),
        (b"- a\n", "expected a mapping"),
        (b"# nothing\n", "holds None"),
        (b"\xff\xfe\x00", "is not UTF-8"),
        (b"", "is empty"),
    ],
)
def test_a_mapping_that_cannot_be_read(content, message, tmp_path):
    (tmp_path / "options.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=message) as refusal:
        files.read_mapping(tmp_path / "options.yaml", "--config")
    assert "options.yaml" in str(refusal.value) and "\n" not in str(refusal.value)


def test_the_card_of_a_probe_set_may_be_damaged_too(tmp_path):
    (tmp_path / "data.jsonl").write_text(ROW)
    (tmp_path / "probe.yaml").write_text("name: [")
    with pytest.raises(ValueError, match=r"probe\.yaml', line 1"):
        probe_io.load(tmp_path)


@pytest.mark.parametrize(
    "entry, name",
    [("name: 5", "name"), ("response_types: 3", "response_types"), ("metadata: [1]", "metadata")]
    + [("required_types: chosen", "required_types")],
)
def test_an_entry_of_a_card_has_its_type(entry, name, tmp_path):
    probe_io.save(probe_io.load([json.loads(ROW)]), tmp_path)
    (tmp_path / probe_io.CARD_FILE).write_text(f"{name}:\n")
    assert len(probe_io.load(tmp_path)) == 1
    (tmp_path / probe_io.CARD_FILE).write_text(entry)
    with pytest.raises(ValueError, match=name):
        probe_io.load(tmp_path)


def test_every_cell_of_a_csv_file_is_text(tmp_path):
    path = tmp_path / "probes.csv"
    path.write_text("prompt,chosen,rejected,greedy\nWhy?,NA,42,\nHow?,None,1.50,null\n")
    found = [probe.responses for probe in probe_io.load(path)]
    assert found == [
        {"chosen": "NA", "rejected": "42"},
        {"chosen": "None", "rejected": "1.50", "greedy": "null"},
    ]


@pytest.mark.parametrize(
    "text", ["prompt,chosen\na,b,c\n", "prompt,chosen\na,b\na,b,c\n", 'prompt,chosen\n"a\n', "a,b\n"]
)
def test_a_csv_file_whose_cells_do_not_fit_is_refused(text, tmp_path):
    path = tmp_path / "probes.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match="probes.csv"):
        files.read_texts(path)


def test_a_folder_of_splits_says_which_one_to_give(tmp_path):
    DatasetDict({"test": Dataset.from_list([json.loads(ROW)])}).save_to_disk(str(tmp_path / "data"))
    with pytest.raises(ValueError, match="data/test"):
        probe_io.load(tmp_path / "data")
    assert len(probe_io.load(tmp_path / "data/test")) == 1
