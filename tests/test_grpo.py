"""GRPO's objective has the right gradient, token by token, and a run leaves what one needs to judge it."""
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import GRPO, MINI, read_rows, tiny
from torch import tensor

import grpo
import tasks
from checkpoint import load
from grpo import Group, Tokens, advantages, policy_loss, response_logprobs, token_weight
from optimizer import Optimizer
from report.rollouts import over_all_processes, sums_over, warnings_of
from sample import Completion

ARGS = SimpleNamespace(
    log_groups=1,
    truncated="keep",
    loss="token-mean",
    max_new_tokens=20,
    clip_low=0.2,
    clip_high=0.2,
    kl=0.0,
    temperature=1.0,
    micro_batch_tokens=10_000,
    lr=0.1,
)
PROMPT = [5, 9, 200, 31, 8]


def completions(lengths=(4, 9, 1, 6), seed=0):
    """Responses of these lengths to PROMPT, each with its end token."""
    generator = torch.Generator().manual_seed(seed)
    _, tokenizer = tiny()
    out = []
    for n in lengths:
        tokens = torch.randint(0, 256, (n - 1,), generator=generator).tolist() + [tokenizer.end_id]
        out.append(Completion(PROMPT, tokens, [-3.0] * n, "stop"))
    return out


def group_of(responses, advantage, number=0):
    return Group(number, None, None, PROMPT, responses, advantages=advantage)


# ---- the objective -------------------------------------------------------------------------------
def test_advantages():
    """Rule 12: equal rewards give zeros."""
    a = advantages(tensor([[1.0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]))
    assert torch.allclose(a[0], tensor([1.5, -0.5, -0.5, -0.5]), atol=1e-4)
    assert a.sum(-1).abs().max() < 1e-5 and (a[2:] == 0).all()
    # The mean of sixteen 0.7 is not 0.7 in float32.
    assert not advantages(torch.full((16,), 0.7)).any()
    assert advantages(tensor([[1.0, 0, 0, 0]]), normalise=False).tolist() == [[0.75, -0.25, -0.25, -0.25]]


def tokens_of(logp, advantage, reference=None):
    """Tokens whose old log-probability is 0, with equal weights."""
    n = len(logp)
    return Tokens(logp, torch.zeros(n), torch.zeros(n), tensor(advantage), torch.full((n,), 1 / n), reference)


@pytest.mark.parametrize("ratio, advantage, moves", [
    (1.5, 1.0, False),
    (1.5, -1.0, True),
    (0.5, 1.0, True),
    (0.5, -1.0, False),
    (1.1, 1.0, True),
    (0.9, -1.0, True),
    (1.25, 1.0, True),  # --clip-high is not --clip-low
    (0.75, -1.0, False),
])
def test_clip_quadrants(ratio, advantage, moves):
    """Rule 11: a token stops only where its ratio has left the range in the direction of its advantage."""
    logp = tensor([math.log(ratio)], requires_grad=True)
    tokens = tokens_of(logp, [advantage])
    loss, _ = policy_loss(tokens, clip_low=0.2, clip_high=0.28)
    loss.backward()
    assert logp.grad.item() == pytest.approx(-ratio * advantage if moves else 0.0)
    assert over_all_processes([sums_over(tokens, loss, 0.2, 0.28)])["clip_fraction"] == (not moves)


def test_kl_term_is_k3():
    logp, reference = tensor([-1.0, -2.0], requires_grad=True), tensor([-1.5, -1.0])
    _, loss = policy_loss(tokens_of(logp, [0.0, 0.0], reference), kl=0.1)
    k3 = sum(math.exp(gap) - gap - 1 for gap in (-1.5 - -1.0, -1.0 - -2.0))
    assert loss.item() == pytest.approx(0.1 * k3 / 2)


@pytest.mark.parametrize("loss, shares", [
    ("token-mean", [0.25, 0.75]),
    ("sequence-mean", [0.5, 0.5]),
    ("constant", [0.1, 0.3]),
])
def test_token_weights(loss, shares):
    """Three ways to weigh responses of 2 and 6 tokens, each as the sum over its tokens."""
    got = [n * token_weight(n, loss, n_responses=2, n_tokens=8, max_new_tokens=10) for n in (2, 6)]
    assert got == pytest.approx(shares)


# ---- one prompt, many responses ------------------------------------------------------------------
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama3-rope"])
def test_shared_prompt_equals_separate_rows(family):
    """Rule 10. Values and gradients against one plain causal forward a response, its end token included."""
    groups = [(PROMPT, [c.tokens for c in completions()]), ([7], [[3, 4, 5]]), ([8, 8], [[1], [2]])]
    ours, _ = tiny(family)
    plain, _ = tiny(family)
    logp, entropy = response_logprobs(ours, groups, 0.7)
    upstream = torch.randn(len(logp), generator=torch.Generator().manual_seed(2))
    (logp * upstream).sum().backward()
    want, want_entropy = [], []
    for prompt, tokens in [(prompt, tokens) for prompt, responses in groups for tokens in responses]:
        hidden = plain(tensor([prompt + tokens[:-1]]))[0, len(prompt) - 1:]
        full = (plain.logits(hidden) / 0.7).log_softmax(-1)
        want.append(full[range(len(tokens)), tokens])
        want_entropy.append(-(full.exp() * full).sum(-1))
    (torch.cat(want) * upstream).sum().backward()
    assert torch.allclose(logp, torch.cat(want), atol=1e-4)
    assert torch.allclose(entropy, torch.cat(want_entropy), atol=1e-4)
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-4, rtol=1e-3)


