"""Group relative policy optimisation: roll out, grade, compare within the group, step (Shao et al. 2024).

    python grpo.py                                                    # the miniature, on a CPU
    python grpo.py --model out/sft --task countdown-3-small           # from a fine-tuned folder
    torchrun --nproc-per-node 4 grpo.py --model ... --task countdown-3 --questions 1000 --questions-per-step 256 \\
        --rollouts 16 --mini-batch 32 --steps 150 --lr 1e-6 --max-new-tokens 4096

On one question the model writes a group of answers; one that is better than its group's mean is made likelier, token by token,
as far as the clip allows. The weights that sample are the weights that train: there is no second engine and nothing to sync.
The old log-probabilities are the sampler's own, so the ratio is exact even where sampler and trainer round differently; how
far the two are apart is in the log of every step.

A prompt runs once through training too: its responses attend to one copy of it (`shared_prompt`).

Left out: asynchronous rollouts, a value model, tools, rewards other than the task's grade.
"""
import random
import time
from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import tasks
from cli import UserError, command, natural, number, parser, positive
from model import device_and_dtype, load
from sample import Completion, Params, Sampler
from train import begin, check_finite, interruptible, micro_batches, progress, rank, say, start_processes, total, training_flags, world


# ---- the objective ---------------------------------------------------------------------------------------------------
def advantages(rewards, normalise=True):
    """How much better each rollout is than its group's mean: rewards (questions, rollouts) -> the same shape.

    Divided by the group's standard deviation unless `normalise` is off (Dr. GRPO, Liu et al. 2025, leaves it out, since it
    weighs easy and hard questions more). A group whose rewards are all equal gets zeros: it has nothing to compare.

    advantages([[1, 0, 0, 0]])  ->  [[1.5, -0.5, -0.5, -0.5]]
    """
    centred = rewards - rewards.mean(-1, keepdim=True)
    return centred / (rewards.std(-1, keepdim=True) + 1e-6) if normalise else centred


def token_weights(lengths, loss, count, tokens, max_new_tokens):
    """The weight of each response's tokens in the loss of a mini-batch: a list of floats.

    `count` responses and `tokens` tokens are those of the whole mini-batch, over all processes, groups without a gradient
    included: a group of equal rewards adds nothing to the sum but counts in the divisor.
    """
    if loss == "token-mean":  # every token alike (DAPO, Yu et al. 2025)
        return [1 / tokens for _ in lengths]
    if loss == "sequence-mean":  # every response alike (the first GRPO)
        return [1 / (count * n) for n in lengths]
    return [1 / (count * max_new_tokens) for _ in lengths]  # constant: length has no pull of its own (Dr. GRPO)


def policy_loss(logp, old_logp, advantage, weight, clip_low=0.2, clip_high=0.2, reference=None, kl=0.0):
    """The clipped objective (Schulman et al. 2017), to be minimised. All tensors (N,), one entry a response token.

        ratio = exp(logp - old_logp)
        loss  = -sum(weight * min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A)) + kl * sum(weight * k3)
        k3    = exp(reference - logp) - (reference - logp) - 1       an unbiased estimate of KL(policy || reference), >= 0

    So a token stops moving once its ratio has left the clip range in the direction of its advantage, and only then.
    Returns (loss, {name: sum over tokens}).
    """
    log_ratio = logp - old_logp
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -(weight * torch.minimum(ratio * advantage, clipped * advantage)).sum()
    stats = {"clip_fraction": (ratio * advantage > clipped * advantage).sum(), "approx_kl": (ratio - 1 - log_ratio).sum()}
    if reference is not None:
        gap = reference - logp
        k3 = gap.exp() - gap - 1
        loss = loss + kl * (weight * k3).sum()
        stats["reference_kl"] = k3.sum()
    return loss, {name: value.item() for name, value in stats.items()}


