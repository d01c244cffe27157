"""Supervised fine-tuning: raise the log-probability of traces.

    python sft.py --data silver.jsonl                           # the miniature, on a CPU
    python sft.py --model Qwen/Qwen2.5-1.5B-Instruct --epochs 2 --context 4096 --tokens-per-batch 65536
    torchrun --nproc-per-node 4 sft.py --model ... --data ...

Reads any chat JSONL whose last message is the assistant's. The loss is the mean over the tokens of that last
turn and its end token; nothing else has a gradient. The mean is over the whole step: how it is cut into
micro-batches or processes changes nothing but the rounding. A micro-batch is one flat row, so that nothing
is padded; each example in it attends to itself only.

Left out: LoRA, loss on earlier turns.
"""
import math
import random
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from run.command import (  # before torch: it says how threads wait
    Defaults, Progress, UserError, command, if_not_given, location, natural, number, parser, positive, say,
    split_list,
)

import torch
from torch import Tensor

from checkpoint import model_fingerprint
from checkpoint.tokenizer import Tokenizer
from model import Transformer, response_logprobs
from optimizer import Optimizer, check_finite, even_passes, publisher, start_training, training_flags
from report.page import renew
from run.files import file_fingerprint, read_jsonl, to_json
from run.processes import balanced, in_batches, total
from run.record import refuse_wrong_out
from run.run_folder import Run
from tasks import hundredth

DEFAULTS: Defaults = {"lr": (1.5e-3, 1e-6), "epochs": (3, 2)}


# ---- a row of chat data --------------------------------------------------------------------------
# Fields of a row or a turn that change what it says and cannot be used here. Empty ones say nothing.
UNSUPPORTED = ("tool_calls", "function_call", "refusal", "audio", "images", "videos", "tools", "functions",
               "documents", "chat_template_kwargs", "system")
TRAINED = ("weight", "loss_weight", "train", "training", "loss", "label")  # whether to train on it
REASONING = ("reasoning_content", "reasoning", "thinking")
NOT_MESSAGES = "messages must be a list of {role: system|user|assistant, content: text}"


def plain_messages(row: dict, where: str) -> list[dict]:
    """The messages of a row as {role, content}, two texts each, of which the last is trained.

    Reasoning becomes <think>, parts of a text are joined. Raises UserError, which names `where`.
    """
    messages = row["messages"]
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise UserError(f"{where}: {NOT_MESSAGES}")
    for holder in (row, *messages):
        refuse_unused(holder, holder is row or holder is messages[-1], where)
    plain = [{"role": message.get("role"), "content": text_of(message, where)} for message in messages]
    if len(plain) < 2 or plain[-1]["role"] != "assistant":
        raise UserError(f"{where}: the last of the messages must be the assistant's, "
                        "after at least one other")
    after_thought = plain[-1]["content"].rpartition("</think>")[2]
    if not after_thought.strip():
        raise UserError(f"{where}: the last turn is empty, which would teach silence; leave the row out")
    if "<think>" in after_thought:
        raise UserError(f"{where}: the <think> of the last turn is never closed; leave the row out")
    return plain


def refuse_unused(holder: dict, is_trained: bool, where: str) -> None:
    """Raises UserError for fields that cannot be used; only the last turn is trained."""
    for name in UNSUPPORTED:
        if holder.get(name):
            raise UserError(f"{where}: {name} is not supported; remove it, or leave the row out")
    for name in TRAINED if holder.get("role", "assistant") == "assistant" else ():  # a row has no role
        wanted = holder.get(name)
        if wanted is not None and wanted != is_trained:  # a weight of 1 is True, as Python has it
            raise UserError(f"{where}: {name} is {to_json(wanted)}, but the last turn of a row is trained "
                            "and no other; cut the conversation there, or leave the row out")


def text_of(message: dict, where: str) -> str:
    """What a turn says, its reasoning in <think>."""
    content = message.get("content")
    if isinstance(content, list) and all(_is_text_part(part) for part in content):
        content = "".join(part["text"] for part in content)
    if message.get("role") not in ("system", "user", "assistant") or not isinstance(content, str):
        raise UserError(f"{where}: {NOT_MESSAGES}")
    thought = next((message[name] for name in REASONING if message.get(name)), None)
    if thought is None:
        return content
    if not isinstance(thought, str) or message["role"] != "assistant" or "think>" in thought + content:
        raise UserError(f"{where}: reasoning must be text, of an assistant's turn, and neither it nor the "
                        "content may have <think>")
    return f"<think>\n{thought.strip()}\n</think>\n\n{content}"


def _is_text_part(part):
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


# ---- the data ------------------------------------------------------------------------------------
@dataclass
class Example:
    """A conversation as ids. The loss is on the answer: the last turn and its end token."""
    prompt: list[int]
    answer: list[int]
    hundredth: int  # 0..99, by a hash of the first question: `hold_out` divides there

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


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
            answer = tokenizer.encode_response(messages[-1]["content"])
            if len(prompt) + len(answer) > context:
                left_out += 1
            else:
                examples.append(Example(prompt, answer, hundredth(first_question(messages))))
    if left_out:
        say(f"left out {left_out} of {left_out + len(examples)} rows that are longer than --context "
            f"{context} tokens")
    if not examples:
        raise UserError(f"--data {paths}: every row is longer than --context {context} tokens; raise it")
    return examples


