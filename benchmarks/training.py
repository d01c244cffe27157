"""One step of SFT or GRPO: tokens a second and the part of the machine's matrix rate, against TRL's trainer.

    python benchmarks/training.py sft --rows 64 --length 1024 --micro-batch-tokens 16384 --steps 5
    python benchmarks/training.py grpo --questions 32 --rollouts 16 --max-new-tokens 1024 \\
        --micro-batch-tokens 16384 --steps 3
    python benchmarks/training.py sft --model FOLDER --data silver.jsonl --peers trl     # for a CPU
    python benchmarks/training.py grpo --model FOLDER --peers trl                        # for a CPU
    python benchmarks/training.py sft --model mini --rows 2 --length 64 --repeats 1      # to see that it runs

Each turn is a process of its own. TRL is left at its defaults but for what the comparison fixes (dtype, the
rows of a step). Time is that of the last of --steps steps, without loading; memory is the peak of the
process, or of the GPU. Without --data, rows are random ids. The GRPO rewards are coins in both, so that every
group has a gradient and nothing is skipped.

MFU counts 6 flops a parameter and token (the head included, the embedding not) and 6 T C a layer and token of
causal attention, over the rate of a large matrix product measured in the same process.
"""
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from types import SimpleNamespace

from common import (  # first of ours: it sets the path
    compare, folder_of, load_model, name_of, refuse_missing, roofline, short_name, synchronize,
    torchs_own_settings,
)

import torch

import grpo
import sft
import tasks
from checkpoint import device_and_dtype, find_folder
from cli import UserError, command, parser, positive
from files import read_jsonl
from sample import Params, Sampler
from tokenizer import Tokenizer
from train import Optimizer, micro_batches, settle_flags


# ---- ours ----------------------------------------------------------------------------------------
def chat_rows(args, tokenizer):
    """(the first --rows chat rows whose length is within 15% of --length, their tokens)."""
    chosen, tokens = [], 0
    for _, row in read_jsonl(args.data, ("messages",)):
        *before, answer = row["messages"]
        n = len(tokenizer.chat(before)) + len(tokenizer.encode(answer["content"])) + 1
        if abs(n - args.length) <= 0.15 * args.length:
            chosen.append(row)
            tokens += n
        if len(chosen) == args.rows:
            return chosen, tokens
    raise UserError(f"--data {args.data}: fewer than {args.rows} rows of about {args.length} tokens")


def flops(model, tokens, length):
    """Of a training step on `tokens` tokens in rows of `length`."""
    c = model.config
    body = sum(w.numel() for w in model.model.layers.parameters())
    head = model.vocab * c.hidden_size
    attention = 12 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * length / 2
    return tokens * (6 * (body + head) + attention)


def started(args):
    """(model, tokenizer, device, flop/s of a large matrix product)."""
    device, dtype = device_and_dtype(args.device, args.dtype)
    model, tokenizer = load_model(args.model, args)
    model.recompute = args.recompute
    _, rate = roofline(device, dtype)
    return model, tokenizer, device, rate


def sft_examples(args, model, tokenizer):
    """(the examples of a step, their tokens)."""
    if not args.data:
        rng = random.Random(0)
        examples = []
        for _ in range(args.rows):
            ids = [rng.randrange(10, model.vocab) for _ in range(args.length)]
            examples.append(sft.Example(ids, start=1))
        return examples, args.rows * args.length
    chosen, tokens = chat_rows(args, tokenizer)
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as f:
        f.writelines(json.dumps(row) + "\n" for row in chosen)
        f.flush()
        return sft.read_examples(f.name, tokenizer, 8192), tokens


