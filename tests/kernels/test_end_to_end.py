"""The model, the sampler and a training step with every kernel in place equal plain PyTorch.

In the interpreter on a CPU, with CUDA graphs on a GPU.
"""
import subprocess
import sys

import pytest
import torch
from conftest import environment, tiny

import kernels
from sample import Sampler, SamplingParams

pytest.importorskip("triton")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
PROMPTS = [[5, 9, 200, 31], [7], [100 + i for i in range(23)]]


@pytest.fixture
def use(monkeypatch):
    return lambda kind: monkeypatch.setenv("KERNELS", kind)


def tiny_there(family):
    model, tokenizer = tiny(family)
    model.frequencies = model.frequencies.to(DEVICE)
    return model.to(DEVICE), tokenizer


def apart(model, c, temperature=1.0):
    """How far the sampler's log-probabilities of a completion are from the trainer's, token by token."""
    tokens = torch.tensor([c.prompt + c.tokens[:-1]], device=DEVICE)
    targets = torch.tensor(c.tokens, device=DEVICE)
    with torch.no_grad():
        hidden = model(tokens)[0, len(c.prompt) - 1:]
        logp, _ = model.logprobs(hidden, targets, temperature)
    return (logp.cpu() - torch.tensor(c.logprobs)).abs()


def test_where_an_operation_runs(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.delenv("KERNELS", raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert not kernels.uses_triton(cpu)
    assert kernels.uses_triton(gpu, torch.bfloat16) and not kernels.uses_triton(gpu, torch.float64)
    monkeypatch.setenv("KERNELS", "triton")
    assert kernels.uses_triton(cpu) and not kernels.uses_triton(cpu, torch.float64)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="needs the package triton, and a GPU or TRITON_INTERPRET=1"):
        kernels.uses_triton(cpu)
    monkeypatch.setenv("KERNELS", "reference")
    assert not kernels.uses_triton(gpu)
    monkeypatch.setenv("KERNELS", "fast")
    with pytest.raises(ValueError, match="KERNELS=fast: give reference or triton"):
        kernels.uses_triton(cpu)


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch, checkpoint, sample, grpo
model, tokenizer = checkpoint.load("mini", "cpu")
completion, = sample.Sampler(model, tokenizer).generate([[5, 6]], 1, sample.SamplingParams(4))[0]
logp, _ = model.logprobs(model(torch.tensor([[5, 6]]))[0], torch.tensor([6, 7]))
logp.sum().backward()
print(len(completion.tokens))
"""


def test_a_cpu_needs_no_triton():
    """Nor does macOS, for which there is none: with triton out of reach, everything runs."""
    env = environment(KERNELS="", CUDA_VISIBLE_DEVICES="")
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "4", done.stdout + done.stderr


@pytest.mark.parametrize("family", ["qwen2-untied", "qwen3"])
def test_training_step(use, family):
    """Values and the gradient of every parameter, through all layers."""
    tokens = torch.randint(0, 300, (2, 19), device=DEVICE)
    targets = torch.randint(0, 300, (38,), device=DEVICE)
    upstream = torch.randn(38, device=DEVICE)
    results = {}
    for kind in ("reference", "triton"):
        use(kind)
        model, _ = tiny_there(family)
        logp, entropy = model.logprobs(model(tokens).flatten(0, 1), targets, 0.8)
        (logp * upstream).sum().backward()
        grads = {name: w.grad for name, w in model.named_parameters()}
        results[kind] = {"logp": logp, "entropy": entropy, **grads}
    for name, want in results["reference"].items():
        error = (results["triton"][name] - want).abs().max() / want.abs().max()
        assert error < 1e-4, f"{name} is off by {error:.1e} of its largest value"


@pytest.mark.parametrize("family, params", [
    ("qwen3", SamplingParams(10)),
    ("qwen2", SamplingParams(5, 0.7, 20, 0.8, repetition_penalty=1.1)),
], ids=["plain", "cuts"])
def test_sampling(use, family, params):
    """The same tokens from both, the trainer's log-probabilities, and new weights seen, by graphs too."""
    model, tokenizer = tiny_there(family)
    samplers = {}
    for kind in ("reference", "triton"):
        use(kind)
        samplers[kind] = Sampler(model, tokenizer, 3)
        samplers[kind].tokens_per_sync = 4
        samplers[kind].graphed = GPU and kind == "triton"
    for _ in range(2):
        got = {}
        for kind, sampler in samplers.items():
            use(kind)
            got[kind] = [c for group in sampler.generate(PROMPTS, 2, params) for c in group]
        assert [c.tokens for c in got["triton"]] == [c.tokens for c in got["reference"]]
        assert all(apart(model, c, params.temperature or 1).max() < 1e-4 for c in got["triton"])
        with torch.no_grad():
            for w in model.parameters():
                w.mul_(1.2).add_(0.01)
    assert not GPU or any(samplers["triton"].graphs.replays.values())


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_bfloat16_stays_close(use):
    """Sampler against trainer in bfloat16: a rounding apart, not a mistake apart."""
    use("triton")
    model, tokenizer = tiny_there("qwen2")
    model = model.bfloat16()
    for group in Sampler(model, tokenizer, 8).generate(PROMPTS, 4, SamplingParams(40)):
        assert all(apart(model, c).mean() < 0.05 for c in group)
