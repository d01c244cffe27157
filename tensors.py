"""A safetensors file: written whole or not at all; and the weights of a folder in several.

    save_tensors("state.safetensors", {"w": w})
    check_finite_files(["state.safetensors"])                   # UserError for a number that is not finite
"""
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cli import UserError
from files import appearing, write_whole


# ---- reading and checking ----------------------------------------------------------------------------
@contextmanager
def open_tensors(path: Path) -> Iterator:
    """A safetensors file, its tensors in main memory, mapped from the file. Raises UserError if damaged."""
    try:
        with safe_open(path, "pt") as f:
            yield f
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path}: truncated or damaged ({e}); get the file again") from e


def check_finite_files(files: list[Path]) -> None:
    """Raises UserError for a number that is not finite."""
    for path in files:
        with open_tensors(path) as f:
            for name in f.keys():  # noqa: SIM118 (a safetensors file is not a dict)
                w = f.get_tensor(name)
                if w.is_floating_point() and not w.isfinite().all():
                    raise UserError(f"{path}: {name} holds numbers that are not finite")


# ---- writing -----------------------------------------------------------------------------------------
def save_tensors(path: str | Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file that is there whole or not at all."""
    tensors = {name: w.detach().to("cpu").contiguous() for name, w in tensors.items()}
    with appearing(path) as tmp:
        try:
            save_file(tensors, tmp, metadata={"format": "pt"})  # tells transformers: PyTorch's
        except SafetensorError as e:  # a full disk comes out as this
            tmp.unlink(missing_ok=True)
            raise UserError(f"{path}: could not be written ({e}); if the disk is full, free some space, then "
                            "go on as after an interruption") from e
        os.chmod(tmp, 0o644)  # the library makes it readable by its owner only


SHARD_BYTES = 5 * 10**9  # of the weights in one file: what the hub and other engines expect


def save_weights(folder: Path, weights: Iterable[tuple[str, Tensor]]) -> torch.dtype:
    """model.safetensors, or shards of at most SHARD_BYTES (or one tensor) with an index; returns the dtype.

    At every moment the folder holds the old weights or the new ones, whole: new shards get other names than
    those that the index lists, and count only when it lists them and there is no model.safetensors.
    """
    index = folder / "model.safetensors.index.json"
    old = {path.name for path in folder.glob("model-*.safetensors")}
    prefix = "model-b" if index.is_file() and '"model-0' in index.read_text() else "model-"
    shards = []  # the names of the tensors in each
    size = 0
    for shard in shards_of(weights):
        shards.append(list(shard))
        save_tensors(folder / f"shard-{len(shards)}.tmp", shard)
        size += sum(w.nbytes for w in shard.values())
        dtype = next(iter(shard.values())).dtype
        del shard  # only one at a time is in main memory
    if len(shards) == 1:
        os.replace(folder / "shard-1.tmp", folder / "model.safetensors")
        index.unlink(missing_ok=True)
        new = set()
    else:
        file_of = {}
        for i, names in enumerate(shards, 1):
            name = f"{prefix}{i:05d}-of-{len(shards):05d}.safetensors"
            os.replace(folder / f"shard-{i}.tmp", folder / name)
            file_of.update(dict.fromkeys(names, name))
        content = {"metadata": {"total_size": size}, "weight_map": file_of}
        write_whole(index, json.dumps(content, indent=2))
        (folder / "model.safetensors").unlink(missing_ok=True)
        new = set(file_of.values())
    for name in old - new:
        (folder / name).unlink()
    return dtype


def shards_of(weights: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """The weights in main memory, as many together as go into one file."""
    shard = {}
    for name, w in weights:
        w = w.detach().to("cpu").contiguous()
        if shard and sum(x.nbytes for x in shard.values()) + w.nbytes > SHARD_BYTES:
            yield shard
            shard = {}
        shard[name] = w
    yield shard
