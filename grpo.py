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
a group attend to one copy of their prompt (`shared_prompt`).

To try another reward, edit `rewards_of`. Left out: asynchronous rollouts, a value model, tools.
"""
import json
import random
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from cli import (  # before torch: it says how threads wait
    Progress, UserError, command, may_change, natural, number, parser, place, positive, say,
)

import torch
import torch.nn.functional as F
from torch import Tensor

import tasks
from checkpoint import device_and_dtype, load, model_fingerprint
from diagnostics import Statistics, StepLog, Tokens
from files import to_json
from model import Attend, Transformer, side_by_side
from processes import balanced, gathered, in_batches, rank, start_processes, total, world
from record import refuse_wrong_out
from run import Run, StopRequest, interruptible
from sample import Completion, Params, Sampler, say_what_the_context_cuts
from train import (
    Optimizer, check_finite, even_passes, lr_or_default, publisher, settle_flags, shard, training_flags, twin,
)
from tokenizer import Tokenizer

MINIATURE_LR = 4e-4
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


def policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    weight: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    reference: Tensor | None = None,
    kl: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The clipped objective (Schulman et al. 2017), to be minimised.

    All tensors are (N,), one entry per response token. `weight` holds the division (`token_weight`).

        ratio   = exp(logp - old_logp)
        clipped = clip(ratio, 1 - clip_low, 1 + clip_high)
        terms   = -sum(weight * min(ratio * A, clipped * A)),  kl * sum(weight * k3)
        k3      = exp(reference - logp) - (reference - logp) - 1

    The first term has no gradient for a token whose ratio has left the clip range in the direction of its
    advantage. k3 is an unbiased estimate of KL(policy || reference) that is never negative (Schulman 2020).
    Returns the two terms, scalars.
    """
    ratio = (logp - old_logp).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -(weight * torch.minimum(ratio * advantage, clipped * advantage)).sum()
    if reference is None:
        return loss, torch.zeros_like(loss)
    gap = reference - logp
    k3 = gap.exp() - gap - 1
    return loss, kl * (weight * k3).sum()


