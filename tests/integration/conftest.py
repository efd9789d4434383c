"""What several integration tests start."""

import pytest

from serving import Serve, free_port
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
