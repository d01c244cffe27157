"""What both trainers promise: exact small steps, one process or two alike, the same end after any kill."""
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import (
    CHAT, GRPO, MINI, ROOT, SFT, children, environment, finish, read_rows, refused, start, stop_at, tiny,
    wait_for_steps, write_jsonl,
)

import grpo
import losses
import run.run_folder as run_module
import sft
from checkpoint import load
from optimizer import Optimizer
from run.command import UserError

pytestmark = pytest.mark.usefixtures("data")


# ---- the optimizer -------------------------------------------------------------------------------
def test_small_steps_move_bfloat16_weights():
    """Rule 13: steps of 1e-5 add up in the masters, though each alone rounds to nothing in bfloat16."""
    weight = torch.tensor(0.02, dtype=torch.bfloat16)
    assert weight - 1e-5 == weight
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
    Optimizer(model, weight_decay=0.0)
    w = model.model.norm.weight
    for scale in [256.0] + [1.0] * 64:
        (w.float().sum() * scale).backward()
    assert w.grad.dtype == torch.float32 and w.grad[0] == 320


def test_optimizer_equals_torch_adamw():
    """Against torch's own loop on an equal model: clipping, betas, decay on matrices only."""
    ours, _ = tiny("llama")
    theirs, _ = tiny("llama")
    optimizer = Optimizer(ours, weight_decay=0.1, max_norm=1.0)
    matrices = [w for w in theirs.parameters() if w.ndim > 1]
    vectors = [w for w in theirs.parameters() if w.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), fused=False)
    for step in range(4):
        tokens = torch.arange(step, step + 12)[None]
        ours(tokens).square().mean().backward()
        theirs(tokens).square().mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        assert abs(optimizer.step(1e-2) - norm.item()) < 1e-4
        reference.step()
        reference.zero_grad()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("factor, lr, message", [
    (float("inf"), 1.0, "the gradient is not finite"),
    (1, 3e38, "the step has made weights that are not finite"),
])
def test_steps_that_are_not_finite_are_refused(factor, lr, message):
    """Rule 16: a gradient before the weights change, a rate far too high before they are saved."""
    model, _ = tiny()
    before = [w.clone() for w in model.parameters()]
    optimizer = Optimizer(model, 0.0)
    (model(torch.tensor([[1, 2]])).sum() * factor).backward()
    with pytest.raises(UserError, match=message):
        optimizer.step(lr)
    if factor != 1:
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_non_finite_loss_stops_the_run(cmd, monkeypatch):
    """Rule 16: the run stops in one line, and its last checkpoint loads."""
    real, calls = sft.loss_of, []

    def loss_of(*args):
        calls.append(args)
        return real(*args) * (float("nan") if len(calls) > 5 else 1)
    monkeypatch.setattr(sft, "loss_of", loss_of)
    refused(cmd, sft, (*SFT, "--save-every", "1", "--out", "run"), "the loss is not finite")
    model, _ = load("run", "cpu")
    assert all(w.isfinite().all() for w in model.parameters())


def test_first_losses_equal_the_golden_file():
    """Three steps of SFT and of GRPO on fixed rows, float32: what many parts of both must not change."""
    golden = json.loads((ROOT / "tests" / "golden" / "losses.json").read_text())
    for name, steps in (("sft", losses.sft_losses()), ("grpo", losses.grpo_losses())):
        for step, want in zip(steps, golden[name], strict=True):
            assert step == pytest.approx(want, rel=1e-3, abs=1e-4), name


# ---- resuming ------------------------------------------------------------------------------------
def everything(out="run"):
    """All files of a run, but for the page: bytes, links, and logs without their timings."""
    found = {}
    for path in sorted(Path(out).rglob("*")):
        name = str(path.relative_to(out))
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.suffix == ".jsonl":
            found[name] = [{k: v for k, v in row.items() if "second" not in k} for row in read_rows(path)]
        elif path.is_file() and path.name not in ("run.json", "report.html"):
            found[name] = path.read_bytes()
    return found