# ---- one prompt, many responses --------------------------------------------------------------------------------------
def shared_prompt(prompt, responses, width):
    """An Attend for one flat row [prompt | response 0 | response 1 | ...], each response padded to `width` tokens.

    The prompt sees itself; a response sees the prompt and its own past. Same values and gradients as running prompt +
    response once per response, for the price of one prompt.
    """
    def attend(layer, q, k, v):
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # (H or K, T, D)
        k, v = (x.repeat_interleave(len(q) // len(k), 0) for x in (k, v))  # (H, T, D): with a mask, the fused kernels want equal heads
        of_prompt = F.scaled_dot_product_attention(*(x[None, :, :prompt] for x in (q, k, v)), is_causal=True)  # (1, H, P, D)
        if width == 0:
            return of_prompt.transpose(1, 2)
        before = [x[None, :, :prompt].expand(responses, -1, -1, -1) for x in (k, v)]  # (n, H, P, D), one copy seen n times
        q, k, v = (x[:, prompt:].unflatten(1, (responses, width)).transpose(0, 1) for x in (q, k, v))  # (n, H, width, D)
        k, v = torch.cat((before[0], k), 2), torch.cat((before[1], v), 2)  # (n, H, P + width, D)
        mask = torch.ones(width, prompt + width, dtype=torch.bool, device=q.device).tril(prompt)
        of_responses = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (n, H, width, D)
        return torch.cat((of_prompt[0].transpose(0, 1), of_responses.transpose(1, 2).flatten(0, 1)))[None]  # (1, T, H, D)
    return attend


def response_logprobs(model, prompt, responses, temperature):
    """(logp, entropy) of every token of `responses` (lists of ids) after `prompt`: two flat tensors, response by response."""
    P, lengths = len(prompt), [len(r) for r in responses]
    width = max(lengths) - 1  # a response's last token is predicted but never fed
    flat = prompt + [i for r in responses for i in r[:-1] + [0] * (width - len(r) + 1)]
    tokens = torch.tensor([flat], device=model.device)
    positions = torch.tensor([[*range(P), *list(range(P, P + width)) * len(responses)]], device=model.device)
    hidden = model(tokens, positions, shared_prompt(P, len(responses), width))[0]  # (T, C)
    # The prompt's last token predicts every response's first; then each fed token predicts the next.
    rows = [t for j, n in enumerate(lengths) for t in (P - 1, *range(P + j * width, P + j * width + n - 1))]
    targets = torch.tensor([i for r in responses for i in r], device=model.device)
    return model.logprobs(hidden[torch.tensor(rows, device=model.device)], targets, temperature)


# ---- a step ----------------------------------------------------------------------------------------------------------
CACHE_SHARE = 0.3  # of the memory that is free before the first step: on a GPU the cache stays while the model trains

@dataclass
class Group:
    """One question of a step, its rollouts and how they were graded. `number` is the question's place in the step."""
    number: int
    problem: tasks.Problem
    prompt: list[int]
    completions: list[Completion]
    grades: list[tasks.Grade]


def roll_out(sampler, chosen, args, params, step):
    """This process's share of the step's questions [(task, problem)], answered and graded: a list of Groups."""
    mine = list(enumerate(chosen))[rank()::world()]
    prompts = [sampler.tokenizer.chat(task.prompt(problem)) for _, (task, problem) in mine]
    keys = [f"step {step}/{problem.id}" for _, (_, problem) in mine]
    answered = sampler.generate(prompts, args.rollouts, params, args.seed, keys)
    sampler.release()
    return [Group(number, problem, prompt, completions, [task.grade(problem, sampler.tokenizer.text(c.tokens)) for c in completions])
            for (number, (task, problem)), prompt, completions in zip(mine, prompts, answered)]


def rewards_of(group, args, step):
    """1 for a correct answer, else 0. The control `--reward random` tosses coins that know nothing of the answers."""
    if args.reward == "random":
        coins = random.Random(f"{args.seed}/{step}/{group.number}")
        return [float(coins.random() < 0.5) for _ in group.grades]
    return [float(grade.correct) for grade in group.grades]


def update(model, reference, optimizer, batch, args, lr):
    """One optimizer step on a mini-batch: [(Group, its advantages)] of this process. Returns (gradient norm or None, sums).

    None: no response of any process has a gradient, and the weights stay (a step on zeros would still move them by momentum).
    """
    kept = [[j for j, c in enumerate(group.completions) if args.truncated == "keep" or c.finish == "stop"] for group, _ in batch]
    lengths = [len(group.completions[j].tokens) for (group, _), js in zip(batch, kept) for j in js]
    count, tokens = total([len(lengths), sum(lengths)], model.device)
    names = ("loss", "trained_tokens", "clip_fraction", "approx_kl", "reference_kl", "entropy", "difference")
    sums, largest = dict.fromkeys(names, 0.0), 0.0
    for (group, advantage), js in zip(batch, kept):
        js = [j for j in js if advantage[j] != 0 or reference is not None]  # no advantage, no gradient: not run
        share = len(group.prompt) // max(1, len(js))  # each response carries its part of the prompt they share
        for part in micro_batches([share + len(group.completions[j].tokens) for j in js], args.micro_batch_tokens):
            part = [js[i] for i in part]
            responses = [group.completions[j] for j in part]
            sizes = torch.tensor([len(c.tokens) for c in responses], device=model.device)
            weights = token_weights(sizes.tolist(), args.loss, count, tokens, args.max_new_tokens)
            a, w = (torch.tensor(x, device=model.device).repeat_interleave(sizes) for x in ([advantage[j] for j in part], weights))  # (N,)
            old_logp = torch.tensor([x for c in responses for x in c.logprobs], device=model.device)
            ids = [c.tokens for c in responses]
            logp, entropy = response_logprobs(model, group.prompt, ids, args.temperature)
            with torch.no_grad():
                ref = response_logprobs(reference, group.prompt, ids, args.temperature)[0] if reference is not None else None
            loss, stats = policy_loss(logp, old_logp, a, w, args.clip_low, args.clip_high, ref, args.kl)
            loss.backward()
            gap = (logp.detach() - old_logp).abs()
            largest = max(largest, gap.max().item())
            stats |= {"loss": loss.item(), "trained_tokens": len(logp), "entropy": entropy.sum().item(), "difference": gap.sum().item()}
            for name, value in stats.items():
                sums[name] += value
    sums = dict(zip(names, total([sums[name] for name in names], model.device)))
    sums["largest_difference"] = total([largest], model.device, "MAX")[0]
    check_finite(sums["loss"], "loss")
    return (optimizer.step(lr) if sums["trained_tokens"] else None), sums


def validate(sampler, problems, args, params):
    """Share of the validation questions answered right, one sample each, over all processes."""
    mine = problems[rank()::world()]
    answered = sampler.generate([sampler.tokenizer.chat(task.prompt(problem)) for task, problem in mine], 1, params, args.seed)
    sampler.release()
    right = sum(task.grade(problem, sampler.tokenizer.text(c.tokens)).correct for (task, problem), (c,) in zip(mine, answered))
    return total([right], sampler.model.device)[0] / len(problems)


def choose(problems, step, count, seed):
    """The questions of a step. Each pass over the data has an order of its own, a function of (seed, pass)."""
    turn, place = divmod(step - 1, len(problems) // count)
    return random.Random(f"{seed}/{turn}").sample(problems, len(problems))[place * count:(place + 1) * count]


# ---- the command -----------------------------------------------------------------------------------------------------
def arguments():
    p = parser(__doc__, out="out/grpo")
    g = p.add_argument_group("what to train on")
    g.add_argument("--task", default="countdown-3-small", help=f"tasks, separated by commas: {tasks.NAMES}")
    g.add_argument("--questions", type=natural, default=400, help="how many of each task, from the split rl (0: all rows of a file; the paper: 1000)")
    g.add_argument("--data-dir", default="data", help="where gsm8k/, csqa/ and the like lie")
    g.add_argument("--steps", type=positive, default=60, help="steps in all (the paper: 150)")
    g.add_argument("--questions-per-step", type=positive, default=16, help="over all processes (the paper: 256)")
    g.add_argument("--rollouts", type=positive, default=8, help="responses to each question, the group (the paper: 16)")
    g.add_argument("--mini-batch", type=positive, default=8, help="questions of one optimizer update (the paper: 32)")
    g.add_argument("--max-new-tokens", type=positive, default=320, help="budget of a response (the paper: 4096)")
    g.add_argument("--slots", type=natural, default=0, help="rows decoded at once; 0: as many as fit in memory")
    g = p.add_argument_group("the objective")
    g.add_argument("--lr", type=number(float, 0), default=None, help="constant learning rate; if not given, the paper's 1e-6, or 3e-4 for a model under 10M parameters")
    g.add_argument("--temperature", type=number(float, 0, open_low=True), default=1.0, help="of the rollouts and of the log-probabilities; no top-k or top-p, which would make the two disagree")
    g.add_argument("--clip-low", type=number(float, 0, 1), default=0.2, help="a ratio below 1 minus this stops falling")
    g.add_argument("--clip-high", type=number(float, 0), default=0.2, help="a ratio above 1 plus this stops rising")
    g.add_argument("--kl", type=number(float, 0), default=0.0, help="weight of the divergence from the starting model; above 0 a second copy of it is kept")
    g.add_argument("--loss", choices=["token-mean", "sequence-mean", "constant"], default="token-mean", help="every token alike, every response alike, or the sum over a fixed length")
    g.add_argument("--no-std", action="store_true", help="do not divide advantages by the group's standard deviation")
    g.add_argument("--truncated", choices=["keep", "mask"], default="keep", help="responses cut off at the budget: train on them (reward 0), or leave them out of loss and divisor")
    g.add_argument("--reward", choices=["correct", "random"], default="correct", help="random is a control: a coin that ignores the answer")
    training_flags(p)
    p.add_argument("--eval-every", type=natural, default=0, help="steps between measurements on the split val; 0: never")
    p.add_argument("--eval-questions", type=positive, default=64, help="how many of each task")
    args = p.parse_args()
    if args.questions_per_step % args.mini_batch:
        raise UserError(f"--mini-batch {args.mini_batch} must divide --questions-per-step {args.questions_per_step}")
    if args.rollouts < 2:
        raise UserError("--rollouts 1: a group needs at least 2 responses to compare")
    return args


def read_problems(args, tokenizer, context):
    """([(task, problem)] to train on, the same to validate on). Refuses now what would fail in the middle of the run."""
    found = tasks.find_all(args.task, args.data_dir)
    problems = [(task, problem) for task in found for problem in task.problems("rl", args.questions, args.seed)]
    held_out = []
    if args.eval_every:
        held_out = [(task, problem) for task in found for problem in task.problems("val", args.eval_questions, args.seed)]
    if len(problems) < args.questions_per_step:
        raise UserError(f"--questions-per-step {args.questions_per_step}: there are only {len(problems)} questions; raise --questions or lower it")
    for task, problem in problems + held_out:
        n = len(tokenizer.chat(task.prompt(problem)))
        if n >= context:
            raise UserError(f"--task {task.name}: the prompt of {problem.id} has {n} tokens and does not fit the model's context of {context}; remove it")
    return problems, held_out


def main():
    args = arguments()
    start_processes(device_and_dtype(args.device)[0])
    model, tokenizer = load(args.model, args.device, args.dtype)
    problems, held_out = read_problems(args, tokenizer, model.config.max_position_embeddings)
    reference = deepcopy(model).requires_grad_(False) if args.kl else None  # before resuming: the model the run began with
    run, optimizer, lr, done = begin(args, model, tokenizer, small=3e-4)
    updates = run.info["updates"]
    sampler, params = Sampler(model, tokenizer, args.slots, CACHE_SHARE), Params(args.max_new_tokens, args.temperature)
    say(f"{len(problems)} questions, {args.steps} steps of {args.questions_per_step} x {args.rollouts} rollouts, learning rate {lr:g}")

    with interruptible(model.device) as asked_to_stop, progress("grpo", done, args.steps) as bar:
        for step in range(done + 1, args.steps + 1):
            started = time.time()
            groups = roll_out(sampler, choose(problems, step, args.questions_per_step, args.seed), args, params, step)
            rolled = time.time()

            rewards = torch.tensor([rewards_of(group, args, step) for group in groups]).reshape(-1, args.rollouts)
            pairs = list(zip(groups, advantages(rewards, not args.no_std).tolist()))
            norms, seen = [], []
            for start in range(0, args.questions_per_step, args.mini_batch):
                batch = [(group, a) for group, a in pairs if start <= group.number < start + args.mini_batch]
                norm, sums = update(model, reference, optimizer, batch, args, lr)
                seen.append(sums)
                if norm is not None:
                    norms.append(norm)
            updates += len(norms)

            row = measure(step, groups, rewards, seen, norms, lr, model.device)
            tokens = row["response_tokens"] * args.questions_per_step * args.rollouts
            row |= {"rollout_seconds": round(rolled - started, 3), "update_seconds": round(time.time() - rolled, 3),
                    "rollout_tokens_per_second": round(tokens / (rolled - started), 1)}
            if held_out and step % args.eval_every == 0:
                row["val"] = validate(sampler, held_out, args, params)
            run.log(row)
            if rank() == 0:
                report(run, row, groups, tokenizer, step)
            bar.set_postfix(reward=f"{row['reward']:.3f}", tokens=f"{row['response_tokens']:.0f}")
            bar.update()
            run.end_of_step(asked_to_stop(), step, args.steps, updates, model, tokenizer, optimizer)
    say(f"wrote {run.out}" if done < args.steps else f"{run.out} is finished already")


def measure(step, groups, rewards, seen, norms, lr, device):
    """The row of metrics.jsonl, over all processes: means per response or per trained token. `seen`: the sums of each update."""
    completions = [c for group in groups for c in group.completions]
    n, reward, right, tokens, cut, mixed = total([
        len(completions), rewards.sum().item(), sum(grade.correct for group in groups for grade in group.grades), sum(len(c.tokens) for c in completions),
        sum(c.finish == "length" for c in completions), (rewards != rewards[:, :1]).any(-1).sum().item()], device)
    sums = {name: sum(s[name] for s in seen) for name in seen[0]}
    row = {"step": step, "reward": reward / n, "correct": right / n, "groups_with_signal": mixed / (n / rewards.shape[1]), "response_tokens": tokens / n,
           "truncated": cut / n, "loss": sums["loss"], "grad_norm": sum(norms) / len(norms) if norms else None, "updates": len(norms), "lr": lr}
    row |= {name: sums[name] / max(1, sums["trained_tokens"]) for name in ("entropy", "clip_fraction", "approx_kl", "reference_kl")}
    # At the first update the weights are still those that sampled: here sampler and trainer must agree.
    first = next((s for s in seen if s["trained_tokens"]), None)
    row["sampler_trainer_mean"] = first["difference"] / first["trained_tokens"] if first else None
    row["sampler_trainer_max"] = first["largest_difference"] if first else None
    return row


def report(run, row, groups, tokenizer, step):
    """Warnings, and rollouts that a person can read: up to four a step in rollouts.jsonl, two now and then on the screen."""
    for text in warnings(row):
        say(f"warning, step {step}: {text}")
    for group in groups[:2]:
        for wanted in (True, False):
            for c, grade in [pair for pair in zip(group.completions, group.grades) if pair[1].correct == wanted][:1]:
                run.log({"step": step, "id": group.problem.id, "question": group.problem.question, "response": tokenizer.text(c.tokens),
                         "correct": grade.correct, "reason": grade.reason, "tokens": len(c.tokens), "finish": c.finish}, "rollouts.jsonl")
    if step == 1 or step % 20 == 0:
        for c, grade in list(zip(groups[0].completions, groups[0].grades))[:2]:
            text = tokenizer.text(c.tokens)
            shown = text if len(text) < 800 else f"{text[:400]} [...] {text[-400:]}"
            say(f"\n--- step {step}, {groups[0].problem.id}: {'correct' if grade.correct else grade.reason}\n{shown}")


def warnings(row):
    if row["truncated"] > 0.9:
        yield f"{row['truncated']:.0%} of the responses were cut off at the budget; raise --max-new-tokens"
    if not row["groups_with_signal"]:
        yield "within every group all rewards are equal, so nothing was learned; the questions are too hard or too easy for this model"
    if row["sampler_trainer_mean"] is not None and row["sampler_trainer_mean"] > 0.05:
        yield f"sampler and trainer disagree by {row['sampler_trainer_mean']:.3f} nats a token; the rollouts are not the trained policy's"


if __name__ == "__main__":
    command(main)
