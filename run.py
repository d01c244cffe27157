"""The folder of a training run: its logs, its checkpoints, and how the run stops and goes on.

    run = Run(args, inputs)                                     # starts the folder, or finds where to go on
    run.restore(optimizer, tokenizer)
    with interruptible(device) as asked:
        ...
        run.log({"step": step, "loss": loss})
        run.end_of_step(optimizer, tokenizer, asked, step=step, last=steps, updates=updates)

It is a Hugging Face model folder, with run.json, metrics.jsonl, rollouts.jsonl, report.html (renewed at each
checkpoint) and state/. `state/step-N` appears by one rename when all of it is written, and only then is one
before it removed. So a kill at any moment leaves a whole checkpoint, and `--resume` cuts the logs back to its
step. With `--keep 3` there are three, and their models in checkpoints/; `best` is a link to the one with the
best score on held-out data, if that is measured.
"""
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path

import torch

from checkpoint import save as save_model_folder
from cli import Stopped, UserError, handlers
from files import check_types, read_json, read_rows_so_far, row_of, to_json, write_whole
from processes import barrier, naming_the_missing, rank, total
from record import is_written, start_or_check, sweep
from screen import say
from tensors import CHECKSUM, save_tensors
from tokenizer import Tokenizer
from train import Optimizer

WEIGHTS = "*.safetensors"


