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
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import BinaryIO

import torch

from run.command import UserError, say
from run.files import check_row, file_fingerprint, fingerprint, read_json
from run.processes import barrier, part_files, rank, world


# ---- going on, or not ------------------------------------------------------------------------------
def refuse_wrong_out(resume: str | None, out: Path, record: Path) -> None:
    """Raises UserError if a run can neither go on nor start at `out`, a folder or a file.

    One that was killed before its record was written may start.
    """
    if is_written(record):
        if not resume:
            raise UserError(f"--out {out} exists; go on with --resume, or give another --out")
        return
    if record.is_file() and record.stat().st_size:
        raise UserError(f"{record}: not whole; put back what was there, or give another --out")
    empty = out.is_dir() and all(path == record for path in out.iterdir())
    if (os.path.lexists(out) and not empty) or part_files(str(out)):
        raise UserError(f"--out {out} exists and holds no run; give another --out, or move it away")
    if resume == "yes":
        raise UserError(f"--resume: {out} holds no run (no {record.name}); start it without --resume")


def is_written(record: Path) -> bool:
    """Whether a record is there, and whole. It is written before all else: half of one belongs to no run."""
    try:
        return record.is_file() and bool(read_json(record))
    except UserError:
        return False


def start_or_check(path: Path, args, inputs: Callable[[], dict]) -> None:
    """Hold the record at `path` until the process ends: write it, or compare it with how it was started.

    `inputs` gives a fingerprint of what is read, by flag. All processes must call it. Raises UserError that
    names what differs.
    """
    barrier()  # all have looked whether there is one
    if rank() == 0:
        file = hold(path)
        now = {**run_record(args), "inputs": inputs()}
        if is_written(path):
            record = read_json(path)
            check_row(record, {"flags": dict, "inputs": dict, "command": list}, path)
            refuse_other_flags(args, record, path)
            refuse_other_inputs(now["inputs"], record, path)
        else:  # written in place, not renamed: the lock is on this file
            file.truncate(0)
            file.write(json.dumps(now, indent=2).encode())
            file.flush()
            os.fsync(file.fileno())
    barrier()


_held: list[BinaryIO] = []  # the record that this process holds


def hold(path: Path) -> BinaryIO:
    """The file, locked. Raises UserError if another process holds it."""
    while _held:
        _held.pop().close()  # of a command of this process, which has ended
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "ab")  # noqa: SIM115 (it lives as long as the process)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        raise UserError(f"{path}: another process is at work there; "
                        "wait until it ends, or give another --out") from e
    except OSError as e:
        say(f"{path}: no lock on this file system ({e.strerror}); let nobody else work there")
    _held.append(file)
    return file


def sweep(folder: Path) -> None:
    """Remove what a kill left half written: `files.appearing`'s *.tmp, and safetensors' .tmp*."""
    for pattern in ("*.tmp", ".tmp*", "*/*.tmp"):
        for path in list(folder.glob(pattern)):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


# ---- what must be the same -------------------------------------------------------------------------
def refuse_other_flags(args, record: dict, path: Path) -> None:
    before = record["flags"]
    now = json.loads(json.dumps(vars(args)))
    if before.keys() != now.keys():
        other = ", ".join(sorted(before.keys() ^ now.keys()))
        raise UserError(f"{path}: damaged, or of another version of this program, which has other flags "
                        f"({other}); start another run in another --out")
    changed = []
    for name in sorted(now.keys() - args.may_change - args.locations):
        if now[name] != before[name]:
            flag = "--" + name.replace("_", "-")
            changed.append(f"{flag} {json.dumps(before[name])}, not {json.dumps(now[name])}")
    if changed:
        raise UserError(f"{path} was started with {'; '.join(changed)}: give the same flags, or start "
                        "another run in another --out (from this one's model with --model)")


def refuse_other_inputs(now: dict, record: dict, path: Path) -> None:
    before = record["inputs"]
    both = before.keys() & now.keys()  # what was not read that time cannot differ
    changed = [name for name in sorted(both) if before[name] != now[name]]
    if changed:
        command = " ".join(record["command"])
        raise UserError(f"{path}: what it read has changed since it began: {', '.join(changed)}; "
                        f"put it back (it began as: {command}), or start another run with another --out")


# Where the code lies, for its fingerprint.
CODE = ("", "grading/", "checkpoint/", "run/", "report/", "kernels/", "kernels/fused/")


# ---- what the record says --------------------------------------------------------------------------
def run_record(args) -> dict:
    """The command, every flag, versions, git commit and machine, as `run.json` keeps them."""
    versions = {"python": sys.version.split()[0]}
    for package in ("torch", "tokenizers", "safetensors", "numpy", "triton"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            pass
    here = Path(__file__).parent.parent
    code = sorted(path for folder in CODE for path in here.glob(f"{folder}*.py"))
    versions["code"] = fingerprint("".join(map(file_fingerprint, code)))
    commit = None
    if (here / ".git").exists():
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True)
        commit = done.stdout.strip()
    device = f"{platform.machine()} with {torch.backends.cpu.get_cpu_capability()}"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    machine = {"device": device, "threads": torch.get_num_threads(), "processes": world()}
    return {"command": [Path(sys.argv[0]).name, *sys.argv[1:]], "flags": vars(args), "versions": versions,
            "git": commit, "machine": machine}
