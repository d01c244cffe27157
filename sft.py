"""Supervised fine-tuning: raise the log-probability of traces.

    python sft.py --data silver.jsonl                           # the miniature, on a CPU
    python sft.py --model Qwen/Qwen2.5-1.5B-Instruct --epochs 2 --context 4096 --tokens-per-batch 65536
    torchrun --nproc-per-node 4 sft.py --model ... --data ...

Reads any chat JSONL whose last message is the assistant's. The loss is the mean over the tokens of that last
turn and its end token; nothing else has a gradient. The mean is over the whole step: how it is cut into
micro-batches or processes changes nothing but the rounding.

Left out: packing several rows into one (a micro-batch holds rows of similar length instead), LoRA, loss on
earlier turns.
"""
import math
import random
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from checkpoint import device_and_dtype, load
from cli import UserError, command, natural, number, parser, positive, split_list
from conversations import plain_messages
from files import read_jsonl
from model import Transformer
from processes import balanced, evenly, start_processes, total, world
from record import file_fingerprints, model_fingerprint, refuse_wrong_out
from run import Run, interruptible
from screen import Progress, say
from tasks import hundredth
from tokenizer import Tokenizer
from train import Optimizer, check_finite, lr_or_default, micro_batches, settle_flags, training_flags

MINIATURE_LR = 1.5e-3
MINIATURE_EPOCHS = 3


# ---- the data ------------------------------------------------------------------------------------
@dataclass
class Example:
    """A conversation as ids. The loss is on ids[start:], the last turn and its end token."""
    ids: list[int]
    start: int
    # 0..99, by a hash of the first question: `hold_out` divides there.
    place: int = field(default=0, compare=False)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def targets(self) -> list[int]:
        return self.ids[self.start:]


def read_examples(paths: str, tokenizer: Tokenizer, context: int) -> list[Example]:
    """The examples of chat JSONL files (names with commas between).

    Rows over the context are left out, and counted.
    """
    examples = []
    left_out = 0
    for path in split_list(paths, "--data"):
        for where, row in read_jsonl(path, ("messages",)):
            messages = plain_messages(row, where)
            prompt = tokenizer.chat(messages[:-1])
            answer = tokenizer.response(messages[-1]["content"])
            if len(prompt) + len(answer) > context:
                left_out += 1
            else:
                examples.append(Example(prompt + answer, len(prompt), hundredth(first_question(messages))))
    if left_out:
        say(f"left out {left_out} of {left_out + len(examples)} rows that are longer than --context "
            f"{context} tokens")
    if not examples:
        raise UserError(f"--data {paths}: every row is longer than --context {context} tokens; raise it")
    return examples


def first_question(messages: list[dict]) -> str:
    """What identifies a conversation: its first user turn, whatever the white space in it."""
    asked = [message["content"] for message in messages if message["role"] == "user"]
    return " ".join(asked[0].split()) if asked else ""


def hold_out(examples: list[Example], args) -> tuple[list[Example], list[Example]]:
    """(those to train on, those to measure the loss on).

    All conversations that begin with one question are on the same side.
    """
    if not args.eval_every:
        return examples, []
    trained = [example for example in examples if example.place >= args.held_out]
    held_out = [example for example in examples if example.place < args.held_out]
    if not trained or not held_out:
        raise UserError(f"--held-out {args.held_out}: that is {len(held_out)} of the {len(examples)} rows; "
                        "another share, or more rows, leaves some on both sides")
    return trained, held_out


def make_batches(
    examples: list[Example], tokens_per_batch: int, seed: int, epoch: int,
) -> list[list[Example]]:
    """One epoch as batches of at most `tokens_per_batch` tokens (or of one longer example), a step each.

    The order depends on (seed, epoch) only.
    """
    order = random.Random(f"{seed}/{epoch}").sample(range(len(examples)), len(examples))
    batches = [[]]
    size = 0
    for i in order:
        example = examples[i]
        if batches[-1] and size + len(example) > tokens_per_batch:
            batches.append([])
            size = 0
        batches[-1].append(example)
        size += len(example)
    return batches


def all_batches(examples: list[Example], args, model: Transformer) -> list[list[Example]]:
    """The batches of all epochs."""
    epochs = args.epochs or (MINIATURE_EPOCHS if model.is_miniature else 2)
    batches = []
    for epoch in range(epochs):
        batches += make_batches(examples, args.tokens_per_batch, args.seed, epoch)
    return batches


# ---- the loss ------------------------------------------------------------------------------------
def loss_of(model: Transformer, examples: list[Example]) -> Tensor:
    """Minus the summed log-probability of the trained tokens, a scalar.

    Rows are padded on the right. Lengths say what is trained, never a comparison with a pad id: that would
    drop the end token wherever the two are the same.
    """
    # The last token of a row is predicted but never fed.
    width = max(len(example) for example in examples) - 1
    rows, positions, targets = [], [], []
    tokens = torch.zeros(len(examples), width, dtype=torch.long)  # (B, T)
    for b, example in enumerate(examples):
        fed = example.ids[:-1]
        tokens[b, :len(fed)] = torch.tensor(fed)
        # Position t predicts token t + 1: tokens start..len-1 are predicted at positions start-1..len-2.
        predicting = range(example.start - 1, len(fed))
        rows += [b] * len(predicting)
        positions += predicting
        targets += example.targets
    rows = torch.tensor(rows, device=model.device)  # (N,)
    positions = torch.tensor(positions, device=model.device)  # (N,)
    targets = torch.tensor(targets, device=model.device)  # (N,)
    hidden = model(tokens.to(model.device))  # (B, T, C)
    logp, _ = model.logprobs(hidden[rows, positions], targets)  # (N,)
    return -logp.sum()