class Run:
    """An output folder, as above."""

    def __init__(self, args, inputs: Callable[[], dict], free: frozenset[str] = frozenset()):
        """`inputs` and `free` as in `record.start_or_check`."""
        self.out = Path(args.out)
        self.save_every = args.save_every
        self.keep = args.keep
        resumed = is_written(self.out / "run.json")
        start_or_check(self.out / "run.json", args, inputs, free)
        checkpoints = self._checkpoints()
        self.resume_from = checkpoints[-1] if checkpoints else None
        self.step = 0  # of the checkpoint that the run goes on from
        self.updates = 0  # optimizer steps until then; GRPO makes several in a step
        self.pending = None  # the line of metrics.jsonl of that step, if a stop came before it was whole
        if self.resume_from:
            counts = self._counts(self.resume_from)
            self.step, self.updates = counts["step"], counts["updates"]
            self.pending = counts.get("pending")
        self.saved = self.step  # the step of the newest checkpoint
        if rank() == 0:
            sweep(self.out)
            logged = self.step if self.resume_from else -1
            cut_log(self.out / "metrics.jsonl", logged - 1 if self.pending else logged)
            cut_log(self.out / "rollouts.jsonl", logged)
        barrier()
        self.history = read_history(self.out / "metrics.jsonl")
        if resumed:
            say(f"resuming {self.out} after step {self.step}")

    # ---- going on ----------------------------------------------------------------------------------
    def _checkpoints(self) -> list[Path]:
        state = self.out / "state"
        if state.exists() and not state.is_dir():
            raise UserError(f"{state}: not a folder; put back what was there")
        found = sorted(state.glob("step-*"))  # without the .tmp of a killed save, and whatever else is there
        return [path for path in found if path.is_dir() and path.name[len("step-"):].isdecimal()]

    def _counts(self, folder: Path) -> dict:
        """What a checkpoint's state.json says. Raises UserError if it is damaged, or another file missing."""
        path = folder / "state.json"
        try:
            counts = read_json(path)
            seal = counts.pop(CHECKSUM, None)
            right = seal in (None, digest(counts)) and {"step", "updates"} <= counts.keys()
        except (UserError, ValueError):  # ValueError: a number that is none
            right = False
        if not right:
            raise UserError(f"{path}: missing or damaged{self._way_back()}")
        missing = counts.get("files", 1) - len(list(folder.glob(WEIGHTS)))
        if missing > 0:
            raise UserError(f"{folder}: {missing} of its files are missing{self._way_back()}")
        return counts

    def _way_back(self) -> str:
        """What to do where the newest checkpoint is damaged."""
        newest, *older = reversed(self._checkpoints())
        if older:
            return f"; remove {newest}, and --resume goes on from {older[0]}"
        return f"; no other is kept (--keep), but its model is: start another run with --model {self.out}"

    def restore(self, optimizer: Optimizer, tokenizer: Tokenizer) -> None:
        """Put the checkpoint, if there is one, into the optimizer and its model."""
        if not self.resume_from:
            return
        try:
            optimizer.load(sorted(self.resume_from.glob(WEIGHTS)), self.updates)
        except UserError as e:
            raise UserError(f"{e}{self._way_back()}") from e
        self._publish(optimizer, tokenizer, self.step)  # a kill may have come between the two

    def settle(self, optimizer: Optimizer, tokenizer: Tokenizer, row: dict) -> None:
        """Log the line that was pending. The checkpoint then says that none is."""
        self.log(row)
        self.pending = None
        if rank() == 0:
            self._write_counts(self.resume_from, self.step, self.updates)
        self._publish(optimizer, tokenizer, self.step)

    # ---- saving ------------------------------------------------------------------------------------
    def end_of_step(
        self, optimizer: Optimizer, tokenizer: Tokenizer, asked: "StopRequest", *,
        step: int, last: int, updates: int,
    ) -> None:
        """Save if it is time to; leave if somebody asked for it."""
        if step == last or self._is_planned(step):
            self.save(optimizer, tokenizer, step, updates)
        self.leave_if_asked(optimizer, tokenizer, asked, step=step, updates=updates)

    def leave_if_asked(
        self, optimizer: Optimizer, tokenizer: Tokenizer, asked: "StopRequest", *,
        step: int, updates: int, pending: dict | None = None,
    ) -> None:
        """If somebody asked the run to stop, save what it has after `step` and leave it (raises Stopped)."""
        if asked.anywhere():
            if step > self.saved:
                self.save(optimizer, tokenizer, step, updates, pending)
            raise Stopped(asked.number)

    def save(self, optimizer: Optimizer, tokenizer: Tokenizer, step: int, updates: int, pending=None) -> None:
        """A checkpoint after `step`, in which the optimizer has made `updates` updates in all.

        `pending` is the line of metrics.jsonl of that step, where something of it is still to be measured.
        """
        final = self.out / "state" / f"step-{step:06d}"
        tmp = final.with_suffix(".tmp")
        if rank() == 0:
            tmp.mkdir(parents=True)
        barrier()
        save_tensors(tmp / f"rank{rank():03d}.safetensors", optimizer.tensors())
        barrier()
        if rank() == 0:
            self._write_counts(tmp, step, updates, pending)
            os.replace(tmp, final)
        self.saved = step
        self._publish(optimizer, tokenizer, step)

    def _is_planned(self, step: int) -> bool:
        """Whether a step has a checkpoint however the run goes: not for a stop, nor only as the last one."""
        on_time = bool(self.save_every) and step % self.save_every == 0
        return on_time or step == self.best_step()

    def _write_counts(self, folder: Path, step: int, updates: int, pending: dict | None = None) -> None:
        counts = {"step": step, "updates": updates, "files": len(list(folder.glob(WEIGHTS)))}
        if not self._is_planned(step):
            counts["unplanned"] = True
        if pending:
            counts["pending"] = pending
        write_whole(folder / "state.json", to_json({**counts, CHECKSUM: digest(counts)}))

    def _publish(self, optimizer: Optimizer, tokenizer: Tokenizer, step: int) -> None:
        """All that follows from a checkpoint: the model, the copies of it that stay, what may go."""
        weights = optimizer.whole_weights()
        if rank() == 0:
            save_model_folder(self.out, optimizer.model, tokenizer, weights)
        for _ in weights:  # the other processes give their parts
            pass
        if rank() == 0:
            if self.keep > 1 or step == self.best_step():
                self._copy_model(step)
            self._link_best()
            self._remove_old(step)
            self._renew_page()
        barrier()

    def _renew_page(self) -> None:
        """report.html, to watch the run. It is no part of the run: what goes wrong with it is only said."""
        import report  # here, so that it is a leaf: it can be deleted with these lines
        try:
            report.renew(self.out)
        except Exception as e:
            say(f"{self.out}/report.html is not renewed: {e}")

    def _model_of(self, step: int) -> Path:
        return self.out / "checkpoints" / f"step-{step:06d}"

    def _copy_model(self, step: int) -> None:
        """The model folder as it is now, whole or not at all. Its weights get a second name, and no copy."""
        target = self._model_of(step)
        if target.is_dir():
            return
        tmp = target.with_suffix(".tmp")
        tmp.mkdir(parents=True)
        for path in self.out.iterdir():
            if path.match(WEIGHTS):
                try:
                    os.link(path, tmp / path.name)
                except OSError:  # a file system where a file has one name only
                    shutil.copy2(path, tmp / path.name)
            elif path.is_file() and path.suffix not in (".jsonl", ".html"):
                shutil.copy2(path, tmp / path.name)
        os.replace(tmp, target)

    def _link_best(self) -> None:
        best = self.best_step()
        if best is not None and self._model_of(best).is_dir():
            link = self.out / "best.tmp"
            link.symlink_to(self._model_of(best).relative_to(self.out))
            os.replace(link, self.out / "best")

    def _remove_old(self, step: int) -> None:
        """All but the newest checkpoint, at `step`, and as many planned ones as --keep leaves room for."""
        newest = f"step-{step:06d}"
        older = [path.name for path in self._checkpoints() if path.name != newest and was_planned(path)]
        kept = [newest]
        if self.keep > 1:
            kept += older[1 - self.keep:]
        for state in self._checkpoints():
            if state.name not in kept:
                shutil.rmtree(state)
        if self.keep == 1:
            kept = []
        best = self.best_step()
        if best is not None:
            kept.append(f"step-{best:06d}")
        for model in (self.out / "checkpoints").glob("step-*"):
            if model.is_dir() and model.name not in kept:
                shutil.rmtree(model)

    # ---- the logs ----------------------------------------------------------------------------------
    def log(self, row: dict, name: str = "metrics.jsonl") -> None:
        row = finite(row)
        if name == "metrics.jsonl":
            self.history.append(row)
        if rank() == 0:
            with open(self.out / name, "a", encoding="utf-8") as f:
                f.write(to_json(row) + "\n")

    def best_step(self) -> int | None:
        """The step with the best score, the first of several; None without a score after a step."""
        scores = [(score_of(row), -row["step"]) for row in self.history if row["step"]]
        scores = [pair for pair in scores if pair[0] is not None]
        return -max(scores)[1] if scores else None


