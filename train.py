"""What both trainers share: flags, processes, batches, the optimizer, the run folder and how to resume it.

Exact resuming needs no saved random state, because nothing here or in the loops draws from a running
generator: the order of the data and every sampled token are functions of (seed, step, ...). A checkpoint of a
run is the float32 weights, AdamW's two moments and two counts, of steps and of optimizer updates.

In several processes the engine is PyTorch's own FSDP2 (`shard`); only sums of a few numbers go by hand. In
one process nothing is wrapped.
"""
import argparse
import json
import math
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from checkpoint import save as save_model_folder
from checkpoint import save_tensors
from cli import (
    UserError, goes_on, natural, number, plan_flags, positive, refuse_other_flags, resume_flag, run_record,
    say, to_json, write_whole,
)
from model import Transformer
from processes import barrier, local, naming_the_missing, rank, rows_of, shard, total, whole, world
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
        self._write_back()
        self.sums.clear()
        return norm

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

        `updates` is how many steps AdamW had made. A tensor is whole on each process while it is read.
        """
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
# Flags that a resumed run may give anew: they change what is kept, or where and in how many pieces it is
# computed, which only the rounding shows. (With --dtype auto another device may mean another dtype.)
FREE_TO_CHANGE = {"out", "resume", "save_every", "eval_every", "device", "slots", "micro_batch_tokens",
                  "recompute", "timeout"}


class Run:
    """An output folder: a Hugging Face model folder, with run.json, metrics.jsonl, rollouts.jsonl and state/.

    `state/step-N` appears by one rename when all of it is written, and only then is the step before it
    removed. So a kill at any moment leaves a whole checkpoint, and `--resume` cuts the logs back to its step.
    """

    def __init__(self, args):
        self.out = Path(args.out)
        self.save_every = args.save_every
        resumed = goes_on(args.resume, self.out)
        if resumed:
            refuse_other_flags(args, self.out, FREE_TO_CHANGE)
        barrier()  # no process may create the folder before all have looked
        checkpoints = sorted((self.out / "state").glob("step-*[0-9]"))  # not the .tmp of a killed save
        self.resume_from = checkpoints[-1] if checkpoints else None
        self.step = 0  # of the checkpoint that the run goes on from
        self.updates = 0  # optimizer steps until then; GRPO makes several in a step
        if self.resume_from:
            counts = json.loads((self.resume_from / "state.json").read_text())
            self.step, self.updates = counts["step"], counts["updates"]
        if rank() == 0:
            self.out.mkdir(parents=True, exist_ok=True)
            if not resumed:
                write_whole(self.out / "run.json", json.dumps(run_record(args), indent=2))
            self._cut(self.out / "metrics.jsonl")
            self._cut(self.out / "rollouts.jsonl")
        barrier()
        if resumed:
            say(f"resuming {self.out} after step {self.step}")

    def _cut(self, path):
        """Drop the lines of steps after the checkpoint (without one, all), and one that a kill cut short."""
        if not path.is_file() or not path.stat().st_size:
            return
        lines = path.read_bytes().split(b"\n")[:-1]  # not splitlines: a text may hold other line separators
        kept = [line.decode() + "\n" for line in lines if json.loads(line)["step"] <= self.step]
        write_whole(path, "".join(kept) if self.resume_from else "")

    def restore(self, optimizer: Optimizer, tokenizer: Tokenizer) -> None:
        """Put the checkpoint, if there is one, into the optimizer and its model."""
        if not self.resume_from:
            return
        optimizer.load(sorted(self.resume_from.glob("*.safetensors")), self.updates)
        self._save_model(optimizer, tokenizer)  # a kill may have come between it and the checkpoint

    def end_of_step(
        self, optimizer: Optimizer, tokenizer: Tokenizer, *, step: int, last: int, updates: int, stop: bool,
    ):
        """Save if it is time to. If somebody asked the run to stop, save and leave it (KeyboardInterrupt)."""
        due = self.save_every and step % self.save_every == 0
        if due or stop or step == last:
            self.save(optimizer, tokenizer, step, updates)
        if stop:
            raise KeyboardInterrupt

    def save(self, optimizer: Optimizer, tokenizer: Tokenizer, step: int, updates: int) -> None:
        """A checkpoint after `step`, in which the optimizer has made `updates` updates in all."""
        final = self.out / "state" / f"step-{step:06d}"
        tmp = final.with_suffix(".tmp")
        if rank() == 0:
            shutil.rmtree(tmp, ignore_errors=True)
            tmp.mkdir(parents=True)
        barrier()
        save_tensors(tmp / f"rank{rank():03d}.safetensors", optimizer.tensors())
        barrier()
        if rank() == 0:
            write_whole(tmp / "state.json", json.dumps({"step": step, "updates": updates}))
            os.replace(tmp, final)
        self._save_model(optimizer, tokenizer)
        if rank() == 0:
            for other in final.parent.iterdir():
                if other != final:
                    shutil.rmtree(other)
        barrier()

    def _save_model(self, optimizer, tokenizer):
        weights = optimizer.whole_weights()
        if rank() == 0:
            save_model_folder(self.out, optimizer.model, tokenizer, weights)
        for _ in weights:  # the other processes give their parts
            pass

    def log(self, row: dict, name: str = "metrics.jsonl") -> None:
        if rank() == 0:
            with open(self.out / name, "a", encoding="utf-8") as f:
                f.write(to_json(row) + "\n")


# ---- around the loop -----------------------------------------------------------------------------
def progress(name: str, done: int, steps: int) -> tqdm:
    """A progress bar over steps, on the first process only, and only on a terminal."""
    hidden = None if rank() == 0 else True  # None: tqdm shows it on a terminal only
    return tqdm(total=steps, initial=done, desc=name, unit="step", disable=hidden)


@contextmanager
def interruptible(device: torch.device | str = "cpu") -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether somebody asked the run to stop (Ctrl-C, SIGTERM).

    It tells every process the same, so all must call it.

    The loop then saves and leaves. A second Ctrl-C does not wait.
    """
    asked = []

    def handler(number, frame):
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        print("\nstopping after this step (once more to stop now)", flush=True)

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with naming_the_missing():
            yield lambda: total([len(asked)], device)[0] > 0
    finally:
        for number, old in before.items():
            signal.signal(number, old)
