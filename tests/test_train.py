"""What both trainers promise: exact small steps, one process or two alike, the same end after any kill."""
import json
import os
import random
import shutil
import signal
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import CHAT, MINI, ROOT, children, finish, read_rows, refused, start, tiny, write_jsonl

import diagnostics
import grpo
import losses
import sft
import run as run_module
from checkpoint import load
from cli import UserError
from train import Optimizer

SFT = ("--model", MINI, "--data", "chat.jsonl", "--tokens-per-batch", "256", "--device", "cpu")
GRPO = ("--model", MINI, "--device", "cpu", "--questions", "16", "--questions-per-step", "4",
        "--mini-batch", "2", "--rollouts", "4", "--max-new-tokens", "50")


@pytest.fixture(autouse=True)
def in_a_folder_with_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl("chat.jsonl", CHAT)


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
    optimizer = Optimizer(model, weight_decay=0.0, max_norm=0)
    w = model.model.norm.weight
    for scale in [256.0] + [1.0] * 64:
        (w.float().sum() * scale).backward()
    assert w.grad is None and optimizer.sums["model.norm.weight"][0] == 320


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


def test_a_non_finite_gradient_is_refused():
    """Rule 16: the weights stay."""
    model, _ = tiny()
    before = [w.clone() for w in model.parameters()]
    optimizer = Optimizer(model, 0.0)
    (model(torch.tensor([[1, 2]])).sum() * float("inf")).backward()
    with pytest.raises(UserError, match="the gradient is not finite"):
        optimizer.step(1.0)
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
def fingerprint(out):
    """All bytes that matter: weights, masters, moments, and the logs without their timings."""
    out = Path(out)
    files = {}
    for path in [out / "model.safetensors", *sorted((out / "state").glob("*/*"))]:
        files[str(path.relative_to(out))] = path.read_bytes()
    metrics = []
    for row in read_rows(out / "metrics.jsonl"):
        metrics.append({name: value for name, value in row.items() if "second" not in name})
    rollouts = out / "rollouts.jsonl"
    return files, metrics, rollouts.read_bytes() if rollouts.exists() else b""


def steps_done(out):
    path = Path(out, "metrics.jsonl")
    return path.read_text().count("\n") if path.exists() else 0


@pytest.mark.parametrize("script, flags, kill_at", [
    ("sft.py", (*SFT, "--epochs", "2", "--save-every", "3"), 5),
    ("grpo.py", (*GRPO, "--steps", "6", "--save-every", "2", "--lr", "1e-3"), 3),
])
def test_killed_and_resumed_ends_with_the_same_bytes(script, flags, kill_at):
    """Rule 15: SIGKILL in the middle, twice; then --resume to the end."""
    finish(start(script, *flags, "--out", "whole"))
    resume = ()
    for at in (kill_at, kill_at + 2):
        process = start(script, *flags, "--out", "broken", *resume)
        while steps_done("broken") < at and process.poll() is None:
            time.sleep(0.002)
        process.kill()
        process.wait()
        resume = ("--resume",)
    finish(start(script, *flags, "--out", "broken", "--resume"))
    assert fingerprint("whole") == fingerprint("broken")


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
    assert fingerprint("whole") == fingerprint("run")
    status, out, _ = cmd(sft, *flags, "--out", "run", "--resume", "auto")
    assert status == 0 and "finished already" in out
    Path("begun").mkdir()  # killed before it had written anything
    assert cmd(sft, *flags, "--out", "begun", "--resume", "auto")[0] == 0
    Path("other").mkdir()
    Path("other/file").write_text("of somebody else's")
    refused(cmd, sft, (*flags, "--out", "other", "--resume", "auto"), "--out other exists")
    refused(cmd, sft, (*flags, "--out", "new", "--resume"), "--resume: new holds no run")


def test_a_checkpoint_appears_whole_or_not_at_all(cmd, monkeypatch):
    """Rule 15: a crash before a checkpoint's rename leaves the one before, and resuming takes that."""
    flags = (*SFT, "--save-every", "2")
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
    assert status == 0 and "after step 4" in out and fingerprint("whole") == fingerprint("broken")


