"""Everything runs offline and with one thread per process, on the CPU unless `-m gpu` was asked for."""

import os
from pathlib import Path

for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
    os.environ[name] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest  # noqa: E402
import torch  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPUs before anything uses one: bitwise comparisons are the CPU's."""
    if config.option.markexpr.strip() != "gpu":
        os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def datasets_cache(tmp_path_factory):
    """A cache of its own per test process, so that no run sees what another one left."""
    import datasets

    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with the public data files; README.md says where they come from."""
    folder = os.environ.get("TRL_DYNAMICS_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("TRL_DYNAMICS_DATA does not name the folder with the public data files (see README.md)")
    return Path(folder)
