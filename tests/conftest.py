"""Everything runs offline, on the CPU and with one thread per process, however pytest was started."""

import os
from pathlib import Path

for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
    os.environ[name] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["DS_ACCELERATOR"] = "cpu"

import pytest  # noqa: E402
import torch  # noqa: E402


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
