"""Several processes that torchrun started: who is who, sums over all, a sharded model, a file of all.

Started alone, a process is the first of one, and nothing here costs anything.
"""
import atexit
import glob
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from hashlib import blake2b
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import cli
from cli import UserError
from model import Transformer


def start_processes(device: torch.device, minutes: float) -> None:
    """Join the other processes, if torchrun started several: NCCL between GPUs, gloo between CPUs.

    `minutes`: how long they wait for each other before they give up.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        wait = timedelta(minutes=minutes)
        store, me, everybody = next(dist.rendezvous("env://", timeout=wait))
        # torchrun's restarts share a store: without a name of its own one would find the old addresses.
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        # The roll call names who is missing within `wait`; the collective itself must not give up before it.
        dist.init_process_group(backend, store=store, rank=me, world_size=everybody, timeout=2 * wait)
        global _messengers, _minutes
        _messengers = dist.new_group(backend="gloo", timeout=2 * wait)
        _minutes = minutes
        atexit.register(leave)


def leave() -> None:
    """Leave the other processes, at the end of the program.

    One whose command has ended well is gone at once: torch's threads sometimes abort an interpreter that is
    torn down (SIGABRT), and torchrun would take it for a failure.
    """
    if cli.ended_well:  # `cli.command` has flushed what was printed
        os._exit(0)
    dist.destroy_process_group()


_messengers = None  # a group of its own for the roll call: it works after another one has failed, and on GPUs
_minutes = 0.0


def call_the_roll(minutes: float | None = None) -> None:
    """Wait until all processes are here. Raises UserError that names those which do not come in time."""
    minutes = _minutes if minutes is None else minutes
    try:
        dist.monitored_barrier(_messengers, timeout=timedelta(minutes=minutes), wait_all_ranks=True)
    except RuntimeError as e:
        # The first process hears of all others; these hear of the first only.
        named = re.search(r"Ranks? ([\d, ]+) failed to pass", str(e))
        who = named.group(1).strip(" ,") if named else "0 (or what its message names)"
        raise UserError(f"process {who} of {world()} is dead or stuck: its connection is lost, or it did not "
                        f"come within {minutes:g} minutes (--timeout); the last checkpoint is good, go on "
                        "with --resume") from e


@contextmanager
def naming_the_missing() -> Iterator[None]:
    """Where other processes left a computation in the lurch, find out which. Raises UserError then."""
    try:
        yield
    except RuntimeError as e:
        if world() > 1 and ("gloo" in str(e) or isinstance(e, dist.DistError)):
            call_the_roll(min(_minutes, 1 / 6))
        raise


@contextmanager
def all_or_none() -> Iterator[None]:
    """If what is inside fails on one process, all leave, and only that one says why. All must come here."""
    error = None
    try:
        yield
    except UserError as e:
        error = e
    if world() > 1:
        failed = torch.tensor([float(error is not None)])
        dist.all_reduce(failed, group=_messengers)
        if failed.item() and error is None:
            sys.exit(2)
    if error:
        raise error


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
    call_the_roll()
    t = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(t, op=getattr(dist.ReduceOp, op))
    return t.tolist()


def gathered(text: str) -> list[str]:
    """The texts of all processes, in their order. All must call it."""
    if world() == 1:
        return [text]
    call_the_roll()
    mine = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world())]
    dist.all_gather(sizes, torch.tensor([len(mine)]), group=_messengers)
    most = int(max(sizes))
    parts = [torch.zeros(most, dtype=torch.uint8) for _ in range(world())]
    dist.all_gather(parts, torch.cat((mine, mine.new_zeros(most - len(mine)))), group=_messengers)
    return [part[:int(size)].numpy().tobytes().decode() for part, size in zip(parts, sizes, strict=True)]


def barrier() -> None:
    if world() > 1:
        call_the_roll()


# ---- a model that all hold a part of ---------------------------------------------------------------
def shard(model: Transformer, masters: bool = True) -> None:
    """Divide the weights among the processes, in place (FSDP2): each holds rows of all tensors.

    They are held in float32, to be the masters of an optimizer (or, without `masters`, as they are). A
    block's weights are whole only while the block computes, in the dtype that the model had. Gradients are
    summed over the processes in float32 as each block's backward ends, so that no process ever holds a whole
    one: therefore all must run the same number of passes (`evenly`).
    """
    from torch.distributed.device_mesh import init_device_mesh  # here: their import takes half a second
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    dtype = model.dtype
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32,
        cast_forward_inputs=False)  # the rotation's angles stay float32
    mesh = init_device_mesh(model.frequencies.device.type, (world(),))
    for module in (*model.model.layers, model):  # one block at a time leaves the host for the device
        fully_shard(module.float() if masters else module, mesh=mesh, mp_policy=policy)
        module.set_gradient_divide_factor(1.0)  # the sum, not the mean
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no other way to leave it undivided


def twin(model: Transformer, copied: bool = False) -> Transformer:
    """A second model, frozen, whose weights are the same tensors, or copies of them."""
    with torch.device("meta"):
        other = Transformer(model.config)
    weights = {name: w.clone() if copied else w for name, w in model.state_dict().items()}
    other.load_state_dict(weights, assign=True)
    other.frequencies = model.frequencies
    other.vocab = model.vocab
    return other.requires_grad_(False)


def local(tensor: Tensor) -> Tensor:
    """The rows of a tensor that this process holds: all of them, if it is not sharded (torch's DTensor)."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor with the rows of all processes. All must call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def rows_of(all_rows: Tensor, tensor: Tensor) -> Tensor:
    """Those of all rows that this process holds of `tensor`."""
    if local(tensor) is tensor:
        return all_rows
    chunk = math.ceil(len(all_rows) / world())
    return all_rows[rank() * chunk:(rank() + 1) * chunk]


def balanced(items: list, cost: Callable[[Any], int]) -> list:
    """This process's share of items that all know.

    The dearest go first, each to the process that has least to do so far.
    """
    shares = [[] for _ in range(world())]
    loads = [0] * len(shares)
    for item in sorted(items, key=cost, reverse=True):
        least = loads.index(min(loads))
        shares[least].append(item)
        loads[least] += cost(item)
    return shares[rank()]


def evenly(parts: list, device: torch.device) -> list:
    """A process's micro-batches, and None as often as another process has more of them.

    Where the weights are sharded all processes run together: for a None a pass that counts nothing.
    """
    most = int(largest(len(parts), device))
    return parts + [None] * (most - len(parts))


# ---- a file of lines that all processes write ------------------------------------------------------
ALONE = 7 * 24 * 60  # minutes: processes that only share files may end days apart


def own_part(path: str) -> str:
    """Where this process writes its lines of a file: the file itself, or a part beside it."""
    return path if world() == 1 else f"{path}.rank{rank()}"


def parts_of(path: str) -> list[str]:
    return sorted(glob.glob(f"{glob.escape(path)}.rank*"))


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
        parts = parts_of(path)
        for part in parts:
            with open(part, "rb") as lines:
                f.writelines(line for line in lines if line.endswith(b"\n")
                             and blake2b(line, digest_size=16).digest() not in seen)
        f.flush()
        os.fsync(f.fileno())
    for part in parts:
        os.remove(part)
