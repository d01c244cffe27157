"""A run is never mixed: what it was started with, what it read, who works in its folder, damage on disk."""
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import CHAT, MINI, environment, read_rows, refused, start, tiny, write_jsonl

import cli
import evaluate
import grpo
import record
import sample
import sft
import tasks
from checkpoint import load, save

SFT = ("--data", "chat.jsonl", "--tokens-per-batch", "256", "--device", "cpu", "--epochs", "1",
       "--context", "256")
GRPO = ("--device", "cpu", "--questions", "8", "--questions-per-step", "2", "--mini-batch", "2", "--rollouts",
        "2", "--max-new-tokens", "10", "--steps", "2")
SAMPLE = ("--device", "cpu", "--questions", "3", "--n", "1", "--max-new-tokens", "10")
EVALUATE = ("--device", "cpu", "--questions", "3", "--samples", "1", "--max-new-tokens", "10")
QUESTIONS = [{"question": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(30)]


@pytest.fixture(autouse=True)
def in_a_folder_with_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl("chat.jsonl", CHAT)
    write_jsonl("questions.jsonl", QUESTIONS)
    save("model", *tiny())


@pytest.fixture(params=["sample", "sft", "grpo", "evaluate"])
def go(request, cmd):
    """go(): run a command in its folder, and go on. -> (exit status, stdout, stderr)"""
    task = ("--task", "file:questions.jsonl:integer", "--split", "all")
    lines = {
        "sample": (sample, *SAMPLE, *task, "--model", "model", "--out", "run.jsonl"),
        "sft": (sft, *SFT, "--model", "model", "--out", "run"),
        "grpo": (grpo, *GRPO, *task, "--model", "model", "--out", "run"),
        "evaluate": (evaluate, *EVALUATE, "--tasks", "file:questions.jsonl:integer", "--split", "all",
                     "--models", "a=model", "--out", "run"),
    }
    module, *flags = lines[request.param]

    def run(*more, out=None):
        argv = [*flags[:-1], out or flags[-1], *more]
        return cmd(module, *argv)
    run.name, run.module, run.flags = request.param, module, flags
    run.resume = () if request.param == "sample" else ("--resume",)
    run.record = Path("run.jsonl.run.json" if request.param == "sample" else "run/run.json")
    return run


def bytes_below(path="."):
    """Of all files, but for the page, which names the command."""
    files = [p for p in sorted(Path(path).rglob("*")) if p.is_file() and p.name != "report.html"]
    return {str(p): p.read_bytes() for p in files}


# ---- what it was started with ----------------------------------------------------------------------
def test_going_on_is_no_new_run(go):
    assert go()[0] == 0
    before = bytes_below()
    status, out, err = go(*go.resume)
    assert status == 0, err
    assert "has changed" not in out
    assert bytes_below() == before


def test_places_are_no_settings(go, tmp_path, monkeypatch):
    """Another spelling of the folder, a relative path, a folder that was moved."""
    assert go()[0] == 0
    name = go.flags[-1]
    if go.name != "sample":
        assert go(*go.resume, out=f"./{name}/")[0] == 0
    assert go(*go.resume, out=str(tmp_path / name))[0] == 0
    for path in list(Path().glob("run*")):
        path.rename(f"moved-{path.name}")
    status, _, err = go(*go.resume, out=f"moved-{name}")
    assert status == 0, err
    Path("model").rename("elsewhere")
    Path("questions.jsonl").rename("q.jsonl")
    Path("chat.jsonl").rename("c.jsonl")
    go.flags[:] = [flag.replace("model", "elsewhere") if flag in ("model", "a=model") else
                   flag.replace("chat.jsonl", "./c.jsonl") for flag in go.flags]
    go.flags[:] = [flag.replace("questions.jsonl", f"{tmp_path}/q.jsonl") for flag in go.flags]
    if go.name == "evaluate":  # it has something to do
        rows = Path(f"moved-{name}/results.jsonl")
        rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:-1]))
    status, _, err = go(*go.resume, out=f"moved-{name}")
    assert status == 0, err


