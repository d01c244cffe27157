"""One step of SFT or GRPO against TRL's trainer: the same model, rows and dtype, each turn a process of its own, in turns.

    python benchmarks/training.py sft --model SMOLLM2_FOLDER --data silver.jsonl      # 8 rows of about 720 tokens
    python benchmarks/training.py grpo --model SMOLLM2_FOLDER                         # 4 questions x 8 rollouts, 128 new tokens

Needs trl and datasets. TRL is left at its defaults but for what the comparison fixes (float32, the rows of a step, one step).
Time is that of the step, without loading; memory is the peak of the process. The GRPO rewards are coins in both, so that
every group has a gradient and nothing is skipped.
"""
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

import grpo
import sft
import tasks
from cli import UserError, command, parser, positive, read_jsonl
from common import conclude
from model import Tokenizer, find, load
from sample import Params, Sampler
from train import Optimizer, micro_batches


def rows_of_about(args, tokenizer):
    """The first `--rows` chat rows whose length is within 15% of --length."""
    chosen = []
    for row in read_jsonl(args.data, ("messages",)):
        n = len(tokenizer.chat(row["messages"][:-1])) + len(tokenizer.encode(row["messages"][-1]["content"])) + 1
        if abs(n - args.length) <= 0.15 * args.length:
            chosen.append((n, row))
        if len(chosen) == args.rows:
            return [row for _, row in chosen], sum(n for n, _ in chosen)
    raise UserError(f"--data {args.data}: fewer than {args.rows} rows of about {args.length} tokens")


def timer():
    """A TRL callback that times the first step."""
    from transformers import TrainerCallback

    class Timer(TrainerCallback):
        def on_step_begin(self, *a, **k):
            self.started = time.time()

        def on_step_end(self, *a, **k):
            self.seconds = time.time() - self.started
    return Timer()


def sft_ours(args):
    model, tokenizer = load(args.model, "cpu", args.dtype)
    chosen, tokens = rows_of_about(args, tokenizer)
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as f:
        f.writelines(json.dumps(row) + "\n" for row in chosen)
        f.flush()
        rows = sft.read_rows(f.name, tokenizer, 8192)
    optimizer, started = Optimizer(model, 1e-4), time.time()
    for group in micro_batches([len(ids) for ids, _ in rows], 2048):  # sft.py's default --micro-batch-tokens
        (sft.loss_of(model, [rows[i] for i in group]) / tokens).backward()
    optimizer.step(1e-6)
    return time.time() - started, tokens


def sft_trl(args):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    chosen, tokens = rows_of_about(args, Tokenizer(find(args.model)))
    watch = timer()
    with tempfile.TemporaryDirectory() as out:
        config = SFTConfig(output_dir=out, max_steps=1, per_device_train_batch_size=args.rows, use_cpu=True, bf16=False, report_to=[], save_strategy="no",
                           model_init_kwargs={"dtype": "float32"}, learning_rate=1e-6)
        SFTTrainer(args.model, args=config, train_dataset=Dataset.from_list([{"messages": r["messages"]} for r in chosen]), callbacks=[watch]).train()
    return watch.seconds, tokens


def grpo_ours(args):
    model, tokenizer = load(args.model, "cpu", args.dtype)
    task = tasks.find("countdown-3")
    problems = [(task, p) for p in task.problems("rl", args.questions)]
    step = SimpleNamespace(rollouts=args.rollouts, seed=0, reward="random", truncated="keep", loss="token-mean", max_new_tokens=args.max_new_tokens, clip_low=0.2, clip_high=0.2, kl=0.0,
                           temperature=1.0, micro_batch_tokens=2048)
    optimizer, sampler, started = Optimizer(model, 0.0), Sampler(model, tokenizer), time.time()
    groups = grpo.roll_out(sampler, problems, step, Params(args.max_new_tokens), 1)
    rolled = time.time()
    rewards = torch.tensor([grpo.rewards_of(group, step, 1) for group in groups])
    grpo.update(model, None, optimizer, list(zip(groups, grpo.advantages(rewards).tolist())), step, 1e-6)
    print(f"rollout {rolled - started:.1f} s, update {time.time() - rolled:.1f} s", file=sys.stderr)
    return time.time() - started, sum(len(c.tokens) for group in groups for c in group.completions)


def grpo_trl(args):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    task, watch, lengths = tasks.find("countdown-3"), timer(), []
    data = Dataset.from_list([{"prompt": task.prompt(p)} for p in task.problems("rl", args.questions)])

    def coin(completions, completion_ids, **_):
        lengths.extend(map(len, completion_ids))
        return [float(random.random() < 0.5) for _ in completions]
    with tempfile.TemporaryDirectory() as out:
        config = GRPOConfig(output_dir=out, max_steps=1, per_device_train_batch_size=args.rollouts, gradient_accumulation_steps=args.questions, num_generations=args.rollouts,
                            max_completion_length=args.max_new_tokens, temperature=1.0, use_cpu=True, bf16=False, report_to=[], save_strategy="no", model_init_kwargs={"dtype": "float32"}, learning_rate=1e-6)
        trainer = GRPOTrainer(args.model, reward_funcs=coin, args=config, train_dataset=data, callbacks=[watch])
        trainer.train()
    return watch.seconds, sum(lengths)


ONE = {"sft-ours": sft_ours, "sft-trl": sft_trl, "grpo-ours": grpo_ours, "grpo-trl": grpo_trl}


def main():
    p = parser(__doc__, out="")
    p.add_argument("stage", choices=["sft", "grpo", *ONE], help="sft or grpo; the others run one turn and print it")
    p.add_argument("--data", default="silver.jsonl", help="sft: chat rows")
    p.add_argument("--rows", type=positive, default=8, help="sft: rows of the step")
    p.add_argument("--length", type=positive, default=720, help="sft: tokens of a row, about")
    p.add_argument("--questions", type=positive, default=4, help="grpo")
    p.add_argument("--rollouts", type=positive, default=8, help="grpo")
    p.add_argument("--max-new-tokens", type=positive, default=128, help="grpo")
    p.add_argument("--repeats", type=positive, default=5)
    args = p.parse_args()
    args.model = str(find(args.model))
    if args.stage in ONE:
        seconds, tokens = ONE[args.stage](args)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        return print("TURN " + json.dumps({"seconds": round(seconds, 2), "tokens": tokens, "tokens_per_second": round(tokens / seconds, 1), "peak_gib": round(peak, 2)}))
    turns = []
    for _ in range(args.repeats):
        for who in ("ours", "trl"):
            flags = [x for name in ("model", "data", "rows", "length", "questions", "rollouts", "max_new_tokens") for x in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]
            done = subprocess.run([sys.executable, __file__, f"{args.stage}-{who}", *flags], capture_output=True, text=True)
            line = next((line for line in done.stdout.splitlines() if line.startswith("TURN ")), None)
            if line is None:
                raise UserError(f"a turn of {who} failed:\n{done.stderr[-2000:]}")
            turns.append({"who": who, **json.loads(line[5:])})
            print(turns[-1], flush=True)
    conclude(f"{args.stage}-{Path(args.model).name}", args, turns, "tokens_per_second" if args.stage == "sft" else "seconds", "trl", better="higher" if args.stage == "sft" else "lower")


if __name__ == "__main__":
    command(main)
