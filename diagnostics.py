"""What a GRPO step tells: its figures, what in them needs attention, and rollouts that a person can read.

Groups, completions and grades are those of `grpo.py`.
"""
import time
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from cli import say
from processes import largest, rank, summed
from run import Run
from tokenizer import Tokenizer


# ---- sums over tokens ------------------------------------------------------------------------------
@dataclass
class Tokens:
    """The tokens of some responses: all tensors are (N,), one entry a token."""
    logp: Tensor
    entropy: Tensor
    old_logp: Tensor  # the sampler's
    advantage: Tensor
    weight: Tensor
    reference_logp: Tensor | None  # under a KL term only


class Statistics:
    """Sums over the tokens of a mini-batch, most of them over the trained ones, which have an advantage."""
    NAMES = ("loss", "trained_tokens", "clip_fraction", "approx_kl", "reference_kl", "reference_tokens",
             "entropy", "difference")

    def __init__(self):
        self.sums = dict.fromkeys(self.NAMES, torch.zeros(()))
        self.largest_difference = torch.zeros(())  # of sampler and trainer, at one token

    @torch.no_grad()
    def add(self, tokens: Tokens, loss: Tensor, clip_low: float, clip_high: float) -> None:
        trained = tokens.advantage != 0
        log_ratio = tokens.logp - tokens.old_logp
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
        values = {
            "loss": loss,
            "trained_tokens": trained.sum(),
            "clip_fraction": (ratio * tokens.advantage > clipped * tokens.advantage).sum(),
            "approx_kl": torch.where(trained, ratio - 1 - log_ratio, 0).sum(),
            "entropy": torch.where(trained, tokens.entropy, 0).sum(),
            "difference": torch.where(trained, log_ratio.abs(), 0).sum(),
        }
        if tokens.reference_logp is not None:
            gap = tokens.reference_logp - tokens.logp
            values["reference_kl"] = (gap.exp() - gap - 1).sum()
            values["reference_tokens"] = torch.tensor(len(gap))
        for name, value in values.items():
            self.sums[name] = self.sums[name].to(value.device) + value.double()
        most = log_ratio.abs().max()
        self.largest_difference = torch.maximum(self.largest_difference.to(most.device), most)

    def over_all_processes(self) -> dict[str, float]:
        sums = summed({name: value.item() for name, value in self.sums.items()})
        return {**sums, "largest_difference": largest(self.largest_difference.item())}


# ---- figures -------------------------------------------------------------------------------------
def measure(groups: list, update_results: list[tuple]) -> dict:
    """The figures of a step: means per rollout or per trained token.

    `update_results`: the (gradient norm, sums) of each mini-batch. `loss`, without a KL term, is the sum of
    theirs, `grad_norm` the mean. A trained token is one of a response in the loss that has an advantage.
    """
    completions = [c for group in groups for c in group.completions]
    n = len(completions)
    norms = [norm for norm, _ in update_results if norm is not None]
    sums = {name: sum(s[name] for _, s in update_results) for name in Statistics.NAMES}
    trained = max(1, sums["trained_tokens"])
    reference_kl = None
    if sums["reference_tokens"]:
        reference_kl = sums["reference_kl"] / sums["reference_tokens"]
    row = {
        "reward": sum(sum(group.rewards) for group in groups) / n,
        "correct": sum(grade.correct for group in groups for grade in group.grades) / n,
        "groups_with_signal": sum(len(set(group.rewards)) > 1 for group in groups) / len(groups),
        "response_tokens": sum(len(c.tokens) for c in completions) / n,
        "truncated": sum(c.finish == "length" for c in completions) / n,
        "loss": sums["loss"],
        "grad_norm": sum(norms) / len(norms) if norms else None,
        "updates": len(norms),
        "entropy": sums["entropy"] / trained,
        "clip_fraction": sums["clip_fraction"] / trained,
        "approx_kl": sums["approx_kl"] / trained,
        "reference_kl": reference_kl,
        "sampler_trainer_mean": None,
        "sampler_trainer_max": None,
    }
    # At the first update the weights are still those that sampled: here sampler and trainer must agree.
    first = next((s for norm, s in update_results if norm is not None), None)
    if first and first["trained_tokens"]:
        row["sampler_trainer_mean"] = first["difference"] / first["trained_tokens"]
        row["sampler_trainer_max"] = first["largest_difference"]
    return row


