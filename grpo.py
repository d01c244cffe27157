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
import math
import random
import time
from copy import deepcopy

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import tasks
from cli import UserError, command, natural, number, parser, positive
from model import load, place
from sample import Params, Sampler, key_of
from train import NonFinite, Optimizer, Run, default_lr, interruptible, pack, rank, start_processes, stop_on_nonfinite, total, world


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
    token-mean: every token alike (DAPO, Yu et al. 2025). sequence-mean: every response alike (the first GRPO).
    constant: the sum over a fixed length, so that length has no pull of its own (Dr. GRPO).
    """
    return [{"token-mean": 1 / tokens, "sequence-mean": 1 / (count * n), "constant": 1 / (count * max_new_tokens)}[loss] for n in lengths]


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
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (1, H or K, T, D)
        head, tail = zip(*((x[:, :, :prompt], x[:, :, prompt:].unflatten(2, (responses, width))[0].transpose(0, 1)) for x in (q, k, v)))
        o_head = F.scaled_dot_product_attention(*head, is_causal=True, enable_gqa=True)  # (1, H, prompt, D)
        if width == 0:
            return o_head.transpose(1, 2)
        q, (k, v) = tail[0], (torch.cat((h.expand(responses, -1, -1, -1), t), dim=2) for h, t in zip(head[1:], tail[1:]))  # (n, K, prompt + width, D)
        mask = torch.ones(width, prompt + width, dtype=torch.bool, device=q.device).tril(prompt)
        o_tail = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)  # (n, H, width, D)
        return torch.cat((o_head[0].transpose(0, 1), o_tail.transpose(1, 2).flatten(0, 1)))[None]  # (1, T, H, D)
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

def roll_out(sampler, chosen, args, params, step):
    """This process's share of the step's questions, answered and graded: [(place in the step, prompt, completions, grades)]."""
    mine = list(enumerate(chosen))[rank()::world()]
    prompts = [sampler.tokenizer.chat(task.prompt(problem)) for _, (task, problem) in mine]
    keys = [f"step {step}/{problem.id}" for _, (_, problem) in mine]
    groups = sampler.generate(prompts, args.rollouts, params, args.seed, keys)
    return [(i, prompt, group, [task.grade(problem, sampler.tokenizer.text(c.tokens)) for c in group])
            for (i, (task, problem)), prompt, group in zip(mine, prompts, groups)]


def reward_of(grade, args, step, place, index):
    """1 for a correct answer. The control `--reward random` tosses a coin that knows nothing of the answer."""
    return float(random.Random(f"{args.seed}/{step}/{place}/{index}").random() < 0.5 if args.reward == "random" else grade.correct)


def update(model, reference, optimizer, group_batch, args, temperature, lr):
    """One optimizer step on a mini-batch: [(prompt, completions, advantages)] of this process. Returns (norm or None, sums).

    None: no response of any process has a gradient, and the weights stay (a step on zeros would still move them by momentum).
    """
    kept = [[j for j, c in enumerate(completions) if args.truncated == "keep" or c.finish == "stop"] for _, completions, _ in group_batch]
    lengths = [len(completions[j].tokens) for (_, completions, _), js in zip(group_batch, kept) for j in js]
    count, tokens = total([len(lengths), sum(lengths)], model.device)
    names = ("loss", "trained_tokens", "clip_fraction", "approx_kl", "reference_kl", "entropy", "difference")
    sums, largest = dict.fromkeys(names, 0.0), 0.0
    for (prompt, completions, advantage), js in zip(group_batch, kept):
        js = [j for j in js if advantage[j] != 0 or reference is not None]  # no advantage, no gradient: not run
        for part in pack([len(prompt) // max(1, len(js)) + len(completions[j].tokens) for j in js], args.micro_batch_tokens):
            rows = [completions[js[i]] for i in part]
            sizes = [len(c.tokens) for c in rows]
            logp, entropy = response_logprobs(model, prompt, [c.tokens for c in rows], temperature)
            spread = lambda values: torch.tensor([x for x, n in zip(values, sizes) for _ in range(n)], device=logp.device)
            old_logp = torch.tensor([x for c in rows for x in c.logprobs], device=logp.device)
            with torch.no_grad():
                ref = response_logprobs(reference, prompt, [c.tokens for c in rows], temperature)[0] if reference is not None else None
            loss, stats = policy_loss(logp, old_logp, spread([advantage[js[i]] for i in part]),
                                      spread(token_weights(sizes, args.loss, count, tokens, args.max_new_tokens)),
                                      args.clip_low, args.clip_high, ref, args.kl)
            loss.backward()
            gap = (logp.detach() - old_logp).abs()
            largest = max(largest, gap.max().item())
            for name, value in {**stats, "loss": loss.item(), "trained_tokens": len(logp), "entropy": entropy.sum().item(), "difference": gap.sum().item()}.items():
                sums[name] += value
    sums = dict(zip(names, total([sums[name] for name in names], model.device)))
    sums["largest_difference"] = total([largest], model.device, "MAX")[0]
    if not math.isfinite(sums["loss"]):
        raise NonFinite
    return (optimizer.step(lr) if sums["trained_tokens"] else None), sums


def validate(sampler, problems, args, params):
    """Share of the validation questions answered right, one sample each, over all processes."""
    mine = problems[rank()::world()]
    groups = sampler.generate([sampler.tokenizer.chat(task.prompt(problem)) for task, problem in mine], 1, params, args.seed)
    right = sum(task.grade(problem, sampler.tokenizer.text(group[0].tokens)).correct for (task, problem), group in zip(mine, groups))
    return total([right], sampler.model.device)[0] / len(problems)


def choose(problems, step, count, seed):
    """The questions of a step. Each pass over the data has an order of its own, a function of (seed, pass)."""
    per_pass = len(problems) // count
    turn, place = divmod(step - 1, per_pass)
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
    g.add_argument("--weight-decay", type=number(float, 0), default=0.0, help="AdamW's, on matrices only")
    g.add_argument("--max-norm", type=number(float, 0), default=1.0, help="clip the gradient to this norm; 0 does not")
    g = p.add_argument_group("memory and checkpoints")
    g.add_argument("--micro-batch-tokens", type=positive, default=2048, help="response tokens (padding included) of one group that go through the model at once; lower it if memory runs out")
    g.add_argument("--recompute", action="store_true", help="keep no activations inside the layers and compute them again: much less memory, a third more work")
    g.add_argument("--save-every", type=natural, default=20, help="steps between checkpoints; 0: only at the end")
    g.add_argument("--eval-every", type=natural, default=0, help="steps between measurements on the split val; 0: never")
    g.add_argument("--eval-questions", type=positive, default=64, help="how many of each task")
    g.add_argument("--resume", action="store_true", help="go on with the run in --out, to the same end as if it had not stopped")
    args = p.parse_args()
    if args.questions_per_step % args.mini_batch:
        raise UserError(f"--mini-batch {args.mini_batch} must divide --questions-per-step {args.questions_per_step}")
    if args.rollouts < 2:
        raise UserError("--rollouts 1: a group needs at least 2 responses to compare")
    return args


def main():
    args = arguments()
    start_processes(place(args.device, args.dtype)[0])
    found = tasks.find_all(args.task, args.data_dir)
    problems = [(task, problem) for task in found for problem in task.problems("rl", args.questions, args.seed)]
    held_out = [(task, problem) for task in found for problem in task.problems("val", args.eval_questions, args.seed)] if args.eval_every else []
    if len(problems) < args.questions_per_step:
        raise UserError(f"--questions-per-step {args.questions_per_step}: there are only {len(problems)} questions; raise --questions or lower it")
    model, tokenizer = load(args.model, args.device, args.dtype)
    reference = deepcopy(model).requires_grad_(False) if args.kl else None  # before resuming: the model the run began with
    run = Run(args)
    model.recompute = args.recompute
    lr = default_lr(args.lr, model, small=3e-4, paper=1e-6)
    optimizer = Optimizer(model, args.weight_decay, max_norm=args.max_norm)
    done, updates = run.restore(optimizer), run.info["updates"]
    sampler, params = Sampler(model, tokenizer, args.slots), Params(args.max_new_tokens, args.temperature)
    run.say(f"{len(problems)} questions, {args.steps} steps of {args.questions_per_step} x {args.rollouts} rollouts, learning rate {lr:g}")

    with interruptible(model.device) as asked_to_stop, tqdm(total=args.steps, initial=done, desc="grpo", unit="step", disable=None if rank() == 0 else True) as bar:
        for step in range(done + 1, args.steps + 1):
            started = time.time()
            chosen = choose(problems, step, args.questions_per_step, args.seed)
            groups = roll_out(sampler, chosen, args, params, step)
            rolled = time.time()

            rewards = torch.tensor([[reward_of(g, args, step, i, j) for j, g in enumerate(grades)] for i, _, _, grades in groups]).reshape(-1, args.rollouts)
            advantage = advantages(rewards, not args.no_std).tolist()
            norms, first, sums = [], None, {}
            for start in range(0, args.questions_per_step, args.mini_batch):
                batch = [(prompt, completions, a) for (i, prompt, completions, _), a in zip(groups, advantage) if start <= i < start + args.mini_batch]
                try:
                    norm, seen = update(model, reference, optimizer, batch, args, args.temperature, lr)
                except NonFinite:
                    raise stop_on_nonfinite(run, f"the loss or gradient of step {step}")
                if first is None and seen["trained_tokens"]:
                    first = seen  # the weights are still those that sampled: here sampler and trainer must agree
                if norm is not None:
                    norms.append(norm)
                    updates += 1
                sums = {name: sums.get(name, 0.0) + value for name, value in seen.items()}

            row = measure(step, groups, rewards, sums, first, norms, lr, model.device)
            row |= {"rollout_seconds": round(rolled - started, 3), "update_seconds": round(time.time() - rolled, 3),
                    "rollout_tokens_per_second": round(row["response_tokens"] * args.questions_per_step * args.rollouts / (rolled - started), 1)}
            if held_out and step % args.eval_every == 0:
                row["val"] = validate(sampler, held_out, args, params)
            run.log(row)
            report(run, row, groups, chosen, tokenizer, step)
            bar.set_postfix(reward=f"{row['reward']:.3f}", tokens=f"{row['response_tokens']:.0f}")
            bar.update()
            stop = asked_to_stop()
            if stop or run.due(step, args.steps):
                run.save(step, updates, model, tokenizer, optimizer)
            if stop:
                raise KeyboardInterrupt
    run.say(f"wrote {run.out}" if done < args.steps else f"{run.out} is finished already")
    if dist.is_initialized():
        dist.destroy_process_group()


def measure(step, groups, rewards, sums, first, norms, lr, device):
    """The row of metrics.jsonl, over all processes. Fractions and means are per token or per response, as named."""
    completions = [c for _, _, group, _ in groups for c in group]
    n, reward, right, tokens, cut, mixed = total([
        len(completions), rewards.sum().item(), sum(g.correct for *_, grades in groups for g in grades), sum(len(c.tokens) for c in completions),
        sum(c.finish == "length" for c in completions), (rewards != rewards[:, :1]).any(-1).sum().item()], device)
    trained = max(1, sums["trained_tokens"])
    row = {"step": step, "reward": reward / n, "correct": right / n, "groups_with_signal": mixed / (n / rewards.shape[1]), "response_tokens": tokens / n,
           "truncated": cut / n, "loss": sums["loss"], "grad_norm": sum(norms) / len(norms) if norms else None, "updates": len(norms), "lr": lr,
           "entropy": sums["entropy"] / trained, "clip_fraction": sums["clip_fraction"] / trained, "approx_kl": sums["approx_kl"] / trained,
           "sampler_trainer_mean": first["difference"] / first["trained_tokens"] if first else None, "sampler_trainer_max": first["largest_difference"] if first else None}
    if sums["reference_kl"]:
        row["reference_kl"] = sums["reference_kl"] / trained
    return row


def report(run, row, groups, chosen, tokenizer, step):
    """Warnings, and rollouts that a person can read: four a step in rollouts.jsonl, two now and then on the screen."""
    for text in warnings(row):
        run.say(f"warning, step {step}: {text}")
    for i, _, completions, grades in groups[:2]:
        for j in sorted({max(range(len(grades)), key=lambda j: grades[j].correct), min(range(len(grades)), key=lambda j: grades[j].correct)}):
            run.log({"step": step, "id": chosen[i][1].id, "question": chosen[i][1].question, "response": tokenizer.text(completions[j].tokens),
                     "correct": grades[j].correct, "reason": grades[j].reason, "tokens": len(completions[j].tokens), "finish": completions[j].finish}, "rollouts.jsonl")
    if step == 1 or step % 20 == 0:
        for c, grade in zip(groups[0][2][:2], groups[0][3]):
            text = tokenizer.text(c.tokens)
            run.say(f"\n--- step {step}, {chosen[groups[0][0]][1].id}: {'correct' if grade.correct else grade.reason}\n{text if len(text) < 800 else text[:400] + ' [...] ' + text[-400:]}")


def warnings(row):
    if row["truncated"] > 0.9:
        yield f"{row['truncated']:.0%} of the responses were cut off at the budget; raise --max-new-tokens"
    if not row["groups_with_signal"]:
        yield "within every group all rewards are equal, so nothing was learned; the questions are too hard or too easy for this model"
    if row["sampler_trainer_mean"] is not None and row["sampler_trainer_mean"] > 0.05:
        yield f"sampler and trainer disagree by {row['sampler_trainer_mean']:.3f} nats a token; the rollouts are not the trained policy's"


if __name__ == "__main__":
    command(main)
