"""What several integration tests start."""

import json

import pandas as pd
import pytest

from serving import Serve, free_port
from tiny import tiny_model, tiny_tokenizer
from tiny_runs import PAIRS, PROBES
from trl_dynamics import embedded


@pytest.fixture
def serve(tmp_path):
    """Starts a `transformers serve`, always at the same port; by default with the embedded model."""
    started, port = [], free_port()
    with open(tmp_path / "serve.log", "wb") as log:

        def start(model=None):
            started.append(Serve(port, log, model or embedded.model_path()))
            return started[-1]

        yield start
        for one in started:
            one.kill()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model folder, a training file and a probe file."""
    folder = tmp_path_factory.mktemp("world")
    tiny_model("llama").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    for name, rows in (("train", PAIRS), ("probes", PROBES)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pd.DataFrame(PAIRS).to_parquet(folder / "train.parquet")
    return folder