def test_a_flag_younger_than_the_run_has_its_default(go):
    assert go()[0] == 0
    content = json.loads(go.record.read_text())
    typed = {flag[2:].replace("-", "_") for flag in go.flags if str(flag).startswith("--")}
    content["flags"] = {name: value for name, value in content["flags"].items() if name in typed}
    content["flags"]["gone"] = 7  # and one that there is no more
    go.record.write_text(json.dumps(content, indent=2))
    status, out, err = go(*go.resume)
    assert status == 0, err
    assert "no flag for gone" in out


def test_all_differing_flags_are_named(go):
    assert go()[0] == 0
    before = bytes_below()
    status, _, err = go(*go.resume, "--seed", "1", "--dtype", "float32")
    assert status == 2 and err.count("\n") == 1 and "--dtype auto, not float32; --seed 0, not 1" in err
    assert bytes_below() == before


def test_another_torch_or_code_is_told(go):
    assert go()[0] == 0
    content = json.loads(go.record.read_text())
    content["versions"]["torch"] = "1.0"
    content["machine"]["threads"] = 99
    go.record.write_text(json.dumps(content, indent=2))
    status, out, _ = go(*go.resume)
    assert status == 0
    line, = [line for line in out.splitlines() if "has changed" in line]
    assert "torch was 1.0, is" in line and "threads was 99, is" in line and "same bytes" in line


# ---- what it read ----------------------------------------------------------------------------------
def other_weights():
    model, tokenizer = load("model", "cpu")
    with torch.no_grad():
        model.model.norm.weight += 1e-3
    save("model", model, tokenizer)


