"""One step of SFT or GRPO: tokens a second, share of the machine's matrix rate (MFU), where the time goes; against TRL's trainer.

    python benchmarks/training.py sft --rows 64 --length 1024 --micro-batch-tokens 16384 --steps 5            # on a GPU
    python benchmarks/training.py grpo --questions 32 --rollouts 16 --max-new-tokens 1024 --micro-batch-tokens 16384 --steps 3
    python benchmarks/training.py sft --model SMOLLM2_FOLDER --data silver.jsonl --peers trl                  # on a CPU: 8 rows of about 720 tokens
    python benchmarks/training.py grpo --model SMOLLM2_FOLDER --peers trl                                     # on a CPU: 4 questions x 8 rollouts
    python benchmarks/training.py sft --model mini --rows 2 --length 64 --repeats 1                           # small, to see that it runs

Each turn is a process of its own. TRL is left at its defaults but for what the comparison fixes (dtype, the rows of a step). Time is
that of the last of --steps steps, without loading; memory is the peak of the process, or of the GPU. Without --data, rows are random
ids. The GRPO rewards are coins in both, so that every group has a gradient and nothing is skipped.

MFU counts 6 flops a parameter and token (the head included, the embedding not) and 6 T C a layer and token of causal attention, over the
rate of a large matrix product measured in the same process.
"""
import random
import resource
import subprocess
import tempfile
from types import SimpleNamespace

from common import SHAPES, compare, load_model, model_folder, refuse_missing, roofline, synchronize

import json
import sys
import time

import torch

import grpo
import sft
import tasks
from cli import UserError, command, positive, parser, read_jsonl
from model import Tokenizer, device_and_dtype, find
from sample import Params, Sampler
from train import Optimizer, micro_batches


def chat_rows(args, tokenizer):
    """The first --rows chat rows whose length is within 15% of --length, and their tokens."""
    chosen = []
    for row in read_jsonl(args.data, ("messages",)):
        n = len(tokenizer.chat(row["messages"][:-1])) + len(tokenizer.encode(row["messages"][-1]["content"])) + 1
        if abs(n - args.length) <= 0.15 * args.length:
            chosen.append((n, row))
        if len(chosen) == args.rows:
            return [row for _, row in chosen], sum(n for n, _ in chosen)
    raise UserError(f"--data {args.data}: fewer than {args.rows} rows of about {args.length} tokens")


def flops(model, tokens, length):
    """Of a training step on `tokens` tokens in rows of `length`."""
    c, body = model.config, sum(w.numel() for w in model.model.layers.parameters())
    return tokens * (6 * (body + model.vocab * c.hidden_size) + 12 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * length / 2)


def started(args):
    device, dtype = device_and_dtype(args.device, args.dtype)
    model, tokenizer = load_model(args.model, args)
    model.recompute = args.recompute
    return model, tokenizer, device, roofline(device, dtype)[1]


def sft_ours(args):
    model, tokenizer, device, rate = started(args)
    if args.data:
        chosen, tokens = chat_rows(args, tokenizer)
        with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as f:
            f.writelines(json.dumps(row) + "\n" for row in chosen)
            f.flush()
            rows = sft.read_rows(f.name, tokenizer, 8192)
    else:
        rng = random.Random(0)
        rows, tokens = [([rng.randrange(10, model.vocab) for _ in range(args.length)], 1) for _ in range(args.rows)], args.rows * args.length
    optimizer = Optimizer(model, 1e-4)
    for _ in range(args.steps):
        synchronize(device)
        begun = time.perf_counter()
        for group in micro_batches([len(ids) for ids, _ in rows], args.micro_batch_tokens):
            (sft.loss_of(model, [rows[i] for i in group]) / tokens).backward()
        optimizer.step(1e-6)
        synchronize(device)
        seconds = time.perf_counter() - begun
    return {"seconds": seconds, "tokens": tokens, "mfu": round(flops(model, tokens, args.length) / seconds / rate, 3)}


def grpo_ours(args):
    model, tokenizer, device, rate = started(args)
    task = tasks.find("countdown-3")
    problems = [(task, p) for p in task.problems("rl", args.questions)]
    step = SimpleNamespace(rollouts=args.rollouts, seed=0, reward="random", truncated="keep", loss="token-mean", max_new_tokens=args.max_new_tokens, clip_low=0.2, clip_high=0.2, kl=0.0,
                           temperature=1.0, micro_batch_tokens=args.micro_batch_tokens)
    optimizer, sampler = Optimizer(model, 0.0), Sampler(model, tokenizer, share=grpo.CACHE_SHARE)
    for number in range(args.steps):
        synchronize(device)
        begun = time.perf_counter()
        groups = grpo.roll_out(sampler, problems, step, Params(args.max_new_tokens), number)
        synchronize(device)
        rolled = time.perf_counter()
        rewards = torch.tensor([grpo.rewards_of(group, step, number) for group in groups])
        grpo.update(model, None, optimizer, list(zip(groups, grpo.advantages(rewards).tolist())), step, 1e-6)
        synchronize(device)
        seconds = time.perf_counter() - begun
    tokens = sum(len(c.tokens) for group in groups for c in group.completions)
    # Scoring and weight sync are no stages: the sampler's log-probabilities are the old ones, and its weights are the trained ones.
    return {"seconds": seconds, "tokens": tokens, "rollout_seconds": round(rolled - begun, 3), "rollout_tokens_per_second": round(tokens / (rolled - begun), 1),
            "update_seconds": round(seconds - (rolled - begun), 3)}


