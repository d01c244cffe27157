"""Supervised fine-tuning: raise the log-probability of traces.

    python sft.py --data silver.jsonl                                       # the miniature, on a CPU, in a minute
    python sft.py --model Qwen/Qwen2.5-1.5B-Instruct --data silver.jsonl --epochs 2 --context 4096 --tokens-per-batch 65536
    torchrun --nproc-per-node 4 sft.py --model ... --data ...

Reads any chat JSONL whose last message is the assistant's. The loss is the mean over the tokens of that last turn and its
end token; nothing else has a gradient. The mean is over the whole step: how it is cut into micro-batches or processes
changes nothing but the rounding.

Left out: packing several rows into one (a micro-batch holds rows of similar length instead), LoRA, loss on earlier turns.
"""
import math
import random
import time

import torch

from cli import UserError, command, number, parser, positive, read_jsonl
from model import device_and_dtype, load
from train import begin, check_finite, interruptible, micro_batches, progress, rank, say, start_processes, total, training_flags, world


def read_rows(paths, tokenizer, context):
    """[(ids, start)] of chat JSONL files: `start` is where the trained turn begins. Rows over the context are left out, and said."""
    rows, long = [], 0
    for path in paths.split(","):
        for i, row in enumerate(read_jsonl(path, ("messages",)), 1):
            messages = row["messages"]
            if not (isinstance(messages, list) and messages and all(isinstance(m, dict) and isinstance(m.get("content"), str)
                    and m.get("role") in ("system", "user", "assistant") for m in messages)):
                raise UserError(f"{path}: row {i}: messages must be a list of {{role: system|user|assistant, content: text}}")
            if messages[-1]["role"] != "assistant" or len(messages) < 2:
                raise UserError(f"{path}: row {i}: the last of the messages must be the assistant's, after at least one other")
            prompt = tokenizer.chat(messages[:-1])
            ids = prompt + tokenizer.encode(messages[-1]["content"]) + [tokenizer.end_id]
            if len(ids) > context:
                long += 1
            else:
                rows.append((ids, len(prompt)))
    if long:
        say(f"left out {long} of {long + len(rows)} rows that are longer than --context {context} tokens")
    if not rows:
        raise UserError(f"--data {paths}: every row is longer than --context {context} tokens; raise it")
    return rows


def make_batches(rows, tokens_per_batch, seed, epoch):
    """One epoch as lists of row indices, each list one optimizer step of at most about `tokens_per_batch` tokens, in an order
    that depends on (seed, epoch) only."""
    order = random.Random(f"{seed}/{epoch}").sample(range(len(rows)), len(rows))
    batches, size = [[]], 0
    for i in order:
        if batches[-1] and size + len(rows[i][0]) > tokens_per_batch:
            batches.append([])
            size = 0
        batches[-1].append(i)
        size += len(rows[i][0])
    return batches


def loss_of(model, rows):
    """Minus the summed log-probability of the trained tokens of `rows` [(ids, start)], padded on the right."""
    width = max(len(ids) for ids, _ in rows) - 1
    tokens = torch.tensor([ids[:-1] + [0] * (width - len(ids) + 1) for ids, _ in rows], device=model.device)  # (B, T)
    # Position t predicts token t + 1: the trained ones are start..len-1. Lengths decide, never a comparison with a pad id.
    at = [(b, t) for b, (ids, start) in enumerate(rows) for t in range(start - 1, len(ids) - 1)]
    targets = torch.tensor([i for ids, start in rows for i in ids[start:]], device=model.device)  # (N,)
    b, t = torch.tensor(at, device=model.device).T
    return -model.logprobs(model(tokens)[b, t], targets)[0].sum()


def learning_rate(step, steps, peak, warmup=0.05):
    """Linear warm-up over the first 5% of the steps, then a cosine to 0. Steps count from 1."""
    rising = max(1, round(warmup * steps))
    if step <= rising:
        return peak * step / rising
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / (steps - rising + 1)))  # 0 only after the last step


def main():
    p = parser(__doc__, out="out/sft")
    p.add_argument("--data", default="silver.jsonl", help="chat JSONL; several files with commas")
    p.add_argument("--epochs", type=positive, default=3, help="times through the data (the paper: 2)")
    p.add_argument("--lr", type=number(float, 0), default=None, help="peak learning rate; if not given, the paper's 1e-6, or 3e-3 for a model under 10M parameters")
    p.add_argument("--tokens-per-batch", type=positive, default=1024, help="tokens of one optimizer step, over all processes")
    p.add_argument("--context", type=positive, default=2048, help="leave out rows longer than this many tokens (the paper: 4096)")
    training_flags(p)
    p.set_defaults(weight_decay=1e-4, save_every=200)
    args = p.parse_args()

    start_processes(device_and_dtype(args.device)[0])
    model, tokenizer = load(args.model, args.device, args.dtype)
    if args.context > model.config.max_position_embeddings:
        raise UserError(f"--context {args.context}: {args.model} has a context of {model.config.max_position_embeddings}")
    rows = read_rows(args.data, tokenizer, args.context)
    run, optimizer, peak, done = begin(args, model, tokenizer, small=3e-3)
    plan = [batch for epoch in range(args.epochs) for batch in make_batches(rows, args.tokens_per_batch, args.seed, epoch)]
    say(f"{len(rows)} rows, {sum(len(ids) for ids, _ in rows):,} tokens; {len(plan)} steps, learning rate {peak:g}")

    with interruptible(model.device) as asked_to_stop, progress("sft", done, len(plan)) as bar:
        for step, batch in enumerate(plan[done:], done + 1):
            started = time.time()
            lr = learning_rate(step, len(plan), peak)
            count = sum(len(ids) - start for ids, start in (rows[i] for i in batch))  # of the whole step, on every process
            mine = batch[rank()::world()]
            loss = 0.0
            for group in micro_batches([len(rows[i][0]) for i in mine], args.micro_batch_tokens):
                micro = loss_of(model, [rows[mine[i]] for i in group]) / count
                micro.backward()
                loss += micro.item()
            loss = total([loss], model.device)[0]
            check_finite(loss, "loss")
            norm = optimizer.step(lr)
            run.log({"step": step, "loss": loss, "lr": lr, "grad_norm": norm, "tokens": count,
                     "tokens_per_second": round(sum(len(rows[i][0]) for i in batch) / (time.time() - started), 1)})
            bar.set_postfix(loss=f"{loss:.3f}", norm=f"{norm:.2f}")
            bar.update()
            run.end_of_step(asked_to_stop(), step, len(plan), step, model, tokenizer, optimizer)
    say(f"wrote {run.out}: loss {loss:.4f} at the last step" if done < len(plan) else f"{run.out} is finished already")


if __name__ == "__main__":
    command(main)