def other_tokenizer():
    path = Path("model/tokenizer_config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "clean_up_tokenization_spaces": True}))


def other_config():
    path = Path("model/config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "rms_norm_eps": 1e-5}))


def other_questions():
    write_jsonl("questions.jsonl", [*QUESTIONS[:-1], {"question": "What is 29 + 1?", "answer": "31"}])


def other_data():
    write_jsonl("chat.jsonl", CHAT[::-1])


@pytest.mark.parametrize("change, name, those", [
    (other_weights, "model.safetensors", ("sample", "sft", "grpo", "evaluate")),
    (other_tokenizer, "tokenizer_config.json", ("sample", "sft", "grpo", "evaluate")),
    (other_config, "config.json", ("sample", "sft", "grpo", "evaluate")),
    (other_questions, "task", ("sample", "grpo", "evaluate")),
    (other_data, "--data", ("sft",)),
], ids=["weights", "tokenizer", "config", "questions", "data"])
def test_what_changed_under_the_same_path_is_named(go, change, name, those):
    if go.name not in those:
        pytest.skip("reads no such thing")
    if go.name in ("sample", "grpo", "evaluate") and change is other_questions:
        go.flags[:] = ["30" if before == "--questions" else flag
                       for before, flag in zip(["", *go.flags], go.flags, strict=False)]
    assert go()[0] == 0
    change()
    before = bytes_below()
    status, out, err = go(*go.resume)
    assert status == 2 and err.count("\n") == 1 and name in err and "has changed since it began" in err
    assert bytes_below() == before


def killed(*args):
    raise RuntimeError("killed")


def test_validation_questions_are_read_when_they_are_first_asked(cmd, monkeypatch):
    """Their fingerprint comes with the --resume that measures first."""
    write_jsonl("q.jsonl", [{"question": f"{i} + 2?", "answer": str(i + 2)} for i in range(120)])
    flags = (*GRPO, "--model", "model", "--task", "file:q.jsonl:integer", "--eval-questions", "2",
             "--out", "run")
    assert cmd(grpo, *flags)[0] == 0
    more = (*flags, "--eval-every", "1", "--resume")
    before = Path("run/run.json").read_bytes()
    with monkeypatch.context() as m:  # a kill at that moment costs nothing
        m.setattr(record, "write_record", killed)
        with pytest.raises(RuntimeError):
            cmd(grpo, *more, "--steps", "3")
    assert Path("run/run.json").read_bytes() == before
    assert cmd(grpo, *more, "--steps", "3")[0] == 0
    assert json.loads(Path("run/run.json").read_text())["inputs"]["the held-out questions"]
    assert not Path("run/run.json.tmp").exists()
    val = tasks.find("file:q.jsonl:integer").problems("val", 0)
    asked = {problem.question for problem in val}
    rows = [{**row, "answer": "9" + row["answer"]} if row["question"] in asked else row
            for row in read_rows("q.jsonl")]
    write_jsonl("q.jsonl", rows)
    refused(cmd, grpo, (*more, "--steps", "4"), "the held-out questions")


# ---- who works there -------------------------------------------------------------------------------
def test_a_second_process_is_refused(go):
    """With the first one's process id; nothing is written."""
    assert go()[0] == 0
    while record._held:  # this process's own
        record._held.pop().close()
    holder = ("import record, sys, time; f = record.hold(record.Path(sys.argv[1])); "
              "print('held', flush=True); time.sleep(60)")
    first = subprocess.Popen([sys.executable, "-c", holder, str(go.record)], stdout=subprocess.PIPE,
                             text=True, env=environment())
    assert first.stdout.readline() == "held\n"
    before = bytes_below()
    status, _, err = go(*go.resume)
    assert status == 2 and err.count("\n") == 1
    assert f"process {first.pid} is at work there" in err or "another process is at work there" in err
    assert bytes_below() == before
    first.kill()
    first.wait()
    assert go(*go.resume)[0] == 0


def test_two_starts_at_once_make_one_run():
    flags = (*GRPO, "--model", MINI, "--steps", "4", "--resume", "auto", "--out", "run")
    both = [start("grpo.py", *flags) for _ in range(2)]
    statuses = [process.wait() for process in both]
    texts = [process.stdout.read() for process in both]
    assert 0 in statuses and set(statuses) <= {0, 2}, texts
    assert [row["step"] for row in read_rows("run/metrics.jsonl")] == [1, 2, 3, 4]


def test_a_file_system_without_locks_is_told(go, monkeypatch):
    def flock(*args):
        raise OSError(95, "Operation not supported")
    monkeypatch.setattr(record.fcntl, "flock", flock)
    status, out, _ = go()
    assert status == 0 and "no lock on this file system" in out


# ---- folders in between ----------------------------------------------------------------------------
@pytest.mark.parametrize("left", [[], ["run.json"], ["run.json", "run.json.tmp"]])
@pytest.mark.parametrize("how", [(), ("--resume", "auto")])
def test_a_run_killed_at_its_birth_starts(cmd, left, how):
    Path("run").mkdir()
    for name in left:
        Path("run", name).write_text('{\n  "command": [')
    if "run.json.tmp" in left:
        Path("run/run.json").unlink()
        refused(cmd, sft, (*SFT, "--model", MINI, "--out", "run", *how), "--out run exists and holds no run")
        return
    status, _, err = cmd(sft, *SFT, "--model", MINI, "--out", "run", *how)
    assert status == 0, err


def test_a_folder_of_somebody_else_is_left_alone(cmd):
    Path("run").mkdir()
    Path("run/thesis.tex").write_text("x")
    for how in ((), ("--resume", "auto"), ("--resume",)):
        refused(cmd, sft, (*SFT, "--model", MINI, "--out", "run", *how), "run")
    assert bytes_below("run") == {"run/thesis.tex": b"x"}


# ---- damage on disk --------------------------------------------------------------------------------
def damaged(path, rng):
    """Contents of a file with one bit flipped, at places all over it, and cut."""
    whole = Path(path).read_bytes()
    header = int.from_bytes(whole[:8], "little") + 8 if str(path).endswith(".safetensors") else len(whole)
    places = [rng.randrange(min(header, len(whole))) for _ in range(40)]
    places += [rng.randrange(header, len(whole)) for _ in range(20) if header < len(whole)]
    for at in places:
        yield whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1:]
    for n in (0, 4, len(whole) // 2, len(whole) - 1):
        yield whole[:n]
    Path(path).write_bytes(whole)


@pytest.mark.parametrize("name", ["state/step-000002/rank000.safetensors", "state/step-000002/state.json"])
def test_damaged_state_is_named(cmd, name):
    """A flipped bit or a cut is found before any work, with what to do."""
    flags = (*SFT, "--model", "model", "--save-every", "1", "--keep", "2", "--out", "run")
    assert cmd(sft, *flags, "--epochs", "1")[0] == 0
    newest = sorted(Path("run/state").iterdir())[-1]
    path = newest / Path(name).name
    harmless = 0
    for content in damaged(path, random.Random(0)):
        path.write_bytes(content)
        before = bytes_below("run")
        status, _, err = cmd(sft, *flags, "--resume")
        if status == 0:  # of a file's header some bits say nothing (a space, the checksum's own name)
            harmless += 1
            continue
        assert status == 2 and err.count("\n") == 1 and str(path) in err, err
        assert bytes_below("run") == before
        if path.suffix == ".safetensors":
            assert f"remove {newest}, and --resume goes on from run/state/step-" in err
    assert harmless < 12
    path.unlink()
    refused(cmd, sft, (*flags, "--resume"), "missing")
    shutil.rmtree(newest)
    status, out, _ = cmd(sft, *flags, "--resume")
    assert status == 0 and "resuming run after step" in out


def test_damaged_weights_are_named(cmd):
    assert cmd(sft, *SFT, "--model", "model", "--out", "run")[0] == 0
    path = Path("run/model.safetensors")
    whole, _ = load("run", "cpu")
    for content in damaged(path, random.Random(1)):
        path.write_bytes(content)
        try:
            found, _ = load("run", "cpu")
        except cli.UserError as e:
            assert "run" in str(e)
        else:  # then it is the same model
            for a, b in zip(whole.parameters(), found.parameters(), strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["metrics.jsonl", "rollouts.jsonl"])
def test_a_damaged_log_is_named_by_its_line(cmd, name):
    flags = (*GRPO, "--model", MINI, "--out", "run")
    assert cmd(grpo, *flags)[0] == 0
    path = Path("run", name)
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0][:-5], *lines[1:]]))
    refused(cmd, grpo, (*flags, "--resume"), f"run/{name}:1: not valid JSON")
    path.write_bytes(b"\n".join(lines) + b'{"step": 2, "re')  # a kill within a line
    assert cmd(grpo, *flags, "--resume")[0] == 0
    assert path.read_bytes() == b"\n".join(lines)


