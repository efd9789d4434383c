"""`trl-dynamics track` gives the numbers that training recorded, does nothing twice, and goes on where it stopped."""

import contextlib
import json
import logging
import shutil

import pytest
import torch

import trl_dynamics
from tiny import tiny_model, tiny_tokenizer
from tiny_runs import PROBES, make_trainer
from trl_dynamics import ProbeSet
from trl_dynamics.cli.main import main
from trl_dynamics.paths.checkpoints import what_differs
from trl_dynamics.paths.summary import summarise_store
from trl_dynamics.scoring.engine import ProbeEngine
from trl_dynamics.store.store import DynamicsStore

KEYS = ["step", "probe_id", "response_type"]


@pytest.fixture
def probe_file(tmp_path):
    path = tmp_path / "probes.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PROBES))
    return path


@pytest.fixture
def scorings(monkeypatch):
    """Calls of the engine over a whole probe set; the start-up check's two probes are not counted."""
    calls = []
    score = ProbeEngine.score

    def counted(self, model, star_ids=None):
        if len(self.encoded.items) == 3 * len(PROBES):
            calls.append(star_ids)
        return score(self, model, star_ids)

    monkeypatch.setattr(ProbeEngine, "score", counted)
    return calls


def train(method: str, output_dir, probe_file, **options) -> None:
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "probe_every": 1} | options
    make_trainer(method, output_dir, probe_set=str(probe_file), **options).train()


def argv(run, probe_file, output_dir, *more: str) -> list[str]:
    options = {"model_name_or_path": run, "checkpoints": "checkpoint-*", "probe_set": probe_file}
    return ["track", *(str(part) for k, v in options.items() for part in (f"--{k}", v))] + [
        "--output_dir",
        str(output_dir),
        *more,
    ]


def frames(*output_dirs):
    return [
        trl_dynamics.load_records(path).drop(columns=["run", "model"]).set_index(KEYS).sort_index()
        for path in output_dirs
    ]


def metric(output_dir, name):
    return next(iter(summarise_store(DynamicsStore(output_dir)).values())).metric(name)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("sft", {}),
        ("dpo", {"probe_layout": "padded", "probe_tokens_per_batch": 90}),
        ("sft", {"probe_max_length": 26, "probe_top_k": 3, "bf16": True}),
        ("sft", {"bf16": True, "probe_dtype": "float32"}),
    ],
    ids=["plain", "padded", "bf16", "float32"],
)
def test_records_of_checkpoints_are_those_of_training(method, options, tmp_path, probe_file):
    train(method, tmp_path / "run", probe_file, **options)
    assert main(argv(tmp_path / "run", probe_file, tmp_path / "after")) == 0
    recorded, tracked = frames(tmp_path / "run", tmp_path / "after")
    assert recorded.loc[[1, 2, 3]].equals(tracked), "every column, y* included, bit for bit"
    metas = [json.loads((tmp_path / name / "dynamics/meta.json").read_text()) for name in ("run", "after")]
    for name in ("batch_plan", "mixed_precision", "probe_dtype", "top_k", "limits", "cuts"):
        assert metas[0][name] == metas[1][name], name


def test_an_option_wins_over_the_run(tmp_path, probe_file, caplog):
    train("sft", tmp_path / "run", probe_file)
    with caplog.at_level(logging.INFO):
        assert main(argv(tmp_path / "run", probe_file, tmp_path / "padded", "--probe_layout", "padded")) == 0
    assert "scoring as the run did" in caplog.text
    assert main(argv(tmp_path / "run", probe_file, tmp_path / "half", "--dtype", "bfloat16")) == 0
    assert main(argv(tmp_path / "run", probe_file, tmp_path / "plain", "--replay", "False")) == 0
    for name, key, value in (("padded", "batch_plan", "padded"), ("half", "model", "bfloat16")):
        meta = json.loads((tmp_path / name / "dynamics/meta.json").read_text())
        assert value in meta[key].values()
    recorded, plain = frames(tmp_path / "run", tmp_path / "plain")
    assert recorded.loc[[1, 2, 3], "logp_sum"].equals(plain["logp_sum"])
    # Without the run's y* the first checkpoint is its own baseline.
    assert not recorded.loc[[1, 2, 3], "star_logp_sum"].equals(plain["star_logp_sum"])


