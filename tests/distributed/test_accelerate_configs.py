"""Every config that ships is one that accelerate takes, and says what it was run as."""

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command_parser

from comparison import assert_same_course
from launcher import CONFIGS, launch

FILES = sorted(CONFIGS.glob("*.yaml"))
MULTI_NODE = ["ddp_multi_node", "fsdp2_multi_node", "zero3_multi_node"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_accelerate_reads_it_and_knows_every_key(path):
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig)
    written = yaml.safe_load(path.read_text())
    for key in ("num_processes", "num_machines", "machine_rank", "mixed_precision"):
        assert getattr(config, key) == written[key]
    assert config.distributed_type.value == written["distributed_type"]
    # What stands in a section becomes an option of the launcher; it is silent about those that it does not know.
    sections = [written.get(name, {}) for name in ("fsdp_config", "deepspeed_config")]
    assert {key for section in sections for key in section} <= set(vars(launch_command_parser().parse_args(["x"])))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_its_head_says_what_was_run(path):
    head = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert "not run on" in head or path.stem == "single_gpu"
    if path.stem.endswith("_multi_node"):
        for name in ("machine_rank", "main_process_ip", "num_machines", "num_processes"):
            assert name in head


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return launch("single_gpu", ["sft"], tmp_path_factory.mktemp("one"), 1)


@pytest.mark.distributed
@pytest.mark.parametrize("name", MULTI_NODE)
def test_two_launchers_that_act_two_machines_record_what_one_process_records(name, one, tmp_path):
    one.outcome("sft")
    result = launch(name, ["sft"], tmp_path, 2)
    assert result.outcome("sft")["num_processes"] == 2
    assert result.failure is None
    assert_same_course(one.folder / "sft", tmp_path / "sft")