@pytest.mark.parametrize("change", [
    lambda row: {}, lambda row: {**row, "index": []}, lambda row: {**row, "correct": "a"},
    lambda row: {name: row[name] for name in row if name != "tokens"}, lambda row: {**row, "step": None},
    lambda row: {**row, "id": "x", "index": 7}, lambda row: {**row, "verdicts": [1], "reward": "x"},
    lambda row: {**row, "attempts": ["x"], "val": {}}, lambda row: {**row, "forced": {}, "val_loss": "x"},
])
@pytest.mark.parametrize("module, flags, name", [
    (evaluate, (*EVALUATE, "--models", f"a={MINI}", "--out", "run"), "run/results.jsonl"),
    (sample, (*SAMPLE, "--model", MINI, "--out", "run.jsonl"), "run.jsonl"),
    (evaluate, (*EVALUATE, "--models", f"a={MINI}", "--budget-forcing", "--out", "run"), "run/results.jsonl"),
    (grpo, (*GRPO, "--model", MINI, "--out", "run"), "run/rollouts.jsonl"),
    (grpo, (*GRPO, "--model", MINI, "--out", "run"), "run/metrics.jsonl"),
], ids=["evaluate", "sample", "forced", "rollouts", "metrics"])
def test_a_line_that_says_something_else_is_named(cmd, module, flags, name, change):
    assert cmd(module, *flags)[0] == 0
    rows = read_rows(name)
    rows[1] = change(rows[1])
    write_jsonl(name, rows)
    status, _, err = cmd(module, *flags, *([] if module is sample else ["--resume"]))
    assert status == 0 or (status == 2 and err.count("\n") == 1 and f"{name}:2: " in err)