@torch.no_grad()
def held_out_loss(model: Transformer, examples: list[Example], args) -> float:
    """The loss on examples that nothing is trained on, a mean over their trained tokens on all processes."""
    mine = micro_batches(balanced(examples, len), len, args.micro_batch_tokens)
    loss = 0.0
    for part in evenly(mine, model.device):
        one = loss_of(model, part or examples[:1])  # sharded weights come only if all processes run
        loss += one.item() if part else 0.0
    return total([loss], model.device)[0] / sum(len(example.targets) for example in examples)


def learning_rate(step: int, steps: int, peak: float, warmup: float = 0.05) -> float:
    """Linear warm-up over the first 5% of the steps, then a cosine to 0. Steps count from 1."""
    rising = max(1, round(warmup * steps))
    if step <= rising:
        return peak * step / rising
    # The angle reaches pi after the last step, which still has a small rate.
    angle = math.pi * (step - rising) / (steps - rising + 1)
    return peak * 0.5 * (1 + math.cos(angle))


# ---- the command ---------------------------------------------------------------------------------
def arguments():
    p = parser(__doc__, out="out/sft")
    p.add_argument("--data", default="silver.jsonl", help="chat JSONL; several files with commas")
    p.add_argument("--epochs", type=positive, default=None,
                   help="times through the data; if not given, the paper's 2, "
                        f"or {MINIATURE_EPOCHS} for a model under 10M parameters")
    p.add_argument("--lr", type=number(float, 0), default=None,
                   help="peak learning rate; if not given, the paper's 1e-6, "
                        f"or {MINIATURE_LR:g} for a model under 10M parameters")
    p.add_argument("--tokens-per-batch", type=positive, default=1024,
                   help="tokens of one optimizer step, over all processes")
    p.add_argument("--context", type=positive, default=2048,
                   help="leave out rows longer than this many tokens (the paper: 4096)")
    training_flags(p)
    p.add_argument("--eval-every", type=natural, default=0,
                   help="steps between measurements of the loss on rows that are held out from training, the "
                        "last after the last step; 0: never, and no row is held out")
    p.add_argument("--held-out", type=number(int, 1, 50), default=5,
                   help="with --eval-every: hundredths of the conversations that are held out, by a hash of "
                        "their first question")
    p.set_defaults(weight_decay=1e-4, save_every=200)
    return p.parse_args()


def main():
    args = arguments()
    refuse_wrong_out(args.resume, Path(args.out))
    device, _ = device_and_dtype(args.device)
    settle_flags(args, device)
    start_processes(device, args.timeout)
    model, tokenizer = load(
        args.model, args.device, args.dtype, args.chat_template_kwargs, on_host=world() > 1)
    args.chat_template_kwargs = tokenizer.template_kwargs
    longest = model.config.max_position_embeddings
    if args.context > longest:
        raise UserError(f"--context {args.context}: {args.model} has a context of {longest}")
    examples, held_out = hold_out(read_examples(args.data, tokenizer, args.context), args)

    run = Run(args, lambda: {"--model": model_fingerprint(args.model),
                             "--data": file_fingerprints(split_list(args.data, "--data"))})
    optimizer = Optimizer(model, args.weight_decay, max_norm=args.max_norm)
    run.restore(optimizer, tokenizer)
    model.recompute = args.recompute
    peak = lr_or_default(args.lr, model, MINIATURE_LR)
    batches = all_batches(examples, args, model)
    steps = len(batches)
    say(f"{len(examples)} rows, {sum(map(len, examples)):,} tokens; {steps} steps, learning rate {peak:g}")
    if held_out:
        say(f"{len(held_out)} more rows are held out")
    if run.step >= steps:
        say(f"{run.out} is finished already")
        return

    with interruptible(device) as asked, Progress("sft", steps, run.step) as progress:
        for step in range(run.step + 1, steps + 1):
            started = time.time()
            batch = batches[step - 1]
            lr = learning_rate(step, steps, peak)
            count = sum(len(example.targets) for example in batch)  # of the whole step, on every process
            mine = micro_batches(balanced(batch, len), len, args.micro_batch_tokens)
            my_loss = torch.zeros((), dtype=torch.float64, device=device)
            for part in evenly(mine, device):
                if part is None:  # only for the sake of the others, who need this process's weights
                    (0 * loss_of(model, batch[:1])).backward()
                    continue
                micro = loss_of(model, part) / count
                micro.backward()
                my_loss += micro.detach()
            loss, = total([my_loss.item()], device)
            check_finite(loss, "loss")
            norm = optimizer.step(lr)
            speed = sum(map(len, batch)) / (time.time() - started)
            row = {"step": step, "loss": loss, "lr": lr, "grad_norm": norm, "tokens": count,
                   "tokens_per_second": round(speed, 1)}
            shown = {"loss": f"{loss:.3f}", "norm": f"{norm:.2f}", "tokens/s": f"{speed:,.0f}"}
            if held_out and (step % args.eval_every == 0 or step == steps):
                row["val_loss"] = held_out_loss(model, held_out, args)
                shown["val_loss"] = f"{row['val_loss']:.3f}"
            run.log(row)
            progress.update(**shown)
            run.end_of_step(optimizer, tokenizer, asked, step=step, last=steps, updates=step)
    say(f"wrote {run.out}: loss {loss:.4f} at the last step")


if __name__ == "__main__":
    command(main)
