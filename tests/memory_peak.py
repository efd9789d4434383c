"""The peak memory of a process of its own."""

import sys

import pytest

# getrusage counts what the process was started from as well, a worker of pytest with all that it has grown to.
PEAK = """
def peak_kib():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