def test_what_is_done_is_not_done_again(tmp_path, probe_file, scorings):
    train("sft", tmp_path / "run", probe_file, max_steps=2)
    scorings.clear()
    assert main(argv(tmp_path / "run", probe_file, tmp_path / "after")) == 0
    assert len(scorings) == 2
    assert main(argv(tmp_path / "run", probe_file, tmp_path / "after")) == 0
    assert len(scorings) == 2
    train("sft", tmp_path / "run", probe_file, max_steps=4)
    scorings.clear()
    assert main(argv(tmp_path / "run", probe_file, tmp_path / "after")) == 0
    assert len(scorings) == 2, "only the two checkpoints that are new"
    assert sorted(trl_dynamics.load_records(tmp_path / "after")["step"].unique()) == [1, 2, 3, 4]


def test_an_interrupted_call_goes_on(tmp_path, probe_file, monkeypatch, scorings):
    train("sft", tmp_path / "run", probe_file)
    assert main(argv(tmp_path / "run", probe_file, tmp_path / "whole")) == 0
    counted = ProbeEngine.score

    def interrupted(self, model, star_ids=None):
        if len(scorings) == 2:
            raise KeyboardInterrupt
        return counted(self, model, star_ids)

    scorings.clear()
    with monkeypatch.context() as patch:
        patch.setattr(ProbeEngine, "score", interrupted)
        with pytest.raises(KeyboardInterrupt):
            main(argv(tmp_path / "run", probe_file, tmp_path / "after"))
    assert len(scorings) == 2
    assert main(argv(tmp_path / "run", probe_file, tmp_path / "after")) == 0
    assert len(scorings) == 3
    whole, after = frames(tmp_path / "whole", tmp_path / "after")
    assert whole.equals(after)
    normalizer, trained = (metric(tmp_path / name, "normalizer_chosen") for name in ("after", "run"))
    assert list(normalizer.index) == [1, 2, 3] and normalizer.equals(trained[normalizer.index])


def test_vocabularies_of_different_sizes_have_no_common_normaliser(tmp_path, probe_file):
    for name, size in (("small", 260), ("large", 300)):
        tiny_model(vocab_size=size).save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    models = ["--model_name_or_path", str(tmp_path / "small"), str(tmp_path / "large")]
    assert main(["track", *models, "--probe_set", str(probe_file), "--output_dir", str(tmp_path / "out")]) == 0
    assert metric(tmp_path / "out", "normalizer_chosen").empty and len(metric(tmp_path / "out", "entropy")) == 1


def test_an_interrupted_call_keeps_the_y_star_of_every_tokenizer(tmp_path, probe_file, monkeypatch, scorings):
    train("sft", tmp_path / "run", probe_file, max_steps=2)
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    for checkpoint in (tmp_path / "other").glob("checkpoint-*"):
        tokenizer = tiny_tokenizer()
        tokenizer.eos_token = "<|im_start|>"
        tokenizer.save_pretrained(checkpoint)
    models = ["--model_name_or_path", str(tmp_path / "run"), str(tmp_path / "other")]
    wanted = ["--probe_set", str(probe_file), "--checkpoints", "checkpoint-*"]
    for stop in (99, 3, 99):
        output_dir = tmp_path / ("whole" if not (tmp_path / "whole").exists() else "after")
        counted = ProbeEngine.score

        def interrupted(self, model, star_ids=None, stop=stop, counted=counted):
            if len(scorings) == stop:
                raise KeyboardInterrupt
            return counted(self, model, star_ids)

        scorings.clear()
        with monkeypatch.context() as patch:
            patch.setattr(ProbeEngine, "score", interrupted)
            with pytest.raises(KeyboardInterrupt) if stop == 3 else contextlib.nullcontext():
                main(["track", *models, *wanted, "--output_dir", str(output_dir)])
    assert len(scorings) == 1
    whole, after = (trl_dynamics.load_records(tmp_path / name).drop(columns="run") for name in ("whole", "after"))
    assert whole["model"].nunique() == 2 and whole.equals(after)


def test_what_an_earlier_release_did_not_ask_is_no_difference(tmp_path, probe_file, scorings):
    train("sft", tmp_path / "run", probe_file, max_steps=1)
    assert main(argv(tmp_path / "run", probe_file, tmp_path / "after")) == 0
    path = tmp_path / "after/dynamics/meta.json"
    meta = json.loads(path.read_text())
    for name in ("probe_samples", "probe_sample_tokens", "probe_max_probes", "probe_subset"):
        del meta["settings"][name]
    path.write_text(json.dumps(meta))
    scorings.clear()
    assert main(argv(tmp_path / "run", probe_file, tmp_path / "after")) == 0
    assert not scorings and not (tmp_path / "after/dynamics-old-1").exists()


