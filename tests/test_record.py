"""A run is never mixed: what it was started with, what it read, who works in its folder."""
import fcntl
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import CHAT, MINI, bytes_below, read_rows, refused, start, tiny, write_jsonl

import evaluate
import grpo
import run.record as record
import sample
import sft
from checkpoint import load, save

SFT = ("--data", "chat.jsonl", "--tokens-per-batch", "256", "--device", "cpu", "--epochs", "1",
       "--context", "256")
GRPO = ("--device", "cpu", "--questions", "8", "--questions-per-step", "2", "--mini-batch", "2", "--rollouts",
        "2", "--max-new-tokens", "10", "--steps", "2")
SAMPLE = ("--device", "cpu", "--questions", "3", "--n", "1", "--max-new-tokens", "10")
EVALUATE = ("--device", "cpu", "--questions", "3", "--samples", "1", "--max-new-tokens", "10")
QUESTIONS = [{"question": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(30)]


@pytest.fixture(autouse=True)
def more_data(data):
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


def stays(go, message, *more):
    """Whether the run is refused in one line, and no byte is another."""
    before = bytes_below()
    status, _, err = go(*go.resume, *more)
    assert status == 2 and err.count("\n") == 1 and message in err, err
    assert bytes_below() == before


# ---- what it was started with ----------------------------------------------------------------------
def test_going_on_is_no_new_run(go):
    """And all flags that differ are named."""
    assert go()[0] == 0
    before = bytes_below()
    status, _, err = go(*go.resume)
    assert status == 0, err
    assert bytes_below() == before
    stays(go, '--dtype "auto", not "float32"; --seed 0, not 1', "--seed", "1", "--dtype", "float32")


def test_places_are_no_settings(go, tmp_path):
    """Another spelling of a folder, an absolute path, folders and files that were moved."""
    assert go()[0] == 0
    for path in list(Path().glob("run*")):
        path.rename(f"moved-{path.name}")
    Path("model").rename("elsewhere")
    Path("chat.jsonl").rename("c.jsonl")
    moved = {"model": "elsewhere", "a=model": "a=elsewhere", "chat.jsonl": "./c.jsonl"}
    if go.name != "evaluate":  # its rows have the names of the tasks
        Path("questions.jsonl").rename("q.jsonl")
        moved["file:questions.jsonl:integer"] = f"file:{tmp_path}/q.jsonl:integer"
    go.flags[:] = [moved.get(flag, flag) for flag in go.flags]
    status, _, err = go(*go.resume, out=f"{tmp_path}/moved-{go.flags[-1]}")
    assert status == 0, err


# ---- what it read ----------------------------------------------------------------------------------
def test_what_changed_under_the_same_path_is_named(go):
    go.flags[:] = ["30" if before == "--questions" else flag
                   for before, flag in zip(["", *go.flags], go.flags, strict=False)]
    assert go()[0] == 0
    model, tokenizer = load("model", "cpu")
    with torch.no_grad():
        model.model.norm.weight += 1e-3
    save("model", model, tokenizer)
    write_jsonl("questions.jsonl", [*QUESTIONS[:-1], {"question": "What is 29 + 1?", "answer": "31"}])
    write_jsonl("chat.jsonl", CHAT[::-1])
    changed = {"sft": "--data, --model", "evaluate": "--models, --tasks"}.get(go.name, "--model, --task")
    stays(go, f"has changed since it began: {changed};")


# ---- who works there -------------------------------------------------------------------------------
def test_a_second_process_is_refused(go):
    """Nothing is written."""
    assert go()[0] == 0
    while record._held:  # this process's own
        record._held.pop().close()
    with open(go.record, "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        stays(go, "another process is at work there")
    assert go(*go.resume)[0] == 0


def test_two_starts_at_once_make_one_run():
    flags = (*GRPO, "--model", MINI, "--steps", "4", "--resume", "auto", "--out", "run")
    both = [start("grpo.py", *flags) for _ in range(2)]
    statuses = [process.wait() for process in both]
    texts = [process.stdout.read() for process in both]
    assert 0 in statuses and set(statuses) <= {0, 2}, texts
    assert [row["step"] for row in read_rows("run/metrics.jsonl")] == [1, 2, 3, 4]


def test_a_file_system_without_locks_is_told(cmd, monkeypatch):
    def flock(*args):
        raise OSError(95, "Operation not supported")
    monkeypatch.setattr(record.fcntl, "flock", flock)
    status, out, _ = cmd(sft, *SFT, "--model", "model", "--out", "run")
    assert status == 0 and "no lock on this file system" in out


# ---- damage on disk --------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["metrics.jsonl", "rollouts.jsonl"])
def test_a_damaged_log_is_named_by_its_line(cmd, name):
    flags = (*GRPO, "--model", MINI, "--out", "run")
    assert cmd(grpo, *flags)[0] == 0
    path = Path("run", name)
    lines = path.read_bytes().split(b"\n")
    odd = {**json.loads(lines[0]), "odd": "a\u2028b"}  # which is no end of a line
    lines[0] = json.dumps(odd, ensure_ascii=False).encode()
    path.write_bytes(b"\n".join([lines[0][:-2], *lines[1:]]))
    refused(cmd, grpo, (*flags, "--resume"), f"run/{name}:1: not valid JSON")
    path.write_bytes(b"\n".join(lines) + b'{"step": 2, "re')  # a kill within a line
    assert cmd(grpo, *flags, "--resume")[0] == 0
    assert path.read_bytes() == b"\n".join(lines)


def test_numbers_that_are_not_finite_are_named(cmd):
    model, tokenizer = load("model", "cpu")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    save("model", model, tokenizer)
    refused(cmd, sft, (*SFT, "--model", "model", "--out", "run"),
            "model.layers.1.mlp.up_proj.weight holds numbers that are not finite")
    assert not Path("run").exists()


def test_a_run_of_another_version_is_refused(go):
    """In one line, never misread: it is known by its flags."""
    assert go()[0] == 0
    content = json.loads(go.record.read_text())
    content["flags"]["plan"] = None
    go.record.write_text(json.dumps(content))
    stays(go, "of another version of this program, which has other flags (plan)")


def test_damaged_state_is_one_line(cmd):
    flags = (*SFT, "--model", "model", "--save-every", "1", "--keep", "2", "--out", "run")
    assert cmd(sft, *flags)[0] == 0
    newest = sorted(Path("run/state").iterdir())[-1]
    tensors, counts = newest / "rank000.safetensors", newest / "state.json"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:len(whole) // 2])
    refused(cmd, sft, (*flags, "--resume"), f"{newest} is damaged (")
    tensors.unlink()
    refused(cmd, sft, (*flags, "--resume"), "missing or has another shape")
    counts.write_text('{"step": 3')
    refused(cmd, sft, (*flags, "--resume"), "state.json: not valid JSON")
    shutil.rmtree(newest)
    status, out, _ = cmd(sft, *flags, "--resume")
    assert status == 0 and "resuming run after step" in out
