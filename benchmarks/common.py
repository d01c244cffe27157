"""The end of every benchmark: medians, spread, ratio, and a JSON file that names machine and versions."""
import json
import os
import platform
import statistics
from pathlib import Path

import torch

from cli import run_record


def machine():
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        with open("/proc/cpuinfo") as f:
            name = next(line.split(":")[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor()
    return f"{name}, {os.cpu_count()} cores"


def conclude(name, args, turns, key, peer, better):
    """Print and write medians and spread of `key` for ours and the peer, and how many times better ours is."""
    values = {who: [t[key] for t in turns if t["who"] == who] for who in ("ours", peer)}
    medians = {who: statistics.median(v) for who, v in values.items()}
    ratio = medians["ours"] / medians[peer] if better == "higher" else medians[peer] / medians["ours"]
    for who, v in values.items():
        print(f"{who:>14}: median {medians[who]:,.1f} {key.replace('_', ' ')} (lowest {min(v):,.1f}, highest {max(v):,.1f}, n = {len(v)})")
    print(f"ours is {ratio:.2f} times as good as {peer}")
    peaks = {who: max(t["peak_gib"] for t in turns if t["who"] == who) for who in values} if "peak_gib" in turns[0] else None
    if peaks:
        print(f"peak memory: ours {peaks['ours']:.2f} GiB, {peer} {peaks[peer]:.2f} GiB, ratio {peaks['ours'] / peaks[peer]:.2f}")
    from importlib import metadata
    record = {"machine": machine(), "threads": torch.get_num_threads(), "versions": {**run_record(args)["versions"], **{p: metadata.version(p) for p in ("transformers", "trl") if _installed(p)}},
              "flags": {k: v for k, v in vars(args).items() if k not in ("model", "out", "data")}, "median": medians, "ratio": round(ratio, 2), "peak_gib": peaks, "turns": turns}
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote benchmarks/results/{name}.json")


def _installed(package):
    from importlib import metadata
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