def test_the_length_of_answers_is_a_difference_only_where_answers_are_asked_for():
    probes = ProbeSet.load(PROBES)

    def differences(was: tuple, now: tuple) -> list[str]:
        was, now = (dict(zip(("probe_samples", "probe_sample_tokens"), given, strict=True)) for given in (was, now))
        earlier = {"probe_set": {"fingerprint": probes.fingerprint}, "settings": was, "targets": []}
        return what_differs(earlier, {"settings": now, "targets": []}, probes)

    assert differences((None, 64), (0, 32)) == []
    assert differences((2, 64), (2, 32)) == ["probe_sample_tokens was 64, is 32"]
    assert differences((None, 64), (2, 64)) == ["probe_samples was None, is 2"]


def test_other_settings_start_anew(tmp_path, probe_file, scorings, caplog):
    train("sft", tmp_path / "run", probe_file, max_steps=1)
    for dtype in ("float32", "bfloat16"):
        assert main(argv(tmp_path / "run", probe_file, tmp_path / "after", "--dtype", dtype)) == 0
    coarse, fine = frames(tmp_path / "after", tmp_path / "run")
    assert not coarse.equals(fine.loc[[1]])
    meta = json.loads((tmp_path / "after/dynamics/meta.json").read_text())
    assert meta["settings"]["dtype"] == "bfloat16" and (tmp_path / "after/dynamics-old-1").is_dir()
    assert "it was moved to dynamics-old-1, since dtype was float32, is bfloat16" in caplog.text


def test_another_probe_set_starts_anew_and_both_are_named(tmp_path, probe_file, caplog):
    train("sft", tmp_path / "run", probe_file, max_steps=1)
    assert main(argv(tmp_path / "run", probe_file, tmp_path / "after")) == 0
    was = ProbeSet.load(str(probe_file)).fingerprint[:12]
    probe_file.write_text(json.dumps(PROBES[0]) + "\n")
    now = ProbeSet.load(str(probe_file)).fingerprint[:12]
    assert main(argv(tmp_path / "run", probe_file, tmp_path / "after")) == 0
    assert len(trl_dynamics.load_records(tmp_path / "after")) == 3
    assert (tmp_path / "after/dynamics-old-1/meta.json").is_file()
    told = [record.getMessage() for record in caplog.records if "moved" in record.getMessage()]
    assert len(told) == 1 and f"3 probes, fingerprint {was}" in told[0] and f"1 probes, fingerprint {now}" in told[0]
    assert "in the batches of the run" in caplog.text and "whose probes were others" in caplog.text


def test_the_place_of_a_training_run_is_not_taken(tmp_path, probe_file, capsys):
    train("sft", tmp_path / "run", probe_file, max_steps=1)
    recorded = frames(tmp_path / "run")[0]
    assert main(argv(tmp_path / "run", probe_file, tmp_path / "run")) == 1
    said = "holds the records of a training run (sft), whose place those of track would take; choose another --output"
    assert said in capsys.readouterr().err
    assert frames(tmp_path / "run")[0].equals(recorded) and not list((tmp_path / "run").glob("dynamics-old-*"))


@pytest.mark.parametrize(("more", "num_probes"), [((), 2), (("--probe_subset", "1"), 1), (("--replay", "False"), 3)])
def test_the_part_of_the_probe_set_is_the_run_s(more, num_probes, tmp_path, probe_file):
    train("sft", tmp_path / "run", probe_file, max_steps=1, probe_subset=0.5)
    for probes in (probe_file,) if more else (probe_file, tmp_path / "run/dynamics/probe_set"):
        assert main(argv(tmp_path / "run", probes, tmp_path / "after", *more)) == 0
        tracked = frames(tmp_path / "after")[0]
        assert tracked.index.get_level_values("probe_id").nunique() == num_probes
        if not more:
            assert tracked.equals(frames(tmp_path / "run")[0].loc[[1]])


