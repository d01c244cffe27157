import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import MINI, tiny

import grpo
from grpo import Group, advantages, policy_loss, response_logprobs, token_weights
from sample import Completion
from train import Optimizer

ARGS = SimpleNamespace(truncated="keep", loss="token-mean", max_new_tokens=20, clip_low=0.2, clip_high=0.2, kl=0.0, temperature=1.0, micro_batch_tokens=10_000)
PROMPT = [5, 9, 200, 31, 8]


def completions(lengths=(4, 9, 1, 6), finish="stop", seed=0):
    g, (_, tokenizer) = torch.Generator().manual_seed(seed), tiny()
    return [Completion(PROMPT, torch.randint(0, 256, (n - 1,), generator=g).tolist() + [tokenizer.end_id], [-3.0] * n, finish) for n in lengths]


# ---- the objective ---------------------------------------------------------------------------------------------------

def test_advantages():
    a = advantages(torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]))
    assert torch.allclose(a[0], torch.tensor([1.5, -0.5, -0.5, -0.5]), atol=1e-4)
    assert a.sum(-1).abs().max() < 1e-5 and (a[2:] == 0).all()  # rule 12
    assert advantages(torch.tensor([[1.0, 0, 0, 0]]), normalise=False).tolist() == [[0.75, -0.25, -0.25, -0.25]]


@pytest.mark.parametrize("ratio, advantage, moves", [(1.5, 1.0, False), (1.5, -1.0, True), (0.5, 1.0, True), (0.5, -1.0, False), (1.1, 1.0, True), (0.9, -1.0, True)])
def test_clip_quadrants(ratio, advantage, moves):
    """Rule 11: a token stops only where its ratio has left the range in the direction of its advantage."""
    logp = torch.tensor([math.log(ratio)], requires_grad=True)
    loss, stats = policy_loss(logp, torch.zeros(1), torch.tensor([advantage]), torch.ones(1))
    loss.backward()
    assert logp.grad.item() == pytest.approx(-ratio * advantage if moves else 0.0)
    assert stats["clip_fraction"] == (not moves)


def test_clip_low_and_high_are_two_numbers():
    logp = torch.tensor([math.log(1.25), math.log(0.75)], requires_grad=True)
    policy_loss(logp, torch.zeros(2), torch.tensor([1.0, -1.0]), torch.ones(2), clip_low=0.2, clip_high=0.28)[0].backward()
    assert logp.grad[0] != 0 and logp.grad[1] == 0


def test_kl_term_is_k3():
    logp, reference = torch.tensor([-1.0, -2.0], requires_grad=True), torch.tensor([-1.5, -1.0])
    loss, stats = policy_loss(logp, logp.detach(), torch.zeros(2), torch.tensor([0.5, 0.5]), reference=reference, kl=0.1)
    k3 = [math.exp(r - p) - (r - p) - 1 for p, r in zip([-1.0, -2.0], [-1.5, -1.0])]
    assert loss.item() == pytest.approx(0.1 * sum(k3) / 2) and stats["reference_kl"] == pytest.approx(sum(k3))


def test_token_weights():
    """Three ways to weigh responses of 2 and 6 tokens, as a sum over tokens."""
    assert [w * n for w, n in zip(token_weights([2, 6], "token-mean", 2, 8, 10), (2, 6))] == [0.25, 0.75]
    assert [w * n for w, n in zip(token_weights([2, 6], "sequence-mean", 2, 8, 10), (2, 6))] == [0.5, 0.5]
    assert [w * n for w, n in zip(token_weights([2, 6], "constant", 2, 8, 10), (2, 6))] == pytest.approx([0.1, 0.3])


# ---- one prompt, many responses --------------------------------------------------------------------------------------

@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama3-rope"])
@pytest.mark.parametrize("lengths", [(4, 9, 1, 6), (1, 1), (5,)])
def test_shared_prompt_equals_separate_rows(family, lengths):
    """Values and gradients against one plain causal forward a response."""
    group = completions(lengths)
    (ours, _), (plain, _) = tiny(family), tiny(family)
    upstream = torch.randn(sum(lengths), generator=torch.Generator().manual_seed(2))
    logp, entropy = response_logprobs(ours, PROMPT, [c.tokens for c in group], 0.7)
    (logp * upstream).sum().backward()
    want, wanted_entropy = [], []
    for c in group:
        full = (plain.logits(plain(torch.tensor([PROMPT + c.tokens[:-1]])))[0, len(PROMPT) - 1:] / 0.7).log_softmax(-1)
        want.append(full[range(len(c.tokens)), c.tokens])
        wanted_entropy.append(-(full.exp() * full).sum(-1))
    (torch.cat(want) * upstream).sum().backward()
    assert torch.allclose(logp, torch.cat(want), atol=1e-4) and torch.allclose(entropy, torch.cat(wanted_entropy), atol=1e-4)
    for a, b in zip(ours.parameters(), plain.parameters()):
        assert torch.allclose(a.grad, b.grad, atol=1e-4, rtol=1e-3)


# ---- the update ------------------------------------------------------------------------------------------------------

def gradient(group, advantage, **change):
    model, _ = tiny()
    optimizer = Optimizer(model, 0.0)
    grads = {}
    optimizer.step = lambda lr: grads.update({n: w.grad.clone() for n, w in model.named_parameters()}) or 1.0
    norm, sums = grpo.update(model, None, optimizer, [(Group(0, None, PROMPT, group, []), advantage)], SimpleNamespace(**{**vars(ARGS), **change}), 0.1)
    return torch.cat([g.flatten() for g in grads.values()]) if grads else None, norm, sums


