"""What both trainers share: flags, sharding, the optimizer. (`run/` has the folder and how to resume.)

Exact resuming needs no saved random state, because nothing here or in the loops draws from a running
generator: the order of the data and every sampled token are functions of (seed, step, ...). A checkpoint of a
run is the float32 weights, AdamW's two moments and two counts, of steps and of optimizer updates.

In several processes the engine is PyTorch's own FSDP2 (`shard`); only sums of a few numbers go by hand. In
one process nothing is wrapped.
"""
import argparse
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from checkpoint import device_and_dtype, load, save
from checkpoint.tokenizer import Tokenizer
from model import Transformer
from run.command import Defaults, UserError, fill_in, may_change, natural, number, positive, resume_flag
from run.processes import largest, rank, start_processes, total, world
from run.tensors import read_tensors


# ---- flags ---------------------------------------------------------------------------------------
# By device. With fewer, a GPU waits for the host to launch kernels; with more, a CPU gains nothing.
MICRO_BATCH_TOKENS = {"cpu": 2048, "cuda": 4096}


def training_flags(p: argparse.ArgumentParser) -> None:
    """Add the flags that both trainers have."""
    p.add_argument("--weight-decay", type=number(float, 0), default=0.0, help="AdamW's, on matrices only")
    p.add_argument("--max-norm", type=number(float, 0), default=1.0, help="of the gradient; 0: no clipping")
    g = p.add_argument_group("memory and checkpoints")
    may_change(g.add_argument("--micro-batch-tokens", type=positive, help="tokens that the model runs at "
                              "once; if not given, {cpu}, or {cuda} on a GPU".format(**MICRO_BATCH_TOKENS)))
    may_change(g.add_argument("--recompute", action="store_true",
                              help="keep no activations inside the layers: less memory, a third more work"))
    may_change(g.add_argument("--save-every", type=natural, default=20,
                              help="steps between checkpoints; 0: only at the end"))
    may_change(g.add_argument("--keep", type=positive, default=1, help="how many of the latest checkpoints "
                              "stay; if more than 1, their models too, in OUT/checkpoints"))
    resume_flag(g)
    may_change(g.add_argument("--timeout", type=number(float, 0, 10**6, open_low=True), default=60.0,
                              help="minutes that processes wait for one that is dead or stuck"))


def start_training(args, defaults: Defaults) -> tuple[Transformer, Tokenizer]:
    """Join the other processes and load the model. Flags that were not given get their values."""
    device, _ = device_and_dtype(args.device)
    start_processes(device, args.timeout)
    model, tokenizer = load(
        args.model, args.device, args.dtype, args.chat_template_kwargs, on_host=world() > 1)
    model.recompute = args.recompute
    fill_in(args, defaults, model.is_miniature)
    args.micro_batch_tokens = args.micro_batch_tokens or MICRO_BATCH_TOKENS[device.type]
    args.chat_template_kwargs = tokenizer.template_kwargs
    return model, tokenizer


# ---- several processes -----------------------------------------------------------------------------
def shard(model: Transformer) -> None:
    """Divide the weights among the processes, in place (FSDP2): each holds rows of all tensors.

    They are held in float32, to be the masters of an optimizer. A block's weights are whole only while the
    block computes, in the dtype that the model had. Gradients are summed over the processes in float32 as
    each block's backward ends, so that no process ever holds a whole one: therefore all must run the same
    number of passes (`even_passes`).
    """
    from torch.distributed.device_mesh import init_device_mesh  # here: their import takes half a second
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    dtype = model.dtype
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32,
        cast_forward_inputs=False)  # the rotation's angles stay float32
    mesh = init_device_mesh(model.frequencies.device.type, (world(),))
    for module in (*model.model.layers, model):  # one block at a time leaves the host for the device
        fully_shard(module.float(), mesh=mesh, mp_policy=policy)
        module.set_gradient_divide_factor(1.0)  # the sum, not the mean
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no other way to leave it undivided


def even_passes(model: Transformer, passes: int) -> None:
    """Run empty passes, which add nothing to any gradient, until this process has run as many as any other.

    Sharded weights become whole only where all processes run together. `passes` is how many it has run since
    the last call.
    """
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    for _ in range(int(largest(passes)) - passes):
        logp, _ = model.logprobs(model(token)[0], token[0])
        if logp.requires_grad:
            (0 * logp.sum()).backward()


def twin(model: Transformer, device: torch.device) -> Transformer:
    """A second model, frozen, with a copy of the weights there."""
    with torch.device("meta"):
        other = Transformer(model.config)
    weights = {name: w.to(device, copy=True) for name, w in model.state_dict().items()}
    other.load_state_dict(weights, assign=True)
    other.frequencies = model.frequencies
    other.vocab = model.vocab
    return other.requires_grad_(False)


