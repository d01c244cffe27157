"""What every benchmark needs: a model of given shapes, the machine's own limits, turns, medians with their spread, a JSON file."""
import json
import os
import platform
import statistics
import sys
import time
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

from cli import UserError, run_record
from model import Config, Tokenizer, Transformer, find, load, save

FOLDER, VOCABULARY = Path("out/benchmarks"), 151_665  # Qwen's tokens; its matrices are padded to 151,936
SHAPES = {  # random weights will do where only speed is asked for
    "qwen2.5-0.5b": dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2),
    "qwen2.5-1.5b": dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2),
}


def model_folder(name, dtype):
    """The folder of a model; one of SHAPES is made of random weights, with the miniature's tokenizer and Qwen's vocabulary."""
    if name not in SHAPES:
        return str(find(name))
    folder = FOLDER / f"{name}-{str(dtype)[6:]}"
    if not (folder / "config.json").exists():
        tokenizer = Tokenizer("mini")
        config = dict(SHAPES[name], model_type="qwen2", architectures=["Qwen2ForCausalLM"], vocab_size=151_936, rms_norm_eps=1e-6, rope_theta=1e6, hidden_act="silu",
                      max_position_embeddings=32_768, tie_word_embeddings=True, eos_token_id=tokenizer.end_id)
        torch.manual_seed(0)
        model = Transformer(Config(config)).to(dtype)
        for w in model.parameters():
            torch.nn.init.normal_(w, std=0.02) if w.ndim == 2 else None
        save(folder, model, tokenizer)
    return str(folder)


def load_model(folder, args):
    """As `model.load`; a model of SHAPES draws from all of Qwen's vocabulary, not the few tokens of the miniature's tokenizer."""
    model, tokenizer = load(folder, args.device, args.dtype)
    if Path(folder).parent == FOLDER:
        model.vocab = VOCABULARY
    return model, tokenizer


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(run, device, repeats=1):
    """Median wall time of run()."""
    times = []
    for _ in range(repeats):
        synchronize(device)
        started = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def roofline(device, dtype):
    """What this machine does at best, measured: (bytes/s of a large copy, flop/s of a large matrix product)."""
    n, side = (1 << 30, 8192) if device.type == "cuda" else (1 << 26, 1024)
    a, b = torch.empty(n, dtype=torch.uint8, device=device), torch.empty(n, dtype=torch.uint8, device=device)
    x = torch.randn(side, side, device=device).to(dtype)
    for run in (lambda: b.copy_(a), lambda: x @ x):
        run()
    limits = 2 * n / seconds_of(lambda: b.copy_(a), device, 10), 2 * side**3 / seconds_of(lambda: x @ x, device, 10)
    if device.type == "cuda":  # what it took is not the benchmark's
        del a, b, x
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return limits


def machine():
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        with open("/proc/cpuinfo") as f:
            name = next(line.split(":")[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor()
    return f"{name}, {os.cpu_count()} cores"


def write(name, args, **figures):
    """Write figures with the machine, the versions and the flags to --out, or to benchmarks/results/NAME.json."""
    versions = run_record(args)["versions"]
    for package in ("transformers", "trl", "vllm"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            pass
    record = {"machine": machine(), "threads": torch.get_num_threads(), "versions": versions,
              "flags": {k: v for k, v in vars(args).items() if k not in ("model", "out", "data")}, **figures}
    path = Path(args.out or Path(__file__).parent / "results" / f"{name}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {path if args.out else f'benchmarks/results/{name}.json'}")


def compare(name, args, runs, key, better="higher", **more):
    """Run {who: a function that returns figures} in turns, ours first; print and write medians, spread and the ratio of `key`."""
    turns = []
    for repeat in range(args.repeats):
        for who, run in runs.items():
            turns.append({"who": who, **run(repeat)})
            print(turns[-1], flush=True)
    values = {who: [t[key] for t in turns if t["who"] == who] for who in runs}
    medians = {who: statistics.median(v) for who, v in values.items()}
    for who, v in values.items():
        print(f"{who:>14}: median {medians[who]:,.1f} {key.replace('_', ' ')} (lowest {min(v):,.1f}, highest {max(v):,.1f}, n = {len(v)})")
    ratios = {who: round(medians["ours"] / m if better == "higher" else m / medians["ours"], 2) for who, m in medians.items() if who != "ours"}
    for who, ratio in ratios.items():
        print(f"ours against {who}: {ratio:.2f}")
    peaks = {who: max(t["peak_gib"] for t in turns if t["who"] == who) for who in runs} if "peak_gib" in turns[0] else None
    if peaks:
        print("peak memory: " + ", ".join(f"{who} {peak:.2f} GiB" for who, peak in peaks.items()))
    write(name, args, median=medians, ratio=ratios, peak_gib=peaks, **more, turns=turns)


def refuse_missing(package):
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        raise UserError(f"--peers: {package} is not installed; pip install {package}, or name other peers (or none)")
