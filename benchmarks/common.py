"""What benchmarks need: models of given shapes, the machine's limits, turns, medians with spread, JSON."""
import json
import multiprocessing
import os
import resource
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch  # noqa: E402

from checkpoint import config_of, find_folder, load, save  # noqa: E402
from checkpoint.tokenizer import Tokenizer  # noqa: E402
from model import Transformer  # noqa: E402
from run.record import run_record  # noqa: E402

FOLDER = Path("out/benchmarks")
VOCABULARY = 151_665  # Qwen's tokens; its matrices are padded to 151,936
SHAPE = {  # random weights will do where only speed is asked for: those of Qwen2.5-0.5B
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 151_936,
    "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "hidden_act": "silu",
    "max_position_embeddings": 32_768, "tie_word_embeddings": True,
}


# ---- models --------------------------------------------------------------------------------------
def name_of(dtype):
    return str(dtype).removeprefix("torch.")


def folder_of(model, dtype):
    """The folder of a model. `random` is made of random weights, with the miniature's tokenizer."""
    if model != "random":
        return str(find_folder(model))
    folder = FOLDER / f"random-{name_of(dtype)}"
    if not (folder / "config.json").exists():
        tokenizer = Tokenizer(find_folder("mini"))
        torch.manual_seed(0)
        transformer = Transformer(config_of({**SHAPE, "eos_token_id": tokenizer.end_id})).to(dtype)
        for w in transformer.parameters():
            if w.ndim == 2:
                torch.nn.init.normal_(w, std=0.02)
        save(folder, transformer, tokenizer)
    return str(folder)


def load_model(folder, args):
    """As `checkpoint.load`, but the random model draws from all of Qwen's vocabulary."""
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
    n, side = (1 << 28, 8192) if device.type == "cuda" else (1 << 26, 1024)
    a = torch.empty(n, dtype=torch.uint8, device=device)
    b = torch.empty(n, dtype=torch.uint8, device=device)
    x = torch.randn(side, side, device=device).to(dtype)
    b.copy_(a)
    x @ x
    copy = 2 * n / seconds_of(lambda: b.copy_(a), device, 10)
    matmul = 2 * side**3 / seconds_of(lambda: x @ x, device, 10)
    return copy, matmul


def machine():
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    with open("/proc/cpuinfo") as f:
        name = next(line.split(":")[1].strip() for line in f if line.startswith("model name"))
    return f"{name}, {os.cpu_count()} cores"


# ---- turns ---------------------------------------------------------------------------------------
def peak_gib():
    """The most memory that this process has held, or its tensors on a GPU."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


def in_own_process(run, args):
    """The figures of run(args), {"seconds", "tokens", ...}, made in a process of its own."""
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    args = SimpleNamespace(**vars(args))  # argparse's own cannot be sent
    process = context.Process(target=_send_figures, args=(run, args, other))
    process.start()
    other.close()
    figures = pipe.recv()
    process.join()
    return figures


def _send_figures(run, args, pipe):
    figures = run(args)
    speed = round(figures["tokens"] / figures["seconds"], 1)
    pipe.send({**figures, "seconds": round(figures["seconds"], 3), "tokens_per_second": speed,
               "peak_gib": peak_gib()})


# ---- figures -------------------------------------------------------------------------------------
def write(name, args, **figures):
    """Write figures with machine, versions and flags to --out, or to benchmarks/results/NAME.json."""
    record = run_record(args)
    flags = {flag: value for flag, value in vars(args).items() if flag not in ("model", "out", "folder")}
    record = {"machine": machine(), "versions": record["versions"], "threads": torch.get_num_threads(),
              "flags": flags, **figures}
    path = Path(args.out or Path(__file__).parent / "results" / f"{name}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {path if args.out else f'benchmarks/results/{name}.json'}")


def compare(name, args, runs):
    """Make the figures of all {who: run} in turns, a process each; write medians and spread."""
    turns = {who: [] for who in runs}
    for _ in range(args.repeats):
        for who, run in runs.items():
            turns[who].append(in_own_process(run, args))
            print(who, turns[who][-1], flush=True)
    median = {}
    for who, mine in turns.items():
        speeds = [turn["tokens_per_second"] for turn in mine]
        median[who] = statistics.median(speeds)
        peak = max(turn["peak_gib"] for turn in mine)
        print(f"{who:>14}: median {median[who]:,.1f} tokens/s (lowest {min(speeds):,.1f}, highest "
              f"{max(speeds):,.1f}, n = {len(speeds)}), peak {peak:.2f} GiB")
    for who in list(runs)[1:]:
        print(f"ours against {who}: {median['ours'] / median[who]:.2f}")
    write(name, args, median=median, turns=turns)


def torchs_own_settings():
    """For a peer: model.py has changed them for this process."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
