"""A run's own record, run.json: who works there, how it was started, what it read; and whether it goes on.

`start_or_check` writes the record of a new run, or compares it with that of a run which goes on: the flags
must be the same, and so must what it reads. That is known by content, not by path: models, data and the run's
own folder may be moved, but not changed. While a command works it holds a lock on the record (flock), which
ends with the process, however that ends.
"""
import fcntl
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from hashlib import blake2b, file_digest
from importlib import metadata
from pathlib import Path
from typing import BinaryIO

import torch

from checkpoint import device_and_dtype, files_of_weights, find_folder
from cli import Stopped, UserError
from files import read_json
from processes import barrier, rank, world
from screen import say
from tasks import Problem, Task
from tokenizer import TOKENIZER_FILES

# Flags that say where something is; it is compared by its content.
PLACES = {"out", "model", "models", "data", "data_dir", "task", "tasks"}
# Flags that may change: how a run goes on, what is kept, and where and in how many pieces it is computed,
# which changes the result by rounding at most. (With --dtype auto another device may mean another dtype.)
FREE = {"resume", "plan", "plan_memory", "save_every", "keep", "device", "slots", "micro_batch_tokens",
        "recompute", "timeout", "log_groups"}


# ---- going on, or not ------------------------------------------------------------------------------
def refuse_wrong_out(resume: str | None, out: Path) -> None:
    """Raises UserError if a run can neither go on nor start in this folder.

    One that was killed before its record was written may start.
    """
    record = out / "run.json"
    there = is_written(record)
    if there and not resume:
        raise UserError(f"--out {out} exists; go on with --resume, or give another --out")
    if there:
        return
    if os.path.lexists(out) and not (out.is_dir() and all(path == record for path in out.iterdir())):
        if record.is_file():
            raise UserError(f"{record}: not whole; put back what was there, or give another --out")
        raise UserError(f"--out {out} exists and holds no run; give another --out, or move it away")
    if resume == "yes":
        raise UserError(f"--resume: {out} holds no run (no run.json); start it without --resume")


def is_written(path: Path) -> bool:
    """Whether a record is there, and whole. It is written before all else: half of one belongs to no run."""
    try:
        return path.is_file() and isinstance(json.loads(path.read_bytes()), dict)
    except (ValueError, RecursionError):
        return False


def start_or_check(path: Path, args, inputs: Callable[[], dict], free: frozenset[str] = frozenset()) -> None:
    """Hold the record at `path` until the process ends: write it, or compare it with how it was started.

    `inputs` gives a fingerprint of what is read, by flag; `free` are flags that may change, beside FREE. All
    processes must call it. Raises UserError that names what differs, or who holds the record.
    """
    barrier()  # all have looked whether there is one
    if rank() == 0:
        file = hold(path)
        if is_written(path):
            record = read_record(path)
            refuse_other_flags(args, record, path, free)
            found = inputs()
            refuse_other_inputs(found, record, path)
            tell_what_changed(run_record(args), record, path)
            known = record.get("inputs", {})
            first_read = {name: value for name, value in found.items() if known.get(name) is None}
            if known and any(first_read.values()):
                replace_record(path, {**record, "inputs": {**known, **first_read}})
        else:
            write_record(file, {**run_record(args), "inputs": inputs()})
    Stopped.way_on = "; what was written is whole, go on with --resume"
    barrier()


def write_record(file: BinaryIO, record: dict) -> None:
    """In place, where nothing was yet: the lock is the file's."""
    file.truncate(0)
    file.write(json.dumps(record, indent=2).encode())
    file.flush()
    os.fsync(file.fileno())


def replace_record(path: Path, record: dict) -> None:
    """Another record for a run that is there: whole or not at all, and locked before it gets the name."""
    file = open(f"{path}.tmp", "wb")  # noqa: SIM115 (as in `hold`)
    with suppress(OSError):  # no locks on this file system
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    write_record(file, record)
    os.replace(f"{path}.tmp", path)
    _held.append(file)


def sweep(folder: Path) -> None:
    """Remove what a kill left half written: `write_whole`'s and `save`'s *.tmp, and safetensors' .tmp*."""
    for pattern in ("*.tmp", ".tmp*", "*/*.tmp"):
        for path in list(folder.glob(pattern)):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


_held: list[BinaryIO] = []  # the record that this process holds