def test_resume_auto_starts_or_goes_on(cmd):
    """What torchrun's --max-restarts needs: one command line for the start and for every restart."""
    flags = (*SFT, "--epochs", "1", "--save-every", "3")
    cmd(sft, *flags, "--out", "whole")
    status, out, _ = cmd(sft, *flags, "--out", "run", "--resume", "auto")
    assert status == 0 and "resuming" not in out
    shutil.rmtree("run/state")
    refused(cmd, sft, (*flags, "--out", "run", "--resume", "auto"), "holds a model, but its state/ is gone")
    Path("run/config.json").unlink()  # as after a kill before the first checkpoint
    status, out, _ = cmd(sft, *flags, "--out", "run", "--resume", "auto")
    assert status == 0 and "resuming run after step 0" in out
    assert everything("whole") == everything("run")
    status, out, _ = cmd(sft, *flags, "--out", "run", "--resume", "auto")
    assert status == 0 and "finished already" in out
    Path("begun").mkdir()  # killed before it had written anything
    assert cmd(sft, *flags, "--out", "begun", "--resume", "auto")[0] == 0


def test_a_checkpoint_appears_whole_or_not_at_all(cmd, monkeypatch):
    """Rule 15: a crash before a checkpoint's rename leaves the one before, and resuming takes that.

    The state keeps more than the bfloat16 weights, which have lost the small steps.
    """
    flags = (*SFT, "--dtype", "bfloat16", "--lr", "1e-5", "--save-every", "2")
    cmd(sft, *flags, "--out", "whole")
    real, checkpoints = os.replace, []

    def replace(source, target):
        if Path(target).name.startswith("step-"):
            checkpoints.append(target)
            if len(checkpoints) == 3:
                raise RuntimeError("pulled the plug")
        real(source, target)
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(RuntimeError):
        cmd(sft, *flags, "--out", "broken")
    monkeypatch.setattr(os, "replace", real)
    assert sorted(path.name for path in Path("broken/state").iterdir()) == ["step-000004", "step-000006.tmp"]
    status, out, _ = cmd(sft, *flags, "--out", "broken", "--resume")
    assert status == 0 and "after step 4" in out and everything("whole") == everything("broken")


def test_a_kill_between_checkpoint_and_model_folder(cmd):
    """The last checkpoint is there but the model folder is not: --resume writes it."""
    cmd(sft, *SFT, "--out", "run")
    refused(cmd, sft, (*SFT, "--out", "run"), "--out run exists")
    weights = Path("run/model.safetensors")
    whole = weights.read_bytes()
    weights.unlink()
    more = ("--micro-batch-tokens", "100", "--recompute")  # which may change
    assert cmd(sft, *SFT, "--out", "run", "--resume", *more)[0] == 0 and weights.read_bytes() == whole


# ---- stops, checkpoints that are kept, longer runs -------------------------------------------------
VAL = (*GRPO, "--reward", "random", "--lr", "1e-3", "--eval-every", "2", "--eval-questions", "4")


def test_a_stop_anywhere_changes_nothing(cmd, monkeypatch):
    """In a measurement, a rollout, an update, by any signal: the same bytes in the end."""
    flags = (*VAL, "--steps", "5", "--save-every", "2", "--out", "run")
    assert cmd(grpo, *flags)[0] == 0
    whole = everything()
    moments = [("validate", 1), ("validate", 2), ("validate", 4), ("roll_out", 1), ("roll_out", 2),
               ("update", 1), ("update", 4), ("step", 40)]
    signals = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2]
    for (function, call), number in zip(moments, itertools.cycle(signals), strict=False):
        shutil.rmtree("run")
        with monkeypatch.context() as m:
            signal.signal(number, signal.SIG_DFL)  # it may be ignored here
            owner = grpo.Sampler if function == "step" else grpo
            calls = stop_at(m, owner, function, call, number)
            assert cmd(grpo, *flags)[0] == 128 + number, (function, call)
        assert function != "step" or len(calls) <= 41  # a rollout of an hour is not waited for
        status, _, err = cmd(grpo, *flags, "--resume")
        assert status == 0, err
        assert everything() == whole, (function, call)
    assert cmd(grpo, *flags, "--resume")[0] == 0 and everything() == whole


