"""What both trainers share: processes, token-budget batches, the optimizer, the run folder and how to resume it.

Exact resuming needs no saved random state, because nothing here or in the loops draws from a running generator: the order of
the data and every sampled token are functions of (seed, step, ...). A checkpoint is the float32 weights, AdamW's two
moments and the number of the step.

Left out: FSDP. The bfloat16 weights live whole on every process, so that the sampler sees each update with no copy; what is
sharded is the larger part, the float32 masters and moments (12 of 18 bytes a parameter).
"""
import atexit
import json
import math
import os
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from tqdm import tqdm

from cli import UserError, natural, number, positive, run_record, to_json, write_whole
from model import Transformer, save, save_tensors


# ---- processes -------------------------------------------------------------------------------------------------------
def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def start_processes(device):
    """Join the other processes, if torchrun started several: NCCL between GPUs, gloo between CPUs."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)


def say(text):
    """Print, from the first process only."""
    if rank() == 0:
        print(text, flush=True)


def total(values, device="cpu", op="SUM"):
    """The sum (or MAX) over all processes of a list of numbers."""
    if world() == 1:
        return list(values)
    t = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(t, op=getattr(dist.ReduceOp, op))
    return t.tolist()


def barrier():
    if world() > 1:
        dist.barrier()


def training_flags(p):
    """The flags that both trainers have."""
    p.add_argument("--weight-decay", type=number(float, 0), default=0.0, help="AdamW's, on matrices only")
    p.add_argument("--max-norm", type=number(float, 0), default=1.0, help="clip the gradient to this norm; 0 does not")
    g = p.add_argument_group("memory and checkpoints")
    g.add_argument("--micro-batch-tokens", type=positive, default=2048, help="tokens (padding included) that go through the model at once, in GRPO those of one group's responses; lower it if memory runs out")
    g.add_argument("--recompute", action="store_true", help="keep no activations inside the layers and compute them again: much less memory, a third more work")
    g.add_argument("--save-every", type=natural, default=20, help="steps between checkpoints; 0: only at the end")
    g.add_argument("--resume", action="store_true", help="go on with the run in --out, to the same end as if it had not stopped")


# ---- batches ---------------------------------------------------------------------------------------------------------
def micro_batches(lengths, budget, waste=1.2):
    """Group indices by similar length: rows x longest row of a group is at most `budget`, and at most `waste` times the real
    tokens, since rows are padded to the longest. One row may exceed the budget alone.

    micro_batches([5, 1, 4, 1], budget=10)  ->  [[1, 3], [2, 0]]
    """
    groups, real = [], 0
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        padded = (len(groups[-1]) + 1) * lengths[i] if groups else 0
        if groups and padded <= budget and padded <= waste * (real + lengths[i]):
            groups[-1].append(i)
            real += lengths[i]
        else:
            groups.append([i])
            real = lengths[i]
    return groups


# ---- the optimizer ---------------------------------------------------------------------------------------------------
def check_finite(value, what):
    """Stop before a step that would spoil the weights. On every process alike: `value` is a sum over all of them."""
    if not math.isfinite(value):
        raise UserError(f"the {what} is not finite, so the step was refused and the run stopped; the last checkpoint in --out, if one was made, is good. "
                        "Start a new run with a lower --lr, or look at the data")


class Optimizer:
    """AdamW on float32 masters (Loshchilov & Hutter 2019), sharded over the processes.

    bfloat16 has 8 bits of mantissa: bf16(0.02) - 1e-5 == bf16(0.02), so a small step on bfloat16 weights is lost. The step is
    taken on a float32 master and the weight becomes its rounding. Gradients are summed in float32 too, over micro-batches
    and processes. Masters and moments of a tensor live on one process only, which broadcasts the new weight (ZeRO stage 1,
    Rajbhandari et al. 2020, by whole tensors). For a float32 model the master is the weight itself.
    """

    def __init__(self, model: Transformer, weight_decay, betas=(0.9, 0.95), max_norm=1.0):
        self.model, self.max_norm = model, max_norm
        self.weights = dict(model.named_parameters())
        load, self.owner = [0] * world(), {}
        for name, w in sorted(self.weights.items(), key=lambda item: -item[1].numel()):
            self.owner[name] = load.index(min(load))
            load[self.owner[name]] += w.numel()
        self.masters = {name: w if w.dtype == torch.float32 else torch.nn.Parameter(w.detach().float())
                        for name, w in self.weights.items() if self.owner[name] == rank()}
        decayed, others = [m for m in self.masters.values() if m.ndim > 1], [m for m in self.masters.values() if m.ndim == 1]
        self.adamw = torch.optim.AdamW([{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}],
                                       lr=0.0, betas=betas, eps=1e-8, fused=True) if self.masters else None
        self.sums = {}  # name -> float32 gradient, for weights that are not float32
        for name, w in self.weights.items():
            if w.dtype != torch.float32:
                w.register_post_accumulate_grad_hook(lambda w, name=name: self._collect(name, w))

    def _collect(self, name, w):
        """Runs when a backward pass has finished this weight's gradient: add it up in float32 and free it."""
        if name in self.sums:
            self.sums[name] += w.grad
        else:
            self.sums[name] = w.grad.float()
        w.grad = None

    def step(self, lr):
        """Sum the gradients over the processes, clip, step. Returns the norm before clipping; refuses one that is not finite.

        The loss of every micro-batch must already be divided by the count of the whole step, over all processes.
        """
        grads = {}
        for name, w in self.weights.items():
            grad = self.sums.get(name, w.grad)
            # A process without rows in this step, or a weight that no row touched, still joins the sum.
            grads[name] = torch.zeros_like(w, dtype=torch.float32) if grad is None else grad
            if world() > 1:
                dist.all_reduce(grads[name])
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in grads.values()])).item()
        check_finite(norm, "gradient")
        scale = min(1.0, self.max_norm / (norm + 1e-6)) if self.max_norm else 1.0
        for name, master in self.masters.items():
            master.grad = grads[name].mul_(scale)
        if self.adamw:
            for group in self.adamw.param_groups:
                group["lr"] = lr
            self.adamw.step()
        with torch.no_grad():
            for name, w in self.weights.items():
                if name in self.masters and self.masters[name] is not w:
                    w.copy_(self.masters[name])
                    self.masters[name].grad = None
                if world() > 1:
                    dist.broadcast(w.data, self.owner[name])
                w.grad = None
        self.sums.clear()
        return norm

    def state(self):
        """This process's share: {name: tensor} with the prefixes master., first. and second. (moments)."""
        out = {f"master.{name}": master.detach() for name, master in self.masters.items()}
        for name, master in self.masters.items():
            if moments := self.adamw.state[master]:
                out[f"first.{name}"], out[f"second.{name}"] = moments["exp_avg"], moments["exp_avg_sq"]
        return out

    @torch.no_grad()
    def load(self, files, updates):
        """Take masters and moments from the files of any number of processes; `updates` is how many steps AdamW has made."""
        for path in files:
            with safe_open(path, "pt", device=str(self.model.device)) as f:
                names = set(f.keys())
                for name in (n for n in self.weights if f"master.{n}" in names):
                    for copy in (self.weights, self.masters):  # only the process that steps a weight has its master
                        if name in copy:
                            copy[name].copy_(f.get_tensor(f"master.{name}"))
                    if name in self.masters and f"first.{name}" in names:
                        self.adamw.state[self.masters[name]] = {"step": torch.tensor(float(updates), device=self.model.device),
                                                                "exp_avg": f.get_tensor(f"first.{name}"), "exp_avg_sq": f.get_tensor(f"second.{name}")}