# ---- the update ----------------------------------------------------------------------------------
def gradient(*groups, **change):
    """(the gradient that an update of the groups would step on or None, the norm it returns)."""
    model, _ = tiny()
    optimizer = Optimizer(model, 0.0)
    grads = []

    def step(lr):
        grads.extend(w.grad.flatten() for w in model.parameters())
        return 1.0
    optimizer.step = step
    args = SimpleNamespace(**{**vars(ARGS), **change})
    reference = tiny(seed=1)[0] if args.kl else None
    norm, _ = grpo.update(model, reference, optimizer, list(groups), args)
    return torch.cat(grads) if grads else None, norm


def close(a, b, atol=1e-5):
    return torch.allclose(a, b, atol=atol, rtol=1e-4)


def test_micro_batches_do_not_change_the_gradient():
    """Rule 9 for GRPO: however a step is cut, against the objective of one plain forward a response."""
    groups = [group_of(completions(), [1.0, -0.5, 0.5, -1.0]),
              group_of(completions((3, 2), seed=4), [0.7, -0.7], number=1)]
    model, _ = tiny()
    reference, _ = tiny(seed=1)
    objective = 0
    for group in groups:
        for completion, advantage in zip(group.completions, group.advantages, strict=True):
            logp, far = (m.logits(m(tensor([PROMPT + completion.tokens[:-1]])))[0, len(PROMPT) - 1:]
                         .log_softmax(-1)[range(len(completion.tokens)), completion.tokens]
                         for m in (model, reference))
            ratio = (logp + 3.0).exp()
            gap = far.detach() - logp
            gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
            objective = objective + (0.1 * (gap.exp() - gap - 1) - gain).sum()
    (objective / sum(len(c.tokens) for group in groups for c in group.completions)).backward()
    want = torch.cat([w.grad.flatten() for w in model.parameters()])
    for budget in (1, 12, 20, 30, 10_000):
        got, _ = gradient(*groups, micro_batch_tokens=budget, kl=0.1)
        assert close(got, want, atol=1e-4), budget


def test_a_groups_prompt_runs_once(monkeypatch):
    """Whatever the lengths of its responses, and with others beside it, as far as a micro-batch goes."""
    ran = []
    real = grpo.response_logprobs

    def response_logprobs(model, asked, temperature):
        ran.append([(len(prompt), [len(r) for r in responses]) for prompt, responses in asked])
        return real(model, asked, temperature)
    monkeypatch.setattr(grpo, "response_logprobs", response_logprobs)
    groups = [group_of(completions((2, 30)), [0.7, -0.7], number) for number in range(4)]
    gradient(*groups, micro_batch_tokens=80)  # a group has 5 + 32 tokens
    assert ran == [[(5, [2, 30])] * 2] * 2
    ran.clear()
    gradient(groups[0], micro_batch_tokens=20)  # larger than a micro-batch
    assert ran == [[(5, [2])], [(5, [30])]]