def test_masters_are_resumed_under_bfloat16(cmd, monkeypatch):
    """Rule 15: the state keeps more than the bfloat16 weights, which have lost the small steps."""
    flags = (*SFT, "--dtype", "bfloat16", "--lr", "1e-5", "--save-every", "2")
    cmd(sft, *flags, "--out", "whole")
    real = run_module.Run.save

    def save_and_stop(self, step, updates):
        real(self, step, updates)
        if step == 4:
            raise KeyboardInterrupt
    monkeypatch.setattr(run_module.Run, "save", save_and_stop)
    assert cmd(sft, *flags, "--out", "broken")[0] == 130
    monkeypatch.setattr(run_module.Run, "save", real)
    assert cmd(sft, *flags, "--out", "broken", "--resume")[0] == 0
    assert fingerprint("whole") == fingerprint("broken")


def test_a_kill_between_checkpoint_and_model_folder(cmd):
    """The last checkpoint is there but the model folder is not: --resume writes it."""
    cmd(sft, *SFT, "--out", "run")
    weights = Path("run/model.safetensors")
    whole = weights.read_bytes()
    weights.unlink()
    assert cmd(sft, *SFT, "--out", "run", "--resume")[0] == 0 and weights.read_bytes() == whole


def test_logs_with_odd_line_separators_are_cut_back(cmd):
    """A sampled text may hold U+2028, which str.splitlines would take for the end of a line."""
    cmd(sft, *SFT, "--out", "run")
    log = Path("run/metrics.jsonl")
    odd = json.dumps({"step": 1, "response": "a\u2028b"}, ensure_ascii=False)
    lines = log.read_text() + odd + "\n"
    log.write_text(lines + '{"step": 99999}\n{"st')
    assert cmd(sft, *SFT, "--out", "run", "--resume")[0] == 0 and log.read_text() == lines


# ---- stops, checkpoints that are kept, longer runs -------------------------------------------------
VAL = (*GRPO, "--reward", "random", "--lr", "1e-3", "--eval-every", "2", "--eval-questions", "4")


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


def stop_at(monkeypatch, owner, function, call, number=signal.SIGTERM):
    """The process gets a signal as it calls a function for the n-th time."""
    real, calls = getattr(owner, function), []

    def stopped(*args, **kw):
        calls.append(args)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return real(*args, **kw)
    monkeypatch.setattr(owner, function, stopped)


@pytest.mark.parametrize("call", [1, 2, 3, 4])
@pytest.mark.parametrize("function", ["validate", "roll_out", "update"])
def test_a_stop_anywhere_changes_nothing(cmd, monkeypatch, function, call):
    """In a measurement, a rollout, an update: the same bytes in the end, and gone on with twice."""
    flags = (*VAL, "--steps", "5", "--save-every", "2", "--out", "run")
    assert cmd(grpo, *flags)[0] == 0
    whole = everything()
    shutil.rmtree("run")
    with monkeypatch.context() as m:
        stop_at(m, grpo, function, call)
        assert cmd(grpo, *flags)[0] == 128 + signal.SIGTERM
    status, _, err = cmd(grpo, *flags, "--resume")
    assert status == 0, err
    assert everything() == whole
    assert cmd(grpo, *flags, "--resume")[0] == 0 and everything() == whole


