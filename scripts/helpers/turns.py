"""Time programs in turns, a few steps of each, so that a slow minute of the machine meets all of them."""

import subprocess
import sys
import tempfile


READY = "ready for a turn"


def wait_for_turn() -> None:
    """For a program that `run_in_turns` started: say that a turn is over, and wait for the next."""
    print(READY, flush=True)
    sys.stdin.readline()


def run_in_turns(commands: dict[str, list[str]], environment: dict[str, str] | None = None) -> dict[str, str]:
    """Start programs, give them turns until all have ended, and return the last line that each printed.

    Raises:
        RuntimeError: a program failed; the message ends with what it printed.
    """
    running: dict[str, subprocess.Popen] = {}
    found: dict[str, str] = {}
    with tempfile.TemporaryFile("w+") as errors:

        def wait(name: str) -> None:
            """For the end of a turn, or of the program."""
            last = ""
            for line in running[name].stdout:
                if line.strip() == READY:
                    return
                last = line
            if running[name].wait():
                errors.seek(0)
                raise RuntimeError(f"{name} failed:\n{errors.read()[-3000:]}")
            found[name] = last

        try:
            for name, command in commands.items():
                pipe = subprocess.PIPE
                running[name] = subprocess.Popen(
                    command, stdin=pipe, stdout=pipe, stderr=errors, text=True, env=environment
                )
                wait(name)
            while len(found) < len(commands):
                for name in [name for name in commands if name not in found]:
                    print("go", file=running[name].stdin, flush=True)
                    wait(name)
        finally:
            for process in running.values():
                process.kill()
                process.communicate()
    return found