def timer():
    """A TRL callback that times the last step."""
    from transformers import TrainerCallback

    class Timer(TrainerCallback):
        def on_step_begin(self, *a, **k):
            self.started = time.perf_counter()

        def on_step_end(self, *a, **k):
            self.seconds = time.perf_counter() - self.started
    return Timer()


def trl_flags(args, out):
    device, dtype = device_and_dtype(args.device, args.dtype)
    return dict(output_dir=out, max_steps=args.steps, use_cpu=device.type == "cpu", bf16=False, report_to=[], save_strategy="no",
                model_init_kwargs={"dtype": str(dtype)[6:]}, learning_rate=1e-6)


def sft_trl(args):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    chosen, tokens = chat_rows(args, Tokenizer(find(args.model)))
    watch = timer()
    with tempfile.TemporaryDirectory() as out:
        config = SFTConfig(per_device_train_batch_size=args.rows, **trl_flags(args, out))
        SFTTrainer(args.model, args=config, train_dataset=Dataset.from_list([{"messages": r["messages"]} for r in chosen]), callbacks=[watch]).train()
    return {"seconds": watch.seconds, "tokens": tokens}


def grpo_trl(args):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    task, watch, lengths = tasks.find("countdown-3"), timer(), []
    data = Dataset.from_list([{"prompt": task.prompt(p)} for p in task.problems("rl", args.questions)])

    def coin(completions, completion_ids, **_):
        lengths.extend(map(len, completion_ids))
        return [float(random.random() < 0.5) for _ in completions]
    with tempfile.TemporaryDirectory() as out:
        config = GRPOConfig(per_device_train_batch_size=args.rollouts, gradient_accumulation_steps=args.questions, num_generations=args.rollouts,
                            max_completion_length=args.max_new_tokens, temperature=1.0, **trl_flags(args, out))
        GRPOTrainer(args.model, reward_funcs=coin, args=config, train_dataset=data, callbacks=[watch]).train()
    return {"seconds": watch.seconds, "tokens": sum(lengths[-args.questions * args.rollouts:])}


ONE = {"sft-ours": sft_ours, "sft-trl": sft_trl, "grpo-ours": grpo_ours, "grpo-trl": grpo_trl}


def main():
    p = parser(__doc__, out="", model="qwen2.5-0.5b")
    p.add_argument("stage", choices=["sft", "grpo", *ONE], help="sft or grpo; the others run one turn and print it")
    p.add_argument("--peers", choices=["none", "trl"], default="none", help="trl (for sft it needs --data) or none")
    p.add_argument("--data", default="", help="sft: chat rows; without it, random ids")
    p.add_argument("--rows", type=positive, default=8, help="sft: rows of the step")
    p.add_argument("--length", type=positive, default=720, help="sft: tokens of a row, about")
    p.add_argument("--questions", type=positive, default=4, help="grpo")
    p.add_argument("--rollouts", type=positive, default=8, help="grpo")
    p.add_argument("--max-new-tokens", type=positive, default=128, help="grpo")
    p.add_argument("--micro-batch-tokens", type=positive, default=2048, help="as in sft.py and grpo.py")
    p.add_argument("--recompute", action="store_true", help="as in sft.py and grpo.py (TRL recomputes by default)")
    p.add_argument("--steps", type=positive, default=1, help="steps of a turn; the last is timed (on a GPU the first compiles)")
    p.add_argument("--repeats", type=positive, default=5, help="turns of each")
    args = p.parse_args()
    shape = args.model if args.model in SHAPES else args.model.rstrip("/").rpartition("/")[2]
    args.model = model_folder(args.model, device_and_dtype(args.device, args.dtype)[1])
    if args.stage in ONE:
        figures = ONE[args.stage](args)
        peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print("TURN " + json.dumps({**figures, "seconds": round(figures["seconds"], 3), "tokens_per_second": round(figures["tokens"] / figures["seconds"], 1), "peak_gib": round(peak, 2)}))
        return
    if args.peers == "trl":
        refuse_missing("trl")
        if args.stage == "sft" and not args.data:
            raise UserError("--peers trl: give --data, for TRL reads chat rows")

    def turn(who):
        def run(repeat):
            names = ("model", "data", "rows", "length", "questions", "rollouts", "max_new_tokens", "micro_batch_tokens", "steps", "device", "dtype")
            flags = [x for name in names for x in (f"--{name.replace('_', '-')}", str(getattr(args, name)))] + ["--recompute"] * args.recompute
            done = subprocess.run([sys.executable, __file__, f"{args.stage}-{who}", *flags], capture_output=True, text=True)
            line = next((line for line in done.stdout.splitlines() if line.startswith("TURN ")), None)
            if line is None:
                raise UserError(f"a turn of {who} failed:\n{done.stderr[-2000:]}")
            return json.loads(line[5:])
        return run
    runs = {who: turn(who) for who in ("ours", *([args.peers] if args.peers != "none" else []))}
    key, better = ("tokens_per_second", "higher") if args.stage == "sft" else ("seconds", "lower")
    compare(f"{args.stage}-{shape}", args, runs, key, better)


if __name__ == "__main__":
    command(main)
