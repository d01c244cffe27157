"""Group relative policy optimisation: roll out, grade, compare within the group, step (Shao et al. 2024).

    python grpo.py                                                    # goes on from out/sft, into out/grpo
    python grpo.py --model mini --out out/rl --lr 3e-4 --steps 340    # from the base: RL only
    torchrun --nproc-per-node 4 grpo.py --model ... --task countdown-3 --questions 1000 --steps 150 \\
        --questions-per-step 256 --rollouts 16 --mini-batch 32 --lr 1e-6 --max-new-tokens 4096

On one question the model writes a group of answers; one that is better than its group's mean is made
likelier, token by token, as far as the clip allows. In one process the weights that sample are the weights
that train; several train on shards and sample from a whole copy, refreshed after every step. The old
log-probabilities are the sampler's own, so the ratio is to the policy that really sampled; how far sampler
and trainer are apart is in the log of every step.

Words: a *rollout* is one sampled answer, from the sampler a `Completion`, in the loss a `Response`; a *group*
is a question with its rollouts. In training a micro-batch holds responses of one or more groups, and those of
a group attend to one copy of their prompt (`model.shared_prompt`).

To try another reward, edit `rewards_of`. Left out: asynchronous rollouts, a value model, tools.
"""
import json
import random
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from run.command import (  # before torch: it says how threads wait
    Defaults, Progress, UserError, command, if_not_given, location, may_change, natural, number, parser,
    positive, say,
)

import torch
from torch import Tensor

import tasks
from checkpoint import model_fingerprint
from model import Transformer, response_logprobs
from optimizer import Optimizer, check_finite, even_passes, publisher, start_training, training_flags, twin
from report.page import renew
from report.rollouts import StepLog, over_all_processes, sums_over
from run.files import to_json
from run.processes import balanced, gathered, in_batches, rank, total, world
from run.record import refuse_wrong_out
from run.run_folder import Run
from sample import Completion, Sampler, SamplingParams, check_lengths

DEFAULTS: Defaults = {"lr": (4e-4, 1e-6)}
# Of the memory that is free before the first step: on a GPU the cache stays while the model trains.
SAMPLER_CACHE_FRACTION = 0.3


# ---- the objective -------------------------------------------------------------------------------
def advantages(rewards: Tensor, normalise: bool = True) -> Tensor:
    """How much better each rollout is than its group's mean: rewards (..., rollouts) -> the same shape.

    Divided by the group's standard deviation unless `normalise` is off (Dr. GRPO, Liu et al. 2025, leaves it
    out, since it weighs easy and hard questions more). A group whose rewards are all equal gets zeros: it has
    nothing to compare.

    advantages([1, 0, 0, 0])  ->  [1.5, -0.5, -0.5, -0.5]
    """
    advantage = rewards - rewards.mean(-1, keepdim=True)
    if normalise:
        advantage = advantage / (rewards.std(-1, keepdim=True) + 1e-6)
    # The mean of equal numbers may be off by a rounding, which the division would blow up.
    equal = (rewards == rewards[..., :1]).all(-1, keepdim=True)
    return advantage.masked_fill(equal, 0.0)


def token_weight(length: int, averaging: str, n_responses: int, n_tokens: int, max_new_tokens: int) -> float:
    """The weight that each token of a response of `length` tokens has in the loss of a mini-batch.

    `n_responses` and `n_tokens` are those of the whole mini-batch, over all processes, groups without a
    gradient included: a group of equal rewards adds nothing to the sum but counts in the divisor.
    """
    if averaging == "token-mean":  # every token alike (DAPO, Yu et al. 2025)
        return 1 / n_tokens
    if averaging == "sequence-mean":  # every response alike (the first GRPO)
        return 1 / (n_responses * length)
    return 1 / (n_responses * max_new_tokens)  # constant: length has no pull of its own (Dr. GRPO)


@dataclass
class Tokens:
    """The response tokens of a micro-batch: all tensors are (N,), one entry a token."""
    logp: Tensor
    entropy: Tensor
    old_logp: Tensor  # the sampler's
    advantage: Tensor
    weight: Tensor  # holds the division: `token_weight`
    reference_logp: Tensor | None = None  # under a KL term only


