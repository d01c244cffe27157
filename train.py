"""What both trainers share: flags, batches, the optimizer. (`run.py` has the folder and how to resume.)

Exact resuming needs no saved random state, because nothing here or in the loops draws from a running
generator: the order of the data and every sampled token are functions of (seed, step, ...). A checkpoint of a
run is the float32 weights, AdamW's two moments and two counts, of steps and of optimizer updates.

In several processes the engine is PyTorch's own FSDP2 (`shard`); only sums of a few numbers go by hand. In
one process nothing is wrapped.
"""
import argparse
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from cli import UserError, natural, number, positive, resume_flag
from model import Transformer
from processes import local, rows_of, shard, total, whole, world
from tensors import check_all


# ---- flags ---------------------------------------------------------------------------------------
# By device. A GPU would wait for the host to launch the kernels of fewer; a CPU gains nothing by more.
MICRO_BATCH_TOKENS = {"cpu": 2048, "cuda": 4096}


def training_flags(p: argparse.ArgumentParser) -> None:
    """Add the flags that both trainers have."""
    p.add_argument("--weight-decay", type=number(float, 0), default=0.0, help="AdamW's, on matrices only")
    p.add_argument("--max-norm", type=number(float, 0), default=1.0,
                   help="clip the gradient to this norm; 0 does not")
    g = p.add_argument_group("memory and checkpoints")
    g.add_argument("--micro-batch-tokens", type=positive, default=None,
                   help="tokens (padding included; in GRPO about) that go through the model at once; if not "
                        "given, {cpu}, or {cuda} on a GPU; lower it if memory runs out"
                        .format(**MICRO_BATCH_TOKENS))
    g.add_argument("--recompute", action="store_true",
                   help="keep no activations inside the layers and compute them again: "
                        "much less memory, a third more work")
    g.add_argument("--save-every", type=natural, default=20,
                   help="steps between checkpoints; 0: only at the end")
    g.add_argument("--keep", type=positive, default=1,
                   help="how many of the latest checkpoints stay; if more than 1, their "
                        "models too, in OUT/checkpoints")
    resume_flag(g)
    g.add_argument("--timeout", type=number(float, 0, 10**6, open_low=True), default=60.0,
                   help="of several processes: minutes that they wait for one that is dead or stuck")


def settle_flags(args, device: torch.device) -> None:
    """Give the flags their defaults that depend on the device, for run.json."""
    args.micro_batch_tokens = args.micro_batch_tokens or MICRO_BATCH_TOKENS[device.type]


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
        spoilt = sum(not finite(local(master)) for master in self.masters.values())
        if total([spoilt], self.model.device)[0]:
            raise UserError("the step has made weights that are not finite, so the run stopped; the last "
                            "checkpoint in --out, if one was made, is good. Start another with a lower --lr")

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
                holders = [f for f, names in zip(opened, stored, strict=True) if name in names]
                pieces = [f.get_tensor(name) for f in holders]
                all_rows = torch.cat(pieces) if pieces else torch.empty(0)
                if all_rows.shape != into.shape:
                    raise UserError(f"{files[0].parent}: {name} is missing or has another shape")
                local(into).copy_(rows_of(all_rows, into))
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
