"""The optimizer, SFT, and what both trainers promise about checkpoints."""
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import CHAT, MINI, ROOT, environment, tiny, write_jsonl

import grpo
import sft
import train
from model import load
from cli import UserError
from train import Optimizer, micro_batches

SFT = ("--model", MINI, "--data", "chat.jsonl", "--tokens-per-batch", "256", "--device", "cpu")
GRPO = ("--model", MINI, "--questions", "16", "--questions-per-step", "4", "--mini-batch", "2", "--rollouts", "4", "--max-new-tokens", "50", "--device", "cpu")


# ---- batches and schedule --------------------------------------------------------------------------------------------

def test_micro_batches_are_of_similar_length():
    lengths = [7, 300, 12, 12, 90, 88, 1, 100]
    groups = micro_batches(lengths, 200)
    assert sorted(i for g in groups for i in g) == list(range(8))
    for g in groups:
        padded = len(g) * max(lengths[i] for i in g)
        assert len(g) == 1 or padded <= 200 and padded <= 1.2 * sum(lengths[i] for i in g)


def test_schedule():
    rates = [sft.learning_rate(s, 100, 2.0) for s in range(1, 101)]
    assert rates[0] == 0.4 and max(rates) == rates[4] == 2.0 and 0 < rates[-1] < 0.002
    assert rates[52] == pytest.approx(1 + math.cos(math.pi * 48 / 96))


# ---- SFT loss --------------------------------------------------------------------------------------------------------

def rows_of(n=8):
    _, tokenizer = tiny()
    write_jsonl("rows.jsonl", CHAT[:n])
    return sft.read_rows("rows.jsonl", tokenizer, 256), tokenizer


def test_loss_is_of_the_assistant_turn_and_its_end(tmp_path, monkeypatch):
    """Rule 10, with an independent sum; padding and prompt tokens have no influence, the end token has."""
    monkeypatch.chdir(tmp_path)
    rows, tokenizer = rows_of(5)
    model, _ = tiny()
    want = 0.0
    for (ids, start), chat in zip(rows, CHAT):
        prompt = tokenizer.chat(chat["messages"][:1])
        assert ids == prompt + tokenizer.encode(chat["messages"][1]["content"]) + [tokenizer.end_id] and start == len(prompt)
        logp = model.logits(model(torch.tensor([ids])))[0].log_softmax(-1)
        want -= sum(logp[t - 1, ids[t]] for t in range(start, len(ids)))
    assert torch.allclose(sft.loss_of(model, rows), want, rtol=1e-5)
    # A pad id that is also the end token changes nothing, since masks come from lengths.
    logits = []
    model.logprobs = lambda hidden, targets: logits.append(targets) or (torch.zeros(len(targets), requires_grad=True), None)
    sft.loss_of(model, rows)
    assert logits[0].tolist() == [i for ids, start in rows for i in ids[start:]] and logits[0].tolist().count(tokenizer.end_id) == 5


def gradients(rows, cuts):
    model, _ = tiny("qwen3")
    count = sum(len(ids) - start for ids, start in rows)
    for cut in cuts:
        (sft.loss_of(model, [rows[i] for i in cut]) / count).backward()
    return torch.cat([w.grad.flatten() for w in model.parameters()])


def test_micro_batches_do_not_change_the_gradient(tmp_path, monkeypatch):
    """Rule 9, with rows of different lengths, where a mean of means would differ."""
    monkeypatch.chdir(tmp_path)
    write_jsonl("rows.jsonl", [{"messages": [c["messages"][0], {"role": "assistant", "content": c["messages"][1]["content"] * (1 + i)}]} for i, c in enumerate(CHAT[:8])])
    rows = sft.read_rows("rows.jsonl", tiny()[1], 256)
    whole = gradients(rows, [range(8)])
    for cuts in ([range(0, 4), range(4, 8)], [[0, 7], [1, 6], [2, 5], [3, 4]], [[i] for i in range(8)]):
        assert torch.allclose(gradients(rows, cuts), whole, atol=1e-5, rtol=1e-4)


# ---- the optimizer ---------------------------------------------------------------------------------------------------

