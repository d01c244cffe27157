"""What a GRPO step tells: its figures, what in them needs attention, and rollouts that a person can read.

Groups, completions and grades are those of `grpo.py`.
"""
import torch

from processes import summed
from run import Run
from screen import say
from tokenizer import Tokenizer

# What `grpo.policy_loss` and `grpo.backward` add up over tokens.
SUMMED = ("loss", "trained_tokens", "clip_fraction", "approx_kl", "reference_kl", "reference_tokens",
          "entropy", "difference")


# ---- figures -------------------------------------------------------------------------------------
def measure(groups: list, update_results: list[tuple], device: torch.device) -> dict:
    """The figures of a step over all processes: means per rollout or per trained token.

    `update_results`: the (gradient norm, sums) of each mini-batch. `loss`, without a KL term, is the sum of
    theirs, `grad_norm` the mean. A trained token is one of a response in the loss that has an advantage.
    """
    completions = [c for group in groups for c in group.completions]
    counts = summed({
        "groups": len(groups),
        "mixed": sum(len(set(group.rewards)) > 1 for group in groups),
        "rollouts": len(completions),
        "reward": sum(sum(group.rewards) for group in groups),
        "correct": sum(grade.correct for group in groups for grade in group.grades),
        "tokens": sum(len(c.tokens) for c in completions),
        "truncated": sum(c.finish == "length" for c in completions),
    }, device)
    n = counts["rollouts"]
    norms = [norm for norm, _ in update_results if norm is not None]
    sums = {name: sum(s[name] for _, s in update_results) for name in SUMMED}
    trained = max(1, sums["trained_tokens"])
    row = {
        "reward": counts["reward"] / n,
        "correct": counts["correct"] / n,
        "groups_with_signal": counts["mixed"] / counts["groups"],
        "response_tokens": counts["tokens"] / n,
        "truncated": counts["truncated"] / n,
        "loss": sums["loss"],
        "grad_norm": sum(norms) / len(norms) if norms else None,
        "updates": len(norms),
        "entropy": sums["entropy"] / trained,
        "clip_fraction": sums["clip_fraction"] / trained,
        "approx_kl": sums["approx_kl"] / trained,
        "reference_kl": sums["reference_kl"] / max(1, sums["reference_tokens"]),
        "sampler_trainer_mean": None,
        "sampler_trainer_max": None,
    }
    # At the first update the weights are still those that sampled: here sampler and trainer must agree.
    first = next((s for _, s in update_results if s["trained_tokens"]), None)
    if first:
        row["sampler_trainer_mean"] = first["difference"] / first["trained_tokens"]
        row["sampler_trainer_max"] = first["largest_difference"]
    return row


# ---- warnings ------------------------------------------------------------------------------------
def warnings_of(row: dict, context_cuts: bool = False, rewards: list[float] = ()) -> dict[str, str]:
    """{what in the figures of a step needs attention: why, and what to try}

    `context_cuts`: it is the model's context that ends responses, not their budget. `rewards` are those of
    all steps so far.
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
    best, now = collapse(rewards)
    if now < best / 2:
        found["collapsed"] = (
            f"the mean reward of {WINDOW} steps has fallen from {best:.3f} to {now:.3f}; start another run "
            "with a lower --lr, or from an earlier model (--keep, --eval-every)")
    return found


WINDOW = 5  # steps


def collapse(rewards: list[float]) -> tuple[float, float]:
    """(the best mean of WINDOW steps in a row, that of the last ones): (0, 0) for too few steps.

    collapse([0.2, 0.5, 0.5, 0.5, 0.5, 0.5, 0, 0, 0, 0, 0])  ->  (0.5, 0)
    """
    means = [sum(rewards[i:i + WINDOW]) / WINDOW for i in range(len(rewards) - WINDOW + 1)]
    return (max(means), means[-1]) if means else (0.0, 0.0)


# ---- rollouts to read ----------------------------------------------------------------------------
def log_rollouts(run: Run, groups: list, tokenizer: Tokenizer, step: int) -> None:
    """Up to four rollouts a step for rollouts.jsonl: a right and a wrong one of each of two questions."""
    for group in groups[:2]:
        for wanted in (True, False):
            for completion, grade in zip(group.completions, group.grades, strict=True):
                if grade.correct == wanted:
                    run.log(rollout_row(step, group.problem, completion, grade, tokenizer), "rollouts.jsonl")
                    break


def rollout_row(step, problem, completion, grade, tokenizer):
    return {
        "step": step,
        "id": problem.id,
        "question": problem.question,
        "response": tokenizer.text(completion.tokens),
        "correct": grade.correct,
        "reason": grade.reason,
        "tokens": len(completion.tokens),
        "finish": completion.finish,
    }


def show_rollouts(group, tokenizer: Tokenizer, step: int) -> None:
    """Two rollouts on the screen that a person can read."""
    for completion, grade in list(zip(group.completions, group.grades, strict=True))[:2]:
        text = tokenizer.text(completion.tokens)
        if len(text) >= 800:
            text = f"{text[:400]} [...] {text[-400:]}"
        say(f"\n--- step {step}, {group.problem.id}: {'correct' if grade.correct else grade.reason}\n{text}")