def test_equal_rewards_give_no_gradient_and_count_in_the_divisor():
    """Rule 12: alone, such a group makes no step at all; beside another it halves that one's weight."""
    responses = completions((5, 5))
    flat = group_of(completions((5, 5), seed=9), [0.0, 0.0], number=1)
    mixed = group_of(responses, [1.0, -1.0])
    assert gradient(flat) == (None, None)
    assert close(2 * gradient(mixed, flat)[0], gradient(mixed)[0])


def test_truncated_responses():
    """`keep` trains them; `mask` leaves them out of the loss and of the divisor."""
    responses = completions()
    responses[1].finish = "length"
    group = group_of(responses, [1.0, -1.0, 0.5, 0.2])
    others = group_of([responses[0], responses[2], responses[3]], [1.0, 0.5, 0.2])
    masked, _ = gradient(group, truncated="mask")
    assert close(masked, gradient(others)[0], atol=1e-6)
    assert not close(masked, gradient(group)[0], atol=1e-4)


def test_random_reward_knows_nothing():
    args = SimpleNamespace(reward="random", seed=0)

    def coins(correct):
        out = []
        for place in range(40):
            grades = [SimpleNamespace(correct=correct)] * 8
            out += grpo.rewards_of(Group(place, None, None, [], [], grades), args, step=1)
        return out
    assert coins(True) == coins(False) and 0.4 < sum(coins(True)) / 320 < 0.6


def test_questions_are_seen_once_a_pass():
    problems = list(range(20))
    steps = [grpo.choose(problems, step, 5, seed=0) for step in range(1, 9)]
    first, second = sum(steps[:4], []), sum(steps[4:], [])
    assert sorted(first) == sorted(second) == problems and first != second


# ---- the command ---------------------------------------------------------------------------------
FLAGS = (*GRPO, "--steps", "2", "--max-new-tokens", "60")
FILES = {"config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
         "model.safetensors", "run.json", "metrics.jsonl", "rollouts.jsonl", "state"}


def test_a_run_leaves_what_is_promised(cmd):
    flags = (*FLAGS, "--steps", "3", "--eval-every", "2", "--eval-questions", "6", "--kl", "0.01")
    status, _, err = cmd(grpo, *flags, "--out", "out/grpo")
    assert status == 0, err
    out = Path("out/grpo")
    assert {path.name for path in out.iterdir()} >= FILES
    rows = read_rows(out / "metrics.jsonl")
    measured = [(0, True), (1, False), (2, False), (2, True), (3, False), (3, True)]
    assert [(row["step"], "val" in row) for row in rows] == measured
    assert rows[0].keys() == {"step", "val"} and 0 <= rows[-1]["val"] <= 1
    record = json.loads((out / "run.json").read_text())
    assert record["flags"]["clip_low"] == 0.2 and "torch" in record["versions"]
    logged = read_rows(out / "rollouts.jsonl")
    assert [row["step"] for row in logged] == [1, 1, 2, 2, 3, 3] and (out / "report.html").exists()


def test_logged_groups_are_whole(cmd):
    """All rollouts of a question, each with its very ids."""
    status, _, err = cmd(grpo, *FLAGS, "--steps", "3", "--log-groups", "3", "--reward", "random")
    assert status == 0, err
    rows = read_rows("out/grpo/rollouts.jsonl")
    assert [row["step"] for row in rows] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    _, tokenizer = load(MINI, "cpu")
    task = tasks.find("countdown-3-small")
    for row in rows:
        rollouts = row["rollouts"]
        rewards = [rollout["reward"] for rollout in rollouts]
        assert len(rollouts) == 4 and row["task"] == task.name
        assert row["prompt"] == tokenizer.chat(task.prompt(tasks.Problem("", "", row["question"], {})))
        assert [rollout["advantage"] for rollout in rollouts] == pytest.approx(
            advantages(tensor(rewards)).tolist(), abs=1e-5)
        for rollout in rollouts:
            assert tokenizer.decode_response(rollout["ids"]) == rollout["response"]
            assert rollout["tokens"] == len(rollout["ids"]) == len(rollout["sampler_logprobs"])