@pytest.mark.parametrize("module, flags", [
    (sft, (*SFT, "--epochs", "3", "--eval-every", "2", "--held-out", "20", "--lr", "3e-2")),
    (grpo, (*VAL, "--steps", "6")),
], ids=["sft", "grpo"])
def test_checkpoints_that_stay(cmd, module, flags):
    """The latest, each with its model, and the best by what was measured on held-out data."""
    assert cmd(module, *flags, "--save-every", "3", "--keep", "2", "--out", "run")[0] == 0
    rows = [row for row in read_rows("run/metrics.jsonl") if row["step"]]
    last = rows[-1]["step"]
    scores = {row["step"]: row.get("val", -row.get("val_loss", 0)) for row in rows if "reward" not in row
              and "loss" not in row}
    best = min(step for step in scores if scores[step] == max(scores.values()))
    assert os.readlink("run/best") == f"checkpoints/step-{best:06d}"
    states = {path.name for path in Path("run/state").iterdir()}
    assert len(states) == 2 and f"step-{last:06d}" in states
    assert {path.name for path in Path("run/checkpoints").iterdir()} == states | {f"step-{best:06d}"}
    load("run/best", "cpu")
    newest = Path(f"run/checkpoints/step-{last:06d}/model.safetensors")
    assert newest.read_bytes() == Path("run/model.safetensors").read_bytes()


@pytest.mark.parametrize("keep", [1, 3, 9])
def test_as_many_stay_as_were_asked_for(cmd, keep):
    assert cmd(sft, *SFT, "--epochs", "2", "--save-every", "1", "--keep", str(keep), "--out", "run")[0] == 0
    last = read_rows("run/metrics.jsonl")[-1]["step"]
    want = [f"step-{step:06d}" for step in range(max(1, last - keep + 1), last + 1)]
    assert sorted(path.name for path in Path("run/state").iterdir()) == want
    assert sorted(path.name for path in Path("run/checkpoints").glob("*")) == (want if keep > 1 else [])


def test_a_finished_run_goes_on_with_more_steps(cmd):
    """GRPO's rate is constant; SFT's was laid out for its end."""
    flags = (*GRPO, "--reward", "random", "--lr", "1e-3", "--save-every", "2")
    assert cmd(grpo, *flags, "--steps", "5", "--out", "whole")[0] == 0
    assert cmd(grpo, *flags, "--steps", "3", "--out", "run")[0] == 0
    assert cmd(grpo, *flags, "--steps", "5", "--out", "run", "--resume")[0] == 0
    assert everything("run") == everything("whole")
    assert cmd(sft, *SFT, "--epochs", "1", "--out", "sft")[0] == 0
    refused(cmd, sft, (*SFT, "--epochs", "2", "--out", "sft", "--resume"), "--epochs 1, not 2")