def hold(path: Path) -> BinaryIO:
    """The file, locked. Raises UserError with the process that holds it."""
    while _held:
        _held.pop().close()  # of a command of this process, which has ended
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "ab")  # noqa: SIM115 (it lives as long as the process)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        raise UserError(f"{path}: {holder_of(file)} is at work there; "
                        "wait until it ends, or give another --out") from e
    except OSError as e:
        say(f"{path}: no lock on this file system ({e.strerror}); let nobody else work there")
    _held.append(file)
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
    kinds = {"flags": dict, "versions": dict, "machine": dict, "inputs": dict, "command": list}
    for name, kind in kinds.items():
        younger = name in ("machine", "inputs")  # a run may have begun before they were kept
        if not isinstance(record.get(name), kind) and not (younger and name not in record):
            raise UserError(f"{path}: damaged (no {name}); put back what was there, or give another --out")
    return record


def refuse_other_flags(args, record: dict, path: Path, free: frozenset[str]) -> None:
    before = record["flags"]
    now = json.loads(json.dumps(vars(args)))
    gone = sorted(before.keys() - now.keys())
    if gone:
        say(f"{path}: this version has no flag for {', '.join(gone)}, which the run was started with")
    changed = []
    for name in sorted(now.keys() - PLACES - FREE - free):
        then = before.get(name, args.defaults.get(name))  # the flag may be younger than the run
        if now[name] != then:
            changed.append(difference("--" + name.replace("_", "-"), then, now[name]))
    if changed:
        raise UserError(f"{path} was started with {'; '.join(changed)}: give the same flags, or start "
                        "another run in another --out (from this one's model with --model)")


def difference(flag: str, then, now) -> str:
    """How a flag was typed and is typed.

    difference("--lr", 0.1, None)  ->  "--lr 0.1, not without it"
    """
    if then is None or then is False:
        return f"no {flag}"
    typed = flag if then is True else f"{flag} {spelled(then)}"
    return f"{typed}, not {'without it' if now is None or now is False else spelled(now)}"


def spelled(value) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def refuse_other_inputs(now: dict, record: dict, path: Path) -> None:
    before = record.get("inputs")
    if before is None:
        say(f"{path} is from before inputs had fingerprints: whether they have changed is not known")
        return
    changed = []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name, "missing"), now.get(name, "missing")
        if old != new and old is not None and new is not None:  # None: not read that time
            parts = []
            if isinstance(old, dict) and isinstance(new, dict):
                parts = [part for part in sorted(old.keys() | new.keys()) if old.get(part) != new.get(part)]
            changed.append(f"{name} ({', '.join(parts)})" if parts else name)
    if changed:
        command = " ".join(map(str, record["command"]))
        raise UserError(f"{path}: what it read has changed since it began: {'; '.join(changed)}; "
                        f"put it back (it began as: {command}), or start another run with another --out")


def tell_what_changed(now: dict, record: dict, path: Path) -> None:
    """Where another torch, code or machine computes, the same bytes are not promised."""
    before = {**record["versions"], **record.get("machine", {})}
    now = {**now["versions"], **now["machine"]}
    changed = [f"{name} was {before[name]}, is {now.get(name)}"
               for name in before if before[name] != now.get(name)]
    if changed:
        say(f"{path}: since it began something has changed, so that it need not end with the same bytes: "
            + "; ".join(changed))


# ---- fingerprints ----------------------------------------------------------------------------------
def file_fingerprint(path: str | Path) -> str:
    with open(path, "rb") as f:
        return file_digest(f, "blake2b").hexdigest()[:32]


def file_fingerprints(paths: Iterable[str | Path]) -> list[str]:
    return [file_fingerprint(path) for path in paths]


def model_fingerprint(model: str | Path) -> dict[str, str]:
    """Of each file of a model folder that says what the model computes."""
    folder = find_folder(model)
    names = ("config.json", *TOKENIZER_FILES, "model.safetensors.index.json")
    found = [folder / name for name in names if (folder / name).is_file()]
    return {path.name: file_fingerprint(path) for path in [*found, *files_of_weights(folder)]}


def questions_fingerprint(problems: Iterable[tuple[Task, Problem]]) -> str:
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
    versions["code"] = blake2b("".join(file_fingerprints(code)).encode(), digest_size=8).hexdigest()
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
