"""What benchmarks need: models of given shapes, the machine's limits, turns, medians with spread, JSON."""
import json
import os
import platform
import statistics
import sys
import time
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch  # noqa: E402

from checkpoint import config_of, find_folder, load, save  # noqa: E402
from cli import UserError  # noqa: E402
from model import Transformer  # noqa: E402
from record import run_record  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402

FOLDER = Path("out/benchmarks")
VOCABULARY = 151_665  # Qwen's tokens; its matrices are padded to 151,936
SHAPES = {  # random weights will do where only speed is asked for
    "qwen2.5-0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    },
    "qwen2.5-1.5b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
}


# ---- models --------------------------------------------------------------------------------------
def name_of(dtype):
    return str(dtype).removeprefix("torch.")


def short_name(model):
    """A name for files and titles: the shape, or the last part of a path."""
    return model if model in SHAPES else model.rstrip("/").rpartition("/")[2]


def folder_of(model, dtype):
    """The folder of a model. One of SHAPES is made of random weights, with the miniature's tokenizer."""
    if model not in SHAPES:
        return str(find_folder(model))
    folder = FOLDER / f"{model}-{name_of(dtype)}"
    if not (folder / "config.json").exists():
        tokenizer = Tokenizer(find_folder("mini"))
        config = {
            **SHAPES[model],
            "model_type": "qwen2",
            "architectures": ["Qwen2ForCausalLM"],
            "vocab_size": 151_936,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "hidden_act": "silu",
            "max_position_embeddings": 32_768,
            "tie_word_embeddings": True,
            "eos_token_id": tokenizer.end_id,
        }
        torch.manual_seed(0)
        transformer = Transformer(config_of(config)).to(dtype)
        for w in transformer.parameters():
            if w.ndim == 2:
                torch.nn.init.normal_(w, std=0.02)
        save(folder, transformer, tokenizer)
    return str(folder)


def load_model(folder, args):
    """As `checkpoint.load`, but a model of SHAPES draws from all of Qwen's vocabulary."""
    model, tokenizer = load(folder, args.device, args.dtype)
    if Path(folder).parent == FOLDER:
        model.vocab = VOCABULARY
    return model, tokenizer


# ---- time ----------------------------------------------------------------------------------------
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
    """What this machine does at best, measured: (bytes/s of a large copy, flop/s of a large product)."""
    n, side = (1 << 30, 8192) if device.type == "cuda" else (1 << 26, 1024)
    a = torch.empty(n, dtype=torch.uint8, device=device)
    b = torch.empty(n, dtype=torch.uint8, device=device)
    x = torch.randn(side, side, device=device).to(dtype)
    b.copy_(a)
    x @ x
    copy = 2 * n / seconds_of(lambda: b.copy_(a), device, 10)
    matmul = 2 * side**3 / seconds_of(lambda: x @ x, device, 10)
    if device.type == "cuda":  # what it took is not the benchmark's
        del a, b, x
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return copy, matmul


def machine():
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        with open("/proc/cpuinfo") as f:
            name = next(line.split(":")[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor()
    return f"{name}, {os.cpu_count()} cores"


# ---- figures -------------------------------------------------------------------------------------
def write(name, args, **figures):
    """Write figures with machine, versions and flags to --out, or to benchmarks/results/NAME.json."""
    versions = run_record(args)["versions"]
    for package in ("transformers", "trl", "vllm", "openvino_genai"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            pass
    paths = ("model", "out", "data", "openvino", "samples")
    record = {
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "versions": versions,
        "flags": {flag: value for flag, value in vars(args).items() if flag not in paths},
        **figures,
    }
    path = Path(args.out or Path(__file__).parent / "results" / f"{name}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {path if args.out else f'benchmarks/results/{name}.json'}")


def compare(name, args, runs, figure, better="higher"):
    """Run {who: a function of the repeat that returns figures} in turns, ours first.

    Print and write medians, spread and the ratio of one `figure`.
    """
    turns = []
    for repeat in range(args.repeats):
        for who, run in runs.items():
            turns.append({"who": who, **run(repeat)})
            print(turns[-1], flush=True)
    medians, ratios, peaks = {}, {}, {}
    for who in runs:
        mine = [turn for turn in turns if turn["who"] == who]
        values = [turn[figure] for turn in mine]
        medians[who] = statistics.median(values)
        print(f"{who:>14}: median {medians[who]:,.1f} {figure.replace('_', ' ')} "
              f"(lowest {min(values):,.1f}, highest {max(values):,.1f}, n = {len(values)})")
        if "peak_gib" in mine[0]:
            peaks[who] = max(turn["peak_gib"] for turn in mine)
    for who, median in medians.items():
        if who == "ours":
            continue
        ratio = medians["ours"] / median if better == "higher" else median / medians["ours"]
        ratios[who] = round(ratio, 2)
        print(f"ours against {who}: {ratio:.2f}")
    if peaks:
        print("peak memory: " + ", ".join(f"{who} {peak:.2f} GiB" for who, peak in peaks.items()))
    write(name, args, median=medians, ratio=ratios, peak_gib=peaks or None, turns=turns)


def torchs_own_settings():
    """For a peer: model.py has changed them for this process."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True


def refuse_missing(package):
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError as e:
        raise UserError(f"--peers: {package} is not installed; "
                        f"pip install {package}, or name other peers (or none)") from e