# ---- one prompt, many responses ------------------------------------------------------------------
def shared_prompt(P: int, lengths: list[int], device: torch.device) -> Attend:
    """An Attend for one flat row [prompt | response 0 | response 1 | ...].

    The prompt has P tokens, response i has lengths[i]. The prompt sees itself; a response sees the prompt and
    its own past. Same values and gradients as running prompt + response once per response, for the price of
    one prompt and without padding (attention apart: there each response has a copy of the prompt's keys and
    values, and is padded to the longest).
    """
    n, L = len(lengths), max(lengths)
    total_length = sum(lengths)
    mask = torch.ones(L, P + L, dtype=torch.bool, device=device).tril(P)  # token i sees P + i + 1 positions
    # Where among the tokens of all responses each padded place (n, L) is taken from. Beyond a response's end
    # it is some other token, which no real one sees.
    starts = torch.tensor(lengths).cumsum(0) - torch.tensor(lengths)  # (n,)
    places = starts[:, None] + torch.arange(L)  # (n, L)
    is_real = torch.arange(L) < torch.tensor(lengths)[:, None]  # (n, L)
    real = is_real.flatten().nonzero()[:, 0].to(device)  # (sum of lengths,)
    places = places.clamp(max=max(0, total_length - 1)).flatten().to(device)  # (n * L,)

    def split(x, H):
        """(1, T, H or K, D) -> the prompt's part (1, H, P, D) and the responses' (n, H, L, D)."""
        x = x[0].repeat_interleave(H // x.shape[2], 1)  # (T, H, D): with a mask kernels want equal heads
        of_prompt = x[None, :P].transpose(1, 2)
        if not total_length:
            return of_prompt, None
        padded = x[P:].index_select(0, places).unflatten(0, (n, L))  # (n, L, H, D)
        return of_prompt, padded.transpose(1, 2)

    def attend(layer, q, k, v):  # q (1, T, H, D), k and v (1, T, K, D) -> (1, T, H, D)
        H = q.shape[2]
        prompt_q, response_q = split(q, H)
        prompt_k, response_k = split(k, H)
        prompt_v, response_v = split(v, H)
        o = F.scaled_dot_product_attention(prompt_q, prompt_k, prompt_v, is_causal=True)  # (1, H, P, D)
        of_prompt = o[0].transpose(0, 1)  # (P, H, D)
        if not total_length:  # responses of one token: predicted, never fed
            return of_prompt[None]
        seen_k = torch.cat((prompt_k.expand(n, -1, -1, -1), response_k), 2)  # (n, H, P + L, D)
        seen_v = torch.cat((prompt_v.expand(n, -1, -1, -1), response_v), 2)
        o = F.scaled_dot_product_attention(response_q, seen_k, seen_v, attn_mask=mask)  # (n, H, L, D)
        of_responses = o.transpose(1, 2).flatten(0, 1).index_select(0, real)  # (sum of lengths, H, D)
        return torch.cat((of_prompt, of_responses))[None]

    return attend


def response_logprobs(
    model: Transformer, asked: list[tuple[list[int], list[list[int]]]], temperature: float,
) -> tuple[Tensor, Tensor]:
    """(logp, entropy) of every token of the responses in `asked`: [(prompt, responses to it)].

    Flat, (N,), response by response. A finished response ends with the stop token that the sampler chose: it
    is a target like any other.
    """
    device = model.device
    attends, sizes = [], []
    tokens, positions = [], []
    predicting = []  # where in the flat row the next token is predicted, for each token of the responses
    targets = []
    for prompt, responses in asked:
        P = len(prompt)
        lengths = [len(response) - 1 for response in responses]  # the last token is predicted but never fed
        attends.append(shared_prompt(P, lengths, device))
        sizes.append(P + sum(lengths))
        tokens += prompt
        positions += range(P)
        end_of_prompt = len(tokens) - 1
        for response in responses:
            fed = response[:-1]
            predicting.append(end_of_prompt)  # it predicts every response's first token
            predicting += range(len(tokens), len(tokens) + len(fed))  # then each fed token predicts the next
            targets += response
            tokens += fed
            positions += range(P, P + len(fed))
    tokens = torch.tensor([tokens], device=device)  # (1, T)
    positions = torch.tensor([positions], device=device)  # (1, T)
    predicting = torch.tensor(predicting, device=device)  # (N,)
    targets = torch.tensor(targets, device=device)  # (N,)
    hidden = model(tokens, positions, side_by_side(attends, sizes))[0]  # (T, C)
    # Not hidden[predicting]: places repeat, and its backward adds them up in whatever order threads come.
    return model.logprobs(hidden.index_select(0, predicting), targets, temperature)


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
    """The step's questions [(task, problem)]; this process's part of them answered, graded and compared.

    None is answered, if the sampler was stopped.
    """
    tokenizer = sampler.tokenizer
    groups = []
    for i, (task, problem) in enumerate(chosen):
        groups.append(Group(i, task, problem, prompt=tokenizer.chat(task.prompt(problem))))
    mine = groups[rank()::world()]
    prompts = [group.prompt for group in mine]
    identities = [f"step {step}/{group.problem.id}" for group in mine]
    params = Params(args.max_new_tokens, args.temperature)
    answered = sampler.generate(prompts, args.rollouts, params, args.seed, identities)
    sampler.release()
    if sampler.stop():
        return groups
    for group, completions in zip(mine, answered, strict=True):
        group.completions = completions
        group.grades = [group.task.grade(group.problem, tokenizer.text(c.tokens)) for c in completions]
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


def validate(sampler: Sampler, problems: list, args, asked: StopRequest) -> dict[str, float] | None:
    """{"val": share of the held-out questions answered correctly, one sample each, over all processes}.

    None, if somebody asked to stop meanwhile.
    """
    mine = problems[rank()::world()]
    prompts = [sampler.tokenizer.chat(task.prompt(problem)) for task, problem in mine]
    answered = sampler.generate(prompts, 1, Params(args.max_new_tokens, args.temperature), args.seed)
    sampler.release()
    if asked.anywhere():
        return None
    right = 0
    for (task, problem), (completion,) in zip(mine, answered, strict=True):
        right += task.grade(problem, sampler.tokenizer.text(completion.tokens)).correct
    return {"val": total([right])[0] / len(problems)}


# ---- an update -----------------------------------------------------------------------------------
@dataclass
class Response:
    """A rollout in the loss of a mini-batch."""
    group: Group
    index: int  # in the group
    weight: float  # of each of its tokens

    @property
    def completion(self) -> Completion:
        return self.group.completions[self.index]

    @property
    def advantage(self) -> float:
        return self.group.advantages[self.index]

    def __len__(self) -> int:
        return len(self.completion.tokens)


def responses_in_loss(groups: list[Group], args) -> list[list[Response]]:
    """For each group the responses that have a gradient: those with an advantage, or all under a KL term."""
    def counts(completion):
        return args.truncated == "keep" or completion.finish == "stop"

    lengths = [len(c.tokens) for group in groups for c in group.completions if counts(c)]
    found = []
    for group in groups:
        responses = []
        for i, completion in enumerate(group.completions):
            if counts(completion) and (group.advantages[i] != 0 or args.kl):
                weight = token_weight(
                    len(completion.tokens), args.loss, len(lengths), sum(lengths), args.max_new_tokens)
                responses.append(Response(group, i, weight))
        if responses:
            found.append(responses)
    return found


def size_of(responses: list[Response]) -> int:
    """About the tokens that some responses of a group take memory for: the prompt's and their own, and an
    eighth for each token of the prompt whose keys and values a response copies.
    """
    P = len(responses[0].group.prompt)
    return P + sum(len(response) + P // 8 for response in responses)


def micro_batches(groups: list[list[Response]], budget: int) -> list[list[list[Response]]]:
    """This process's micro-batches of at most `budget` tokens, each a list of responses by group.

    A group stays whole, so that its prompt runs once, unless it is larger than a micro-batch or than what a
    process has to do.
    """
    share = sum(map(size_of, groups)) // world()
    parts = []
    for responses in groups:
        room = max(1, min(budget, share) - len(responses[0].group.prompt))
        parts += in_batches(responses, lambda r: len(r) + len(r.group.prompt) // 8, room)
    return in_batches(balanced(parts, size_of), size_of, budget)


def update(
    model: Transformer,
    reference: Transformer | None,
    optimizer: Optimizer,
    groups: list[Group],
    args,
    lr: float,
) -> tuple[float | None, dict[str, float]]:
    """One optimizer step on a mini-batch, of which every process has all groups.

    Returns (gradient norm, sums over the trained tokens of all processes). The norm is None if no response of
    any process has a gradient. The weights stay then: a step on zeros would still move them by momentum.
    """
    statistics = Statistics()
    mine = micro_batches(responses_in_loss(groups, args), args.micro_batch_tokens)
    for micro_batch in mine:
        tokens = run_tokens(model, reference, micro_batch, args)
        loss, reference_loss = policy_loss(
            tokens.logp, tokens.old_logp, tokens.advantage, tokens.weight, args.clip_low, args.clip_high,
            tokens.reference_logp, args.kl)
        (loss + reference_loss).backward()
        statistics.add(tokens, loss, args.clip_low, args.clip_high)
    even_passes(model, len(mine), reference)
    sums = statistics.over_all_processes()
    check_finite(sums["loss"], "loss")
    check_finite(sums["reference_kl"], "divergence from the reference")
    norm = optimizer.step(lr) if sums["trained_tokens"] + sums["reference_tokens"] else None
    return norm, sums


def run_tokens(
    model: Transformer, reference: Transformer | None, micro_batch: list[list[Response]], args,
) -> Tokens:
    """The tokens of a micro-batch as the loss and the statistics need them."""
    responses = [response for part in micro_batch for response in part]
    asked = [(part[0].group.prompt, [r.completion.tokens for r in part]) for part in micro_batch]

    def by_token(values):
        repeated = [value for value, r in zip(values, responses, strict=True) for _ in range(len(r))]
        return torch.tensor(repeated, device=model.device)  # (N,)

    logp, entropy = response_logprobs(model, asked, args.temperature)
    reference_logp = None
    if reference is not None:
        with torch.no_grad():
            reference_logp, _ = response_logprobs(reference, asked, args.temperature)
    old_logp = torch.tensor([x for r in responses for x in r.completion.logprobs], device=model.device)
    return Tokens(
        logp=logp, entropy=entropy, old_logp=old_logp, reference_logp=reference_logp,
        advantage=by_token([r.advantage for r in responses]), weight=by_token([r.weight for r in responses]))


# ---- the command ---------------------------------------------------------------------------------
def arguments():
    p = parser(__doc__, out=None, model="")
    place(p.add_argument("--model", help="a folder in Hugging Face format, or a hub id, to go on from into "
                         "out/grpo; if not given, out/sft, or where there is none mini into out/rl"))
    g = p.add_argument_group("what to train on")
    place(g.add_argument("--task", default="countdown-3-small", help=f"with commas between: {tasks.NAMES}"))
    g.add_argument("--questions", type=natural, default=400, help="of each task; 0: all (paper: 1000)")
    g.add_argument("--split", default="rl", help=f"{', '.join(tasks.SPLITS)}; of a file: also all")
    place(g.add_argument("--data-dir", default="data", help="where gsm8k/, csqa/ and the like lie"))
    may_change(g.add_argument("--steps", type=positive, default=30,
                              help="in all (paper: 150); with --resume more go on with a run that has ended"))
    g.add_argument("--questions-per-step", type=positive, default=16, help="of all processes (paper: 256)")
    g.add_argument("--rollouts", type=positive, default=8, help="to each question, the group (paper: 16)")
    g.add_argument("--mini-batch", type=positive, default=4, help="questions of one update (paper: 32)")
    g.add_argument("--max-new-tokens", type=positive, default=400, help="budget of a response (paper: 4096)")
    may_change(g.add_argument("--slots", type=natural, default=0, help="rows decoded at once; 0: what fits"))
    g = p.add_argument_group("the objective")
    g.add_argument("--lr", type=number(float, 0), help="constant; if not given, the paper's 1e-6, or "
                   f"{MINIATURE_LR:g} for a model under 10M parameters")
    g.add_argument("--temperature", type=number(float, 0, open_low=True), default=1.0,
                   help="of rollouts and log-probabilities; top-k or top-p would make the two disagree")
    g.add_argument("--clip-low", type=number(float, 0, 1), default=0.2, help="1 less it ends a ratio's fall")
    g.add_argument("--clip-high", type=number(float, 0), default=0.2, help="1 plus it ends a ratio's rise")
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
    return args


def from_where_to_where(model: str | None, out: str | None) -> tuple[str, str]:
    """(--model, --out), where they are not given: RL goes on from what `sft.py` wrote, if that is there."""
    if model:
        return model, out or "out/grpo"
    if Path("out/sft/config.json").is_file():
        return "out/sft", out or "out/grpo"
    out = out or "out/rl"
    say(f"there is no out/sft to go on from, so this is RL only: from mini into {out}")
    return "mini", out


def read_problems(args) -> tuple[list, list]:
    """([(task, problem)] to train on, the same to validate on)."""
    if args.eval_every and args.split in ("all", "val"):
        raise UserError(f"--eval-every measures on the split val, which --split {args.split} trains on; "
                        "leave one of the two out")
    found = tasks.find_all(args.task, args.data_dir)
    problems = tasks.problems_of(found, args.split, args.questions, args.seed)
    if len(problems) < args.questions_per_step:
        raise UserError(f"--questions-per-step {args.questions_per_step}: "
                        f"there are only {len(problems)} questions; raise --questions or lower it")
    held_out = []
    if args.eval_every:
        held_out = tasks.problems_of(found, "val", args.eval_questions, args.seed)
    return problems, held_out


def prompts_of(problems: list, tokenizer: Tokenizer, context: int) -> list[list[int]]:
    """The prompt of each (task, problem). Refuses one that would fail in the middle of the run."""
    prompts = []
    for task, problem in problems:
        prompts.append(tokenizer.chat(task.prompt(problem)))
        n = len(prompts[-1])
        if n >= context:
            raise UserError(f"--task {task.name}: the prompt of {problem.id} has {n} tokens and does not fit "
                            f"the model's context of {context}; remove it")
    return prompts


def copies_of(model: Transformer, device: torch.device, kl: float) -> tuple[Transformer, Transformer | None]:
    """(the model to sample from, the reference of a KL term).

    In one process the first is the model itself. Several train on shards of the model and sample from a whole
    copy; the reference, where there is one, is sharded as well.
    """
    if world() == 1:
        return model, twin(model, copied=True) if kl else None
    reference = None
    if kl:
        reference = twin(model)
        shard(reference, masters=False)
    return twin(model).to(device), reference


def main():
    args = arguments()
    args.model, args.out = from_where_to_where(args.model, args.out)
    refuse_wrong_out(args.resume, Path(args.out), Path(args.out) / "run.json")
    device, _ = device_and_dtype(args.device)
    settle_flags(args, device)
    start_processes(device, args.timeout)
    problems, held_out = read_problems(args)
    model, tokenizer = load(
        args.model, args.device, args.dtype, args.chat_template_kwargs, on_host=world() > 1)
    args.chat_template_kwargs = tokenizer.template_kwargs
    prompts = prompts_of(problems, tokenizer, model.config.max_position_embeddings)
    prompts_of(held_out, tokenizer, model.config.max_position_embeddings)
    policy, reference = copies_of(model, device, args.kl)  # before resuming: the reference is where it began
    model.recompute = args.recompute
    lr = lr_or_default(args.lr, model, MINIATURE_LR)
    optimizer = Optimizer(model, args.weight_decay, max_norm=args.max_norm)
    sampler = Sampler(policy, tokenizer, args.slots, SAMPLER_CACHE_FRACTION)
    run = Run(args, partial(inputs, args, problems, held_out), optimizer, publisher(optimizer, tokenizer),
              last=args.steps)
    say(f"{len(problems)} questions, {args.steps} steps of {args.questions_per_step} x {args.rollouts} "
        f"rollouts, learning rate {lr:g}")
    context_cuts = say_what_the_context_cuts(prompts, model, args.max_new_tokens) > len(prompts) / 2
    log = StepLog(run, tokenizer, args, context_cuts)

    with interruptible() as asked, Progress("grpo", args.steps, run.step) as progress:
        sampler.stop = asked.here
        updates = run.updates

        def measure():
            optimizer.refresh(policy)
            return validate(sampler, held_out, args, asked)

        run.restore(asked, measure)
        for step in range(run.step + 1, args.steps + 1):
            optimizer.refresh(policy)
            log.start()
            groups = roll_out(sampler, choose(problems, step, args.questions_per_step, args.seed), args, step)
            # No weight has changed since the last step: a rollout that was cut short is made again.
            run.leave_if_asked(asked, step - 1, updates)
            exchange(groups)
            log.rolled_out()

            results = []  # (gradient norm, sums) of each mini-batch
            for first in range(0, args.questions_per_step, args.mini_batch):
                mini_batch = groups[first:first + args.mini_batch]
                results.append(update(model, reference, optimizer, mini_batch, args, lr))

            row = log.write(step, groups, results, lr)
            updates += row["updates"]
            progress.update(**{"reward": f"{row['reward']:.3f}", "tokens": f"{row['response_tokens']:.0f}",
                               "tokens/s": f"{row['rollout_tokens_per_second']:,.0f}"})
            run.end_of_step(step, updates, asked, measure)
    if run.step >= args.steps:
        say(f"{run.out} is finished already; more --steps go on with it")
        return
    log.say_warnings()
    say(f"wrote {run.out}")


def inputs(args, problems: list, held_out: list) -> dict:
    """Fingerprints of what is read."""
    return {
        "--model": model_fingerprint(args.model),
        "--task": tasks.questions_fingerprint(problems),
        "the held-out questions": tasks.questions_fingerprint(held_out) if held_out else None,
    }


if __name__ == "__main__":
    command(main, resumable=True)