# ---- warnings ------------------------------------------------------------------------------------
def warnings_of(row: dict, context_cuts: bool = False) -> dict[str, str]:
    """{what in the figures of a step needs attention: why, and what to try}

    `context_cuts`: it is the model's context that ends responses, not their budget.
    """
    found = {}
    if row["truncated"] > 0.9:
        where, cure = "budget", "raise --max-new-tokens"
        if context_cuts:
            where, cure = "end of the model's context", "only a model with a longer one helps"
        found["truncated"] = f"{row['truncated']:.0%} of the responses were cut off at the {where}; {cure}"
    if not row["groups_with_signal"]:
        found["no signal"] = (
            "within every group all rewards are equal, so nothing was learned; the questions are too hard or "
            "too easy for this model: try another --task, or more --rollouts")
    difference = row["sampler_trainer_mean"]
    if difference is not None and difference > 0.05:
        found["apart"] = (
            f"sampler and trainer disagree by {difference:.3f} nats a token; the rollouts are not the "
            "trained policy's: try --dtype float32, or KERNELS=reference before the command")
    return found


# ---- the log of a run ------------------------------------------------------------------------------
class StepLog:
    """Writes what the steps of a run tell, and warns once of each thing that needs attention."""

    def __init__(self, run: Run, tokenizer: Tokenizer, args, context_cuts: bool):
        self.run = run
        self.tokenizer = tokenizer
        self.args = args
        self.context_cuts = context_cuts
        self.warned = Counter()

    def start(self) -> None:
        self.started_at = time.time()

    def rolled_out(self) -> None:
        self.rolled_out_at = time.time()

    def write(self, step: int, groups: list, update_results: list[tuple], lr: float) -> dict:
        """Write a step's rollouts and its line of metrics.jsonl, which it returns. All processes call it."""
        row = {"step": step, **measure(groups, update_results), "lr": lr}
        seconds = self.rolled_out_at - self.started_at
        tokens = row["response_tokens"] * len(groups) * self.args.rollouts
        row["rollout_seconds"] = round(seconds, 3)
        row["update_seconds"] = round(time.time() - self.rolled_out_at, 3)
        row["rollout_tokens_per_second"] = round(tokens / seconds, 1)
        for name, text in warnings_of(row, self.context_cuts).items():
            if not self.warned[name]:
                say(f"warning, step {step}: {text} (said once)")
            self.warned[name] += 1
        for group in groups[:self.args.log_groups]:
            self.run.log(group_row(step, group, self.tokenizer), "rollouts.jsonl")
        if rank() == 0 and (step == 1 or step % 20 == 0):
            show_rollouts(groups[0], self.tokenizer, step)
        self.run.log(row)
        return row

    def say_warnings(self) -> None:
        for name, count in self.warned.items():
            say(f"warned of in {count} of {self.run.last - self.run.step} steps: {name}")


def group_row(step: int, group, tokenizer: Tokenizer) -> dict:
    """A line of rollouts.jsonl: a question with all that was sampled, in the order of the samples."""
    rollouts = []
    for i, completion in enumerate(group.completions):
        grade = group.grades[i]
        text = tokenizer.text(completion.tokens)
        rollouts.append({
            "response": text,
            "answer": grade.answer,
            "correct": grade.correct,
            "reason": grade.reason,
            "reward": group.rewards[i],
            "advantage": round(group.advantages[i], 5),
            "finish": completion.finish,
            "tokens": len(completion.tokens),
            **group.task.skills(group.problem, text),
            "ids": completion.tokens,
            "sampler_logprobs": [round(logp, 5) for logp in completion.logprobs],
        })
    return {
        "step": step,
        "task": group.task.name,
        "id": group.problem.id,
        "question": group.problem.question,
        "reference": group.problem.truth["answer"],
        "prompt": group.prompt,
        "rollouts": rollouts,
    }


def show_rollouts(group, tokenizer: Tokenizer, step: int) -> None:
    """Two rollouts on the screen that a person can read."""
    for completion, grade in list(zip(group.completions, group.grades, strict=True))[:2]:
        text = tokenizer.text(completion.tokens)
        if len(text) >= 800:
            text = f"{text[:400]} [...] {text[-400:]}"
        say(f"\n--- step {step}, {group.problem.id}: {'correct' if grade.correct else grade.reason}\n{text}")