def local(tensor: Tensor) -> Tensor:
    """The rows of a tensor that this process holds: all of them, if it is not sharded (torch's DTensor)."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def rows_of(all_rows: Tensor, tensor: Tensor) -> Tensor:
    """The rows of `all_rows` that correspond to this process's shard of `tensor`."""
    if local(tensor) is tensor:
        return all_rows
    chunk = math.ceil(len(all_rows) / world())
    return all_rows[rank() * chunk:(rank() + 1) * chunk]


def publisher(optimizer: "Optimizer", tokenizer: Tokenizer) -> Callable[[Path], None]:
    """Returns a function that saves the optimizer's model into a folder. All processes must call it."""
    def publish(folder: Path) -> None:
        weights = {}
        for name, w in optimizer.whole_weights():  # all give their parts of each
            if rank() == 0:
                weights[name] = w.cpu()
        if rank() == 0:
            save(folder, optimizer.model, tokenizer, weights)
    return publish


# ---- the optimizer -------------------------------------------------------------------------------
def check_finite(value: float, what: str) -> None:
    """Raises UserError before a step that would spoil the weights.

    Every process does, as `value` is a sum over all of them.
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
            w.grad_dtype = torch.float32  # in which the gradients of several backward passes are added up
            self.masters[name] = w if w.dtype == torch.float32 else torch.nn.Parameter(w.detach().float())
        groups = [
            {"params": [m for m in self.masters.values() if m.ndim > 1], "weight_decay": weight_decay},
            {"params": [m for m in self.masters.values() if m.ndim == 1], "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=1e-8, fused=True)

    def step(self, lr: float) -> float:
        """Clip the gradient and make one step of AdamW.

        Returns the gradient's norm before clipping, over all processes. Raises UserError if it is not finite.
        """
        for name, master in self.masters.items():
            grad = self.weights[name].grad
            master.grad = torch.zeros_like(master) if grad is None else grad
        norms = [torch.linalg.vector_norm(local(master.grad)) for master in self.masters.values()]
        norm = torch.linalg.vector_norm(torch.stack(norms)).item()
        if world() > 1:
            norm = math.sqrt(total([norm**2])[0])
        check_finite(norm, "gradient")
        scale = min(1.0, self.max_norm / (norm + 1e-6)) if self.max_norm else 1.0
        for master in self.masters.values():
            master.grad.mul_(scale)
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        self._check_masters()
        self._write_back()
        return norm

    @torch.no_grad()
    def _check_masters(self):
        """A finite gradient can still lead to masters that are not, with a rate that is far too high, say."""
        def finite(tensor):
            return bool(tensor.sum().isfinite() or tensor.isfinite().all())  # large sums may overflow
        spoilt = sum(not finite(local(master)) for master in self.masters.values())
        if total([spoilt])[0]:
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
        """Yields (name, whole weight). All processes must go through it together; each gets every weight."""
        for name, w in self.weights.items():
            w = w.detach()
            yield name, (w.full_tensor() if hasattr(w, "full_tensor") else w).to(self.dtype)

    def refresh(self, copy: Transformer) -> None:
        """Copy the present weights to `copy`, a tensor at a time, unless it is the model itself."""
        if copy is not self.model:
            weights = dict(copy.named_parameters())
            for name, w in self.whole_weights():
                weights[name].data.copy_(w)

    def tensors(self) -> dict[str, Tensor]:
        """The masters and moments that this process holds, named master.W, first.W and second.W."""
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
        """Take weights, masters and moments from a checkpoint, written by any number of processes.

        `updates` is how many steps AdamW had made. Raises UserError for a damaged file, before anything is
        changed.
        """
        pieces = {}  # the parts of each tensor, memory-mapped: they take no memory until they are read
        for path in files:
            for name, w in read_tensors(path):
                pieces.setdefault(name, []).append(w)

        def take(name, into):
            rows = torch.cat(pieces[name]) if name in pieces else torch.empty(0)
            if rows.shape != into.shape:
                raise UserError(f"{name} is missing or has another shape")
            local(into).copy_(rows_of(rows, into))
            return into

        for name, master in self.masters.items():
            take(f"master.{name}", master)
            if f"first.{name}" in pieces:
                self.adamw.state[master] = {
                    "step": torch.tensor(float(updates), device=self.model.device),
                    "exp_avg": take(f"first.{name}", torch.zeros_like(master)),
                    "exp_avg_sq": take(f"second.{name}", torch.zeros_like(master)),
                }
        self._write_back()
