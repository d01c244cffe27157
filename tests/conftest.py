"""What the tests share: tiny models of every family, and a command run inside the test's own process."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
if not torch.cuda.is_available():
    # Read when triton is imported, which nothing here does before a test asks for it.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import run.command as cli  # noqa: E402
from checkpoint import config_of, save  # noqa: E402
from checkpoint.tokenizer import Tokenizer  # noqa: E402
from model import Transformer  # noqa: E402

MINI = str(ROOT / "mini")
ROOMS = ("grading", "checkpoint", "run", "report", "kernels")
SOURCES = [p for folder in ("", *ROOMS, "kernels/fused", "mini") for p in (ROOT / folder).glob("*.py")]
TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
}
QWEN2 = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
QWEN3 = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FAMILIES = {  # what each changes in TINY; None removes a key
    "qwen2": QWEN2,
    "qwen2-untied": {**QWEN2, "tie_word_embeddings": False, "head_dim": 8},
    "qwen3": {**QWEN3, "head_dim": 24},  # heads x head_dim is not the width
    "llama": {**LLAMA, "num_key_value_heads": 4},
    "llama-bias": {**LLAMA, "attention_bias": True},
    "llama3-rope": {**LLAMA, "rope_scaling": LLAMA3_ROPE},
    "llama3-rope-new": {**LLAMA, "rope_theta": None, "rope_parameters": {"rope_theta": 500.0, **LLAMA3_ROPE}},
}


def tiny(family="qwen2", seed=0, padding=5, dtype=torch.float32):
    """(Transformer with random weights, the miniature's Tokenizer).

    `padding`: ids of the vocabulary beyond the tokenizer.
    """
    tokenizer = Tokenizer(MINI)
    config = {**TINY, **FAMILIES[family]}
    config |= {"vocab_size": tokenizer.size + padding, "eos_token_id": tokenizer.end_id}
    config = {name: value for name, value in config.items() if value is not None}
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(config_of(config))
    with torch.no_grad():
        for w in model.parameters():
            noise = torch.randn(w.shape, generator=generator)
            w.copy_(0.3 * noise if w.ndim > 1 else 1 + 0.1 * noise)
    model.vocab = tokenizer.size
    return model.to(dtype), tokenizer


@pytest.fixture
def folder(tmp_path):
    """A saved tiny model: folder(family) -> its path."""
    def make(family="qwen2", **kw):
        path = tmp_path / family
        save(path, *tiny(family, **kw))
        return path
    return make


@pytest.fixture
def cmd(monkeypatch, capsys, tmp_path):
    """cmd(module, *argv): run a command in an empty folder. -> (exit status, stdout, stderr)"""
    monkeypatch.chdir(tmp_path)

    def run(module, *argv):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, argv)])
        before = {number: signal.getsignal(number) for number in cli.STOPPING}
        status = 0
        try:
            cli.command(module.main)
        except SystemExit as e:
            status = e.code or 0
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        out = capsys.readouterr()
        return status, out.out, out.err
    return run


def refused(cmd, module, argv, message):
    """Whether a command says `message` in one line and exits with 2."""
    status, _, err = cmd(module, *argv)
    assert status == 2, (argv, err)
    assert message in err, (argv, err)
    assert err.count("\n") == 1 and "Traceback" not in err, (argv, err)


def write_jsonl(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_rows(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def chat_row(a, b):
    answer = f"{a} * {b} = {a * b}\n<answer>{a * b}</answer>"
    question = f"What is {a} * {b}?"
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


CHAT = [chat_row(a, b) for a in range(2, 9) for b in range(2, 6)]
SFT = ("--model", MINI, "--data", "chat.jsonl", "--tokens-per-batch", "256", "--device", "cpu")
GRPO = ("--model", MINI, "--device", "cpu", "--questions", "16", "--questions-per-step", "4",
        "--mini-batch", "2", "--rollouts", "4", "--max-new-tokens", "50")


@pytest.fixture
def data(tmp_path, monkeypatch):
    """The test works in a folder of its own, with chat.jsonl."""
    monkeypatch.chdir(tmp_path)
    write_jsonl("chat.jsonl", CHAT)


def bytes_below(path="."):
    """Of all files, but for the page, which names the command."""
    files = [p for p in sorted(Path(path).rglob("*")) if p.is_file() and p.name != "report.html"]
    return {str(p): p.read_bytes() for p in files}


def stop_at(monkeypatch, owner, function, call, number=signal.SIGTERM):
    """The process gets a signal as it calls a function for the n-th time. Returns the list of its calls."""
    real, calls = getattr(owner, function), []

    def stopped(*args, **kw):
        calls.append(args)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return real(*args, **kw)
    monkeypatch.setattr(owner, function, stopped)
    return calls


def environment(**kw):
    """For a subprocess: one thread, so that two runs add up in the same order."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **kw}


def start(script, *flags, processes=1, restarts=0):
    """Run a command as a process of its own, by torchrun if it is to be several."""
    runner = [sys.executable]
    if processes > 1:
        runner += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
                   "--max-restarts", str(restarts)]
    command = [*runner, str(ROOT / script), *map(str, flags)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment(), preexec_fn=default_signals, **pipes)


def default_signals():
    """What a shell gives a command in the foreground, however this process was started."""
    for number in cli.STOPPING:
        signal.signal(number, signal.SIG_DFL)


def children(process):
    """The processes that a torchrun started."""
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def steps_done(out="run"):
    path = Path(out, "metrics.jsonl")
    return path.read_text().count("\n") if path.exists() else 0


def wait_for_steps(process, n, out="run"):
    while steps_done(out) < n:
        assert process.poll() is None, process.stdout and process.stdout.read()
        time.sleep(0.002)


def finish(process):
    assert process.wait() == 0, process.stdout.read()