def finite(value):
    """A row in which infinities and NaN, which JSON does not know, are None."""
    if isinstance(value, dict):
        return {name: finite(of_name) for name, of_name in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def was_planned(checkpoint: Path) -> bool:
    """As its state.json says. One that cannot be read may go: a kill may have come while it was removed."""
    try:
        return not read_json(checkpoint / "state.json").get("unplanned")
    except UserError:
        return False


def score_of(row: dict) -> float | None:
    """What a line of metrics.jsonl says of the held-out data, as a number to be high."""
    if row.get("val") is not None:
        return row["val"]
    return -row["val_loss"] if row.get("val_loss") is not None else None


def cut_log(path: Path, step: int) -> None:
    """Drop the lines of later steps, which are the last ones, and one that a kill cut short."""
    if not path.exists():
        return
    if not path.is_file():
        raise UserError(f"{path}: not a file")
    end = 0
    with open(path, "rb+") as f:
        for i, line in enumerate(f, 1):
            if not line.endswith(b"\n") or row_of(line, f"{path}:{i}", {"step": int})["step"] > step:
                break
            end += len(line)
        if end < path.stat().st_size:
            f.truncate(end)


def read_history(path: Path) -> list[dict]:
    """The lines of metrics.jsonl, whose scores must be numbers."""
    rows = read_rows_so_far(path, {"step": int})
    for where, row in rows:
        check_types({"reward": None, "val": None, "val_loss": None, **row},
                    dict.fromkeys(("reward", "val", "val_loss"), float | int | None), where)
    return [row for _, row in rows]


def digest(counts: dict) -> str:
    return blake2b(to_json(counts).encode(), digest_size=16).hexdigest()


# ---- stopping ------------------------------------------------------------------------------------
class StopRequest:
    """Whether somebody asked the run to stop (a signal of `cli.STOPPING`)."""
    AGAIN = 2.0  # seconds after which Ctrl-C is meant anew: torchrun's agent repeats the terminal's

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = device
        self.asked_at: float | None = None
        self.number = signal.SIGINT  # or the signal that came

    def handler(self, number: int, frame) -> None:
        now = time.monotonic()
        if self.asked_at is None:
            self.asked_at = now
            self.number = number
            with suppress(OSError, ValueError, AttributeError):  # nothing said here may end the run
                if os.isatty(sys.stderr.fileno()):
                    os.write(sys.stderr.fileno(), b"\nstopping, once all is saved (Ctrl-C again: at once)\n")
        elif number == signal.SIGINT and now - self.asked_at > self.AGAIN:
            raise Stopped(number)

    def here(self) -> bool:
        """What this process knows."""
        return self.asked_at is not None

    def anywhere(self) -> bool:
        """What any process knows. All must call it."""
        return total([float(self.here())], self.device)[0] > 0


@contextmanager
def interruptible(device: torch.device | str = "cpu") -> Iterator[StopRequest]:
    """Inside, a signal does not end the run but is kept, for the loop to save and leave.

    A second Ctrl-C does not wait.
    """
    request = StopRequest(device)
    with handlers(request.handler), naming_the_missing():
        yield request
