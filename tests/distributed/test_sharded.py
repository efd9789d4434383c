"""Two processes that each hold half of the model track what one process tracks: FSDP2, DeepSpeed ZeRO-2 and ZeRO-3."""

import json

import numpy as np
import pytest

from comparison import assert_consistent, assert_same_answers, assert_same_course, assert_same_start, records
from launcher import launch

pytestmark = pytest.mark.distributed

SAME_COURSE = {
    "sft": "shared_prefix",
    "dpo": "shared_prefix",
    "dpo_padded": "padded",
    "sft_lora": "shared_prefix",
    "accumulation": "shared_prefix",
    "uneven_shared": "shared_prefix",
    "uneven_padded": "padded",
    "answers_shared": "shared_prefix",
    "one_probe_shared": "shared_prefix",
    "tied": "shared_prefix",
    "own_forward": "padded",
    "saved": "shared_prefix",
}
WRAPPERS = {"fsdp2": ("FSDP", "FSDPLlamaForCausalLM"), "zero2": ("DEEPSPEED", "DeepSpeedEngine")}
WRAPPERS["zero3"] = WRAPPERS["zero2"]
CONFIGS = list(WRAPPERS)
REFUSED = [
    ("fsdp2", "context_parallel", "context parallelism (cp_size=2)"),
    ("zero3", "sequence_parallel", "sequence parallelism (sp_size=2)"),
    ("zero3", "tensor_parallel", "tensor parallelism (tp_size=2)"),
]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return launch("single_gpu", [*SAME_COURSE, "grpo"], tmp_path_factory.mktemp("one"), 1)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """Launches each config once, when its first test asks."""
    launches = {}

    def get(config):
        if config not in launches:
            extra = ["bf16"] if config == "fsdp2" else []
            names = [*SAME_COURSE, "resumed", "grpo", *extra, *(name for where, name, _ in REFUSED if where == config)]
            launches[config] = launch(config, names, tmp_path_factory.mktemp(config), 2)
        return launches[config]

    return get


@pytest.mark.parametrize("name", SAME_COURSE)
@pytest.mark.parametrize("config", CONFIGS)
def test_sharded_processes_record_what_one_records(config, name, one, sharded):
    one.outcome(name)
    two = sharded(config)
    facts = two.outcome(name)
    assert facts["num_processes"] == 2
    assert facts["distributed_type"] == WRAPPERS[config][0]
    assert facts["wrapper"] == ("FSDPPeftModel" if (config, name) == ("fsdp2", "sft_lora") else WRAPPERS[config][1])
    assert facts["share_held"] == pytest.approx(0.5, abs=0.05)
    assert_same_course(one.folder / name, two.folder / name)
    meta = json.loads((two.folder / name / "dynamics/meta.json").read_text())
    assert meta["batch_plan"]["layout"] == SAME_COURSE[name]
    # Where parameters are split, a process sees a part of each; they are counted as a whole.
    alone = json.loads((one.folder / name / "dynamics/meta.json").read_text())
    for count in ("num_parameters", "num_trainable"):
        assert meta["model"][count] == alone["model"][count]


@pytest.mark.parametrize("config", CONFIGS)
def test_sharded_processes_answer_as_one_does(config, one, sharded):
    one.outcome("answers_shared"), sharded(config).outcome("answers_shared")
    assert_same_answers(one.folder / "answers_shared", sharded(config).folder / "answers_shared")


@pytest.mark.parametrize("config", CONFIGS)
def test_grpo_scores_what_it_generates_from(config, one, sharded):
    two = sharded(config)
    one.outcome("grpo"), two.outcome("grpo")
    assert_same_start(one.folder / "grpo", two.folder / "grpo")
    assert_consistent(two.folder / "grpo")


@pytest.mark.parametrize("config", CONFIGS)
def test_a_sharded_run_goes_on_from_its_checkpoint(config, one, sharded):
    two = sharded(config)
    two.outcome("resumed")
    assert_same_course(one.folder / "saved", two.folder / "resumed")
    assert json.loads((two.folder / "resumed/dynamics/meta.json").read_text())["resumed_at"] == [2]


def test_fsdp_in_bf16_does_not_round_the_statistics(sharded):
    two = sharded("fsdp2")
    two.outcome("bf16")
    # A single token's log-probability, so no sum of rounded numbers can look exact.
    single = records(two.folder / "bf16")["eos_logp"].dropna().to_numpy().astype(np.float32)
    bf16 = (single.view(np.uint32) & 0xFFFF) == 0
    assert len(single) and bf16.mean() < 0.1


@pytest.mark.parametrize(("config", "name", "given"), REFUSED)
def test_processes_that_share_rows_are_refused(config, name, given, sharded):
    refused = sharded(config).outcome(name)["refused"]
    assert refused.startswith(f"probes cannot be scored under {given}") and refused.count(". ") == 0


@pytest.mark.parametrize("config", CONFIGS)
def test_the_processes_end_by_themselves(config, sharded):
    assert sharded(config).failure is None
