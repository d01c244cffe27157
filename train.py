"""What both trainers share: flags, processes, batches, the optimizer, the run folder and how to resume it.

Exact resuming needs no saved random state, because nothing here or in the loops draws from a running
generator: the order of the data and every sampled token are functions of (seed, step, ...). A checkpoint of a
run is the float32 weights, AdamW's two moments and two counts, of steps and of optimizer updates.

In several processes the engine is PyTorch's own FSDP2 (`shard`); only sums of a few numbers go by hand. In
one process nothing is wrapped.
"""
import argparse
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from hashlib import blake2b
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from checkpoint import CHECKSUM, check_all, save_tensors
from checkpoint import save as save_model_folder
from cli import (
    Stopped, UserError, handlers, natural, number, plan_flags, positive, read_json, read_jsonl, resume_flag,
    say, to_json, write_whole,
)
from model import Transformer
from processes import barrier, local, naming_the_missing, rank, rows_of, shard, total, whole, world
from record import begin, goes_on, sweep
from tokenizer import Tokenizer


# ---- flags ---------------------------------------------------------------------------------------
def training_flags(p: argparse.ArgumentParser) -> None:
    """Add the flags that both trainers have."""
    p.add_argument("--weight-decay", type=number(float, 0), default=0.0, help="AdamW's, on matrices only")
    p.add_argument("--max-norm", type=number(float, 0), default=1.0,
                   help="clip the gradient to this norm; 0 does not")
    g = p.add_argument_group("memory and checkpoints")
    g.add_argument("--micro-batch-tokens", type=positive, default=2048,
                   help="tokens (padding included) that go through the model at once; in GRPO about, "
                        "and of responses to one prompt; lower it if memory runs out")
    g.add_argument("--recompute", action="store_true",
                   help="keep no activations inside the layers and compute them again: "
                        "much less memory, a third more work")
    g.add_argument("--save-every", type=natural, default=20,
                   help="steps between checkpoints; 0: only at the end")
    g.add_argument("--keep", type=positive, default=1,
                   help="how many of the latest checkpoints stay; if more than 1, their models too, "
                        "in OUT/checkpoints (each is as large as the first: see --plan)")
    resume_flag(g)
    plan_flags(g)
    g.add_argument("--timeout", type=number(float, 0, 10**6, open_low=True), default=60.0,
                   help="of several processes: minutes that they wait for one that is dead or stuck")


def lr_or_default(lr: float | None, model: Transformer, miniature: float) -> float:
    """The rate of --lr.

    Without it the paper's 1e-6, or `miniature` for a model of that size, which 1e-6 would not move.
    """
    if lr is not None:
        return lr
    return miniature if model.is_miniature else 1e-6


# ---- batches -------------------------------------------------------------------------------------
def micro_batches(items: list, length: Callable, budget: int, waste: float = 1.2) -> list[list]:
    """Group items by similar length, shortest first.

    Rows are padded to the longest of their group, so what counts is rows x longest: at most `budget`, and at
    most `waste` times the real tokens. One item may exceed the budget alone.

    micro_batches(["aaaaa", "b", "cccc", "d"], len, budget=10)  ->  [["b", "d"], ["cccc", "aaaaa"]]
    """
    groups = []
    real = 0  # tokens of the last group, without padding
    for item in sorted(items, key=length):
        n = length(item)
        padded = (len(groups[-1]) + 1) * n if groups else 0
        if groups and padded <= budget and padded <= waste * (real + n):
            groups[-1].append(item)
            real += n
        else:
            groups.append([item])
            real = n
    return groups


# ---- the optimizer -------------------------------------------------------------------------------
def check_finite(value: float, what: str) -> None:
    """Stop before a step that would spoil the weights.

    On every process alike: `value` is a sum over all of them.
    """
    if not math.isfinite(value):
        raise UserError(f"the {what} is not finite, so the step was refused and the run stopped; "
                        "the last checkpoint in --out, if one was made, is good. "
                        "Start a new run with a lower --lr, or look at the data")