def test_micro_batches_do_not_change_the_gradient():
    """Rule 9 for GRPO."""
    group = completions()
    whole = gradient(group, [1.0, -0.5, 0.5, -1.0])[0]
    for budget in (1, 12, 20):
        assert torch.allclose(gradient(group, [1.0, -0.5, 0.5, -1.0], micro_batch_tokens=budget)[0], whole, atol=1e-5, rtol=1e-4)


def test_equal_rewards_give_no_gradient_and_count_in_the_divisor():
    """Rule 12: alone, such a group makes no step at all; beside another it halves that one's weight."""
    group = completions((5, 5))
    assert gradient(group, [0.0, 0.0])[:2] == (None, None)
    model, _ = tiny()
    both = {}
    optimizer = Optimizer(model, 0.0)
    optimizer.step = lambda lr: both.update({n: w.grad.clone() for n, w in model.named_parameters()}) or 1.0
    grpo.update(model, None, optimizer, [(Group(0, None, PROMPT, group, []), [1.0, -1.0]), (Group(1, None, PROMPT, completions((5, 5), seed=9), []), [0.0, 0.0])], ARGS, 0.1)
    alone = gradient(group, [1.0, -1.0])[0]
    assert torch.allclose(torch.cat([g.flatten() for g in both.values()]) * 2, alone, atol=1e-5, rtol=1e-4)


def test_truncated_responses():
    """keep trains them; mask leaves them out of the loss and of the divisor."""
    group = completions()
    group[1].finish = "length"
    masked = gradient(group, [1.0, -1.0, 0.5, 0.2], truncated="mask")[0]
    others = [group[0], group[2], group[3]]
    assert torch.allclose(masked, gradient(others, [1.0, 0.5, 0.2])[0], atol=1e-6)
    assert not torch.allclose(masked, gradient(group, [1.0, -1.0, 0.5, 0.2])[0], atol=1e-4)


def test_the_end_token_is_trained_and_the_prompt_is_not():
    """Rule 10: logp holds one number for each sampled token, the end token among them; the prompt's tokens as targets have none."""
    model, tokenizer = tiny()
    seen = []
    real = model.logprobs
    model.logprobs = lambda h, targets, t=1.0: seen.append(targets.tolist()) or real(h, targets, t)
    group = completions((4, 3))
    response_logprobs(model, PROMPT, [c.tokens for c in group], 1.0)
    assert seen == [group[0].tokens + group[1].tokens] and seen[0].count(tokenizer.end_id) == 2


def test_random_reward_knows_nothing():
    args = SimpleNamespace(reward="random", seed=0)
    coins = [coin for c in (True, False) for i in range(40) for coin in grpo.rewards_of(Group(i, None, [], [], [SimpleNamespace(correct=c)] * 8), args, 1)]
    assert coins[:320] == coins[320:] and 0.4 < sum(coins) / len(coins) < 0.6


def test_questions_are_seen_once_a_pass():
    problems = [(None, i) for i in range(20)]
    passed = [grpo.choose(problems, step, 5, 0) for step in range(1, 9)]
    assert sorted(i for c in passed[:4] for _, i in c) == sorted(i for c in passed[4:] for _, i in c) == list(range(20)) and passed[:4] != passed[4:]


# ---- the command -----------------------------------------------------------------------------------------------------

FLAGS = ("--model", MINI, "--questions", "16", "--questions-per-step", "4", "--mini-batch", "2", "--rollouts", "4", "--steps", "2", "--max-new-tokens", "60", "--device", "cpu")


def test_a_run_leaves_what_the_spec_lists(cmd, tmp_path):
    status, out, err = cmd(grpo, *FLAGS, "--eval-every", "2", "--eval-questions", "6", "--kl", "0.01")
    assert status == 0, err
    files = {p.name for p in (tmp_path / "out" / "grpo").iterdir()}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.safetensors", "run.json", "metrics.jsonl", "rollouts.jsonl", "state"} <= files
    rows = [json.loads(line) for line in (tmp_path / "out/grpo/metrics.jsonl").read_text().splitlines()]
    # Rule 3 at every step: before the first update the trainer must find the sampler's numbers.
    assert all(r["sampler_trainer_max"] is None or r["sampler_trainer_max"] < 1e-4 for r in rows) and any(r["sampler_trainer_max"] for r in rows)
    assert "val" in rows[1] and 0 <= rows[1]["val"] <= 1
    record = json.loads((tmp_path / "out/grpo/run.json").read_text())
    assert record["flags"]["clip_low"] == 0.2 and "torch" in record["versions"]
    rollout = json.loads((tmp_path / "out/grpo/rollouts.jsonl").read_text().splitlines()[0])
    assert {"step", "question", "response", "correct", "reason"} <= set(rollout)


def test_warnings():
    row = {"truncated": 0.95, "groups_with_signal": 0.0, "sampler_trainer_mean": 0.2}
    assert len(list(grpo.warnings(row))) == 3
    assert not list(grpo.warnings({"truncated": 0.1, "groups_with_signal": 0.5, "sampler_trainer_mean": 1e-6}))


def test_truncation_warning_appears(cmd):
    assert "cut off at the budget; raise --max-new-tokens" in cmd(grpo, *FLAGS, "--max-new-tokens", "3")[1]
