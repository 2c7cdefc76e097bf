"""Programs of several processes, which a test starts and does not wait for for ever."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
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


def run_ranks(command: Sequence[str | Path], ranks: int, seconds: int = 300) -> list[subprocess.CompletedProcess]:
    """What the processes of a run over ranks printed, which nobody ends when one of them fails.

    Args:
        command: a script and its arguments.
        ranks: processes.
        seconds: as above, for all of them.

    Raises:
        TimeoutError: one did not end; all are killed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]), "MASTER_PORT": port}
    shared |= {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(ranks):
            environment = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            # Not pipes, which would have to be emptied while another process is waited for.
            with open(f"{folder}/out{rank}", "w") as out, open(f"{folder}/errors{rank}", "w") as errors:
                given = {"env": environment, "stdout": out, "stderr": errors, "start_new_session": True}
                processes.append(subprocess.Popen([sys.executable, *map(str, command)], **given))
        end, late = time.monotonic() + seconds, []
        for rank, process in enumerate(processes):
            try:
                process.wait(max(0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                late.append(rank)
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        texts = [[Path(f"{folder}/{kind}{rank}").read_text() for kind in ("out", "errors")] for rank in range(ranks)]
    if late:
        raise TimeoutError(f"{command} did not end on ranks {late} in {seconds} s:\n{texts[late[0]][1][-3000:]}")
    done = zip(processes, texts, strict=True)
    return [subprocess.CompletedProcess(command, process.returncode, *text) for process, text in done]
