"""One step of SFT or GRPO: tokens a second and the part of the machine's matrix rate, against TRL's trainer.

    python benchmarks/training.py sft --rows 64 --length 1024 --micro-batch-tokens 16384 --steps 5
    python benchmarks/training.py grpo --questions 32 --rollouts 16 --max-new-tokens 1024 --steps 3
    python benchmarks/training.py sft --model FOLDER --peers trl                        # for a CPU

Each turn is a process of its own. TRL is left at its defaults but for what the comparison fixes (dtype, the
rows of a step). Time is that of the last of --steps steps, without loading; memory is the peak of the
process, or of the GPU. The GRPO rewards are coins in both, so that every group has a gradient and nothing is
skipped.

MFU counts 6 flops a parameter and token (the head included, the embedding not) and 6 T C a layer and token of
causal attention, over the rate of a large matrix product measured in the same process.
"""
import random
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

from common import (  # first of ours: it sets the path
    compare, folder_of, load_model, name_of, roofline,
    synchronize, torchs_own_settings,
)

import grpo
import sft
import tasks
from checkpoint import device_and_dtype, find_folder
from checkpoint.tokenizer import Tokenizer
from optimizer import MICRO_BATCH_TOKENS, Optimizer
from run.command import command, parser, positive
from run.processes import in_batches
from sample import Sampler


# ---- ours ----------------------------------------------------------------------------------------
def chat_rows(args, tokenizer):
    """Conversations whose last turn has --length tokens."""
    rng = random.Random(0)
    rows = []
    for _ in range(args.rows):
        numbers = " ".join(str(rng.randrange(100)) for _ in range(args.length))
        answer = tokenizer.decode(tokenizer.encode(numbers)[:args.length])
        rows.append([{"role": "user", "content": "Count."}, {"role": "assistant", "content": answer}])
    return rows


def flops(model, tokens, length):
    """Of a training step on `tokens` tokens in rows of `length`."""
    c = model.config
    body = sum(w.numel() for w in model.model.layers.parameters())
    head = model.vocab * c.hidden_size
    attention = 12 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * length / 2
    return tokens * (6 * (body + head) + attention)


def sft_ours(args):
    model, tokenizer = load_model(args.model, args)
    model.recompute = args.recompute
    _, rate = roofline(model.device, model.dtype)
    examples = []
    for *before, last in chat_rows(args, tokenizer):
        prompt = tokenizer.chat(before)
        examples.append(sft.Example(prompt, tokenizer.encode_response(last["content"]), hundredth=0))
    tokens = sum(map(len, examples))
    optimizer = Optimizer(model, 1e-4)
    for _ in range(args.steps):
        synchronize(model.device)
        begun = time.perf_counter()
        for part in in_batches(examples, len, args.micro_batch_tokens):
            (sft.loss_of(model, part) / tokens).backward()
        optimizer.step(1e-6)
        synchronize(model.device)
        seconds = time.perf_counter() - begun
    mfu = flops(model, tokens, args.length) / seconds / rate
    return {"seconds": seconds, "tokens": tokens, "mfu": round(mfu, 3)}


def grpo_ours(args):
    model, tokenizer = load_model(args.model, args)
    model.recompute = args.recompute
    _, rate = roofline(model.device, model.dtype)
    task = tasks.find("countdown-3")
    problems = [(task, problem) for problem in task.problems("rl", args.questions)]
    flags = SimpleNamespace(**vars(args), reward="random", no_std=False, truncated="keep", loss="token-mean",
                            clip_low=0.2, clip_high=0.2, kl=0.0, temperature=1.0, lr=1e-6)
    optimizer = Optimizer(model, 0.0)
    sampler = Sampler(model, tokenizer, cache_fraction=grpo.SAMPLER_CACHE_FRACTION)
    for step in range(args.steps):
        synchronize(model.device)
        begun = time.perf_counter()
        groups = grpo.roll_out(sampler, problems, flags, step)
        synchronize(model.device)
        rollout_seconds = time.perf_counter() - begun
        grpo.update(model, None, optimizer, groups, flags)
        synchronize(model.device)
        seconds = time.perf_counter() - begun
    tokens = sum(len(c.tokens) for group in groups for c in group.completions)
    fed = sum(len(group.prompt) for group in groups) + tokens
    mfu = flops(model, fed, fed / len(groups) / args.rollouts) / (seconds - rollout_seconds) / rate
    return {"seconds": seconds, "tokens": tokens, "rollout_seconds": round(rollout_seconds, 3),
            "rollout_tokens_per_second": round(tokens / rollout_seconds, 1),
            "update_seconds": round(seconds - rollout_seconds, 3), "update_mfu": round(mfu, 3)}


