"""A run's own record, run.json: who holds it, how the run was started, what it read; and how a run goes on.

`begin` is the door. A run goes on with the flags it was started with, from the same inputs. What it reads is
known by content, not by path: a model may move, but not change. So may the folder of the run itself. While a
command works it holds a lock on its run.json (flock), which ends with the process, however that ends.
"""
import fcntl
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from hashlib import blake2b, file_digest
from importlib import metadata
from pathlib import Path
from typing import BinaryIO

import torch

from checkpoint import device_and_dtype, files_of_weights, find_folder
from cli import UserError, read_json, say
from processes import barrier, rank, world
from tasks import Problem, Task
from tokenizer import TOKENIZER_FILES

# Flags that say where something is; it is compared by its content.
PLACES = {"out", "model", "models", "data", "data_dir", "task", "tasks"}
# Flags that a run may give anew: how it goes on, and where and in how many pieces it is computed, which only
# the rounding shows. (With --dtype auto another device may mean another dtype.)
FREE = {"resume", "plan", "plan_memory", "device", "slots", "micro_batch_tokens", "recompute", "timeout"}


# ---- going on, or not ------------------------------------------------------------------------------
def goes_on(resume: str | None, out: Path) -> bool:
    """Whether a run goes on in its folder. Raises UserError if it can neither go on nor start there."""
    there = is_written(out / "run.json")
    if resume == "yes" and not there:
        raise UserError(f"--resume: {out} holds no run (no run.json); "
                        "start it without --resume, with an --out that does not exist")
    if there and not resume:
        raise UserError(f"--out {out} exists; go on with --resume, or give another --out")
    if not there and os.path.lexists(out):  # a run that was killed before it had written anything may start
        others = [out]
        if out.is_dir():
            others = [path for path in out.iterdir() if path.name != "run.json" or not path.is_file()]
        if others:
            raise UserError(f"--out {out} exists and holds no run; give another --out, or move it away")
    return there


def is_written(path: Path) -> bool:
    """Whether a record is there and whole. It is written before all else, so a part of one is of no run."""
    return path.is_file() and path.read_bytes().endswith(b"\n}")


def begin(path: Path, args, inputs: Callable[[], dict], free: set[str] = frozenset()) -> None:
    """Hold the record at `path` until the process ends: write it, or compare it with how it was started.

    `inputs` gives a fingerprint of what is read, by flag; `free` are flags that may change, beside FREE. For
    all processes to call. Raises UserError that names what differs, or who holds the record.
    """
    barrier()  # all have looked whether there is one
    if rank() == 0:
        file = hold(path)
        if is_written(path):
            refuse_other_flags(args, path, free)
            refuse_other_inputs(args, path, inputs())
            tell_what_changed(args, path)
        else:
            content = {**run_record(args), "inputs": inputs()}
            file.truncate(0)  # in place: the lock is the file's
            file.write(json.dumps(content, indent=2).encode())
            file.flush()
            os.fsync(file.fileno())
    barrier()


def sweep(folder: Path) -> None:
    """Remove what a kill left half written."""
    for path in (*folder.glob("*.tmp"), *folder.glob("*/*.tmp"), *folder.glob(".tmp*")):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


_held: dict[int, BinaryIO] = {}  # by inode: a folder may have moved


