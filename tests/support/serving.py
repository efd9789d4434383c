"""A real `transformers serve` on loopback."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


class Serve:
    """One `transformers serve` process with one model."""

    def __init__(self, port, log, model):
        self.url = f"http://127.0.0.1:{port}"
        command = ["serve", str(model), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
        code = "import sys; from transformers.cli.transformers import main; sys.exit(main())"
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *command], stdout=log, stderr=log, env=environment, start_new_session=True
        )
        self.wait()

    def wait(self, seconds=120):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert self.process.poll() is None, "transformers serve ended by itself"
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.2)
        raise AssertionError("transformers serve did not come up")

    def kill(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
