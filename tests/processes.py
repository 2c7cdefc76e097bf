"""Programs of several processes, which a test starts and does not wait for for ever."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


TESTS = Path(__file__).parent


def run_processes(command: Sequence[str | Path], seconds: int = 300) -> subprocess.CompletedProcess:
    """What a program printed, which finds the modules of the tests and of the package where this process does.

    Raises:
        TimeoutError: it did not end; it and all that it has started are killed. Its message ends with what was printed.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(list(map(str, command)), env=environment, start_new_session=True, **streams)
    try:
        output, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        # Children would hold the pipes open.
        os.killpg(process.pid, signal.SIGKILL)
        raise TimeoutError(f"{command} did not end in {seconds} s:\n{process.communicate()[1][-3000:]}") from None
    return subprocess.CompletedProcess(command, process.returncode, output, errors)
