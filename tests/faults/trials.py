"""Kill a command at every call that changes a file below its folder, or fill the disk there; then go on.

    python tests/faults/trials.py                    # 40 trials of each command, in minutes
    python tests/faults/trials.py --every            # all of them, in an hour or two
    python tests/faults/trials.py --commands sft --every --stride 7

However it ends, going on must lead to the same bytes in the same set of files as a run that nothing befell.
The commands run in forks of one process that has imported them, with a preloaded library (faults.c) that
counts the calls and strikes at the n-th.
"""
import argparse
import ctypes
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
MINI = str(ROOT / "mini")
MODES = {"kill before": 1, "kill after": 2, "kill within": 3, "disk full": 4}

QUESTIONS = ["--device", "cpu", "--questions", "4", "--max-new-tokens", "30"]
COMMANDS = {
    "sample": ["--model", MINI, *QUESTIONS, "--n", "1", "--out", "run.jsonl"],
    "sft": ["--model", MINI, "--device", "cpu", "--data", "../chat.jsonl", "--tokens-per-batch", "256",
            "--epochs", "2", "--save-every", "1", "--keep", "2", "--eval-every", "2", "--held-out", "20",
            "--resume", "auto", "--out", "run"],
    "grpo": ["--model", MINI, *QUESTIONS, "--questions-per-step", "2", "--mini-batch", "1", "--rollouts", "2",
             "--steps", "3", "--save-every", "1", "--eval-every", "2", "--eval-questions", "2",
             "--reward", "random", "--resume", "auto", "--out", "run"],
    "evaluate": ["--models", f"a={MINI},b={MINI}", *QUESTIONS, "--samples", "1", "--tasks",
                 "countdown-3-small,countdown-2-small", "--resume", "auto", "--out", "run"],
}


# ---- the process that forks ------------------------------------------------------------------------
def serve():
    """Read requests {name, argv, cwd, mode, at, processes, struck}, a line each; answer {status, calls}."""
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    sys.path.insert(0, str(ROOT))
    import cli
    import evaluate
    import grpo
    import sample
    import sft
    mains = {"evaluate": evaluate, "grpo": grpo, "sample": sample, "sft": sft}
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        children = [fork(request, rank, port, cli, mains) for rank in range(request["processes"])]
        print(json.dumps(wait_for(children)), flush=True)


def fork(request, rank, port, cli, mains):
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        return child, reader
    status = 70
    try:
        os.chdir(request["cwd"])
        screen = os.open(f"screen{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(screen, 1)
        os.dup2(screen, 2)
        if request["processes"] > 1:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(request["processes"]),
                              LOCAL_WORLD_SIZE=str(request["processes"]),
                              MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                              USE_LIBUV="0")  # torch's faster store may spin for ever in a fork
        sys.argv = [request["name"] + ".py", *request["argv"]]
        library = ctypes.CDLL(None)
        if rank == request["struck"]:
            mode = MODES.get(request["mode"], 0)
            library.faults_arm(os.path.abspath("run").encode(), ctypes.c_long(request["at"]), mode)
        cli.command(mains[request["name"]].main)
        status = 0
    except SystemExit as e:
        status = e.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os.write(writer, str(library.faults_calls()).encode())
        os._exit(status)


def wait_for(children):
    """Once one has failed the others are asked to end, then made to, as torchrun does."""
    status = {}
    deadline = None
    too_late = time.time() + 120
    pids = [child for child, _ in children]
    while len(status) < len(pids):
        for child in pids:
            if child not in status:
                done, code = os.waitpid(child, os.WNOHANG)
                if done:
                    status[child] = os.waitstatus_to_exitcode(code)
        if deadline is None and any(status.values()):
            deadline = time.time() + 10
            for child in pids:
                if child not in status:
                    with suppress(ProcessLookupError):
                        os.kill(child, signal.SIGTERM)
        if time.time() > min(deadline or too_late, too_late):
            for child in pids:
                if child not in status:
                    os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    calls = [os.read(reader, 20) for _, reader in children]
    for _, reader in children:
        os.close(reader)
    return {"status": [status[child] for child in pids], "calls": [int(text or 0) for text in calls]}


