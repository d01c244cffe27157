"""Several processes that torchrun started: who is who, sums over all of them, one file written by all.

Started alone, a process is the first of one, and nothing here costs anything.
"""
import atexit
import glob
import os
from datetime import timedelta
from hashlib import blake2b

import torch
import torch.distributed as dist


def start_processes(device: torch.device, timeout: timedelta | None = None) -> None:
    """Join the other processes, if torchrun started several: NCCL between GPUs, gloo between CPUs.

    `timeout`: how long they wait for each other before they give up; None is torch's own.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
        atexit.register(dist.destroy_process_group)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def total(values: list[float], device: torch.device | str = "cpu") -> list[float]:
    """The sum over all processes of each of a list of numbers."""
    return _reduced(values, device, "SUM")


def summed(figures: dict[str, float], device: torch.device | str = "cpu") -> dict[str, float]:
    """The sum over all processes of each of some named numbers."""
    return dict(zip(figures, total(list(figures.values()), device), strict=True))


def largest(value: float, device: torch.device) -> float:
    """The largest of a number over all processes."""
    return _reduced([value], device, "MAX")[0]


def _reduced(values, device, op):
    if world() == 1:
        return list(values)
    t = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(t, op=getattr(dist.ReduceOp, op))
    return t.tolist()


def barrier() -> None:
    if world() > 1:
        dist.barrier()


# ---- a file of lines that all processes write ------------------------------------------------------
ALONE = timedelta(days=7)  # processes that only share files may end days apart


def own_part(path: str) -> str:
    """Where this process writes its lines of a file: the file itself, or a part beside it."""
    return path if world() == 1 else f"{path}.rank{rank()}"


def join_parts(path: str) -> None:
    """Put the parts that processes wrote, now or before a kill, into the file. For one process to call.

    Whole lines only, and each once: a kill may have come between the copy and the removal of a part.
    """
    if not os.path.exists(path):
        open(path, "x").close()
    seen = set()
    with open(path, "rb+") as f:
        end = 0
        for line in f:
            if line.endswith(b"\n"):
                end += len(line)
                seen.add(blake2b(line, digest_size=16).digest())
        f.truncate(end)  # a line that a kill cut short
        f.seek(end)
        parts = sorted(glob.glob(f"{glob.escape(path)}.rank*"))
        for part in parts:
            with open(part, "rb") as lines:
                f.writelines(line for line in lines if line.endswith(b"\n")
                             and blake2b(line, digest_size=16).digest() not in seen)
        f.flush()
        os.fsync(f.fileno())
    for part in parts:
        os.remove(part)
