"""Two processes track what one process tracks: data parallelism over gloo, with the recipe's config."""

import json
import sys

import pytest
from comparison import assert_consistent, assert_same_course, assert_same_start, batch_plan
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
    "one_probe_shared",
    "one_probe_padded",
    "saved",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def one(folder):
    return launch("single_gpu", [*SAME_COURSE, "grpo"], folder / "one", 1)


@pytest.fixture(scope="module")
def two(folder, one):
    return launch("ddp", [*SAME_COURSE, "grpo", "resumed_from_one"], folder / "ddp", 2)


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


def test_grpo_samples_differently_from_the_same_start(one, two):
    for run in (one, two):
        run.outcome("grpo")
        assert_consistent(run.folder / "grpo")
    assert_same_start(one.folder / "grpo", two.folder / "grpo")


@pytest.mark.parametrize(
    ("name", "num_groups"),
    [("uneven_shared", 5), ("uneven_padded", 9), ("one_probe_shared", 1), ("one_probe_padded", 1)],
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