class Optimizer:
    """AdamW on float32 masters (Loshchilov & Hutter 2019).

    bfloat16 has 8 bits of mantissa: bf16(0.02) - 1e-5 == bf16(0.02), so a small step on bfloat16 weights is
    lost. The step is taken on a float32 master and the weight becomes its rounding. Gradients are summed in
    float32 too, over micro-batches and processes. For a float32 model the master is the weight itself. In
    several processes the model is sharded here (`shard`), and the shards are the masters.

    A step takes the sum of all gradients since the last one: whoever calls backward() has divided the loss by
    the count of the whole step (trained tokens, or what GRPO's weights count), over all processes.
    """

    def __init__(self, model: Transformer, weight_decay: float, betas=(0.9, 0.95), max_norm: float = 1.0):
        self.model = model
        self.dtype = model.dtype  # of the weights that compute, are sampled from, and are saved
        self.max_norm = max_norm
        if world() > 1:
            shard(model)
        self.weights = dict(model.named_parameters())
        self.masters = {}
        for name, w in self.weights.items():
            self.masters[name] = w if w.dtype == torch.float32 else torch.nn.Parameter(w.detach().float())
        groups = [
            {"params": [m for m in self.masters.values() if m.ndim > 1], "weight_decay": weight_decay},
            {"params": [m for m in self.masters.values() if m.ndim == 1], "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=1e-8, fused=True)
        self.sums = {}  # name: float32 gradient, for weights that are not float32
        for name, w in self.weights.items():
            if w.dtype != torch.float32:
                w.register_post_accumulate_grad_hook(partial(self._collect, name))

    def _collect(self, name, w):
        """Runs when a backward pass has finished this weight's gradient: add it up in float32 and free it."""
        if name in self.sums:
            self.sums[name] += w.grad
        else:
            self.sums[name] = w.grad.float()
        w.grad = None

    def step(self, lr: float) -> float:
        """Clip, step.

        Returns the norm before clipping, over all processes; refuses one that is not finite.
        """
        grads = {}
        for name, w in self.weights.items():
            grad = self.sums.get(name, w.grad)
            grads[name] = torch.zeros_like(self.masters[name]) if grad is None else grad
        norms = [torch.linalg.vector_norm(local(grad)) for grad in grads.values()]
        norm = torch.linalg.vector_norm(torch.stack(norms)).item()
        if world() > 1:
            norm = math.sqrt(total([norm**2], self.model.device)[0])
        check_finite(norm, "gradient")
        scale = min(1.0, self.max_norm / (norm + 1e-6)) if self.max_norm else 1.0
        for name, master in self.masters.items():
            master.grad = grads[name].mul_(scale)
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        self._check_masters()
        self._write_back()
        self.sums.clear()
        return norm

    @torch.no_grad()
    def _check_masters(self):
        """A finite gradient too may end in masters that are not: in a rate far too high, say."""
        def finite(tensor):
            return bool(tensor.sum().isfinite() or tensor.isfinite().all())  # large sums may overflow
        bad = sum(not finite(local(master)) for master in self.masters.values())
        if total([bad], self.model.device)[0]:
            check_finite(math.inf, "weights after the step")

    @torch.no_grad()
    def _write_back(self):
        """Round the masters into the weights and clear the gradients."""
        for name, w in self.weights.items():
            master = self.masters[name]
            if master is not w:
                w.copy_(master)
                master.grad = None
            w.grad = None

    @torch.no_grad()
    def whole_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, weight), one after the other; on all processes together, which each get all of it."""
        for name, w in self.weights.items():
            yield name, whole(w.detach()).to(self.dtype)

    def refresh(self, copy: Transformer) -> None:
        """Give a copy of the model its present weights, a tensor at a time. Nothing, if it is the model."""
        if copy is not self.model:
            weights = dict(copy.named_parameters())
            for name, w in self.whole_weights():
                weights[name].data.copy_(w)

    def tensors(self) -> dict[str, Tensor]:
        """What this process holds, by the names master.W, first.W and second.W: masters and moments."""
        out = {}
        for name, master in self.masters.items():
            out[f"master.{name}"] = local(master.detach())
            moments = self.adamw.state[master]
            if moments:  # none before the first step
                out[f"first.{name}"] = local(moments["exp_avg"])
                out[f"second.{name}"] = local(moments["exp_avg_sq"])
        return out

    @torch.no_grad()
    def load(self, files: list[Path], updates: int) -> None:
        """Take weights, masters and moments from a checkpoint's files, of any number of processes.

        `updates` is how many steps AdamW had made. A tensor is whole on each process while it is read. Raises
        UserError for a damaged file, before anything is changed.
        """
        check_all(files)
        with ExitStack() as stack:
            opened = [stack.enter_context(safe_open(path, "pt")) for path in files]
            stored = [set(f.keys()) for f in opened]

            def read(name, into):
                pieces = [f.get_tensor(name) for f, n in zip(opened, stored, strict=True) if name in n]
                local(into).copy_(rows_of(torch.cat(pieces), into))
                return into

            for name, master in self.masters.items():
                read(f"master.{name}", master)
                if any(f"first.{name}" in names for names in stored):
                    self.adamw.state[master] = {
                        "step": torch.tensor(float(updates), device=self.model.device),
                        "exp_avg": read(f"first.{name}", torch.zeros_like(master)),
                        "exp_avg_sq": read(f"second.{name}", torch.zeros_like(master)),
                    }
        self._write_back()


# ---- the run folder ------------------------------------------------------------------------------
# Flags that a run may give anew, beside those of `record.py`: they change only what is kept.
FREE_TO_CHANGE = {"save_every", "keep"}
WEIGHTS = "*.safetensors"


class Run:
    """An output folder: a Hugging Face model folder, with run.json, metrics.jsonl, rollouts.jsonl and state/.

    `state/step-N` appears by one rename when all of it is written, and only then is one before it removed. So
    a kill at any moment leaves a whole checkpoint, and `--resume` cuts the logs back to its step. With
    `--keep 3` there are three, and the three models in checkpoints/; `best` is a link to the one with the
    best score on held-out data, if that is measured.
    """

    def __init__(self, args, inputs: Callable[[], dict], free: set[str] = frozenset()):
        self.out = Path(args.out)
        self.save_every = args.save_every
        self.keep = args.keep
        resumed = goes_on(args.resume, self.out)
        begin(self.out / "run.json", args, inputs, FREE_TO_CHANGE | free)
        checkpoints = self._checkpoints()
        self.resume_from = checkpoints[-1] if checkpoints else None
        self.step = 0  # of the checkpoint that the run goes on from
        self.updates = 0  # optimizer steps until then; GRPO makes several in a step
        self.pending = None  # the line of metrics.jsonl of that step, if a stop came before it was whole
        if self.resume_from:
            counts = self._counts(self.resume_from)
            self.step, self.updates = counts["step"], counts["updates"]
            self.pending = counts.get("pending")
        self.saved = self.step
        barrier()  # all have looked
        if rank() == 0:
            sweep(self.out)
            self._cut(self.out / "metrics.jsonl")
            self._cut(self.out / "rollouts.jsonl")
        barrier()
        log = self.out / "metrics.jsonl"
        self.history = [row for _, row in read_jsonl(log)] if log.is_file() and log.stat().st_size else []
        if resumed:
            say(f"resuming {self.out} after step {self.step}")

    def _checkpoints(self) -> list[Path]:
        found = sorted((self.out / "state").glob("step-*[0-9]"))  # not the .tmp of a killed save
        return [path for path in found if path.is_dir()]

    def _cut(self, path):
        """Drop the lines of steps after the checkpoint (without one, all), and one that a kill cut short."""
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: not a file")
        if not path.exists() or not path.stat().st_size:
            return
        content = path.read_bytes()
        whole_lines = content[:content.rfind(b"\n") + 1]
        if whole_lines != content:
            write_whole(path, whole_lines)
        rows = [row for _, row in read_jsonl(path, {"step": int})] if whole_lines else []
        last = self.step if self.resume_from else -1
        if self.pending and path.name == "metrics.jsonl":
            last -= 1
        kept = [to_json(row) + "\n" for row in rows if row["step"] <= last]
        if len(kept) < len(rows):
            write_whole(path, "".join(kept))

    def _counts(self, folder):
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
        found = len(list(folder.glob(WEIGHTS)))
        if found < counts.get("files", 1):
            raise UserError(f"{folder}: {counts['files'] - found} of its files are missing{self._way_back()}")
        return counts

    def _way_back(self):
        """What to do where the newest checkpoint is damaged."""
        newest, *others = reversed(self._checkpoints())
        if others:
            return f"; remove {newest}, and --resume goes on from {others[0]}"
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

    def end_of_step(
        self, optimizer: Optimizer, tokenizer: Tokenizer, stop: "Stop", *, step: int, last: int, updates: int,
    ):
        """Save if it is time to, or the model is the best so far; leave if somebody asked for it."""
        due = self.save_every and step % self.save_every == 0
        if due or step == last or step == self.best_step():
            self.save(optimizer, tokenizer, step, updates)
        self.leave_if_asked(optimizer, tokenizer, stop, step=step, updates=updates)

    def leave_if_asked(
        self, optimizer: Optimizer, tokenizer: Tokenizer, stop: "Stop", *, step: int, updates: int,
        pending: dict | None = None,
    ):
        """If somebody asked the run to stop, save what it has after `step` and leave it (raises Stopped)."""
        if stop.anywhere():
            if step > self.saved:
                self.save(optimizer, tokenizer, step, updates, pending)
            raise Stopped(stop.number)

    def save(self, optimizer: Optimizer, tokenizer: Tokenizer, step: int, updates: int, pending=None) -> None:
        """A checkpoint after `step`, in which the optimizer has made `updates` updates in all.

        `pending` is the line of metrics.jsonl of that step, where something of it is still to be measured.
        """
        final = self.out / "state" / f"step-{step:06d}"
        tmp = final.with_suffix(".tmp")
        if self.saved != step:
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

    def _write_counts(self, folder, step, updates, pending=None):
        counts = {"step": step, "updates": updates, "files": len(list(folder.glob(WEIGHTS)))}
        on_time = self.save_every and step % self.save_every == 0
        if not on_time and step != self.best_step():
            counts["unplanned"] = True  # a stop, or the end: it goes before those that --save-every made
        if pending:
            counts["pending"] = pending
        write_whole(folder / "state.json", to_json({**counts, CHECKSUM: digest(counts)}))

    def settle(self, optimizer: Optimizer, tokenizer: Tokenizer) -> None:
        """What was pending is in the log now: so says the checkpoint."""
        if rank() == 0:
            self._write_counts(self.resume_from, self.step, self.updates)
        self.pending = None
        self._publish(optimizer, tokenizer, self.step)

    def _publish(self, optimizer, tokenizer, step):
        """All that follows from a checkpoint: the model, the copies of it that are kept, what may go."""
        weights = optimizer.whole_weights()
        if rank() == 0:
            save_model_folder(self.out, optimizer.model, tokenizer, weights)
        for _ in weights:  # the other processes give their parts
            pass
        if rank() == 0:
            best = self.best_step()
            models = self.out / "checkpoints"
            if self.keep > 1 or best == step:
                self._copy_model(models / f"step-{step:06d}")
            best_model = models / f"step-{best or 0:06d}"
            if best_model.is_dir():
                link = self.out / "best.tmp"
                link.symlink_to(best_model.relative_to(self.out))
                os.replace(link, self.out / "best")
            planned = [path.name for path in self._checkpoints()
                       if not read_json(path / "state.json").get("unplanned")]
            newest = f"step-{step:06d}"
            kept = self.keep - (newest not in planned)
            latest = [newest, *planned[len(planned) - kept:]] if kept else [newest]
            for state in self._checkpoints():
                if state.name not in latest:
                    shutil.rmtree(state)
            for model in models.glob("step-*"):
                if model != best_model and (model.name not in latest or self.keep == 1):
                    shutil.rmtree(model)
        barrier()

    def _copy_model(self, target):
        """The model folder as it is now, whole or not at all; weights as another name of the same file."""
        if target.is_dir():
            return
        tmp = target.with_suffix(".tmp")
        tmp.mkdir(parents=True)
        for path in self.out.iterdir():
            if path.is_file() and path.suffix != ".jsonl":
                try:
                    (os.link if path.match(WEIGHTS) else shutil.copy2)(path, tmp / path.name)
                except OSError:  # a file system without such names
                    shutil.copy2(path, tmp / path.name)
        os.replace(tmp, target)

    # ---- the log -----------------------------------------------------------------------------------
    def log(self, row: dict, name: str = "metrics.jsonl") -> None:
        for key, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                row = {**row, key: None}  # JSON knows no infinity
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


def digest(counts: dict) -> str:
    return blake2b(to_json(counts).encode(), digest_size=16).hexdigest()


def score_of(row: dict) -> float | None:
    """What a line of metrics.jsonl says of the held-out data, as a number to be high."""
    if row.get("val") is not None:
        return row["val"]
    return -row["val_loss"] if row.get("val_loss") is not None else None


# ---- around the loop -----------------------------------------------------------------------------
class Stop:
    """Whether somebody asked the run to stop (`cli.STOPPING`)."""
    AGAIN = 2.0  # seconds after which Ctrl-C is meant anew: torchrun's agent repeats the terminal's

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = device
        self.asked_at: float | None = None
        self.number = signal.SIGINT  # or what came first

    def handler(self, number: int, frame) -> None:
        now = time.monotonic()
        if self.asked_at is None:
            self.asked_at = now
            self.number = number
            with suppress(OSError, ValueError, AttributeError):  # nothing said here may end the run
                if os.isatty(sys.stderr.fileno()):
                    os.write(sys.stderr.fileno(), b"\nstopping, once all is saved (again: at once)\n")
        elif number == signal.SIGINT and now - self.asked_at > self.AGAIN:
            raise Stopped(number)

    def here(self) -> bool:
        """What this process knows."""
        return self.asked_at is not None

    def anywhere(self) -> bool:
        """What any process knows. All must call it."""
        return total([float(self.here())], self.device)[0] > 0


@contextmanager
def interruptible(device: torch.device | str = "cpu") -> Iterator[Stop]:
    """Inside, a signal does not end the run but is kept, for the loop to save and leave.

    A second Ctrl-C does not wait.
    """
    stop = Stop(device)
    with handlers(stop.handler), naming_the_missing():
        yield stop
