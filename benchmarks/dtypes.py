"""What bfloat16 costs and wins on this machine: sampler against trainer, greedy text, tokens a second.

    python benchmarks/dtypes.py --model FOLDER --device cpu

Differences are of log-probabilities, in nats a token: the sampler's against what the trainer computes for the
same tokens, in each dtype; and for greedy text, how many tokens are those of float32 before the first that is
not.
"""
import statistics
import time

from common import machine, name_of, short_name, write  # first of ours: it sets the path

import torch
from sampling import QUESTIONS

import grpo
from checkpoint import load
from cli import command, parser, positive
from sample import Params, Sampler


def common_length(a, b):
    """How many tokens two texts share from their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def measure(args, dtype):
    """(figures, greedy texts) of a dtype."""
    model, tokenizer = load(args.model, args.device, name_of(dtype))
    prompts = [tokenizer.chat([{"role": "user", "content": question}]) for question in QUESTIONS]
    sampler = Sampler(model, tokenizer)
    greedy = [c.tokens for c, in sampler.generate(prompts, 1, Params(args.max_new_tokens, 0))]
    speeds = []
    for seed in range(args.repeats):
        started = time.perf_counter()
        groups = sampler.generate(prompts, 4, Params(args.max_new_tokens), seed)
        speeds.append(sum(len(c.tokens) for group in groups for c in group) / (time.perf_counter() - started))
    differences = []
    with torch.no_grad():
        for prompt, group in zip(prompts, groups, strict=True):
            logp, _ = grpo.response_logprobs(model, [(prompt, [c.tokens for c in group])], 1.0)
            differences.append((logp.cpu() - torch.tensor([x for c in group for x in c.logprobs])).abs())
    differences = torch.cat(differences)
    return {
        "dtype": name_of(dtype),
        "sampler_trainer_mean": round(differences.mean().item(), 6),
        "sampler_trainer_max": round(differences.max().item(), 5),
        "tokens": len(differences),
        "tokens_per_second": [round(speed, 1) for speed in speeds],
    }, greedy


def main():
    p = parser(__doc__, out=None)
    p.add_argument("--max-new-tokens", type=positive, default=128)
    p.add_argument("--repeats", type=positive, default=3)
    args = p.parse_args()
    exact, reference = measure(args, torch.float32)
    rounded, greedy = measure(args, torch.bfloat16)
    shared = [common_length(a, b) for a, b in zip(reference, greedy, strict=True)]
    rounded["greedy_tokens_shared"] = shared
    rounded["of_tokens"] = [len(text) for text in reference]
    for row in (exact, rounded):
        print(row)
    print(f"{machine()}: greedy text is float32's for {statistics.median(shared)} tokens in the median")
    write(f"dtypes-{short_name(args.model)}", args, rows=[exact, rounded])


if __name__ == "__main__":
    command(main)