# ---- trials ----------------------------------------------------------------------------------------
class Server:
    """Runs commands in a folder of its own each."""

    def __init__(self, folder: Path):
        self.folder = folder
        library = folder / "faults.so"
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, HERE / "faults.c", "-ldl"], check=True)
        environment = {**os.environ, "LD_PRELOAD": str(library)}
        command = [sys.executable, str(Path(__file__).resolve()), "--serve"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        assert self.process.stdout.readline() == "ready\n"
        with open(folder / "chat.jsonl", "w") as f:
            for i in range(16):
                answer = f"<answer>{i * i}</answer>"
                messages = [{"role": "user", "content": f"What is {i} * {i}?"},
                            {"role": "assistant", "content": answer}]
                f.write(json.dumps({"messages": messages}) + "\n")

    def run(self, name, cwd, mode="none", at=0, processes=1, struck=0):
        cwd.mkdir(exist_ok=True)
        request = {"name": name, "argv": COMMANDS[name], "cwd": str(cwd), "mode": mode, "at": at,
                   "processes": processes, "struck": struck}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def contents(folder: Path) -> dict:
    """All that a run has left, by path: bytes, but for timings and the order in which rows came."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if name.startswith("screen") or path.is_dir() and not path.is_symlink():
            continue
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.suffix == ".jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            rows = [{key: value for key, value in row.items() if "second" not in key} for row in rows]
            found[name] = sorted(json.dumps(row) for row in rows)
        elif path.name == "report.html":  # of curves too, and some of them are timings
            found[name] = path.read_text().rstrip().endswith("</html>")
        else:
            found[name] = path.read_bytes()
    return found


@dataclass(frozen=True)
class Trial:
    name: str
    processes: int
    struck: int  # which of them
    mode: str
    at: int


def all_trials(server: Server, names, processes: int) -> tuple[list[Trial], dict]:
    """Every trial of some commands, and what a run of each leaves that nothing befalls."""
    trials, whole = [], {}
    for name in names:
        cwd = server.folder / f"whole-{name}-{processes}"
        done = server.run(name, cwd, processes=processes)
        assert not any(done["status"]), (cwd / "screen0.txt").read_text()
        whole[name] = contents(cwd)
        for struck in range(processes):
            if struck:  # count its calls
                done = server.run(name, server.folder / f"count-{name}-{struck}", processes=processes,
                                  struck=struck)
            for mode in MODES:
                for at in range(1, done["calls"][struck] + 1):
                    trials.append(Trial(name, processes, struck, mode, at))
    return trials, whole


def attempt(server: Server, trial: Trial, whole: dict) -> str:
    """Strike, go on, compare. -> what went wrong, or "" """
    cwd = server.folder / "trial"
    shutil.rmtree(cwd, ignore_errors=True)
    struck = server.run(trial.name, cwd, trial.mode, trial.at, trial.processes, trial.struck)
    status = struck["status"][trial.struck]
    screen = (cwd / f"screen{trial.struck}.txt").read_text()
    if trial.mode == "disk full":
        lines = [line for line in screen.splitlines() if line.startswith(f"{trial.name}.py: ")]
        if status not in (0, 2) or "Traceback" in screen or "Exception ignored" in screen:
            return f"status {status}: {screen[-1500:]}"
        if status == 2 and (len(lines) != 1 or "disk is full" not in lines[0]):
            return f"said {lines}"
    elif status not in (0, -signal.SIGKILL):  # 0: the call came after the last line
        return f"status {status}: {screen[-1500:]}"
    again = server.run(trial.name, cwd, processes=trial.processes)
    if any(again["status"]):
        return f"does not go on: {(cwd / 'screen0.txt').read_text()[-1500:]}"
    found = contents(cwd)
    names = sorted(found.keys() ^ whole.keys()) or sorted(n for n in whole if found[n] != whole[n])
    return f"other files: {names}" if names else ""


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    p.add_argument("--commands", default=",".join(COMMANDS))
    p.add_argument("--processes", type=int, default=1)
    p.add_argument("--every", action="store_true", help="not a sample of 40")
    p.add_argument("--stride", type=int, default=1, help="with --every: only one in so many")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    if args.serve:
        serve()
        return
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder))
        for name in args.commands.split(","):
            started = time.time()
            trials, whole = all_trials(server, [name], args.processes)
            chosen = trials[::args.stride] if args.every else random.Random(args.seed).sample(trials, 40)
            survived = {mode: [0, 0] for mode in MODES}
            for trial in chosen:
                wrong = attempt(server, trial, whole[name])
                survived[trial.mode][0] += 1
                survived[trial.mode][1] += not wrong
                if wrong:
                    failed += 1
                    print(trial, wrong, flush=True)
            cells = " | ".join(f"{good} of {tried}" for tried, good in survived.values())
            print(f"| {name} | {args.processes} | {len(trials)} | {cells} | {time.time() - started:.0f} s |",
                  flush=True)
        server.close()
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