def test_adapters_are_scored_on_their_base(tmp_path, probe_file):
    torch.manual_seed(0)
    tiny_model("llama").save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    options = {"probe_set": str(probe_file), "max_steps": 2, "save_strategy": "steps", "save_steps": 1, "lora": True}
    trainer = make_trainer("sft", tmp_path / "run", probe_every=1, **options)
    trainer.model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    trainer.train()
    assert main(argv(tmp_path / "run", probe_file, tmp_path / "after")) == 0
    recorded, tracked = frames(tmp_path / "run", tmp_path / "after")
    assert recorded.loc[[1, 2]].equals(tracked)


def test_processes_that_know_nothing_of_each_other_are_refused(tmp_path, probe_file, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(argv(tmp_path / "run", probe_file, tmp_path / "scores")) == 1
    assert "each would work alone: on a CPU, processes work together only with" in capsys.readouterr().err
    assert not (tmp_path / "scores").exists()


def as_json(capsys, *argv: str) -> dict:
    capsys.readouterr()
    main(["diagnose", "--format", "json", *argv])
    return json.loads(capsys.readouterr().out)


def test_a_base_is_step_0_of_a_run(tmp_path, probe_file, capsys):
    train("dpo", tmp_path / "run", probe_file)
    shutil.rmtree(tmp_path / "run/dynamics")
    base = tmp_path / "base"
    tiny_model().save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    assert main(argv(tmp_path / "run", probe_file, tmp_path / "after", "--base", str(base))) == 0
    records = trl_dynamics.load_records(tmp_path / "after")
    assert sorted(records["step"].unique()) == [0, 1, 2, 3] and records["model"].nunique() == 1
    summary = next(iter(summarise_store(DynamicsStore(tmp_path / "after")).values()))
    assert main(["track", "--model_name_or_path", str(base), "--probe_set", str(probe_file)]
                + ["--output_dir", str(tmp_path / "alone")]) == 0  # fmt: skip
    alone = next(iter(summarise_store(DynamicsStore(tmp_path / "alone")).values()))
    assert summary.path().loc[0].equals(alone.path().loc[0])
    judged = as_json(capsys, str(tmp_path / "after"))["runs"]
    # Of a run without records, the model card that TRL writes says what trained it.
    assert [(run["steps"], run["trained_with"], run["compared_with"]) for run in judged] == [
        ([0, 1, 2, 3], "dpo", None)
    ]


def test_a_model_after_its_base_stands_at_its_last_step(tmp_path, probe_file):
    train("dpo", tmp_path / "run", probe_file)
    line = [
        "track",
        "--model_name_or_path",
        str(tmp_path / "run/checkpoint-2"),
        "--base",
        str(tmp_path / "run/checkpoint-1"),
    ]
    line += ["--probe_set", str(probe_file), "--output_dir", str(tmp_path / "after")]
    assert main(line) == 0
    assert sorted(trl_dynamics.load_records(tmp_path / "after")["step"].unique()) == [0, 2]
    assert main([*line, "--method", "ppo"]) == 1


def test_two_models_without_checkpoints_are_compared(tmp_path, probe_file, capsys):
    # Changes are judged from four probes on.
    rows = [row | {"prompt": row["prompt"] + more} for row in PROBES for more in ("", " please")]
    probe_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train("dpo", tmp_path / "run", probe_file, learning_rate=1e-2)
    models = [str(tmp_path / "run" / f"checkpoint-{step}") for step in (1, 3)]
    line = ["track", "--model_name_or_path", *models, "--probe_set", str(probe_file), "--probe_samples", "2"]
    assert main([*line, "--output_dir", str(tmp_path / "after")]) == 0
    first, second = as_json(capsys, str(tmp_path / "after"))["runs"]
    assert (first["steps"], first["compared_with"]) == ([0], None)
    assert (second["steps"], second["compared_with"], second["trained_with"]) == ([0, 1], "checkpoint-1", "dpo")
    # What is judged is the change between the two steps of the run itself.
    assert main(argv(tmp_path / "run", probe_file, tmp_path / "series", "--base", models[0],
                     "--checkpoints", "checkpoint-3")) == 0  # fmt: skip
    (series,) = as_json(capsys, str(tmp_path / "series"))["runs"]
    assert {f["name"] for f in series["findings"]} == {f["name"] for f in second["findings"]} != set()
    assert main(["report", str(tmp_path / "after"), "-o", str(tmp_path / "page.html")]) == 0