def first_question(messages: list[dict]) -> str:
    """What identifies a conversation: its first user turn, whatever the white space in it."""
    users = [message["content"] for message in messages if message["role"] == "user"]
    return " ".join(users[0].split()) if users else ""


def hold_out(examples: list[Example], args) -> tuple[list[Example], list[Example]]:
    """(those to train on, those to measure the loss on).

    All conversations that begin with one question are on the same side.
    """
    if not args.eval_every:
        return examples, []
    trained = [example for example in examples if example.hundredth >= args.held_out]
    held_out = [example for example in examples if example.hundredth < args.held_out]
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
    order = random.Random(f"{seed}/{epoch}").sample(examples, len(examples))
    return in_batches(order, len, tokens_per_batch, by_length=False)


# ---- the loss ------------------------------------------------------------------------------------
def loss_of(model: Transformer, examples: list[Example]) -> Tensor:
    """Minus the summed log-probability of the trained tokens, a scalar."""
    logp, _ = response_logprobs(model, [(example.prompt, [example.answer]) for example in examples])
    return -logp.sum()


@torch.no_grad()
def held_out_loss(model: Transformer, examples: list[Example], args) -> float:
    """The loss on examples that nothing is trained on, a mean over their trained tokens on all processes."""
    mine = in_batches(balanced(examples, len), len, args.micro_batch_tokens)
    loss = sum(loss_of(model, micro_batch).item() for micro_batch in mine)
    even_passes(model, len(mine))
    return total([loss])[0] / sum(len(example.answer) for example in examples)


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
    location(p.add_argument("--data", default="silver.jsonl", help="chat JSONL; several files with commas"))
    p.add_argument("--epochs", type=positive,
                   help=f"times through the data; {if_not_given(DEFAULTS['epochs'])}")
    p.add_argument("--lr", type=number(float, 0), help=f"at its peak; {if_not_given(DEFAULTS['lr'])}")
    p.add_argument("--tokens-per-batch", type=positive, default=1024, help="of one update, of all processes")
    p.add_argument("--context", type=positive, default=2048, help="leave out longer rows (paper: 4096)")
    training_flags(p)
    p.add_argument("--eval-every", type=natural, default=0, help="steps between measurements of the loss on "
                   "held-out rows, from before the first to after the last; 0: never, and none is held out")
    p.add_argument("--held-out", type=number(int, 1, 50), default=5,
                   help="with --eval-every: hundredths of the conversations, by a hash of the first question")
    p.set_defaults(weight_decay=1e-4, save_every=200)
    return p.parse_args()


def main():
    args = arguments()
    refuse_wrong_out(args.resume, Path(args.out), Path(args.out) / "run.json")
    model, tokenizer = start_training(args, DEFAULTS)
    longest = model.config.max_position_embeddings
    if args.context > longest:
        raise UserError(f"--context {args.context}: {args.model} has a context of {longest}")
    examples, held_out = hold_out(read_examples(args.data, tokenizer, args.context), args)
    batches = []
    for epoch in range(args.epochs):
        batches += make_batches(examples, args.tokens_per_batch, args.seed, epoch)
    steps = len(batches)
    optimizer = Optimizer(model, args.weight_decay, max_norm=args.max_norm)

    def measure():
        return {"val_loss": held_out_loss(model, held_out, args)}

    run = Run(args, partial(inputs, args), optimizer, publisher(optimizer, tokenizer), steps, measure,
              renew)
    say(f"{len(examples)} rows, {sum(map(len, examples)):,} tokens; {steps} steps, learning rate {args.lr:g}"
        + (f"; {len(held_out)} more rows are held out" if held_out else ""))

    with run.interruptible(), Progress("sft", steps, run.step) as progress:
        run.restore()
        for step in range(run.step + 1, steps + 1):
            started = time.time()
            batch = batches[step - 1]
            lr = learning_rate(step, steps, args.lr)
            count = sum(len(example.answer) for example in batch)  # of the whole step, on every process
            mine = in_batches(balanced(batch, len), len, args.micro_batch_tokens)
            losses = []  # of the micro-batches
            for micro_batch in mine:
                loss = loss_of(model, micro_batch) / count
                loss.backward()
                losses.append(loss.detach().double())
            even_passes(model, len(mine))
            loss, = total([float(sum(losses))])
            check_finite(loss, "loss")
            norm = optimizer.step(lr)
            speed = sum(map(len, batch)) / (time.time() - started)
            run.log({"step": step, "loss": loss, "lr": lr, "grad_norm": norm, "tokens": count,
                     "tokens_per_second": round(speed, 1)})
            progress.update(**{"loss": f"{loss:.3f}", "norm": f"{norm:.2f}", "tokens/s": f"{speed:,.0f}"})
            run.end_of_step(step, step)
    if run.step >= steps:
        say(f"{run.out} is finished already")
        return
    say(f"wrote {run.out}: loss {loss:.4f} at the last step")


def inputs(args) -> dict:
    """Fingerprints of what is read."""
    files = [file_fingerprint(path) for path in split_list(args.data, "--data")]
    return {"--model": model_fingerprint(args.model), "--data": files}


if __name__ == "__main__":
    command(main, resumable=True)