# ---- the run folder --------------------------------------------------------------------------------------------------
# Flags that a resumed run may give anew: they change what is kept or how much memory is used, not what is computed (the last
# three only by the rounding of sums).
FREE_TO_CHANGE = {"resume", "save_every", "eval_every", "device", "slots", "micro_batch_tokens", "recompute"}


class Run:
    """An output folder: a Hugging Face model folder, and beside it run.json, metrics.jsonl, rollouts.jsonl and state/.

    `state/step-N` appears by one rename when all of it is written, and only then is the step before it removed. So a kill at
    any moment leaves a whole checkpoint, and `--resume` cuts the logs back to its step.
    """

    def __init__(self, args):
        self.out, self.save_every = Path(args.out), args.save_every
        record = self.out / "run.json"
        flags = {k: v for k, v in vars(args).items() if k not in FREE_TO_CHANGE}
        if args.resume:
            if not record.is_file():
                raise UserError(f"--resume: {self.out} holds no run (no run.json); start it without --resume")
            before = {k: v for k, v in json.loads(record.read_text())["flags"].items() if k not in FREE_TO_CHANGE}
            for name in sorted(flags.keys() | before.keys()):
                if flags.get(name) != before.get(name):
                    flag = f"--{name.replace('_', '-')}"
                    raise UserError(f"--resume: {self.out} was started with {flag} {before.get(name)}, not {flags.get(name)}; give the same flags")
        elif self.out.exists():
            raise UserError(f"--out {self.out} exists; go on with --resume, or give another --out")
        barrier()  # no process may create the folder before all have looked
        states = sorted((self.out / "state").glob("step-*[0-9]"))
        self.state = states[-1] if states else None
        self.info = json.loads((self.state / "state.json").read_text()) if self.state else {"step": 0, "updates": 0}
        if rank() == 0:
            self.out.mkdir(parents=True, exist_ok=True)
            if not args.resume:
                write_whole(record, json.dumps(run_record(args), indent=2))
            for name in ("metrics.jsonl", "rollouts.jsonl"):
                self._cut(self.out / name)
        barrier()
        if args.resume:
            say(f"resuming {self.out} after step {self.info['step']}")

    def _cut(self, path):
        """Drop the lines of steps after the checkpoint, and a last line that a kill cut short."""
        if path.is_file() and path.stat().st_size:
            lines = path.read_bytes().split(b"\n")[:-1]  # not splitlines: a text may hold other line separators
            write_whole(path, "".join(line.decode() + "\n" for line in lines if json.loads(line)["step"] <= self.info["step"]))

    def restore(self, optimizer, tokenizer):
        """Put the checkpoint, if there is one, into the optimizer and its model. Returns the step it was made after."""
        if self.state:
            optimizer.load(sorted(self.state.glob("*.safetensors")), self.info["updates"])
            if rank() == 0:  # a kill may have come between the checkpoint and the model folder
                save(self.out, optimizer.model, tokenizer)
        return self.info["step"]

    def save(self, step, updates, model, tokenizer, optimizer):
        """A checkpoint after `step`, in which the optimizer has made `updates` updates in all."""
        final = self.out / "state" / f"step-{step:06d}"
        tmp = final.with_suffix(".tmp")
        if rank() == 0:
            shutil.rmtree(tmp, ignore_errors=True)
            tmp.mkdir(parents=True)
        barrier()
        save_tensors(tmp / f"rank{rank():03d}.safetensors", optimizer.state())
        barrier()
        if rank() == 0:
            write_whole(tmp / "state.json", json.dumps({"step": step, "updates": updates}))
            os.replace(tmp, final)
            save(self.out, model, tokenizer)
            for other in final.parent.iterdir():
                if other != final:
                    shutil.rmtree(other)
        barrier()

    def end_of_step(self, stop, step, last, *checkpoint):
        """Save if it is time to or somebody asked the run to stop; then leave."""
        if stop or step == last or self.save_every and step % self.save_every == 0:
            self.save(step, *checkpoint)
        if stop:
            raise KeyboardInterrupt

    def log(self, row, name="metrics.jsonl"):
        if rank() == 0:
            with open(self.out / name, "a", encoding="utf-8") as f:
                f.write(to_json(row) + "\n")