def sft_ours(args):
    model, tokenizer, device, rate = started(args)
    examples, tokens = sft_examples(args, model, tokenizer)
    optimizer = Optimizer(model, 1e-4)
    for _ in range(args.steps):
        synchronize(device)
        begun = time.perf_counter()
        for part in micro_batches(examples, len, args.micro_batch_tokens):
            (sft.loss_of(model, part) / tokens).backward()
        optimizer.step(1e-6)
        synchronize(device)
        seconds = time.perf_counter() - begun
    mfu = flops(model, tokens, args.length) / seconds / rate
    return {"seconds": seconds, "tokens": tokens, "mfu": round(mfu, 3)}


def grpo_ours(args):
    model, tokenizer, device, _ = started(args)
    task = tasks.find("countdown-3")
    problems = [(task, problem) for problem in task.problems("rl", args.questions)]
    flags = SimpleNamespace(
        rollouts=args.rollouts,
        seed=0,
        reward="random",
        no_std=False,
        log_groups=0,
        truncated="keep",
        loss="token-mean",
        max_new_tokens=args.max_new_tokens,
        clip_low=0.2,
        clip_high=0.2,
        kl=0.0,
        temperature=1.0,
        micro_batch_tokens=args.micro_batch_tokens,
    )
    optimizer = Optimizer(model, 0.0)
    sampler = Sampler(model, tokenizer, cache_fraction=grpo.SAMPLER_CACHE_FRACTION)
    for step in range(args.steps):
        synchronize(device)
        begun = time.perf_counter()
        groups = grpo.roll_out(sampler, problems, flags, Params(args.max_new_tokens), step)
        synchronize(device)
        rollout_seconds = time.perf_counter() - begun
        grpo.update(model, None, optimizer, groups, flags, lr=1e-6)
        synchronize(device)
        seconds = time.perf_counter() - begun
    tokens = sum(len(c.tokens) for group in groups for c in group.completions)
    # Scoring and weight sync are no stages: the sampler's log-probabilities are the old ones, its weights the
    # trained ones.
    return {
        "seconds": seconds,
        "tokens": tokens,
        "rollout_seconds": round(rollout_seconds, 3),
        "rollout_tokens_per_second": round(tokens / rollout_seconds, 1),
        "update_seconds": round(seconds - rollout_seconds, 3),
    }


# ---- TRL -----------------------------------------------------------------------------------------
def step_timer():
    """A TRL callback that times the last step."""
    from transformers import TrainerCallback

    class StepTimer(TrainerCallback):
        seconds = 0.0

        def on_step_begin(self, *args, **kwargs):
            self.started = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            self.seconds = time.perf_counter() - self.started
    return StepTimer()


def trl_flags(args, out):
    torchs_own_settings()
    device, dtype = device_and_dtype(args.device, args.dtype)
    return {
        "output_dir": out,
        "max_steps": args.steps,
        "use_cpu": device.type == "cpu",
        "bf16": False,
        "report_to": [],
        "save_strategy": "no",
        "model_init_kwargs": {"dtype": name_of(dtype)},
        "learning_rate": 1e-6,
    }


def sft_trl(args):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    chosen, tokens = chat_rows(args, Tokenizer(find_folder(args.model)))
    data = Dataset.from_list([{"messages": row["messages"]} for row in chosen])
    timer = step_timer()
    with tempfile.TemporaryDirectory() as out:
        config = SFTConfig(per_device_train_batch_size=args.rows, **trl_flags(args, out))
        SFTTrainer(args.model, args=config, train_dataset=data, callbacks=[timer]).train()
    return {"seconds": timer.seconds, "tokens": tokens}


def grpo_trl(args):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    task = tasks.find("countdown-3")
    problems = task.problems("rl", args.questions)
    data = Dataset.from_list([{"prompt": task.prompt(problem)} for problem in problems])
    timer = step_timer()
    lengths = []

    def coin(completions, completion_ids, **_):
        lengths.extend(map(len, completion_ids))
        return [float(random.random() < 0.5) for _ in completions]

    with tempfile.TemporaryDirectory() as out:
        config = GRPOConfig(
            per_device_train_batch_size=args.rollouts,
            gradient_accumulation_steps=args.questions,
            num_generations=args.rollouts,
            max_completion_length=args.max_new_tokens,
            temperature=1.0,
            **trl_flags(args, out),
        )
        GRPOTrainer(args.model, reward_funcs=coin, args=config, train_dataset=data, callbacks=[timer]).train()
    return {"seconds": timer.seconds, "tokens": sum(lengths[-args.questions * args.rollouts:])}