@pytest.mark.parametrize("module, flags", [
    (sft, (*SFT, "--epochs", "3", "--eval-every", "2", "--held-out", "20", "--lr", "3e-2")),
    (grpo, (*VAL, "--steps", "8", "--eval-questions", "16", "--max-new-tokens", "100")),
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


@pytest.mark.parametrize("keep", [1, 2, 3, 4, 9])
def test_as_many_stay_as_were_asked_for(cmd, keep):
    assert cmd(sft, *SFT, "--epochs", "2", "--save-every", "1", "--keep", str(keep), "--out", "run")[0] == 0
    last = read_rows("run/metrics.jsonl")[-1]["step"]
    want = [f"step-{step:06d}" for step in range(max(1, last - keep + 1), last + 1)]
    assert sorted(path.name for path in Path("run/state").iterdir()) == want
    assert sorted(path.name for path in Path("run/checkpoints").glob("*")) == (want if keep > 1 else [])


def test_a_kill_while_a_checkpoint_is_removed(cmd, monkeypatch):
    """It once left a folder without its state.json, at which every --resume stopped."""
    flags = (*SFT, "--epochs", "2", "--save-every", "2", "--out", "run")
    real = shutil.rmtree

    def rmtree(path, *args, **kw):
        if "step-000002" in str(path):
            (Path(path) / "state.json").unlink()
            raise RuntimeError("killed")
        real(path, *args, **kw)
    with monkeypatch.context() as m:
        m.setattr(shutil, "rmtree", rmtree)
        with pytest.raises(RuntimeError):
            cmd(sft, *flags)
    shutil.copytree("run/state/step-000004", "run/state/step-000099-mine")
    status, out, err = cmd(sft, *flags, "--resume")
    assert status == 0 and "after step 4" in out, err
    assert len([path for path in Path("run/state").iterdir() if path.name != "step-000099-mine"]) == 1


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
                for example in some if question in tokenizer.decode(example.ids)}
    assert not questions(trained) & questions(held_out)
    args.eval_every = 0
    assert sft.hold_out(examples, args) == (examples, [])
    flags = (*SFT, "--epochs", "1", "--eval-every", "3", "--held-out", "20", "--out", "run")
    status, out, _ = cmd(sft, *flags)
    assert status == 0 and "more rows are held out" in out
    assert any("val_loss" in row for row in read_rows("run/metrics.jsonl"))
    refused(cmd, sft, (*SFT, "--eval-every", "1", "--held-out", "1", "--out", "other"),
            "leaves some on both sides")


def test_masters_that_are_not_finite_are_refused(cmd):
    """A finite gradient with a rate far too high: nothing of it is saved."""
    model, _ = tiny()
    optimizer = Optimizer(model, 0.0)
    model(torch.tensor([[1, 2]])).sum().backward()
    with pytest.raises(UserError, match="the step has made weights that are not finite"):
        optimizer.step(3e38)
    refused(cmd, sft, (*SFT, "--lr", "3e38", "--save-every", "1", "--out", "run"), "not finite")
    refused(cmd, sft, (*SFT, "--lr", "inf", "--out", "other"), "inf must be a finite number")
    if list(Path("run").glob("state/*")):
        model, _ = load("run", "cpu")
        assert all(w.isfinite().all() for w in model.parameters())


def test_a_log_knows_no_infinity(cmd, monkeypatch):
    real = diagnostics.measure
    monkeypatch.setattr(diagnostics, "measure", lambda *args: {
        **real(*args), "approx_kl": float("inf"), "mine": {"a": [float("nan"), 1]}})
    assert cmd(grpo, *GRPO, "--steps", "1", "--out", "run")[0] == 0
    row, = read_rows("run/metrics.jsonl")
    assert row["approx_kl"] is None and row["mine"] == {"a": [None, 1]}
    assert "Infinity" not in Path("run/metrics.jsonl").read_text()


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
    def strike(how, at):
        process = start("tests/struck.py", how, at, name, *STRUCK[name])
        return process.wait(), process.stdout.read()

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
    for how in ("kill", "kill", "kill", "full"):
        for path in Path().glob("run*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        status, screen = strike(how, random.Random(f"{name}{how}{len(screen)}").randint(1, calls))
        if how == "full":
            assert status == 2 and screen.count("the disk is full") == 1, screen
        else:
            assert status == -signal.SIGKILL, screen
        status, screen = strike("kill", 0)
        assert status == 0, screen
        assert end() == whole


# ---- processes -----------------------------------------------------------------------------------
def close(one, other, atol=1e-4):
    one, _ = load(one, "cpu")
    other, _ = load(other, "cpu")
    return all((a - b).abs().max() < atol for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_two_processes_equal_one():
    """Rules 4 and 9: same losses, same rollouts, weights equal but for the order of additions.

    Of three processes one has no row in some steps, and no group in some mini-batches.
    """
    scripts = {
        "sft.py": (*SFT, "--epochs", "1", "--tokens-per-batch", "90"),
        "grpo.py": (*GRPO, "--steps", "2", "--kl", "0.01", "--lr", "1e-3", "--recompute"),
    }
    for n in (1, 2, 3):
        runs = []
        for script, flags in scripts.items():
            runs.append(start(script, *flags, "--out", f"{script}-{n}", processes=n))
        for run in runs:
            finish(run)
    for script in scripts:
        for n in (2, 3):
            assert close(f"{script}-1", f"{script}-{n}")
            logs = [read_rows(f"{script}-{m}/metrics.jsonl") for m in (1, n)]
            for a, b in zip(*logs, strict=True):
                assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
                assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
                for name in ("reward", "response_tokens", "truncated"):
                    assert a.get(name) == b.get(name)
    one, *others = [read_rows(f"grpo.py-{n}/rollouts.jsonl") for n in (1, 2, 3)]
    for other in others:  # of all processes, not of the first one
        for a, b in zip(one, other, strict=True):
            assert (a["step"], a["id"]) == (b["step"], b["id"])
            assert [r["ids"] for r in a["rollouts"]] == [r["ids"] for r in b["rollouts"]] or a["step"] > 1
    assert len(list(Path("sft.py-2/state").glob("*/rank*.safetensors"))) == 2
    # A run of three processes can go on as one: it takes the rows that are now its own.
    again = start("sft.py", *scripts["sft.py"], "--out", "sft.py-3", "--resume")
    finish(again)
    assert "finished already" in again.stdout.read()
    assert close("sft.py-1", "sft.py-3")


def test_a_lost_process_costs_nothing():
    """Rule 15: as many processes end with the same bytes, another number close to them."""
    flags = (*SFT, "--epochs", "2", "--save-every", "3")
    finish(start("sft.py", *flags, "--out", "whole", processes=2))
    process = start("sft.py", *flags, "--out", "cut-2", processes=2)
    while steps_done("cut-2") < 5:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.002)
    os.kill(children(process)[-1], signal.SIGKILL)
    assert process.wait() != 0
    for n in (1, 3):
        shutil.copytree("cut-2", f"cut-{n}")
    runs = [start("sft.py", *flags, "--out", f"cut-{n}", "--resume", processes=n) for n in (1, 2, 3)]
    for run in runs:
        finish(run)
    assert fingerprint("whole") == fingerprint("cut-2")
    assert close("whole", "cut-1") and close("whole", "cut-3")


KILLED = """
import os, signal, sys
import cli, grpo, run, sft, train
name, owner, function, calls = sys.argv.pop(1), *sys.argv.pop(1).split("."), int(sys.argv.pop(1))
owner = {"run": run, "train": train, "sft": sft, "grpo": grpo, "Sampler": grpo.Sampler}[owner]
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
     [("sft.loss_of", 5), ("run.save_tensors", 2), ("train.local", 300)]),
    ("grpo", (*GRPO, "--steps", "3", "--save-every", "1"),
     [("Sampler.step", 40), ("grpo.run_tokens", 4), ("run.save_tensors", 2)]),
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
        assert fingerprint("whole") == fingerprint(f"cut-{i}"), moments[i]


@pytest.mark.parametrize("stuck", [0, 1])
def test_a_stuck_process_ends_the_run(stuck):
    """The others wait for --timeout; then torchrun ends all, and the last checkpoint is there."""
    process = start("sft.py", *SFT, "--epochs", "50", "--save-every", "1", "--out", "run", "--timeout", "0.1",
                    processes=2)
    while steps_done("run") < 3:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.002)
    ranks = children(process)
    os.kill(ranks[stuck], signal.SIGSTOP)
    started = time.time()
    while Path(f"/proc/{ranks[1 - stuck]}").exists():  # it gives up, and torchrun notices
        assert time.time() - started < 60
        time.sleep(0.1)
    os.kill(ranks[stuck], signal.SIGKILL)  # torchrun would wait half a minute before it does
    assert process.wait() != 0
    out = process.stdout.read()
    assert "another process is dead or stuck" in out
    assert len(list(Path("run/state").glob("step-*[0-9]"))) >= 1


# ---- input ---------------------------------------------------------------------------------------
def test_bad_input(cmd):
    refused(cmd, sft, (*SFT, "--out", "none", "--resume"), "holds no run")
    assert cmd(sft, *SFT, "--out", "run")[0] == 0
    refused(cmd, sft, (*SFT, "--out", "run"), "--out run exists")
    refused(cmd, sft, (*SFT, "--out", "run", "--resume", "--seed", "1"), "--seed 0, not 1")
    refused(cmd, grpo, ("--mini-batch", "3"), "--mini-batch 3 must divide")
    refused(cmd, grpo, (*GRPO, "--questions-per-step", "32", "--mini-batch", "32"), "only 16 questions")
    # Memory flags may change.
    assert cmd(sft, *SFT, "--out", "run", "--resume", "--micro-batch-tokens", "100", "--recompute")[0] == 0