def begin(args, model, tokenizer, small):
    """(run folder, optimizer, learning rate, step to go on after). Without --lr the rate is the paper's 1e-6, or `small` for a
    model of the miniature's size, which 1e-6 would leave where it is."""
    run, optimizer = Run(args), Optimizer(model, args.weight_decay, max_norm=args.max_norm)
    model.recompute = args.recompute
    lr = args.lr if args.lr is not None else small if sum(w.numel() for w in model.parameters()) < 10e6 else 1e-6
    return run, optimizer, lr, run.restore(optimizer, tokenizer)


def progress(name, done, steps):
    """A progress bar over steps, on the first process only, and only on a terminal."""
    return tqdm(total=steps, initial=done, desc=name, unit="step", disable=None if rank() == 0 else True)


@contextmanager
def interruptible(device="cpu"):
    """Yields a function that tells, the same on every process, whether somebody asked the run to stop (Ctrl-C, SIGTERM).
    The loop then saves and leaves. A second Ctrl-C does not wait."""
    asked = []

    def handler(number, frame):
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        print("\nstopping after this step (once more to stop now)", flush=True)

    before = [(s, signal.signal(s, handler)) for s in (signal.SIGINT, signal.SIGTERM)]
    try:
        yield lambda: total([len(asked)], device)[0] > 0
    finally:
        for s, old in before:
            signal.signal(s, old)
