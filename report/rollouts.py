"""What a GRPO step tells: its figures, what in them needs attention, and rollouts that a person can read.

Groups, completions and grades are those of `grpo.py`.
"""
import time

import torch
from torch import Tensor

from checkpoint.tokenizer import Tokenizer
from run.command import say
from run.processes import largest, rank, total
from run.run_folder import Run


# ---- sums over tokens ------------------------------------------------------------------------------
SUMS = ("loss", "trained_tokens", "clip_fraction", "approx_kl", "entropy", "difference", "reference_kl",
        "reference_tokens")


@torch.no_grad()
def sums_over(tokens, loss: Tensor, clip_low: float, clip_high: float) -> dict[str, Tensor]:
    """The SUMS over grpo's `Tokens`, most of them over the trained ones, which have an advantage.

    `difference` is that of sampler and trainer; `largest_difference` is the largest at one token.
    """
    trained = tokens.advantage != 0
    log_ratio = tokens.logp - tokens.old_logp
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    gap = log_ratio[:0]  # there is no reference
    if tokens.reference_logp is not None:
        gap = tokens.reference_logp - tokens.logp
    values = {
        "loss": loss,
        "trained_tokens": trained.sum(),
        "clip_fraction": (ratio * tokens.advantage > clipped * tokens.advantage).sum(),
        "approx_kl": torch.where(trained, ratio - 1 - log_ratio, 0).sum(),
        "entropy": torch.where(trained, tokens.entropy, 0).sum(),
        "difference": torch.where(trained, log_ratio.abs(), 0).sum(),
        "reference_kl": (gap.exp() - gap - 1).sum(),
        "reference_tokens": torch.tensor(len(gap)),
        "largest_difference": log_ratio.abs().max(),
    }
    return {name: value.double() for name, value in values.items()}


def over_all_processes(sums_of_each: list[dict[str, Tensor]]) -> dict[str, float]:
    """The sums over a mini-batch, from `sums_over` of each micro-batch of every process."""
    sums = total([float(sum(part[name] for part in sums_of_each)) for name in SUMS])
    largest_here = max((part["largest_difference"].item() for part in sums_of_each), default=0.0)
    return {**dict(zip(SUMS, sums, strict=True)), "largest_difference": largest(largest_here)}


# ---- figures -------------------------------------------------------------------------------------
def step_figures(groups: list, update_results: list[tuple]) -> dict:
    """The figures of a step: means per rollout or per trained token.

    `update_results`: the (gradient norm, sums) of each mini-batch. `loss` (without the KL term) is their
    sum, `grad_norm` their mean. A trained token is one of a response in the loss that has an advantage.
    """
    completions = [c for group in groups for c in group.completions]
    n = len(completions)
    norms = [norm for norm, _ in update_results if norm is not None]
    sums = {name: sum(s[name] for _, s in update_results) for name in SUMS}
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
def warnings_of(row: dict) -> dict[str, str]:
    """{name of a problem: what the figures of a step show, and what to try}"""
    warnings = {}
    if row["truncated"] > 0.9:
        warnings["truncated"] = (
            f"{row['truncated']:.0%} of the responses were cut off: raise --max-new-tokens, or, if it is the "
            "model's context that ends, take a model with a longer one")
    if not row["groups_with_signal"]:
        warnings["no signal"] = (
            "within every group all rewards are equal, so nothing was learned; the questions are too hard or "
            "too easy for this model: try another --task, or more --rollouts")
    difference = row["sampler_trainer_mean"]
    if difference is not None and difference > 0.05:
        warnings["apart"] = (
            f"sampler and trainer disagree by {difference:.3f} nats a token; the rollouts are not the "
            "trained policy's: try --dtype float32, or KERNELS=reference before the command")
    return warnings


# ---- the log of a run ------------------------------------------------------------------------------
class StepLog:
    """Writes what the steps of a run tell, and warns once of each thing that needs attention."""

    def __init__(self, run: Run, tokenizer: Tokenizer, args):
        self.run = run
        self.tokenizer = tokenizer
        self.args = args
        self.warned = set()

    def start(self) -> None:
        self.started_at = time.time()

    def rolled_out(self) -> None:
        self.rolled_out_at = time.time()

    def write(self, step: int, groups: list, update_results: list[tuple]) -> dict:
        """Write a step's rollouts and its line of metrics.jsonl, which it returns. All processes call it."""
        row = {"step": step, **step_figures(groups, update_results), "lr": self.args.lr}
        seconds = self.rolled_out_at - self.started_at
        tokens = row["response_tokens"] * len(groups) * self.args.rollouts
        row["rollout_seconds"] = round(seconds, 3)
        row["update_seconds"] = round(time.time() - self.rolled_out_at, 3)
        row["rollout_tokens_per_second"] = round(tokens / seconds, 1)
        for name, text in warnings_of(row).items():
            if name not in self.warned:
                say(f"warning, step {step}: {text} (said once)")
                self.warned.add(name)
        for group in groups[:self.args.log_groups] if rank() == 0 else ():
            self.run.log(group_row(step, group, self.tokenizer), "rollouts.jsonl")
        self.run.log(row)
        return row


def group_row(step: int, group, tokenizer: Tokenizer) -> dict:
    """A line of rollouts.jsonl: a question with all that was sampled, in the order of the samples."""
    rollouts = []
    for i, completion in enumerate(group.completions):
        text = tokenizer.decode_response(completion.tokens)
        rollouts.append({
            **group.task.shown(group.problem, text, len(completion.tokens), completion.finish),
            "reward": group.rewards[i],
            "advantage": round(group.advantages[i], 5),
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
