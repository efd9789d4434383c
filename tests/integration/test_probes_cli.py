"""The commands of `trl-dynamics probes` as a user types them."""

import json
import shlex
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict
from transformers import AutoTokenizer, BertConfig, BertModel

from tiny import tiny_model, tiny_tokenizer
from trl_dynamics import embedded
from trl_dynamics.cli import inputs
from trl_dynamics.cli.main import main
from trl_dynamics.probing.builders import BUILDERS
from trl_dynamics.probing.io import load
from trl_dynamics.probing.quality import Embedder
from trl_dynamics.probing.schema import REQUIRED_TYPES

ROOT = Path(__file__).parents[2]


def probes(line, *paths):
    """Run `trl-dynamics probes LINE`, with {0}, {1}, ... in it for paths."""
    return main(["probes", *shlex.split(line.format(*paths))])


def write_rows(path, num, tag, **fields):
    rows = [
        {"prompt": f"{tag} {i}?", "chosen": f" {tag} answer {i} yes", "rejected": f" {tag} no {i}"} | fields
        for i in range(num)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def data(tmp_path):
    write_rows(tmp_path / "train.jsonl", 30, "t")
    write_rows(tmp_path / "test.jsonl", 10, "h")
    return tmp_path


def model_folder(path, tokenizer=None):
    tiny_model().save_pretrained(path)
    (tokenizer or tiny_tokenizer()).save_pretrained(path)
    return path


def test_the_readmes_line(data, capsys):
    assert (
        probes("build --dataset {0}/train.jsonl --held_out {0}/test.jsonl --num_probes 20 --seed 1 -o {0}/set", data)
        == 0
    )
    built = load(data / "set")
    assert built.counts == dict.fromkeys(BUILDERS, 20) and built.metadata["seed"] == 1
    assert built.metadata["source"] == "train.jsonl, split train"
    assert built.metadata["held_out_source"] == "test.jsonl, split train"
    assert "# Probe set `set`" in (data / "set" / "README.md").read_text()
    assert sorted(p.name for p in data.iterdir()) == ["set", "test.jsonl", "train.jsonl"]
    assert f"probe set: {data / 'set'}" in capsys.readouterr().out
    assert probes("build --dataset {0}/train.jsonl --num_probes 20 -o {0}/set", data) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert probes("build --dataset {0}/train.jsonl --num_probes 5 -o {0}/set --overwrite", data) == 0
    assert len(load(data / "set")) == 5


def test_helpful_base_with_and_without_held_out_data(data_dir, tmp_path, capsys):
    rows = [
        line
        for split in ("train", "test")
        for line in (data_dir / "probing_helpful_base" / f"formal_prob_{split}.jsonl").read_text().splitlines()
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(rows[:600]))
    (tmp_path / "test.jsonl").write_text("\n".join(rows[600:]))
    assert (
        probes("build --dataset {0}/train.jsonl --held_out {0}/test.jsonl --num_probes 500 -o {0}/set", tmp_path) == 0
    )
    built = load(tmp_path / "set")
    assert built.counts == dict.fromkeys(BUILDERS, 500)
    assert built.metadata["unusable_rows"]["a blank rejected"] == 1
    assert (
        probes(
            "check {0}/set --model {1} --max_prompt_length 200 --max_length 512", tmp_path, data_dir / "stories260k"
        )
        == 0
    )
    assert "error" not in capsys.readouterr().out


@pytest.mark.parametrize("split", ["train", "test"])
def test_import_of_the_published_sets(split, data_dir, tmp_path, capsys):
    path = data_dir / "probing_helpful_base" / f"formal_prob_{split}.jsonl"
    assert probes("import {0} -o {1}/set --license apache-2.0", path, tmp_path) == 0
    assert len(load(tmp_path / "set")) == 499 and load(tmp_path / "set").fingerprint == load(path).fingerprint
    card = (tmp_path / "set" / "README.md").read_text()
    assert "license: apache-2.0" in card and "rows with a blank rejected: 1" in card
    # The 512 tokens of this model's context are too few for some prompts: cut as in training.
    limits = "--max_prompt_length 200 --max_length 512"
    probes(f"check {{0}}/set --model {{1}} {limits}", tmp_path, data_dir / "stories260k")
    assert "cannot be scored" not in capsys.readouterr().out


def test_import_with_a_column_mapping(tmp_path, capsys):
    frame = pd.DataFrame({"q": ["Why?"], "good": ["a"], "bad": ["b"], "chosen": ["old"], "n": [3], "greedy": ["g"]})
    frame.to_parquet(tmp_path / "t.parquet")
    mapping = "--columns q=prompt good=chosen bad=rejected"
    assert probes(f"import {{0}}/t.parquet -o {{0}}/set {mapping}", tmp_path) == 0
    (probe,) = load(tmp_path / "set")
    assert (probe.prompt, probe.responses) == ("Why?", {"chosen": "a", "rejected": "b", "greedy": "g"})
    assert "columns left out: chosen, n" in capsys.readouterr().out
    for line, message in (
        ("--columns w=prompt", "no column 'w'; found"),
        ("--columns q=prompt good=chosen bad=chosen", "gives 'chosen' twice"),
        ("--columns q", "expected COLUMN=TYPE"),
        ("--columns q=prompt n=chosen", "response 'chosen' is 3; expected text"),
        ("--columns good=chosen bad=rejected", "no column 'prompt'"),
    ):
        assert probes(f"import {{0}}/t.parquet -o {{0}}/other {line}", tmp_path) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_own_answers_rephrases_and_the_cache(data, capsys):
    model = model_folder(data / "model")
    types = "--types rejected greedy chosen_initial sampled_1 chosen_self_rephrase chosen_rephrase_format"
    who = "--model {1} --rephraser {1}"
    line = f"build --dataset {{0}}/train.jsonl {types} --num_probes 6 {who} --max_new_tokens 8 -o {{0}}/set"
    assert probes(line, data, model) == 0
    first = capsys.readouterr().out
    built, rejected = load(data / "set"), (data / "set" / "rejected.jsonl").read_text().splitlines()
    assert built.counts["greedy"] + sum(json.loads(r)["response_type"] == "greedy" for r in rejected) == 6
    # Eight tokens of a random model are no rephrase of anything, and say so.
    reasons = {json.loads(r)["reason"] for r in rejected if "rephrase" in json.loads(r)["response_type"]}
    assert "cut at the limit of new tokens" in reasons
    assert "18 new, 0 from the cache" in first
    cache = (data / "set.answers.jsonl").read_bytes()
    assert probes(line + " --overwrite", data, model) == 0
    again = capsys.readouterr().out
    assert "0 new, 18 from the cache" in again and (data / "set.answers.jsonl").read_bytes() == cache
    assert load(data / "set").fingerprint == built.fingerprint


def test_a_set_is_as_large_as_its_data_and_says_what_it_lacks(tmp_path, capsys):
    rows = [{"prompt": f"{i}?", "chosen": f" answer {i} yes"} for i in range(7)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert probes("build --dataset {0}/t.jsonl -o {0}/set", tmp_path) == 0
    said = capsys.readouterr().out
    assert "7 probes" in said and "these are all usable rows" in said and "no rejected answers: enough for SFT" in said
    assert load(tmp_path / "set").required_types == ("chosen",)
    assert probes("import {0}/t.jsonl -o {0}/imported", tmp_path) == 0
    assert "no rejected answers" in capsys.readouterr().out
    assert load(tmp_path / "imported").counts == {"chosen": 7}
    assert probes("build --dataset {0}/t.jsonl --num_probes 8 -o {0}/more", tmp_path) == 1
    assert "leave --num_probes out" in capsys.readouterr().err


def test_texts_too_long_to_be_rephrased_are_left_out_with_the_reason(tmp_path, capsys):
    tiny_model(max_position_embeddings=512).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"prompt": "long? " * 200, "chosen": f" {i} " + "words " * 200 * i, "rejected": " no"} for i in range(2)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    types = "--types rejected greedy chosen_self_rephrase --max_new_tokens 4"
    line = f"build --dataset {{0}}/t.jsonl {types} --model {{1}} --max_prompt_length 64 -o {{0}}/set"
    assert probes(line, tmp_path, tmp_path / "model") == 0
    rejected = [json.loads(row) for row in (tmp_path / "set" / "rejected.jsonl").read_text().splitlines()]
    reasons = [row["reason"] for row in rejected if row["response_type"] == "chosen_self_rephrase"]
    assert reasons.count("too long for the model's context") == 1
    assert "too long for the model's context" in capsys.readouterr().out


def test_a_boundary_that_is_not_one_stops_the_build(tmp_path, data_dir, capsys):
    rows = [{"prompt": "Once upon a t", "chosen": f"ime {i} was", "rejected": f"ree {i}"} for i in range(3)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    line = "build --dataset {0}/t.jsonl --num_probes 3 --types rejected --model {1} -o {0}/set"
    assert probes(line, tmp_path, data_dir / "stories260k") == 1
    assert "the prompt ends with the tokens ['t'], which become ['time']" in capsys.readouterr().err
    assert not (tmp_path / "set").exists()


def test_a_mixture_and_the_embedded_data(data, capsys):
    config = {"datasets": [{"path": "json", "data_files": str(data / f"{name}.jsonl")} for name in ("train", "test")]}
    (data / "mix.yaml").write_text(yaml.safe_dump(config))
    assert probes("build --config {0}/mix.yaml --num_probes 40 -o {0}/set", data) == 0
    assert len(load(data / "set")) == 40 and load(data / "set").metadata["source"].startswith("mixture of json, json")
    assert probes("build --dataset embedded --num_probes 5 -o {0}/world", data) == 0
    assert load(data / "world").probes[0].is_conversational
    assert probes("check {0}/world --model embedded", data) == 0
    assert "no findings" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--dataset {0}/none.jsonl", "none.jsonl' does not exist"),
        ("", "give exactly one of --dataset_name"),
        ("--dataset {0}/train.jsonl --split dev", "the data has no split 'dev'"),
        ("--dataset {0}/train.jsonl --num_probes 31", "only 30 are usable"),
        ("--dataset {0}/train.jsonl --types poem", "'poem' cannot be built"),
        ("--dataset {0}/train.jsonl --types greedy", "pass --model"),
        ("--dataset {0}/train.jsonl --model {0}/none", "does not exist"),
        ("--dataset {0}/train.jsonl --rephraser http://localhost:1/v1", "pass --rephraser_model"),
        ("--dataset {0}/train.jsonl --rephraser {0}/none.jsonl", "file of rephrases"),
        ("--dataset {0}/train.jsonl --rephraser {0}/none", "model"),
        ("--dataset {0}/train.jsonl --columns chosen", "expected COLUMN=TYPE"),
        ("--dataset {0}/train.jsonl --nonsense 3", "unknown option '--nonsense'"),
        ("--dataset {0}/images.jsonl", "row 0, field 'images': probe sets do not support images"),
        ("--dataset {0}/tools.jsonl", "row 0, field 'tools': probe sets do not support tools"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(data, capsys, options, message):
    write_rows(data / "images.jsonl", 2, "i", images=["a.png"])
    write_rows(data / "tools.jsonl", 2, "i", tools=[{"name": "f"}])
    before = sorted(p.name for p in data.iterdir())
    line = "--num_probes 4 " + options if "--num_probes" not in options else options
    assert probes(f"build -o {{0}}/set {line}", data) == 1
    error = capsys.readouterr().err
    assert message in error and error.strip().splitlines()[-1].startswith("trl-dynamics probes: error: ")
    assert sorted(p.name for p in data.iterdir()) == before


def test_a_dead_server_is_one_line(data, capsys):
    line = "--rephraser http://127.0.0.1:9/v1 --rephraser_model m --max_retries 0 --types chosen_rephrase_format"
    assert probes(f"build --dataset {{0}}/train.jsonl --num_probes 4 -o {{0}}/set {line}", data) == 1
    assert "cannot be reached" in capsys.readouterr().err and not (data / "set").exists()


def test_check_finds_errors(tmp_path, capsys):
    (tmp_path / "s.jsonl").write_text(json.dumps({"prompt": "Why?", "chosen": "a", "rejected": "a"}))
    assert probes("check {0}/s.jsonl --model embedded", tmp_path) == 1
    assert "error: two responses of a probe are the same (1)" in capsys.readouterr().out


def test_show(capsys):
    assert probes("show embedded -n 1 --types chosen rejected") == 0
    out = capsys.readouterr().out
    probe = embedded.probe_set(1).probes[0]
    assert "other_test_permuted" in out and f"probe {probe.probe_id}" in out and "human_unrelated" in out
    assert probe.responses["chosen"][:40] in out and out.count("chosen ") == 2
    assert probes(f"show embedded --probe_id {probe.probe_id} --full") == 0
    out = capsys.readouterr().out
    assert all(text in out for text in probe.responses.values())
    assert probes("show embedded --probe_id nobody") == 1
    assert "no probe 'nobody'" in capsys.readouterr().err


def test_screen_of_pairs(data, capsys):
    model = model_folder(data / "model")
    rows = (data / "train.jsonl").read_text().splitlines()
    rows[3] = json.dumps(json.loads(rows[3]) | {"chosen": " "})
    rows[4] = json.dumps(json.loads(rows[4]) | {"prompt": "x" * 600})
    rows[5] = json.dumps(json.loads(rows[5]) | {"rejected": json.loads(rows[5])["chosen"]})
    (data / "train.jsonl").write_text("\n".join(rows))
    assert probes("screen --dataset {0}/train.jsonl --model {1} --keep_fraction 0.5 -o {0}/out", data, model) == 0
    frame = pd.read_parquet(data / "out" / "scores.parquet")
    assert len(frame) == 28 and not {"3", "4"} & set(frame["probe_id"])
    unscored = [json.loads(line) for line in (data / "out" / "unscored.jsonl").read_text().splitlines()]
    assert {line["probe_id"]: line["reason"][:20] for line in unscored} == {
        "3": "row 3 has a blank ch",
        "4": "probe '4', response ",
    }
    assert float(frame.set_index("probe_id").loc["5", "ches"]) == pytest.approx(0, abs=1e-3)
    kept = [json.loads(line) for line in (data / "out" / "filtered.jsonl").read_text().splitlines()]
    expected = sorted(int(i) for i in frame.nsmallest(14, "ches_normalized")["probe_id"])
    assert kept == [json.loads(rows[i]) for i in expected]
    assert frame["risk"].max() == 1 and frame["risk"].min() == pytest.approx(1 / 28)
    assert "riskiest pairs" in capsys.readouterr().out
    assert probes("screen --dataset {0}/train.jsonl --model {1} -o {0}/out", data, model) == 1
    assert "is not empty" in capsys.readouterr().err


def test_screen_of_a_probe_set_agrees_with_track(tmp_path, capsys):
    (tmp_path / "p").mkdir()
    embedded.probe_set(6).save(tmp_path / "p")
    assert probes("screen --probe_set {0}/p --model embedded -o {0}/out", tmp_path) == 0
    track = "track --model_name_or_path embedded --probe_set {0}/p --output_dir {0}/run"
    assert main(shlex.split(track.format(tmp_path))) == 0
    from trl_dynamics import load_records

    frame = pd.read_parquet(tmp_path / "out" / "scores.parquet").set_index("probe_id")
    for _, record in load_records(tmp_path / "run").iterrows():
        found = frame.loc[record["probe_id"], f"logp_sum/{record['response_type']}"]
        assert found == pytest.approx(record["logp_sum"], abs=1e-3)
    assert len(load(tmp_path / "out" / "filtered.jsonl")) == 5
    assert REQUIRED_TYPES[0] in capsys.readouterr().out


def test_screen_refuses_what_it_cannot_rank(data, capsys):
    (data / "c.jsonl").write_text(json.dumps({"prompt": "Why?", "completion": "a b"}))
    model = model_folder(data / "model")
    for options, message in (
        ("--dataset {0}/c.jsonl", "row 0 has no rejected answer"),
        ("--dataset {0}/c.jsonl --nonsense 1", "unknown option '--nonsense'; see trl-dynamics probes screen --help"),
        ("--dataset {0}/c.jsonl --probe_set embedded", "not both"),
        ("--dataset {0}/train.jsonl --keep_fraction 0", "keep_fraction is 0"),
        ("--dataset {0}/train.jsonl --max_prompt_length 2 --max_length 2", "none of 30 pairs could be scored"),
    ):
        assert probes(f"screen --model {{1}} -o {{0}}/out {options}", data, model) == 1
        assert message in capsys.readouterr().err and not (data / "out").exists()


def test_screen_needs_a_token_that_ends_answers(data, capsys):
    model = model_folder(data / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(model)
    assert probes("screen --model {1} -o {0}/out --dataset {0}/train.jsonl", data, model) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "has no EOS token" in error and "set tokenizer.eos_token" in error and not (data / "out").exists()


def test_similarity_by_an_encoder(tmp_path):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=600, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertModel(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    embedder = Embedder(str(tmp_path))
    tokenizer, model = AutoTokenizer.from_pretrained(tmp_path), BertModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        vectors = [
            model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0) for text in ("one", "another")
        ]
    expected = torch.cosine_similarity(*vectors, dim=0)
    assert embedder("one", "another") == pytest.approx(float(expected), abs=1e-6)
    assert embedder("one", "one") == pytest.approx(1)
    assert -1 <= embedder("x" * 2000, "y") <= 1, "longer than the encoder's context is cut"


def test_help_and_unknown_actions(capsys):
    assert main(["probes"]) == 2 and main(["probes", "--help"]) == 0
    assert "screen" in capsys.readouterr().out
    assert main(["probes", "burn"]) == 1
    assert "unknown action 'burn'" in capsys.readouterr().err


def hh_row(i, tag):
    dialogue = f"\n\nHuman: {tag} {i}?\n\nAssistant: Well.\n\nHuman: And?\n\nAssistant:"
    return {"chosen": f"{dialogue} Yes, number {i} of {tag}.", "rejected": f"{dialogue} No, not {i}."}


def ultrafeedback_row(i, tag):
    def chat(answer):
        return [{"role": "user", "content": f"{tag} {i}?"}, {"role": "assistant", "content": answer}]

    both = {"chosen": chat(f"Yes, number {i} of {tag}."), "rejected": chat(f"No, not {i}.")}
    return {"prompt": f"{tag} {i}?", "prompt_id": str(i), "messages": both["chosen"], "score_chosen": 8.0} | both


@pytest.mark.parametrize(
    ("recipe", "make_row", "splits", "call"),
    [
        ("helpful_base", hh_row, ("train", "test"), ("Anthropic/hh-rlhf", None, "helpful-base")),
        (
            "ultrafeedback",
            ultrafeedback_row,
            ("train_prefs", "test_prefs"),
            ("HuggingFaceH4/ultrafeedback_binarized", None, None),
        ),
    ],
)
def test_the_recipes_on_rows_of_their_layout(recipe, make_row, splits, call, tmp_path, monkeypatch):
    asked = []

    def load_dataset(path, name, data_dir, streaming):
        asked.append((path, name, data_dir))
        return DatasetDict({s: Dataset.from_list([make_row(i, s) for i in range(600)]) for s in splits})

    monkeypatch.setattr(inputs, "load_dataset", load_dataset)
    assert probes("build --config {0}/probes/{1}.yaml -o {2}/set", ROOT, recipe, tmp_path) == 0
    built = load(tmp_path / "set")
    assert asked == [call] and built.counts == dict.fromkeys(BUILDERS, 500) and built.name == recipe
    assert [p.responses["chosen"].strip() for p in built][:2] == [f"Yes, number {i} of {splits[0]}." for i in (0, 1)]
    assert all(f"of {splits[1]}." in p.responses["other_test"] for p in built)
    assert built.metadata["license"] == "mit"
    assert built.probes[0].is_conversational == (recipe == "ultrafeedback")