@pytest.mark.parametrize("change", [
    lambda r: {}, lambda r: {**r, "flags": []}, lambda r: {**r, "versions": 1}, lambda r: "x\n}",
    lambda r: {**r, "machine": 3}, lambda r: {**r, "command": 3}, lambda r: {**r, "inputs": 3},
    lambda r: {**r, "inputs": dict(list(r["inputs"].items())[1:])},
], ids=["empty", "flags", "versions", "text", "machine", "command", "inputs", "an input"])
def test_a_damaged_record_is_named(go, change):
    assert go()[0] == 0
    content = change(json.loads(go.record.read_text()))
    go.record.write_text(content if isinstance(content, str) else json.dumps(content))
    status, _, err = go(*go.resume)
    assert status == 2 and err.count("\n") == 1 and str(go.record) in err


def test_numbers_that_are_not_finite_are_named(cmd):
    model, tokenizer = load("model", "cpu")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    save("model", model, tokenizer)
    refused(cmd, sft, (*SFT, "--model", "model", "--out", "run"),
            "model.layers.1.mlp.up_proj.weight holds numbers that are not finite")
    assert not Path("run").exists()


# ---- hostile folders -------------------------------------------------------------------------------
@pytest.mark.parametrize("key, value", [
    ("num_hidden_layers", 2**40), ("head_dim", 2**40), ("hidden_size", 2**40), ("vocab_size", 2**40),
    ("intermediate_size", 2**40), ("num_attention_heads", 2**30), ("max_position_embeddings", 2**27),
    ("num_hidden_layers", 9999), ("head_dim", 2**27), ("vocab_size", 2**27), ("intermediate_size", 2**27),
])
def test_a_config_cannot_ask_for_more_than_the_weights_hold(cmd, monkeypatch, key, value):
    """It is refused before a model of that size is made, even without memory for its weights."""
    if key != "max_position_embeddings":
        monkeypatch.setattr("checkpoint.Transformer", None)
    path = Path("model/config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    started = time.time()
    status, _, err = cmd(sample, "--model", "model", *SAMPLE)
    assert time.time() - started < 5
    if key == "max_position_embeddings":  # which allocates nothing
        assert status == 0, err
    else:
        assert status == 2 and err.count("\n") == 1 and "model" in err


def links(path):
    path.unlink()
    path.symlink_to("nowhere")


def loops(path):
    path.unlink()
    path.symlink_to(path.name)


def is_a_folder(path):
    path.unlink()
    path.mkdir()


def is_a_pipe(path):
    path.unlink()
    os.mkfifo(path)


def is_deep(path):
    path.write_text('{"a":' * 100_000 + "1" + "}" * 100_000)


@pytest.mark.parametrize("change", [links, loops, is_a_folder, is_a_pipe, is_deep])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json",
                                  "model.safetensors", "generation_config.json"])
def test_what_is_no_file_is_one_line(cmd, change, name):
    if change is is_deep and name == "model.safetensors":
        pytest.skip("is no JSON")
    change(Path("model", name))
    status, _, err = cmd(sample, "--model", "model", *SAMPLE)
    if status:
        assert status == 2 and err.count("\n") == 1 and "model" in err, err
    else:
        assert name in ("tokenizer_config.json", "generation_config.json")  # which need not be there