def test_rewards_of_any_kind_are_numbers(cmd, monkeypatch):
    """Whatever a user's function returns."""
    def rewards_of(group, args, step):
        kinds = (int, bool, float, np.float32)
        return [kind(grade.correct) for kind, grade in zip(kinds, group.grades, strict=True)]
    monkeypatch.setattr(grpo, "rewards_of", rewards_of)
    status, _, err = cmd(grpo, *FLAGS, "--steps", "1")
    assert status == 0, err
    rollouts = [rollout for row in read_rows("out/grpo/rollouts.jsonl") for rollout in row["rollouts"]]
    assert all(type(rollout["reward"]) is float for rollout in rollouts)


def test_figures_mean_the_same_with_a_reference():
    """A KL term runs the responses without an advantage too: they once entered entropy and approx_kl."""
    model, _ = tiny(seed=5)
    reference, _ = tiny(seed=5)
    groups = [group_of(completions(), [1.0, 0.0, 0.0, -1.0]),
              group_of(completions(seed=3), [0.0] * 4, number=1)]

    def sums(reference, kl):
        args = SimpleNamespace(**{**vars(ARGS), "kl": kl})
        return grpo.update(model, reference, SimpleNamespace(step=lambda lr: 0.0), groups, args)[1]
    without, alike = sums(None, 0.0), sums(reference, 0.5)
    trained = len(groups[0].completions[0].tokens) + len(groups[0].completions[3].tokens)
    assert alike["reference_tokens"] > alike["trained_tokens"] == without["trained_tokens"] == trained
    for name in ("loss", "entropy", "approx_kl", "clip_fraction", "difference"):
        assert alike[name] == pytest.approx(without[name], rel=1e-4, abs=1e-6), name


def test_sampler_and_trainer_agree_at_every_step(cmd):
    """Rule 3: before the first update of a step the trainer finds the sampler's numbers."""
    cmd(grpo, *FLAGS, "--log-groups", "0")
    differences = [row["sampler_trainer_max"] for row in read_rows("out/grpo/metrics.jsonl")]
    measured = [x for x in differences if x is not None]
    assert measured and max(measured) < 1e-4
    assert not Path("out/grpo/rollouts.jsonl").exists() and Path("out/grpo/report.html").exists()


def test_goes_on_from_what_is_there(cmd):
    """With no --model RL goes on from out/sft; where there is none it starts from the base, and says so."""
    status, out, err = cmd(grpo, *FLAGS[2:])
    assert status == 0, err
    assert out.startswith("from mini into out/rl:") and Path("out/rl/model.safetensors").is_file()
    Path("out/rl").rename("out/sft")
    status, out, err = cmd(grpo, *FLAGS[2:])
    assert status == 0, err
    assert out.startswith("from out/sft into out/grpo:")
    record = json.loads(Path("out/grpo/run.json").read_text())
    assert record["flags"]["model"] == "out/sft" and record["flags"]["out"] == "out/grpo"
    assert cmd(grpo, *FLAGS[2:], "--resume")[0] == 0


def test_warnings_are_said_once(cmd, folder):
    bad = {"truncated": 0.95, "groups_with_signal": 0.0, "sampler_trainer_mean": 0.2}
    good = {"truncated": 0.1, "groups_with_signal": 0.5, "sampler_trainer_mean": 1e-6}
    assert len(warnings_of(bad)) == 3 and not warnings_of(good)
    _, out, _ = cmd(grpo, *FLAGS, "--max-new-tokens", "3", "--steps", "3")
    assert out.count("were cut off: raise --max-new-tokens") == 1 and "the context of" not in out
    flags = (*FLAGS, "--model", folder(), "--max-new-tokens", "100000", "--out", "run")  # its context: 256
    _, out, _ = cmd(grpo, *flags)
    assert out.count("the context of 256 tokens leaves 16 of 16 prompts less than --max-new-tokens 1000") == 1
