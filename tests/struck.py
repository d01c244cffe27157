"""Runs a command that is killed, or whose disk is full, from the n-th change of a file below its folder on.

    echo "kill 3" | python struck.py NAME FLAGS...      # a line a strike; 0: only count the changes

Python tells an audit hook of every file that is opened, renamed, linked or removed. Each strike is a fork,
and answered by its exit status and what it printed.
"""
import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch._dynamo  # noqa: E402, F401 (which torch's AdamW imports: once, not in each fork)
import evaluate  # noqa: E402
import grpo  # noqa: E402
import run.command as cli  # noqa: E402
import sample  # noqa: E402
import sft  # noqa: E402

CHANGES = {"os.rename", "os.mkdir", "os.link", "os.symlink", "os.truncate"}
calls = 0


def strike(how, at):
    def hook(event, args):
        global calls
        written = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
        inside = "/run" in os.path.abspath(str(args[0])) if event in CHANGES or written else False
        if event in ("os.remove", "os.rmdir"):  # shutil.rmtree names a file by its folder's descriptor
            inside = args[1] != -1 or "/run" in os.path.abspath(str(args[0]))
        if not inside:
            return
        calls += 1
        if at and calls == at and how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if at and calls >= at and how == "full":
            raise OSError(28, "No space left on device", str(args[0]))
    sys.addaudithook(hook)
    try:
        cli.command({"evaluate": evaluate, "grpo": grpo, "sample": sample, "sft": sft}[name].main)
    finally:
        print("changes", calls, flush=True)


name = sys.argv[1]
sys.argv = [f"{name}.py", *sys.argv[2:]]
for line in sys.stdin:
    how, at = line.split()
    child = os.fork()
    if not child:
        screen = os.open("screen", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(screen, 1)
        os.dup2(screen, 2)
        status = 1
        try:
            strike(how, int(at))
            status = 0
        except SystemExit as e:
            status = e.code
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps([status, Path("screen").read_text()]), flush=True)
