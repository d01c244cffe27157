"""Several processes that torchrun started: who is who, sums over all, who does what, a file of all.

Started alone, a process is the first of one, and nothing here costs anything. Numbers and texts go between
main memories (gloo), on GPUs too; only the sharded model of `optimizer.py` uses NCCL.
"""
import glob
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from run.files import read_rows_so_far, whole_lines, write_whole

ALONE = 7 * 24 * 60  # minutes: processes that only share files may end days apart
_messengers = None  # the group in which numbers and texts go


def start_processes(device: torch.device, minutes: float) -> None:
    """Join the other processes, if torchrun started several: NCCL between GPUs, gloo between CPUs.

    `minutes`: how long they wait for each other before they give up, in one line (`command.explanation`).
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        wait = timedelta(minutes=minutes)
        store, me, everybody = next(dist.rendezvous("env://", timeout=wait))
        # torchrun's restarts share a store: without a name of its own one would find the old addresses.
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group(backend, store=store, rank=me, world_size=everybody, timeout=wait)
        global _messengers
        _messengers = dist.new_group(backend="gloo", timeout=wait)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


# ---- sums ----------------------------------------------------------------------------------------
def total(values: list[float], op: str = "SUM") -> list[float]:
    """The sum over all processes (or what else `op` names) of each of a list of numbers."""
    if world() == 1:
        return list(values)
    t = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(t, op=getattr(dist.ReduceOp, op), group=_messengers)
    return t.tolist()


def largest(value: float) -> float:
    """The largest of a number over all processes."""
    return total([value], "MAX")[0]


def barrier() -> None:
    total([0.0])


def gathered(text: str) -> list[str]:
    """The texts of all processes, in their order. All must call it."""
    if world() == 1:
        return [text]
    mine = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world())]
    dist.all_gather(sizes, torch.tensor([len(mine)]), group=_messengers)
    most = int(max(sizes))
    parts = [torch.zeros(most, dtype=torch.uint8) for _ in range(world())]
    dist.all_gather(parts, torch.cat((mine, mine.new_zeros(most - len(mine)))), group=_messengers)
    return [part[:int(size)].numpy().tobytes().decode() for part, size in zip(parts, sizes, strict=True)]


# ---- memory ---------------------------------------------------------------------------------------
def free_memory(device: torch.device) -> float:
    """Bytes that this process can still allocate."""
    if device.type == "cuda":
        unused_by_torch = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused_by_torch
    sharers = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's processes on this host
    return host_memory() // sharers


def host_memory(root: Path = Path("/")) -> int:
    """Bytes that all processes here together can still allocate: the machine's, or a container's if it has a
    limit (cgroups, version 2).

    `root` is another for tests.
    """
    if not (root / "proc/meminfo").is_file():  # it is not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    words = (root / "proc/meminfo").read_text().split()
    left = int(words[words.index("MemAvailable:") + 1]) * 1024
    groups = root / "proc/self/cgroup"
    path = groups.read_text().rpartition("0::/")[2].strip() if groups.is_file() else ""
    folder = root / "sys/fs/cgroup" / path
    for group in (folder, *folder.parents):  # a limit of any of them counts; a container sees only some
        limit = group / "memory.max"
        if limit.is_file() and limit.read_text().strip() != "max":
            stat = (group / "memory.stat").read_text().split()
            given_back = int(stat[stat.index("inactive_file") + 1])  # files in memory: they make way
            used = int((group / "memory.current").read_text()) - given_back
            left = min(left, int(limit.read_text()) - used)
    return max(0, left)


# ---- who does what -------------------------------------------------------------------------------
def balanced(items: list, cost: Callable[[Any], int]) -> list:
    """This process's share of a list of items that every process has.

    The most costly item goes first; each goes to the process that has least to do so far.
    """
    shares = [[] for _ in range(world())]
    loads = [0] * len(shares)
    for item in sorted(items, key=cost, reverse=True):
        least = loads.index(min(loads))
        shares[least].append(item)
        loads[least] += cost(item)
    return shares[rank()]


def in_batches(
    items: list, length: Callable[[Any], int], most: int, padded: bool = False, by_length: bool = True,
) -> list[list]:
    """Items in batches of at most `most` tokens, or of one longer item; by growing length or in their order.

    In a `padded` batch every item takes as much as the longest, else what it has.

    in_batches(["aaaaa", "b", "cccc", "d"], len, most=8)               ->  [["b", "d", "cccc"], ["aaaaa"]]
    in_batches(["aaaaa", "b", "cccc", "d"], len, most=8, padded=True)  ->  [["b", "d"], ["cccc"], ["aaaaa"]]
    """
    batches = []
    size = 0  # of the last batch
    for item in sorted(items, key=length) if by_length else items:
        n = length(item)
        grown = (len(batches[-1]) + 1) * n if padded and batches else size + n
        if batches and grown <= most:
            batches[-1].append(item)
            size = grown
        else:
            batches.append([item])
            size = n
    return batches


# ---- a file of lines that all processes write ------------------------------------------------------
def own_part(path: str) -> str:
    """Where this process writes its lines of a file: the file itself, or a part beside it."""
    return path if world() == 1 else f"{path}.rank{rank()}"


def part_files(path: str) -> list[str]:
    return sorted(glob.glob(f"{glob.escape(path)}.rank*"))


def joined_rows(path: str, required: tuple | dict[str, type]) -> list[tuple[str, dict]]:
    """("file:line", row) of all that was written so far, the parts of all processes joined into the file."""
    barrier()  # all have written
    if rank() == 0:
        join_parts(path)
    barrier()
    return read_rows_so_far(path, required)


def join_parts(path: str) -> None:
    """Put the parts that processes wrote, now or before a kill, into the file. For one process to call.

    Whole lines only, and each once: a kill may have come before a part was removed.
    """
    Path(path).touch()
    parts = part_files(path)
    lines = dict.fromkeys(line for part in (path, *parts) for _, line in whole_lines(part))
    content = b"".join(lines)
    if len(content) != os.path.getsize(path):
        write_whole(os.path.realpath(path), content)
    for part in parts:
        os.remove(part)
