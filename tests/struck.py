"""Runs a command that is killed, or whose disk is full, from the n-th change of a file below its folder on.

    python struck.py kill|full N NAME FLAGS...          # N = 0: only count the changes, and print how many

Python tells an audit hook of every file that is opened, renamed, linked or removed.
"""
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cli  # noqa: E402
import evaluate  # noqa: E402
import grpo  # noqa: E402
import sample  # noqa: E402
import sft  # noqa: E402

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate"}
how, at, name = sys.argv[1], int(sys.argv[2]), sys.argv[3]
calls = 0


def hook(event, args):
    global calls
    written = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
    if not (event in CHANGES or written) or "/run" not in os.path.abspath(str(args[0])):
        return
    calls += 1
    if at and calls == at and how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if at and calls >= at and how == "full":
        raise OSError(28, "No space left on device", str(args[0]))


sys.argv = [f"{name}.py", *sys.argv[4:]]
sys.addaudithook(hook)
try:
    cli.command({"evaluate": evaluate, "grpo": grpo, "sample": sample, "sft": sft}[name].main)
finally:
    print("changes", calls)
