"""A safetensors file: read with errors that name it, written whole or not at all.

    save_tensors("state.safetensors", {"w": w})
    for name, w in read_tensors("state.safetensors"): ...       # UserError for a number that is not finite
"""
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from run.command import UserError
from run.files import appearing


@contextmanager
def open_tensors(path: Path) -> Iterator:
    """A safetensors file, its tensors in main memory, mapped from the file. Raises UserError if damaged."""
    try:
        with safe_open(path, "pt") as f:
            yield f
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path}: truncated or damaged ({e}); get the file again") from e


def read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of all in a file. Raises UserError for a number that is not finite."""
    with open_tensors(path) as f:
        for name in f.keys():  # noqa: SIM118 (a safetensors file is not a dict)
            w = f.get_tensor(name)
            if w.is_floating_point() and not w.isfinite().all():
                raise UserError(f"{path}: {name} holds numbers that are not finite")
            yield name, w


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
