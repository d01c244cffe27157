"""The figures of the first three steps of SFT and GRPO on the miniature, on made-up rows."""
import random
from types import SimpleNamespace

import torch
from conftest import CHAT, MINI

import grpo
import sft
from checkpoint import load
from optimizer import Optimizer
from sample import Completion

ARGS = SimpleNamespace(truncated="keep", loss="token-mean", max_new_tokens=60, clip_low=0.2, clip_high=0.2,
                       kl=0.1, temperature=0.9, micro_batch_tokens=200, lr=1e-3)


def sft_losses():
    model, tokenizer = load(MINI, "cpu", "float32")
    optimizer = Optimizer(model, weight_decay=1e-4)
    rows = []
    for row in CHAT:
        prompt = tokenizer.chat(row["messages"][:1])
        answer = tokenizer.encode_response(row["messages"][1]["content"])
        rows.append(sft.Example(prompt, answer, hundredth=0))
    steps = []
    for step in range(3):
        batch = rows[8 * step:8 * step + 8]
        loss = sft.loss_of(model, batch) / sum(len(example.answer) for example in batch)
        loss.backward()
        steps.append([loss.item(), optimizer.step(1e-3)])
    return steps


def grpo_losses():
    model, tokenizer = load(MINI, "cpu", "float32")
    reference, _ = load(MINI, "cpu", "float32")
    optimizer = Optimizer(model, weight_decay=0.0)
    rng = random.Random(0)
    steps = []
    for _ in range(3):
        groups = []
        for number in range(3):
            prompt = [rng.randrange(40, 120) for _ in range(20)]
            completions = []
            for _ in range(4):
                tokens = [rng.randrange(40, 120) for _ in range(rng.randint(1, 50))] + [tokenizer.end_id]
                completions.append(Completion(prompt, tokens, [-9.0 for _ in tokens], "stop"))
            rewards = torch.tensor([float(rng.random() < 0.5) for _ in range(4)])
            advantages = grpo.advantages(rewards).tolist()
            groups.append(grpo.Group(number, None, None, prompt, completions, advantages=advantages))
        norm, sums = grpo.update(model, reference, optimizer, groups, ARGS)
        steps.append([sums["loss"], norm, sums["entropy"], sums["reference_kl"]])
    return steps