# ---- the command ---------------------------------------------------------------------------------
TURNS = {"sft-ours": sft_ours, "sft-trl": sft_trl, "grpo-ours": grpo_ours, "grpo-trl": grpo_trl}
PASSED_ON = ("model", "data", "rows", "length", "questions", "rollouts", "max_new_tokens",
             "micro_batch_tokens", "steps", "device", "dtype")


def arguments():
    p = parser(__doc__, out=None, model="qwen2.5-0.5b")
    p.add_argument("stage", choices=["sft", "grpo", *TURNS],
                   help="sft or grpo; the others run one turn and print it")
    p.add_argument("--peers", choices=["none", "trl"], default="none",
                   help="trl (for sft it needs --data) or none")
    p.add_argument("--data", default="", help="sft: chat rows; without it, random ids")
    p.add_argument("--rows", type=positive, default=8, help="sft: rows of the step")
    p.add_argument("--length", type=positive, default=720, help="sft: tokens of a row, about")
    p.add_argument("--questions", type=positive, default=4, help="grpo")
    p.add_argument("--rollouts", type=positive, default=8, help="grpo")
    p.add_argument("--max-new-tokens", type=positive, default=128, help="grpo")
    p.add_argument("--micro-batch-tokens", type=positive, default=None, help="as in sft.py and grpo.py")
    p.add_argument("--recompute", action="store_true",
                   help="as in sft.py and grpo.py (TRL recomputes by default)")
    p.add_argument("--steps", type=positive, default=1,
                   help="steps of a turn; the last is timed (on a GPU the first compiles)")
    p.add_argument("--repeats", type=positive, default=5, help="turns of each")
    args = p.parse_args()
    if args.peers == "trl":
        refuse_missing("trl")
        if args.stage == "sft" and not args.data:
            raise UserError("--peers trl: give --data, for TRL reads chat rows")
    return args


def run_turn(args):
    """One turn in this process; its figures are printed for the process that started it."""
    figures = TURNS[args.stage](args)
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 2**30
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    seconds = figures["seconds"]
    figures["seconds"] = round(seconds, 3)
    figures["tokens_per_second"] = round(figures["tokens"] / seconds, 1)
    figures["peak_gib"] = round(peak, 2)
    print("TURN " + json.dumps(figures))


def turns_of(who, args):
    """A function that runs one turn of `who` in a process of its own and returns its figures."""
    flags = ["--recompute"] if args.recompute else []
    for name in PASSED_ON:
        flags += [f"--{name.replace('_', '-')}", str(getattr(args, name))]

    def run(repeat):
        command = [sys.executable, __file__, f"{args.stage}-{who}", *flags]
        done = subprocess.run(command, capture_output=True, text=True)
        for line in done.stdout.splitlines():
            if line.startswith("TURN "):
                return json.loads(line.removeprefix("TURN "))
        raise UserError(f"a turn of {who} failed:\n{done.stderr[-2000:]}")
    return run


def main():
    args = arguments()
    shape = short_name(args.model)
    device, dtype = device_and_dtype(args.device, args.dtype)
    settle_flags(args, device)
    args.model = folder_of(args.model, dtype)
    if args.stage in TURNS:
        run_turn(args)
        return
    runs = {"ours": turns_of("ours", args)}
    if args.peers != "none":
        runs[args.peers] = turns_of(args.peers, args)
    if args.stage == "sft":
        compare(f"sft-{shape}", args, runs, "tokens_per_second")
    else:
        compare(f"grpo-{shape}", args, runs, "seconds", better="lower")


if __name__ == "__main__":
    command(main)
