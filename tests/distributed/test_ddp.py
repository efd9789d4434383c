"""Two processes track what one process tracks: data parallelism over gloo, with the recipe's config."""

import json
import sys

import pandas as pd
import pytest

from comparison import (
    assert_consistent,
    assert_same_answers,
    assert_same_course,
    assert_same_start,
    batch_plan,
    records,
)
from launcher import CONFIGS, free_port, launch, watch
from tiny import tiny_model, tiny_tokenizer
from tiny_runs import PAIRS, PROBES

pytestmark = pytest.mark.distributed

SAME_COURSE = [
    "sft",
    "sft_padded",
    "dpo",
    "dpo_padded",
    "sft_lora",
    "dpo_lora",
    "accumulation",
    "uneven_shared",
    "uneven_padded",
    "answers_shared",
    "answers_padded",
    "one_probe_shared",
    "one_probe_padded",
    "saved",
]
TRACKED = ["tracked", "tracked_uneven"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def one(folder):
    return launch("single_gpu", [*SAME_COURSE, "grpo", *TRACKED], folder / "one", 1)


@pytest.fixture(scope="module")
def two(folder, one):
    # First what finds the processes by itself: training arguments may tell accelerate what they are.
    return launch(
        "ddp", [*TRACKED, *SAME_COURSE, "grpo", "thinned", "full_disk", "resumed_from_one"], folder / "ddp", 2
    )


@pytest.mark.parametrize("name", SAME_COURSE)
def test_two_processes_record_what_one_records(name, one, two):
    ours, theirs = one.outcome(name), two.outcome(name)
    assert (ours["num_processes"], ours["distributed_type"]) == (1, "NO")
    assert (theirs["num_processes"], theirs["distributed_type"]) == (2, "MULTI_CPU")
    assert theirs["wrapper"] == "DistributedDataParallel"
    assert_same_course(one.folder / name, two.folder / name)
    ours, theirs = ([entry for entry in outcome["log"] if "probe/seconds" in entry] for outcome in (ours, theirs))
    assert len(ours) == 4
    for line, other in zip(ours, theirs, strict=True):
        del line["probe/seconds"], other["probe/seconds"]
        assert line == pytest.approx(other, abs=1e-3)


def test_one_process_decides_for_all_what_a_schedule_leaves_out(two):
    """Processes whose clocks differ would wait for each other for ever."""
    two.outcome("thinned")
    meta = json.loads((two.folder / "thinned/dynamics/meta.json").read_text())
    assert [(choice["step"], choice["taken"]) for choice in meta["decisions"]] == [
        (0, True),
        (1, False),
        (2, False),
        (3, False),
        (4, True),
    ]
    assert len(records(two.folder / "thinned", steps=(0, 4)))


def test_two_processes_gauge_what_one_gauges(one, two):
    """Answers differ in length, so that each process counts tokens of its own number."""
    alone, together = (gauged(run.outcome("dpo")) for run in (one, two))
    assert len(alone) == 4 and len(alone[0]) == 6
    for line, other in zip(alone, together, strict=True):
        assert line == pytest.approx(other, rel=1e-4)


def gauged(outcome: dict) -> list[dict]:
    """The squeezing risk of every step."""
    lines = [{k: v for k, v in entry.items() if k.startswith("squeeze_risk/")} for entry in outcome["log"]]
    return [line for line in lines if line]


def test_two_processes_log_the_sides_of_pairs_that_one_logs(one, two):
    """Sums over all processes, and each row of an evaluation once, though batches are filled up."""
    ours, theirs = (sides_logged(run.outcome("accumulation")) for run in (one, two))
    assert [step for step, _ in ours] == [0, 1, 2, 3, 4]
    for (step, line), (other_step, other) in zip(ours, theirs, strict=True):
        assert step == other_step and line == pytest.approx(other, rel=1e-4)


def sides_logged(outcome: dict) -> list[tuple[int, dict]]:
    entries = [(entry["step"], {key: entry[key] for key in entry if "/" in key}) for entry in outcome["log"]]
    return [(step, line) for step, line in entries if any("nll/" in key for key in line)]


@pytest.mark.parametrize("name", ["answers_shared", "answers_padded"])
def test_two_processes_answer_as_one_does(name, one, two):
    one.outcome(name), two.outcome(name)
    assert_same_answers(one.folder / name, two.folder / name)


def test_grpo_samples_differently_from_the_same_start(one, two):
    for run in (one, two):
        run.outcome("grpo")
        assert_consistent(run.folder / "grpo")
    assert_same_start(one.folder / "grpo", two.folder / "grpo")


@pytest.mark.parametrize(
    ("name", "num_groups"),
    [
        ("uneven_shared", 5),
        ("uneven_padded", 9),
        ("one_probe_shared", 1),
        ("one_probe_padded", 1),
        ("tracked_uneven", 9),
    ],
)
def test_the_shares_of_two_processes_were_unequal(name, num_groups, two):
    two.outcome(name)
    assert batch_plan(two.folder / name)["num_groups"] == num_groups


def test_a_run_of_one_process_goes_on_with_two(one, two):
    two.outcome("resumed_from_one")
    assert_same_course(one.folder / "saved", two.folder / "resumed_from_one")
    meta = json.loads((two.folder / "resumed_from_one/dynamics/meta.json").read_text())
    assert meta["resumed_at"] == [2] and meta["num_processes"] == 2


def test_a_run_of_two_processes_goes_on_with_one(folder, one, two):
    two.outcome("saved")
    back = launch("single_gpu", ["resumed_from_two"], folder / "back", 1)
    back.outcome("resumed_from_two")
    assert_same_course(one.folder / "saved", folder / "back/resumed_from_two")


def test_a_full_disk_of_the_main_process_costs_one_probe_and_nothing_else(two):
    whole, lossy = two.outcome("sft"), two.outcome("full_disk")
    assert lossy["steps"] == whole["steps"] == [4, 4]
    assert losses(lossy) == losses(whole) and len(losses(whole)) == 2
    kept, expected = records(two.folder / "full_disk", [0, 1, 4]), records(two.folder / "sft").drop(2, level="step")
    pd.testing.assert_frame_equal(kept, expected, check_exact=True)
    assert json.loads((two.folder / "full_disk/dynamics/meta.json").read_text())["lost_steps"] == [2]
    assert two.output.count("Lost: ") == two.output.count("Lost: the records of step 2. Training goes on") == 1


def losses(outcome: dict) -> list[tuple]:
    """What was logged of training itself."""
    entries = [entry for entry in outcome["log"] if "loss" in entry or "train_loss" in entry]
    return [(entry["step"], entry.get("loss"), entry.get("grad_norm"), entry.get("train_loss")) for entry in entries]


@pytest.mark.parametrize("name", TRACKED)
def test_two_processes_score_checkpoints_as_one_does(name, one, two):
    ours, theirs = one.outcome(name), two.outcome(name)
    assert (ours["num_processes"], ours["distributed_type"]) == (1, "NO")
    assert (theirs["num_processes"], theirs["distributed_type"]) == (2, "MULTI_CPU")
    # The second call takes the new checkpoint only, the third none.
    assert (ours["loaded"], theirs["loaded"]) == ([[1], [1], [0]], [[1, 1], [1, 1], [0, 0]])
    alone, together = (records(run.folder / name, [2, 4]) for run in (one, two))
    pd.testing.assert_frame_equal(alone, together, check_exact=True)
    for run, num_processes in ((one, 1), (two, 2)):
        meta = json.loads((run.folder / name / "dynamics/meta.json").read_text())
        assert (meta["num_processes"], meta["status"]) == (num_processes, "finished")
        assert run.output.count(f"records: {run.folder / name}/dynamics\n") == 3


def test_one_of_two_processes_tells_what_was_scored(one, two):
    for run in (one, two):
        for name in TRACKED:
            run.outcome(name)
        assert run.output.count("scored saved at step ") == 2 * len(TRACKED)
        assert run.output.count("scoring as the run did") == 3 * len(TRACKED)
        assert run.output.count("is not scored in the batches of the run in ") == 2


def test_two_processes_score_checkpoints_as_training_did(one, two):
    two.outcome("tracked")
    recorded, tracked = records(one.folder / "saved").loc[[2, 4]], records(two.folder / "tracked", [2, 4])
    pd.testing.assert_frame_equal(recorded.drop(columns="model"), tracked.drop(columns="model"), check_exact=True)


def test_the_processes_end_by_themselves(one, two):
    assert (one.failure, two.failure) == (None, None)


def test_the_command_line_starts_two_processes(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    for name, rows in (("pairs", PAIRS), ("probes", PROBES)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {
        "accelerate_config": CONFIGS / "ddp.yaml",
        "num_processes": 2,
        "main_process_port": free_port(),
        "model_name_or_path": tmp_path / "model",
        "dataset_name": tmp_path / "pairs.jsonl",
        "probe_set": tmp_path / "probes.jsonl",
        "output_dir": tmp_path / "run",
        "max_steps": 2,
        "use_cpu": True,
        "bf16": False,
    }
    flags = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    output = tmp_path / "output.txt"
    failure = watch([sys.executable, "-m", "trl_dynamics.cli.main", "sft", *flags], output)
    assert failure is None, f"{failure}\n{output.read_text()[-6000:]}"
    assert output.read_text().count("records:") == 1
    assert json.loads((tmp_path / "run/dynamics/meta.json").read_text())["num_processes"] == 2