def policy_loss(
    tokens: Tokens, clip_low: float = 0.2, clip_high: float = 0.2, kl: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The clipped objective (Schulman et al. 2017), to be minimised: two terms, scalars.

        ratio   = exp(logp - old_logp)
        clipped = clip(ratio, 1 - clip_low, 1 + clip_high)
        terms   = -sum(weight * min(ratio * A, clipped * A)),  kl * sum(weight * k3)
        k3      = exp(reference - logp) - (reference - logp) - 1

    The first term has no gradient for a token whose ratio has left the clip range in the direction of its
    advantage A. k3 is an unbiased estimate of KL(policy || reference) that is never negative (Schulman 2020).
    """
    ratio = (tokens.logp - tokens.old_logp).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    gain = torch.minimum(ratio * tokens.advantage, clipped * tokens.advantage)
    loss = -(tokens.weight * gain).sum()
    if tokens.reference_logp is None:
        return loss, torch.zeros_like(loss)
    gap = tokens.reference_logp - tokens.logp
    k3 = gap.exp() - gap - 1
    return loss, kl * (tokens.weight * k3).sum()


# ---- rollouts ------------------------------------------------------------------------------------
@dataclass
class Group:
    """One question of a step and, once rolled out, its responses: all lists are in the same order."""
    number: int  # of the question in the step
    task: tasks.Task
    problem: tasks.Problem
    prompt: list[int]
    completions: list[Completion] = field(default_factory=list)
    grades: list[tasks.Grade] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    advantages: list[float] = field(default_factory=list)


def choose(problems: list, step: int, count: int, seed: int) -> list:
    """The questions of a step. Each pass over the data has its own order, a function of (seed, pass).

    Questions that do not fill a step are left out of that pass.
    """
    steps_in_a_pass = len(problems) // count
    passes, step_in_pass = divmod(step - 1, steps_in_a_pass)
    order = random.Random(f"{seed}/{passes}").sample(problems, len(problems))
    return order[step_in_pass * count:(step_in_pass + 1) * count]


def roll_out(sampler: Sampler, chosen: list, args, step: int) -> list[Group]:
    """Groups of the step's questions [(task, problem)]. Those of this process are answered and graded.

    If the sampler was stopped, none is answered.
    """
    tokenizer = sampler.tokenizer
    groups = []
    for i, (task, problem) in enumerate(chosen):
        groups.append(Group(i, task, problem, prompt=tokenizer.chat(task.prompt(problem))))
    mine = groups[rank()::world()]
    prompts = [group.prompt for group in mine]
    identities = [f"step {step}/{group.problem.id}" for group in mine]
    params = SamplingParams(args.max_new_tokens, args.temperature)
    answered = sampler.generate(prompts, args.rollouts, params, args.seed, identities)
    sampler.release()
    if sampler.should_stop():
        return groups
    for group, completions in zip(mine, answered, strict=True):
        group.completions = completions
        texts = [tokenizer.decode_response(c.tokens) for c in completions]
        group.grades = [group.task.grade(group.problem, text) for text in texts]
        group.rewards = [float(reward) for reward in rewards_of(group, args, step)]
        group.advantages = advantages(torch.tensor(group.rewards), normalise=not args.no_std).tolist()
    return groups


def exchange(groups: list[Group]) -> None:
    """Give every process what the others have rolled out of the step's questions: 30 bytes a token."""
    if world() == 1:
        return
    mine = []
    for group in groups[rank()::world()]:
        mine.append({"completions": [(c.tokens, c.logprobs, c.finish) for c in group.completions],
                     "grades": [vars(grade) for grade in group.grades],
                     "rewards": group.rewards, "advantages": group.advantages})
    for r, text in enumerate(gathered(to_json(mine))):
        for group, row in zip(groups[r::world()], json.loads(text), strict=True):
            group.completions = [Completion(group.prompt, *fields) for fields in row["completions"]]
            group.grades = [tasks.Grade(**fields) for fields in row["grades"]]
            group.rewards = row["rewards"]
            group.advantages = row["advantages"]


def rewards_of(group: Group, args, step: int) -> list[float]:
    """The reward of each rollout: 1 for a correct answer, else 0.

    The control `--reward random` tosses coins that know nothing of the answers.
    """
    if args.reward == "random":
        coins = random.Random(f"{args.seed}/{step}/{group.number}")
        return [float(coins.random() < 0.5) for _ in group.grades]
    return [float(grade.correct) for grade in group.grades]


def validate(sampler: Sampler, problems: list, args) -> dict[str, float] | None:
    """{"val": share of the held-out questions answered correctly, one sample each, over all processes}.

    None, if somebody asked to stop meanwhile.
    """
    mine = problems[rank()::world()]
    prompts = [sampler.tokenizer.chat(task.prompt(problem)) for task, problem in mine]
    answered = sampler.generate(prompts, 1, SamplingParams(args.max_new_tokens, args.temperature), args.seed)
    sampler.release()
    right = 0
    if total([float(sampler.should_stop())])[0]:
        return None
    for (task, problem), (completion,) in zip(mine, answered, strict=True):
        right += task.grade(problem, sampler.tokenizer.decode_response(completion.tokens)).correct
    return {"val": total([right])[0] / len(problems)}


# ---- an update -----------------------------------------------------------------------------------
@dataclass
class Response:
    """A rollout in the loss of a mini-batch."""
    prompt: list[int]
    completion: Completion
    advantage: float
    weight: float  # of each of its tokens

    def __len__(self) -> int:
        return len(self.completion.tokens)


def responses_in_loss(groups: list[Group], args) -> list[list[Response]]:
    """The responses of each group that have a gradient: those with an advantage, or all under a KL term."""
    def is_counted(completion):
        return args.truncated == "keep" or completion.finish == "stop"

    lengths = [len(c.tokens) for group in groups for c in group.completions if is_counted(c)]
    in_loss = []
    for group in groups:
        responses = []
        for completion, advantage in zip(group.completions, group.advantages, strict=True):
            if is_counted(completion) and (advantage != 0 or args.kl):
                weight = token_weight(
                    len(completion.tokens), args.loss, len(lengths), sum(lengths), args.max_new_tokens)
                responses.append(Response(group.prompt, completion, advantage, weight))
        if responses:
            in_loss.append(responses)
    return in_loss


def size_of(responses: list[Response]) -> int:
    """About how many tokens' memory some responses of one group take: the prompt's, their own, and an eighth
    of the prompt for each response, which copies its keys and values.
    """
    P = len(responses[0].prompt)
    return P + sum(len(response) + P // 8 for response in responses)


def micro_batches(groups: list[list[Response]], budget: int) -> list[list[list[Response]]]:
    """This process's micro-batches of at most `budget` tokens, each a list of responses by group.

    A group stays whole, so that its prompt runs once, unless it is larger than a micro-batch or than what a
    process has to do.
    """
    share = sum(map(size_of, groups)) // world()
    parts = []
    for responses in groups:
        room = max(1, min(budget, share) - len(responses[0].prompt))
        parts += in_batches(responses, lambda r: len(r) + len(r.prompt) // 8, room)
    return in_batches(balanced(parts, size_of), size_of, budget)


def update(
    model: Transformer,
    reference: Transformer | None,
    optimizer: Optimizer,
    groups: list[Group],
    args,
) -> tuple[float | None, dict[str, float]]:
    """One optimizer step on a mini-batch, of which every process has all groups.

    Returns (gradient norm, sums over the trained tokens of all processes). The norm is None if no response of
    any process has a gradient. The weights stay then: a step on zeros would still move them by momentum.
    """
    sums_of_each = []
    mine = micro_batches(responses_in_loss(groups, args), args.micro_batch_tokens)
    for micro_batch in mine:
        tokens = run_tokens(model, reference, micro_batch, args)
        loss, reference_loss = policy_loss(tokens, args.clip_low, args.clip_high, args.kl)
        (loss + reference_loss).backward()
        sums_of_each.append(sums_over(tokens, loss, args.clip_low, args.clip_high))
    even_passes(model, len(mine))
    sums = over_all_processes(sums_of_each)
    check_finite(sums["loss"], "loss")
    check_finite(sums["reference_kl"], "divergence from the reference")
    norm = optimizer.step(args.lr) if sums["trained_tokens"] + sums["reference_tokens"] else None
    return norm, sums


def run_tokens(
    model: Transformer, reference: Transformer | None, micro_batch: list[list[Response]], args,
) -> Tokens:
    """Run the model over a micro-batch. Returns what the loss and the statistics need of its tokens."""
    responses = [response for group in micro_batch for response in group]
    groups = [(group[0].prompt, [r.completion.tokens for r in group]) for group in micro_batch]

    def by_token(values):
        repeated = [value for value, r in zip(values, responses, strict=True) for _ in range(len(r))]
        return torch.tensor(repeated, device=model.device)  # (N,)

    logp, entropy = response_logprobs(model, groups, args.temperature)
    reference_logp = None
    if reference is not None:
        with torch.no_grad():
            reference_logp, _ = response_logprobs(reference, groups, args.temperature)
    old_logp = torch.tensor([x for r in responses for x in r.completion.logprobs], device=model.device)
    return Tokens(
        logp=logp, entropy=entropy, old_logp=old_logp, reference_logp=reference_logp,
        advantage=by_token([r.advantage for r in responses]), weight=by_token([r.weight for r in responses]))


# ---- the command ---------------------------------------------------------------------------------
def arguments():
    p = parser(__doc__, out=None, model="")
    location(p.add_argument("--model", help="folder in Hugging Face format, or hub id; default: out/sft, or "
                         "else mini. --out defaults to out/rl for mini, otherwise to out/grpo"))
    g = p.add_argument_group("what to train on")
    tasks.question_flags(g, split="rl", paper=1000)
    may_change(g.add_argument("--steps", type=positive, default=30,
                              help="in all (paper: 150); with --resume, a higher number extends a run"))
    g.add_argument("--questions-per-step", type=positive, default=16, help="of all processes (paper: 256)")
    g.add_argument("--rollouts", type=positive, default=8, help="to each question, the group (paper: 16)")
    g.add_argument("--mini-batch", type=positive, default=4, help="questions of one update (paper: 32)")
    g.add_argument("--max-new-tokens", type=positive, default=400, help="budget of a response (paper: 4096)")
    may_change(g.add_argument("--slots", type=natural, default=0, help="rows decoded at once; 0: what fits"))
    g = p.add_argument_group("the objective")
    g.add_argument("--lr", type=number(float, 0), help=f"constant; {if_not_given(DEFAULTS['lr'])}")
    g.add_argument("--temperature", type=number(float, 0, open_low=True), default=1.0,
                   help="of rollouts and log-probabilities; top-k or top-p would make the two disagree")
    g.add_argument("--clip-low", type=number(float, 0, 1), default=0.2, help="clip ratios below 1 - this")
    g.add_argument("--clip-high", type=number(float, 0), default=0.2, help="clip ratios above 1 + this")
    g.add_argument("--kl", type=number(float, 0), default=0.0,
                   help="weight of the divergence from the starting model, of which a copy is then kept")
    g.add_argument("--loss", choices=["token-mean", "sequence-mean", "constant"], default="token-mean",
                   help="every token alike, every response alike, or the sum over a fixed length")
    g.add_argument("--no-std", action="store_true", help="do not divide advantages by the group's deviation")
    g.add_argument("--truncated", choices=["keep", "mask"], default="keep",
                   help="what the budget cuts off: train on it, or leave it out of loss and divisor")
    g.add_argument("--reward", choices=["correct", "random"], default="correct",
                   help="random is a control: a coin that ignores the answer")
    training_flags(p)
    may_change(p.add_argument("--eval-every", type=natural, default=0, help="steps between measurements on "
                              "the split val, from before the first to after the last; 0: never"))
    p.add_argument("--eval-questions", type=positive, default=64, help="of each task")
    may_change(p.add_argument("--log-groups", type=natural, default=2, help="questions of a step in "
                              "rollouts.jsonl, each with all its rollouts: about 30 bytes a token"))
    args = p.parse_args()
    if args.questions_per_step % args.mini_batch:
        raise UserError(f"--mini-batch {args.mini_batch} must divide --questions-per-step "
                        f"{args.questions_per_step}")
    if args.rollouts < 2:
        raise UserError("--rollouts 1: a group needs at least 2 responses to compare")
    if not args.model:
        args.model = "out/sft" if Path("out/sft/config.json").is_file() else "mini"
    if not args.out:
        args.out = "out/rl" if args.model == "mini" else "out/grpo"
    return args


def read_problems(args) -> tuple[list, list]:
    """([(task, problem)] to train on, the same to validate on)."""
    if args.eval_every and args.split in ("all", "val"):
        raise UserError(f"--eval-every measures on the split val, which --split {args.split} trains on; "
                        "leave one of the two out")
    all_tasks = tasks.find_all(args.task, args.data_dir)
    problems = tasks.problems_of(all_tasks, args.split, args.questions, args.seed)
    if len(problems) < args.questions_per_step:
        raise UserError(f"--questions-per-step {args.questions_per_step}: "
                        f"there are only {len(problems)} questions; raise --questions or lower it")
    held_out = []
    if args.eval_every:
        held_out = tasks.problems_of(all_tasks, "val", args.eval_questions, args.seed)
    return problems, held_out


def copies_of(model: Transformer, kl: float) -> tuple[Transformer, Transformer | None]:
    """(the model to sample from, the reference of a KL term).

    In one process the first is the model itself. Several train on shards of it and sample from a whole copy.
    """
    device = model.frequencies.device
    policy = model if world() == 1 else twin(model, device)
    return policy, twin(model, device) if kl else None


def main():
    args = arguments()
    refuse_wrong_out(args.resume, Path(args.out), Path(args.out) / "run.json")
    problems, held_out = read_problems(args)
    model, tokenizer = start_training(args, DEFAULTS)
    prompts = {problem.id: tokenizer.chat(task.prompt(problem)) for task, problem in (*problems, *held_out)}
    check_lengths(prompts, model.config.max_position_embeddings, args.max_new_tokens)
    policy, reference = copies_of(model, args.kl)  # before resuming: the reference is where it began
    optimizer = Optimizer(model, args.weight_decay, max_norm=args.max_norm)
    sampler = Sampler(policy, tokenizer, args.slots, SAMPLER_CACHE_FRACTION)

    def measure():
        optimizer.refresh(policy)
        return validate(sampler, held_out, args)

    run = Run(args, partial(inputs, args, problems, held_out), optimizer, publisher(optimizer, tokenizer),
              args.steps, measure, renew)
    sampler.should_stop = run.stop_request.here
    say(f"from {args.model} into {args.out}: {len(problems)} questions, {args.steps} steps of "
        f"{args.questions_per_step} x {args.rollouts} rollouts, learning rate {args.lr:g}")
    log = StepLog(run, tokenizer, args)

    with run.interruptible(), Progress("grpo", args.steps, run.step) as progress:
        updates = run.updates
        run.restore()
        for step in range(run.step + 1, args.steps + 1):
            optimizer.refresh(policy)
            log.start()
            groups = roll_out(sampler, choose(problems, step, args.questions_per_step, args.seed), args, step)
            # No weight has changed since the last step; --resume makes these rollouts again.
            run.leave_if_asked(step - 1, updates)
            exchange(groups)
            log.rolled_out()

            results = []  # (gradient norm, sums) of each mini-batch
            for first in range(0, args.questions_per_step, args.mini_batch):
                mini_batch = groups[first:first + args.mini_batch]
                results.append(update(model, reference, optimizer, mini_batch, args))

            row = log.write(step, groups, results)
            updates += row["updates"]
            progress.update(**{"reward": f"{row['reward']:.3f}", "tokens": f"{row['response_tokens']:.0f}",
                               "tokens/s": f"{row['rollout_tokens_per_second']:,.0f}"})
            run.end_of_step(step, updates)
    if run.step >= args.steps:
        say(f"{run.out} is finished already; more --steps go on with it")
        return
    say(f"wrote {run.out}")


def inputs(args, problems: list, held_out: list) -> dict[str, str]:
    """Fingerprints of what is read."""
    read = {"--model": model_fingerprint(args.model), "--task": tasks.questions_fingerprint(problems)}
    if held_out:
        read["the held-out questions"] = tasks.questions_fingerprint(held_out)
    return read


if __name__ == "__main__":
    command(main, resumable=True)