def hold(path: Path) -> BinaryIO:
    """The file, locked. Raises UserError with the process that holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "ab")  # noqa: SIM115 (it lives as long as the process)
    inode = os.fstat(file.fileno()).st_ino
    if inode in _held:
        _held.pop(inode).close()  # of a command of this process, which has ended
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        raise UserError(f"{path}: {holder_of(file)} is at work there; "
                        "wait until it ends, or give another --out") from e
    except OSError as e:
        say(f"{path}: no lock on this file system ({e.strerror}); let nobody else work there")
    _held[inode] = file
    return file


def holder_of(file: BinaryIO) -> str:
    """Which process has a lock on a file, as Linux lists them."""
    inode = f":{os.fstat(file.fileno()).st_ino}"
    locks = Path("/proc/locks")
    for line in locks.read_text().splitlines() if locks.is_file() else ():
        _, kind, _, _, process, where, *_ = line.split()
        if kind == "FLOCK" and where.endswith(inode) and int(process) > 0:
            return f"process {process}"
    return "another process"


# ---- what must be the same -------------------------------------------------------------------------
def read_record(path: Path) -> dict:
    """Raises UserError if it is not what `begin` writes."""
    record = read_json(path)
    for name in ("flags", "versions"):
        if not isinstance(record.get(name), dict):
            raise UserError(f"{path}: damaged (no {name}); put back what was there, or give another --out")
    return record


def refuse_other_flags(args, path: Path, free: set[str]) -> None:
    before = read_record(path)["flags"]
    now = json.loads(json.dumps(vars(args)))
    changed = []
    for name in sorted((now.keys() | before.keys()) - PLACES - FREE - free):
        then = before.get(name, args.defaults.get(name))  # the flag may be younger than the run
        if now.get(name) != then:
            changed.append(f"--{name.replace('_', '-')} {spelled(then)}, not {spelled(now.get(name))}")
    if changed:
        raise UserError(f"{path} was started with {'; '.join(changed)}: give the same flags, or start "
                        "another run in another --out (from this one's model with --model)")


def spelled(value) -> str:
    """The value of a flag as it is typed."""
    if value is None or isinstance(value, bool):
        return "given" if value else "not given"
    return value if isinstance(value, str) else json.dumps(value)


def refuse_other_inputs(args, path: Path, now: dict) -> None:
    record = read_record(path)
    before = record.get("inputs")
    if not isinstance(before, dict):
        say(f"{path} is from before inputs had fingerprints: whether they have changed is not known")
        return
    changed = []
    for name in sorted(before.keys() & now.keys()):
        old, new = before[name], now[name]
        if old != new:
            parts = []
            if isinstance(old, dict) and isinstance(new, dict):
                parts = [part for part in sorted(old.keys() | new.keys()) if old.get(part) != new.get(part)]
            changed.append(f"{name} ({', '.join(parts)})" if parts else name)
    if changed:
        command = " ".join(map(str, record.get("command", [])))
        raise UserError(f"{path}: what it read has changed since it began: {'; '.join(changed)}; "
                        f"put it back (it began as: {command}), or start another run with another --out")


def tell_what_changed(args, path: Path) -> None:
    def facts(record):
        return {**record["versions"], **record.get("machine", {})}
    before, now = facts(read_record(path)), facts(run_record(args))
    changed = [f"{name} was {before[name]}, is {now.get(name)}"
               for name in before if before[name] != now.get(name)]
    if changed:
        say(f"{path}: since it began something has changed, so that it need not end with the same bytes: "
            + "; ".join(changed))


# ---- fingerprints ----------------------------------------------------------------------------------
def of_file(path: str | Path) -> str:
    with open(path, "rb") as f:
        return file_digest(f, "blake2b").hexdigest()[:32]


def of_files(paths: Iterable[str | Path]) -> list[str]:
    return [of_file(path) for path in paths]


def of_model(model: str | Path) -> dict[str, str]:
    """Of each file of a model folder that says what the model computes."""
    folder = find_folder(model)
    names = ("config.json", *TOKENIZER_FILES, "model.safetensors.index.json")
    found = [folder / name for name in names if (folder / name).is_file()]
    return {path.name: of_file(path) for path in [*found, *files_of_weights(folder)]}


def of_questions(problems: Iterable[tuple[Task, Problem]]) -> str:
    """Of questions, how each is graded, and their order."""
    hasher = blake2b(digest_size=16)
    for task, problem in problems:
        grading = getattr(task, "checker", type(task)).__name__
        hasher.update(json.dumps([grading, problem.id, problem.question, problem.truth]).encode())
    return hasher.hexdigest()


# ---- what the record says --------------------------------------------------------------------------
def run_record(args) -> dict:
    """The command, every flag, versions, git commit and machine, as `run.json` keeps them."""
    versions = {"python": sys.version.split()[0]}
    for package in ("torch", "tokenizers", "safetensors", "numpy", "triton"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            pass
    here = Path(__file__).parent
    code = sorted([*here.glob("*.py"), *here.glob("kernels/**/*.py")])
    versions["code"] = blake2b("".join(of_files(code)).encode(), digest_size=8).hexdigest()
    commit = None
    if (here / ".git").exists():
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True)
        commit = done.stdout.strip()
    script = Path(sys.argv[0]).name
    return {"command": [script, *sys.argv[1:]], "flags": vars(args), "versions": versions, "git": commit,
            "machine": machine(getattr(args, "device", "auto"))}


def machine(device: str) -> dict:
    """What the rounding depends on."""
    device, _ = device_and_dtype(device)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{platform.machine()} with {torch.backends.cpu.get_cpu_capability()}"
    return {"device": name, "threads": torch.get_num_threads(), "processes": world()}