# ---- TRL -----------------------------------------------------------------------------------------
def trl_seconds(trainer_class, config_class, args, data, **more):
    """Seconds of the last step of a TRL trainer at its defaults. `more` are its flags, and rewards."""
    from transformers import TrainerCallback
    torchs_own_settings()
    device, dtype = device_and_dtype(args.device, args.dtype)

    class StepTimer(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.started = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            self.seconds = time.perf_counter() - self.started
    timer = StepTimer()
    rewards = {"reward_funcs": more.pop("rewards")} if "rewards" in more else {}
    with tempfile.TemporaryDirectory() as out:
        config = config_class(
            output_dir=out, max_steps=args.steps, use_cpu=device.type == "cpu", bf16=False, report_to=[],
            save_strategy="no", model_init_kwargs={"dtype": name_of(dtype)}, learning_rate=1e-6, **more)
        trainer_class(args.model, args=config, train_dataset=data, callbacks=[timer], **rewards).train()
    return timer.seconds


def sft_trl(args):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    tokenizer = Tokenizer(find_folder(args.model))
    rows = chat_rows(args, tokenizer)
    data = Dataset.from_list([{"messages": messages} for messages in rows])
    seconds = trl_seconds(SFTTrainer, SFTConfig, args, data, per_device_train_batch_size=args.rows)
    tokens = sum(len(tokenizer.chat(row[:1]) + tokenizer.encode_response(row[1]["content"])) for row in rows)
    return {"seconds": seconds, "tokens": tokens}


def grpo_trl(args):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    task = tasks.find("countdown-3")
    data = Dataset.from_list([{"prompt": task.prompt(p)} for p in task.problems("rl", args.questions)])
    lengths = []

    def coin(completions, completion_ids, **_):
        lengths.extend(map(len, completion_ids))
        return [float(random.random() < 0.5) for _ in completions]

    seconds = trl_seconds(
        GRPOTrainer, GRPOConfig, args, data, rewards=coin, per_device_train_batch_size=args.rollouts,
        gradient_accumulation_steps=args.questions, num_generations=args.rollouts,
        max_completion_length=args.max_new_tokens, temperature=1.0)
    return {"seconds": seconds, "tokens": sum(lengths[-args.questions * args.rollouts:])}


# ---- the command ---------------------------------------------------------------------------------
TURNS = {"sft": {"ours": sft_ours, "trl": sft_trl}, "grpo": {"ours": grpo_ours, "trl": grpo_trl}}


def arguments():
    p = parser(__doc__, out=None, model="random")
    p.add_argument("stage", choices=list(TURNS))
    p.add_argument("--peers", choices=["none", "trl"], default="none")
    p.add_argument("--rows", type=positive, default=8, help="sft: rows of the step")
    p.add_argument("--length", type=positive, default=720, help="sft: tokens of a row, about")
    p.add_argument("--questions", type=positive, default=4, help="grpo")
    p.add_argument("--rollouts", type=positive, default=8, help="grpo")
    p.add_argument("--max-new-tokens", type=positive, default=128, help="grpo")
    p.add_argument("--micro-batch-tokens", type=positive, default=None, help="as in sft.py and grpo.py")
    p.add_argument("--recompute", action="store_true", help="as in sft.py and grpo.py (TRL's default)")
    p.add_argument("--steps", type=positive, default=1, help="of a turn; the last is timed")
    p.add_argument("--repeats", type=positive, default=5, help="turns of each")
    return p.parse_args()


def main():
    args = arguments()
    shape = Path(args.model).name
    device, dtype = device_and_dtype(args.device, args.dtype)
    args.micro_batch_tokens = args.micro_batch_tokens or MICRO_BATCH_TOKENS[device.type]
    args.model = folder_of(args.model, dtype)
    runs = {who: run for who, run in TURNS[args.stage].items() if who in ("ours", args.peers)}
    compare(f"{args.stage}-{shape}", args, runs)


if __name__ == "__main__":
    command(main)
