"""squeeze_guard on two processes holds back what one process holds back, whatever splits the model."""

import pytest

from launcher import launch

pytestmark = pytest.mark.distributed

NAMES = ["dpo_guard", "dpo_guard_lora"]
CONFIGS = ["ddp", "fsdp2", "zero2", "zero3"]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return launch("single_gpu", NAMES, tmp_path_factory.mktemp("one"), 1)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Launches each config once, when its first test asks."""
    launches = {}

    def get(config):
        if config not in launches:
            names = NAMES if config in ("ddp", "fsdp2") else NAMES[:1]
            launches[config] = launch(config, names, tmp_path_factory.mktemp(config), 2)
        return launches[config]

    return get


def guarded(outcome: dict) -> list[dict[str, float]]:
    """Per step, the loss and what the guard logged."""
    lines = [entry for entry in outcome["log"] if "loss" in entry]
    return [{key: line[key] for key in line if key == "loss" or key.startswith("squeeze_guard/")} for line in lines]


@pytest.mark.parametrize("config", CONFIGS)
def test_two_processes_guard_as_one(config, one, two):
    for name in NAMES if config in ("ddp", "fsdp2") else NAMES[:1]:
        ours, theirs = guarded(one.outcome(name)), guarded(two(config).outcome(name))
        assert len(ours) == 4 and any(line["squeeze_guard/held_back"] > 0 for line in ours[1:])
        for line, other in zip(ours, theirs, strict=True):
            assert other == pytest.approx(line, rel=2e-3, abs=1e-7)
    assert two(config).failure is None
