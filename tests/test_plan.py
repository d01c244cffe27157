"""--plan tells what a run holds, to within a tenth of the bytes of its tensors: counted while one runs."""
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import CHAT, refused, start, tiny, write_jsonl

import grpo
import sample
import sft
from checkpoint import save
from plan import GIB, MIB, Memory, Target, build, pretending

COMMANDS = {"sft": sft, "grpo": grpo, "sample": sample}
FLAGS = {
    "sft": ("--data", "chat.jsonl", "--epochs", "2", "--tokens-per-batch", "2000", "--lr", "0",
            "--context", "256"),
    "grpo": ("--questions", "8", "--questions-per-step", "4", "--mini-batch", "4", "--rollouts", "4",
             "--steps", "2", "--max-new-tokens", "40", "--reward", "random", "--lr", "1e-9"),
    "sample": ("--questions", "4", "--attempts", "2", "--max-new-tokens", "40", "--reflections", "0"),
}


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl("chat.jsonl", CHAT)
    write_jsonl("long.jsonl", [{"question": "1 + 1 = 2 " * 200, "answer": "1"}])


@pytest.fixture
def model():
    """A folder whose model ends no answer by itself, so that all responses reach the budget."""
    transformer, tokenizer = tiny("qwen2-untied", dtype=torch.float32)
    with torch.no_grad():
        transformer.lm_head.weight[tokenizer.stop_ids] = 0
        transformer.lm_head.weight.mul_(1e-3)
    save("model", transformer, tokenizer)
    return "model"


def planned(cmd, name, *flags):
    """The bytes at the peak, of the phase with most."""
    status, out, err = cmd(COMMANDS[name], *flags)
    assert status == 0 and "it fits" in out, err
    last_row = re.search("at the peak(.*)", out).group(1)
    return max(float(x) * {"GiB": GIB, "MiB": MIB}[unit] for x, unit in re.findall(r"(\S+) (.iB)", last_row))


@pytest.mark.parametrize("name, flags", [
    ("sft", ("--dtype", "bfloat16")),
    ("sft", ("--micro-batch-tokens", "64")),
    ("grpo", ("--dtype", "bfloat16", "--kl", "0.1")),
    ("grpo", ("--recompute", "--micro-batch-tokens", "90")),
    ("sft", ("--tokens-per-batch", "40", "--recompute")),
    ("grpo", ("--eval-every", "1", "--eval-questions", "60", "--recompute", "--micro-batch-tokens", "90")),
    ("sample", ("--n", "8", "--slots", "4")),
    ("sample", ("--dtype", "bfloat16", "--top-p", "0.9", "--repetition-penalty", "1.1", "--slots", "3")),
])
def test_a_plan_holds_what_the_run_holds(cmd, model, name, flags):
    flags = (*FLAGS[name], *flags, "--model", model, "--device", "cpu")
    expected = planned(cmd, name, *flags, "--plan")
    with Memory() as memory:
        assert cmd(COMMANDS[name], *flags, "--out", "run")[0] == 0
    assert expected == pytest.approx(memory.peak, rel=0.1)


@pytest.mark.parametrize("name", ["sft", "grpo"])
def test_a_plan_of_two_processes(cmd, model, name):
    """FSDP's buffers, gathered weights and sums included."""
    flags = (*FLAGS[name], "--model", model, "--device", "cpu", "--dtype", "bfloat16")
    run = start("benchmarks/memory.py", "--measure", name, *flags, "--out", "run", processes=2)
    expected = planned(cmd, name, *flags, "--plan", "2") / GIB
    text, _ = run.communicate()
    assert run.returncode == 0, text
    peaks = [json.loads(line)["tensors"] for line in re.findall(r"MEASURED ({.*?})", text)]
    assert len(peaks) == 2 and expected == pytest.approx(max(peaks), rel=0.1)


def test_a_plan_for_a_gpu_counts_what_the_kernels_hold(monkeypatch):
    """Against the kernels themselves, in Triton's interpreter."""
    pytest.importorskip("triton")
    transformer, tokenizer = tiny("qwen3")
    examples = [sft.Example(list(range(5, 45)), start=10)] * 3
    monkeypatch.setenv("KERNELS", "triton")
    with Memory() as real:
        loss = sft.loss_of(transformer, examples)
        held = real.now
        loss.backward()
    with pretending(Target(gpu=True, fused=True, dtype=torch.float32, memory=0, processes=1)) as pretended:
        twin = build(transformer.config, tokenizer, torch.float32)
        loss = sft.loss_of(twin, examples)
        assert pretended.now == pytest.approx(held, rel=0.02)
        loss.backward()
    assert pretended.peak == pytest.approx(real.peak, rel=0.1)


# ---- what it says --------------------------------------------------------------------------------
def test_a_plan_needs_no_weights_and_writes_nothing(cmd, model):
    Path(model, "model.safetensors").unlink()
    for name, module in COMMANDS.items():
        status, out, _ = cmd(module, *FLAGS[name], "--model", model, "--plan")
        assert status == 0 and "49,952 parameters" in out
        status, out, _ = cmd(module, *FLAGS[name], "--model", model, "--plan-memory", "80")
        assert status == 0 and "on a GPU where tensors may take 72.00 GiB" in out
    assert sorted(path.name for path in Path().iterdir()) == ["chat.jsonl", "long.jsonl", "model"]


@pytest.mark.parametrize("name, flags, memory, message", [
    ("sft", ("--context", "256", "--micro-batch-tokens", "2000"), "0.0018", "with --recompute it takes 1."),
    ("sft", ("--context", "256", "--micro-batch-tokens", "2000"), "0.0001", "take a smaller model"),
    ("sft", ("--context", "257"), "80", "--context 257"),
    ("grpo", ("--slots", "64"), "0.0001", "nor with --recompute --micro-batch-tokens 512 --s"),
    ("sample", ("--slots", "64", "--n", "9"), "0.003", "with --slots 16 it takes"),
    ("sample", ("--slots", "2", "--n", "9"), "0.0001", "fit into 0.09 MiB; take a smaller model"),
    ("sample", ("--prompt", "hello"), "80", "leave --prompt out"),
    ("sft", ("--device", "bogus", "--context", "256"), "80", "--device bogus"),
    ("sample", ("--task", "file:long.jsonl:integer", "--split", "all", "--questions", "0"), "80",
     "does not fit the model's context"),
])
def test_what_does_not_fit_is_refused_with_a_flag(cmd, model, name, flags, memory, message):
    refused(cmd, COMMANDS[name], (*FLAGS[name], *flags, "--model", model, "--plan-memory", memory), message)