def test_small_steps_move_bfloat16_weights():
    """Rule 13: a thousand steps of 1e-5 add up in the masters, though each alone rounds to nothing in bfloat16."""
    assert torch.tensor(0.02, dtype=torch.bfloat16) - 1e-5 == torch.tensor(0.02, dtype=torch.bfloat16)
    model, _ = tiny(dtype=torch.bfloat16)
    w = model.model.norm.weight
    with torch.no_grad():
        w.fill_(0.02)
    optimizer = Optimizer(model, weight_decay=0.0)
    for _ in range(300):
        w.float().sum().backward()
        optimizer.step(1e-5)
    assert w.dtype == torch.bfloat16 and abs(w[0].item() - (0.02 - 300 * 1e-5)) < 2e-4


def test_gradients_add_up_in_float32():
    """256 + 1 is 256 in bfloat16: the small micro-batches after a large one must not vanish."""
    model, _ = tiny(dtype=torch.bfloat16)
    optimizer = Optimizer(model, weight_decay=0.0, max_norm=0)
    w = model.model.norm.weight
    for scale in [256.0] + [1.0] * 64:
        (w.float().sum() * scale).backward()
    assert w.grad is None and optimizer.sums["model.norm.weight"][0] == 320


def test_optimizer_equals_torch_adamw():
    """Against torch's own loop on an equal model: clipping, betas, decay on matrices only."""
    (ours, _), (theirs, _) = tiny("llama"), tiny("llama")
    optimizer = Optimizer(ours, weight_decay=0.1, max_norm=1.0)
    matrices, vectors = [w for w in theirs.parameters() if w.ndim > 1], [w for w in theirs.parameters() if w.ndim == 1]
    reference = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], lr=1e-2, betas=(0.9, 0.95), fused=False)
    for step in range(4):
        tokens = torch.arange(step, step + 12)[None]
        ours(tokens).square().mean().backward()
        theirs(tokens).square().mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        assert abs(optimizer.step(1e-2) - norm.item()) < 1e-4
        reference.step()
        reference.zero_grad()
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours.parameters(), theirs.parameters()))


def test_non_finite_gradient_is_refused(cmd, tmp_path, monkeypatch):
    """Rule 16: the weights stay, the run stops in one line, the last checkpoint loads."""
    model, _ = tiny()
    before = [w.clone() for w in model.parameters()]
    optimizer = Optimizer(model, 0.0)
    (model(torch.tensor([[1, 2]])).sum() * float("inf")).backward()
    with pytest.raises(UserError, match="the gradient is not finite"):
        optimizer.step(1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))

    write_jsonl("chat.jsonl", CHAT)
    real, calls = sft.loss_of, []
    monkeypatch.setattr(sft, "loss_of", lambda *a: real(*a) * (float("nan") if len(calls) > 4 else 1) if not calls.append(1) else None)
    status, _, err = cmd(sft, *SFT, "--save-every", "1", "--out", "run")
    assert status == 2 and "is not finite" in err and err.count("\n") == 1
    assert all(w.isfinite().all() for w in load("run", "cpu")[0].parameters())


# ---- resuming --------------------------------------------------------------------------------------------------------

def fingerprint(out):
    """All bytes that matter: weights, masters, moments, and the logs without their timings."""
    files = [Path(out, "model.safetensors"), *sorted(Path(out, "state").glob("*/*"))]
    rows = [{k: v for k, v in json.loads(line).items() if "second" not in k} for line in Path(out, "metrics.jsonl").read_text().splitlines()]
    rollouts = Path(out, "rollouts.jsonl").read_bytes() if Path(out, "rollouts.jsonl").exists() else b""
    return {str(f.relative_to(out)): f.read_bytes() for f in files}, rows, rollouts


