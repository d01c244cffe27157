"""The folder of a training run: its logs, its checkpoints, and how the run stops and goes on.

    run = Run(args, inputs, optimizer, publish, steps, measure, renew)    # starts, or finds where to go on
    with run.interruptible():
        run.restore()
        for step in range(run.step + 1, steps + 1):
            ...
            run.log({"step": step, "loss": loss})
            run.end_of_step(step, updates)

It is a Hugging Face model folder, with run.json, metrics.jsonl, rollouts.jsonl, report.html (renewed at each
checkpoint) and state/. The order of things makes a kill at any moment harmless. A step is logged, then saved
(`state/step-N` appears by one rename), then measured on held-out data where that is asked for; its score is a
line of its own. Then `best` is linked to the model with the best score, and old checkpoints go. A run that
goes on takes the newest checkpoint, cuts the logs back to its step, and does again what follows from it.

With `--keep 3` there are three checkpoints, and their models in checkpoints/.
"""
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from run.command import Stopped, UserError, handlers, say
from run.files import (
    appearing, check_row, parsed, read_json, read_rows_so_far, to_json, whole_lines, write_whole,
)
from run.processes import barrier, rank, total
from run.record import is_written, start_or_check, sweep
from run.tensors import save_tensors

WEIGHTS = "*.safetensors"
SCORES = {"val": 1, "val_loss": -1}  # of held-out data in metrics.jsonl, and which way is better