def test_no_question_is_trained_on_and_held_out(cmd):
    def conversations(row):
        question, answer = row["messages"]
        spaced = {"role": "user", "content": question["content"] + " "}
        more = [{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."}]
        yield [question, answer]
        yield [question, {"role": "assistant", "content": "another"}]
        yield [{"role": "system", "content": "Be brief."}, spaced, answer]
        yield [question, answer, *more]
    write_jsonl("twice.jsonl", [{"messages": m} for row in CHAT for m in conversations(row)])
    _, tokenizer = load(MINI, "cpu")
    examples = sft.read_examples("twice.jsonl", tokenizer, 512)
    args = Namespace(eval_every=1, held_out=20)
    trained, held_out = sft.hold_out(examples, args)
    assert len(trained) + len(held_out) == len(examples) == 4 * len(CHAT) and 8 <= len(held_out) <= 40

    def questions(some):
        return {question for question in (row["messages"][0]["content"] for row in CHAT)
                for example in some if question in tokenizer.decode(example.prompt)}
    assert not questions(trained) & questions(held_out)
    args.eval_every = 0
    assert sft.hold_out(examples, args) == (examples, [])
    refused(cmd, sft, (*SFT, "--eval-every", "1", "--held-out", "1", "--out", "other"),
            "leaves some on both sides")


def test_a_log_knows_no_infinity(cmd, monkeypatch):
    real = run_module.Run.log
    monkeypatch.setattr(run_module.Run, "log", lambda self, row: real(self, {**row, "lr": float("inf")}))
    assert cmd(sft, *SFT, "--epochs", "1", "--out", "run")[0] == 0
    assert all(row["lr"] is None and row["loss"] for row in read_rows("run/metrics.jsonl"))


# ---- struck anywhere -------------------------------------------------------------------------------
TWO = ("--device", "cpu", "--questions", "4", "--max-new-tokens", "30")
STRUCK = {
    "sample": ("--model", MINI, *TWO, "--n", "1", "--resume", "auto", "--out", "run.jsonl"),
    "sft": (*SFT, "--epochs", "2", "--save-every", "1", "--keep", "2", "--eval-every", "2", "--held-out",
            "20", "--resume", "auto", "--out", "run"),
    "grpo": ("--model", MINI, *TWO, "--questions-per-step", "2", "--mini-batch", "1", "--rollouts", "2",
             "--steps", "3", "--save-every", "1", "--eval-every", "2", "--eval-questions", "2", "--reward",
             "random", "--resume", "auto", "--out", "run"),
    "evaluate": ("--models", f"a={MINI}", *TWO, "--samples", "1", "--tasks",
                 "countdown-3-small,countdown-2-small", "--resume", "auto", "--out", "run"),
}


@pytest.mark.parametrize("name", STRUCK)
def test_struck_anywhere_it_goes_on_to_the_same_end(name):
    """Rule 15: SIGKILL, or a full disk, at some of the calls that change a file."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tests/struck.py"), name, *map(str, STRUCK[name])], env=environment(),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def strike(how, at):
        process.stdin.write(f"{how} {at}\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    def rows():
        return sorted(json.dumps(row) for row in read_rows("run/results.jsonl"))

    def end():
        if name == "sample":
            return sorted(json.dumps(row) for row in read_rows("run.jsonl"))
        return rows() if name == "evaluate" else everything("run")

    status, screen = strike("kill", 0)
    assert status == 0, screen
    calls = int(screen.split()[-1])
    whole = end()
    strikes = [("kill", at) for at in range(1, calls, max(1, calls // 5))]
    for how, at in [*strikes, ("full", calls // 2)]:
        for path in Path().glob("run*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        status, screen = strike(how, at)
        if how == "full":
            assert status == 2 and screen.count("the disk is full") == 1, screen
        else:
            assert status == -signal.SIGKILL, screen
        status, screen = strike("kill", 0)
        assert status == 0, screen
        assert end() == whole, (how, at)
    process.stdin.close()
    process.wait()


# ---- processes -----------------------------------------------------------------------------------
def close(one, other, atol=1e-4):
    one, _ = load(one, "cpu")
    other, _ = load(other, "cpu")
    return all((a - b).abs().max() < atol for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_three_processes_equal_one():
    """Rules 4 and 9: same losses, same rollouts, weights equal but for the order of additions.

    Of three processes one has no row in some steps, and no group in some mini-batches.
    """
    scripts = {
        "sft.py": (*SFT, "--epochs", "1", "--tokens-per-batch", "90"),
        "grpo.py": (*GRPO, "--steps", "2", "--kl", "0.01", "--lr", "1e-3", "--recompute"),
    }
    for n in (1, 3):
        for run in [start(script, *flags, "--out", f"{script}-{n}", processes=n)
                    for script, flags in scripts.items()]:
            finish(run)
    for script in scripts:
        assert close(f"{script}-1", f"{script}-3")
        for a, b in zip(*(read_rows(f"{script}-{n}/metrics.jsonl") for n in (1, 3)), strict=True):
            assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
            for name in ("reward", "response_tokens", "truncated"):
                assert a.get(name) == b.get(name)
    # Of all processes, not of the first one.
    for a, b in zip(*(read_rows(f"grpo.py-{n}/rollouts.jsonl") for n in (1, 3)), strict=True):
        assert (a["step"], a["id"]) == (b["step"], b["id"])
        assert [r["ids"] for r in a["rollouts"]] == [r["ids"] for r in b["rollouts"]] or a["step"] > 1
    assert len(list(Path("sft.py-3/state").glob("*/rank*.safetensors"))) == 3


def test_a_lost_process_costs_nothing(cmd):
    """Rule 15: going on with another number of processes ends close to an unbroken run."""
    flags = (*SFT, "--epochs", "2", "--save-every", "3")
    assert cmd(sft, *flags, "--out", "whole")[0] == 0
    process = start("sft.py", *flags, "--out", "cut-1", processes=2)
    wait_for_steps(process, 5, "cut-1")
    os.kill(children(process)[-1], signal.SIGKILL)
    assert process.wait() != 0
    shutil.copytree("cut-1", "cut-3")
    for run in [start("sft.py", *flags, "--out", f"cut-{n}", "--resume", processes=n) for n in (1, 3)]:
        finish(run)
    assert close("whole", "cut-1") and close("whole", "cut-3")


KILLED = """
import os, signal, sys
import grpo, optimizer, sft
from run import command as cli, run_folder as run
name, owner, function, calls = sys.argv.pop(1), *sys.argv.pop(1).split("."), int(sys.argv.pop(1))
owner = {"run": run, "train": optimizer, "sft": sft, "grpo": grpo, "Sampler": grpo.Sampler}[owner]
real = getattr(owner, function)

def killed(*args, **kw):
    global calls
    calls -= 1
    if calls == 0:
        if function == "save_tensors":
            open(f"{args[0]}.tmp", "w").write("half")
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kw)

if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    setattr(owner, function, killed)
sys.argv[0] = f"{name}.py"
cli.command({"sft": sft, "grpo": grpo}[name].main)
"""


@pytest.mark.parametrize("name, flags, moments", [
    ("sft", (*SFT, "--epochs", "3", "--save-every", "3"),
     [("sft.loss_of", 5), ("train.local", 300)]),
    ("grpo", (*GRPO, "--steps", "3", "--save-every", "1"),
     [("Sampler.step", 40), ("run.save_tensors", 2)]),
])
def test_torchrun_restarts_what_was_lost(name, flags, moments):
    """`--max-restarts` with `--resume auto`: the same bytes, with nobody at the keyboard.

    One process of two is killed in a micro-batch, in a rollout, while it writes its part of a checkpoint, in
    a step of the optimizer.
    """
    Path("killed.py").write_text(KILLED)
    whole = start(f"{name}.py", *flags, "--out", "whole", "--resume", "auto", processes=2)
    runs = []
    for i, (function, calls) in enumerate(moments):
        again = (name, function, calls, *flags, "--out", f"cut-{i}", "--resume", "auto")
        runs.append(start(Path("killed.py").absolute(), *again, processes=2, restarts=1))
    finish(whole)
    for i, run in enumerate(runs):
        status, screen = run.wait(), run.stdout.read()
        assert status == 0 and ("exitcode: -9" in screen or "dead or stuck" in screen), (moments[i], screen)
        assert everything("whole") == everything(f"cut-{i}"), moments[i]


def test_a_stuck_process_ends_the_run():
    """The others wait for --timeout; then torchrun ends all, and the last checkpoint is there."""
    process = start("sft.py", *SFT, "--epochs", "50", "--save-every", "1", "--out", "run", "--timeout", "0.1",
                    processes=2)
    wait_for_steps(process, 3)
    stuck, other = children(process)
    os.kill(stuck, signal.SIGSTOP)
    started = time.time()
    while Path(f"/proc/{other}").exists():  # it gives up, and torchrun notices
        assert time.time() - started < 60
        time.sleep(0.1)
    os.kill(stuck, signal.SIGKILL)  # torchrun would wait half a minute before it does
    assert process.wait() != 0
    out = process.stdout.read()
    assert "another process is dead or stuck" in out
    assert len(list(Path("run/state").glob("step-*[0-9]"))) >= 1