def start(script, *flags, processes=1):
    runner = [sys.executable] if processes == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.Popen([*runner, str(ROOT / script), *map(str, flags)], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def steps_done(out):
    path = Path(out, "metrics.jsonl")
    return path.read_text().count("\n") if path.exists() else 0


@pytest.mark.parametrize("script, flags, kill_at", [("sft.py", (*SFT, "--epochs", "2", "--save-every", "3"), 5), ("grpo.py", (*GRPO, "--steps", "6", "--save-every", "2", "--lr", "1e-3"), 3)])
def test_killed_and_resumed_ends_with_the_same_bytes(script, flags, kill_at, tmp_path, monkeypatch):
    """Rule 15: SIGKILL in the middle, twice; then --resume to the end."""
    monkeypatch.chdir(tmp_path)
    write_jsonl("chat.jsonl", CHAT)
    whole = start(script, *flags, "--out", "whole")
    assert whole.wait() == 0, whole.stdout.read()
    resume = ()
    for at in (kill_at, kill_at + 2):
        process = start(script, *flags, "--out", "broken", *resume)
        while steps_done("broken") < at and process.poll() is None:
            time.sleep(0.002)
        process.kill()
        process.wait()
        resume = ("--resume",)
    last = start(script, *flags, "--out", "broken", "--resume")
    assert last.wait() == 0, last.stdout.read()
    assert fingerprint("whole") == fingerprint("broken")


def test_a_checkpoint_appears_whole_or_not_at_all(cmd, tmp_path, monkeypatch):
    """A crash while a checkpoint is written (here: before the rename) leaves the one before, and resuming takes that."""
    write_jsonl("chat.jsonl", CHAT)
    cmd(sft, *SFT, "--out", "whole", "--save-every", "2")
    real, calls = os.replace, []

    def fail(a, b):
        if str(a).endswith(".tmp") and "step-" in Path(a).name:
            calls.append(a)
            if len(calls) == 3:
                raise RuntimeError("pulled the plug")
        real(a, b)
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(RuntimeError):
        cmd(sft, *SFT, "--out", "broken", "--save-every", "2")
    monkeypatch.setattr(os, "replace", real)
    assert [p.name for p in sorted(Path("broken/state").iterdir())] == ["step-000004", "step-000006.tmp"]
    status, out, _ = cmd(sft, *SFT, "--out", "broken", "--save-every", "2", "--resume")
    assert status == 0 and "after step 4" in out and fingerprint("whole") == fingerprint("broken")


def test_interrupt_saves_and_leaves(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl("chat.jsonl", CHAT)
    process = start("sft.py", *SFT, "--out", "run", "--epochs", "50", "--save-every", "0")
    while steps_done("run") < 3:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130 and "interrupted" in process.stdout.read()
    done = json.loads(next(Path("run/state").iterdir()).joinpath("state.json").read_text())["step"]
    assert done == steps_done("run") >= 3 and load("run", "cpu")


def test_two_processes_equal_one(tmp_path, monkeypatch):
    """Rules 4 and 9: same losses, same rollouts, weights equal but for the order of additions."""
    monkeypatch.chdir(tmp_path)
    write_jsonl("chat.jsonl", CHAT)
    runs = [start(script, *flags, "--out", f"{script}-{n}", processes=n) for n in (1, 2)
            for script, flags in (("sft.py", (*SFT, "--epochs", "1")), ("grpo.py", (*GRPO, "--steps", "2", "--kl", "0.01", "--lr", "1e-3")))]
    assert all(r.wait() == 0 for r in runs), [r.stdout.read() for r in runs]
    for script in ("sft.py", "grpo.py"):
        (a, _), (b, _) = load(f"{script}-1", "cpu"), load(f"{script}-2", "cpu")
        difference = max((x - y).abs().max().item() for x, y in zip(a.parameters(), b.parameters()))
        assert difference < 1e-4
        one, two = ([json.loads(line) for line in Path(f"{script}-{n}/metrics.jsonl").read_text().splitlines()] for n in (1, 2))
        assert [r["loss"] for r in one] == pytest.approx([r["loss"] for r in two], abs=1e-5)
        assert [r["grad_norm"] for r in one] == pytest.approx([r["grad_norm"] for r in two], rel=1e-3)
    assert [(r["reward"], r["response_tokens"], r["truncated"]) for r in one] == [(r["reward"], r["response_tokens"], r["truncated"]) for r in two]
    assert len(list(Path("sft.py-2/state").glob("*/rank*.safetensors"))) == 2
    # A run of two processes can go on as one: each takes the tensors that are now its own.
    again = start("sft.py", *SFT, "--epochs", "1", "--out", "sft.py-2", "--resume")
    assert again.wait() == 0 and "finished already" in again.stdout.read()


def test_masters_are_resumed_under_bfloat16(cmd, tmp_path):
    """The state keeps more than the bfloat16 weights: resuming from the rounded ones would lose the small steps."""
    write_jsonl("chat.jsonl", CHAT)
    flags = (*SFT, "--dtype", "bfloat16", "--lr", "1e-5", "--save-every", "2")
    cmd(sft, *flags, "--out", "whole")
    real = train.Run.save
    state = {}

    def stop_at_4(self, step, *a):
        real(self, step, *a)
        if step == 4 and not state:
            state["stopped"] = True
            raise KeyboardInterrupt
    train.Run.save = stop_at_4
    try:
        assert cmd(sft, *flags, "--out", "broken")[0] == 130
        assert cmd(sft, *flags, "--out", "broken", "--resume")[0] == 0
    finally:
        train.Run.save = real
    assert fingerprint("whole") == fingerprint("broken")


# ---- input -----------------------------------------------------------------------------------------------------------

def test_bad_input(cmd, tmp_path, folder):
    assert cmd(sft, *SFT)[2] == "sft.py: chat.jsonl: no such file\n"
    for row, message in [({"messages": "no"}, "chat.jsonl: row 1: messages must be a list"), ({"messages": [{"role": "user", "content": "x"}]}, "the last of the messages must be the assistant's"),
                         ({"text": "x"}, "chat.jsonl:1: the key 'messages' is missing")]:
        write_jsonl("chat.jsonl", [row])
        status, _, err = cmd(sft, *SFT)
        assert status == 2 and message in err and err.count("\n") == 1
    write_jsonl("chat.jsonl", CHAT)
    assert "every row is longer than --context 8" in cmd(sft, *SFT, "--context", "8")[2]
    assert "has a context of 2048" in cmd(sft, *SFT, "--context", "5000")[2]
    assert "holds no run" in cmd(sft, *SFT, "--out", "none", "--resume")[2]
    assert cmd(sft, *SFT, "--out", "run")[0] == 0
    assert "--out run exists" in cmd(sft, *SFT, "--out", "run")[2]
    assert "--seed 0, not 1" in cmd(sft, *SFT, "--out", "run", "--resume", "--seed", "1")[2]
    assert "--mini-batch 3 must divide" in cmd(grpo, "--mini-batch", "3")[2]
    assert "only 16 questions" in cmd(grpo, *GRPO, "--questions-per-step", "32", "--mini-batch", "32")[2]
    assert "at least 0" in cmd(sft, "--lr", "-1")[2]
    assert cmd(sft, *SFT, "--out", "run", "--resume", "--micro-batch-tokens", "100", "--recompute")[0] == 0  # memory flags may change


def test_a_kill_between_checkpoint_and_model_folder(cmd):
    """The last checkpoint is there but the model folder is not: --resume writes it."""
    write_jsonl("chat.jsonl", CHAT)
    cmd(sft, *SFT, "--out", "run")
    whole = Path("run/model.safetensors").read_bytes()
    Path("run/model.safetensors").unlink()
    assert cmd(sft, *SFT, "--out", "run", "--resume")[0] == 0 and Path("run/model.safetensors").read_bytes() == whole


def test_logs_with_odd_line_separators_are_cut_back(cmd):
    """A sampled text may hold U+2028, which str.splitlines would take for the end of a line."""
    write_jsonl("chat.jsonl", CHAT)
    cmd(sft, *SFT, "--out", "run")
    lines = Path("run/metrics.jsonl").read_text() + json.dumps({"step": 1, "response": "a\u2028b"}, ensure_ascii=False) + "\n"
    Path("run/metrics.jsonl").write_text(lines + '{"step": 99999}\n{"st')
    assert cmd(sft, *SFT, "--out", "run", "--resume")[0] == 0 and Path("run/metrics.jsonl").read_text() == lines


def test_rows_over_the_context_are_counted(cmd):
    long = {"messages": [CHAT[0]["messages"][0], {"role": "assistant", "content": "word " * 300}]}
    write_jsonl("chat.jsonl", [*CHAT, long])
    status, out, _ = cmd(sft, *SFT, "--context", "200")
    assert status == 0 and "left out 1 of 29 rows" in out