class Run:
    """An output folder, as above.

    `state` has what is saved and taken back: `tensors()`, {name: tensor}, and `load(files, updates)`.
    `publish` writes the model into the folder, called by all processes. `last` is the run's last step.
    `measure` gives the score on held-out data, {"val": share}, or None if somebody asked to stop meanwhile.
    `renew` makes the page of the folder anew.
    """

    def __init__(
        self, args, inputs: Callable[[], dict], state, publish: Callable[[Path], None], last: int,
        measure: Callable[[], dict[str, float] | None], renew: Callable[[Path], None],
    ):
        self.out = Path(args.out)
        self.save_every = args.save_every
        self.eval_every = args.eval_every
        self.keep = args.keep
        self.last = last
        self.state = state
        self.publish = publish
        self.measure = measure
        self.renew = renew
        self.stop_request = StopRequest()
        resumed = is_written(self.out / "run.json")
        start_or_check(self.out / "run.json", args, inputs)
        checkpoints = self._checkpoints()
        if not checkpoints and (self.out / "config.json").exists():
            raise UserError(f"{self.out} holds a model, but its state/ is gone; put it back, or start "
                            f"another run with --model {self.out}")
        self.resume_from = checkpoints[-1] if checkpoints else None
        self.step = 0  # of the checkpoint that the run goes on from
        self.updates = 0  # optimizer steps until then; GRPO makes several in a step
        if self.resume_from:
            with self._named_if_damaged():
                counts = read_json(self.resume_from / "state.json")
                check_row(counts, {"step": int, "updates": int}, self.resume_from / "state.json")
            self.step, self.updates = counts["step"], counts["updates"]
        self.saved = self.step  # the step of the newest checkpoint
        if rank() == 0:
            sweep(self.out)
            for name in ("metrics.jsonl", "rollouts.jsonl"):
                cut_log(self.out / name, self.step if self.resume_from else -1)
        barrier()
        self.history = [row for _, row in read_rows_so_far(self.out / "metrics.jsonl", {"step": int})]
        if resumed:
            say(f"resuming {self.out} after step {self.step}")

    # ---- going on ----------------------------------------------------------------------------------
    def _checkpoints(self) -> list[Path]:
        found = sorted((self.out / "state").glob("step-*"))  # without the .tmp of a killed save
        return [path for path in found if path.is_dir() and path.name[len("step-"):].isdecimal()]

    @contextmanager
    def _named_if_damaged(self) -> Iterator[None]:
        try:
            yield
        except UserError as e:
            raise UserError(f"{self.resume_from} is damaged ({e}); remove it, and --resume goes on from the "
                            "one before, if --keep kept it; or start another run "
                            f"with --model {self.out}") from e

    def restore(self) -> None:
        """Load the checkpoint, if there is one, and finish what a kill may have left undone after it."""
        if self.resume_from:
            with self._named_if_damaged():
                self.state.load(sorted(self.resume_from.glob(WEIGHTS)), self.updates)
            self.publish(self.out)
        if self._is_due(self.step) and not self._is_scored(self.step):
            self._measure(self.step)
        if self.resume_from:
            self._tidy()

    # ---- the end of a step ---------------------------------------------------------------------------
    def end_of_step(self, step: int, updates: int) -> None:
        """Save and measure the model where that is due, and leave the run if somebody asked to stop."""
        on_time = bool(self.save_every) and step % self.save_every == 0
        if on_time or self._is_due(step) or step == self.last:
            self.save(step, updates)
            if self._is_due(step):
                self._measure(step)
            self._tidy()
        self.leave_if_asked(step, updates)

    def _is_due(self, step: int) -> bool:
        """Whether the model after a step is to be measured."""
        return bool(self.eval_every) and (step % self.eval_every == 0 or step == self.last)

    def _is_scored(self, step: int) -> bool:
        return any(row["step"] == step and SCORES.keys() & row.keys() for row in self.history)

    def leave_if_asked(self, step: int, updates: int) -> None:
        """If somebody asked to stop, save a checkpoint unless `step` has one, and raise Stopped."""
        if self.stop_request.anywhere():
            if step > self.saved:
                self.save(step, updates)
                self._tidy()
            raise Stopped(self.stop_request.number)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Inside, a signal only asks the loop to stop, which saves and leaves after its step."""
        with handlers(self.stop_request.handler):
            yield

    def save(self, step: int, updates: int) -> None:
        """Write a checkpoint after `step`, by which the optimizer has made `updates` updates in all."""
        final = self.out / "state" / f"step-{step:06d}"
        tmp = final.with_suffix(".tmp")
        if rank() == 0:
            tmp.mkdir(parents=True)
        barrier()
        save_tensors(tmp / f"rank{rank():03d}.safetensors", self.state.tensors())
        barrier()
        if rank() == 0:
            write_whole(tmp / "state.json", to_json({"step": step, "updates": updates}))
            os.replace(tmp, final)
        self.saved = step
        self.publish(self.out)

    def _measure(self, step):
        score = self.measure()
        if score is None:
            raise Stopped(self.stop_request.number)  # the step is saved; --resume measures it
        self.log({"step": step, **score})

    def _tidy(self) -> None:
        """After a checkpoint: copy the model if it stays, remove what need not, renew the page."""
        if rank() == 0:
            if self.keep > 1 or self.saved == self.best_step():
                self._copy_model(self.saved)
            self._link_best()
            self._remove_old()
            self.renew(self.out)
        barrier()

    def _model_of(self, step: int) -> Path:
        return self.out / "checkpoints" / f"step-{step:06d}"

    def _copy_model(self, step: int) -> None:
        """Keep the model as it is now, whole or not at all. The weights are linked, not copied."""
        if self._model_of(step).is_dir():
            return
        with appearing(self._model_of(step)) as tmp:
            tmp.mkdir(parents=True)
            for path in self.out.iterdir():
                if path.is_file() and path.suffix not in (".jsonl", ".html", ".tmp"):
                    link_or_copy(path, tmp / path.name)

    def _link_best(self) -> None:
        best = self.best_step()
        if best is not None and self._model_of(best).is_dir():
            with appearing(self.out / "best") as tmp:
                tmp.symlink_to(self._model_of(best).relative_to(self.out))

    def _remove_old(self) -> None:
        """Remove all checkpoints but the newest --keep, and their models but for the best one."""
        checkpoints = self._checkpoints()
        for state in checkpoints[:-self.keep]:
            shutil.rmtree(state)
        staying = {path.name for path in checkpoints[-self.keep:]} if self.keep > 1 else set()
        best = self.best_step()
        if best is not None:
            staying.add(f"step-{best:06d}")
        for model in (self.out / "checkpoints").glob("step-*"):
            if model.is_dir() and model.name not in staying:
                shutil.rmtree(model)

    # ---- the logs ----------------------------------------------------------------------------------
    def log(self, row: dict, name: str = "metrics.jsonl") -> None:
        """Append a row to a log. JSON knows no infinity and no NaN: they become null."""
        for key, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                row = {**row, key: None}
        if name == "metrics.jsonl":
            self.history.append(row)
        if rank() == 0:
            with open(self.out / name, "a", encoding="utf-8") as f:
                f.write(to_json(row) + "\n")

    def best_step(self) -> int | None:
        """The step with the best score, the first of equals; None if no step was scored."""
        scores = []
        for row in self.history:
            for name, sign in SCORES.items():
                if row["step"] and isinstance(row.get(name), int | float):
                    scores.append((sign * row[name], -row["step"]))
        return -max(scores)[1] if scores else None


def cut_log(path: Path, step: int) -> None:
    """Cut off the lines of later steps, and a last line that a kill left half written."""
    if not path.exists():
        return
    end = 0
    for where, line in whole_lines(path):
        row = parsed(line, where)
        check_row(row, {"step": int}, where)
        if row["step"] > step:
            break
        end += len(line)
    os.truncate(path, end)


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


# ---- stopping ------------------------------------------------------------------------------------
class StopRequest:
    """Whether somebody asked the run to stop (a signal of `command.STOPPING`)."""
    REPEAT_SECONDS = 2.0  # a Ctrl-C sooner than this after the first is torchrun's repetition of it

    def __init__(self):
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
        elif number == signal.SIGINT and now - self.asked_at > self.REPEAT_SECONDS:
            raise Stopped(number)

    def here(self) -> bool:
        """Whether this process was asked."""
        return self.asked_at is not None

    def anywhere(self) -> bool:
        """Whether any process was asked. All must call it."""
        return total([float(self.here())])[0] > 0
