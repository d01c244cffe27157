"""What --plan says a run will hold, against what the run does hold.

    python benchmarks/memory.py --model FOLDER --dtype bfloat16 --processes 1,2
    python benchmarks/memory.py --model mini --processes 1 --commands sft           # to see that it runs

Each command runs for two steps in processes of its own, with every tensor counted (on a GPU, by torch's
allocator). `tensors` is the peak of their bytes, of the process with most; `process` the most memory that the
operating system has seen in use, with all libraries. The plan knows only the first.
"""
import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from common import machine, short_name, write  # first of ours: it sets the path

import torch

import grpo
import sample
import sft
from checkpoint import find_folder
from cli import UserError, command, parser, positive
from files import to_json
from plan import GIB, Memory

ROOT = Path(__file__).resolve().parent.parent
MAINS = {"sft": sft.main, "grpo": grpo.main, "sample": sample.main}


def measured(name, flags):
    """Run a command in this process, and print what it held as JSON."""
    sys.argv = [f"{name}.py", *flags]
    memory = Memory()
    if torch.cuda.is_available():
        command(MAINS[name])
        peak = torch.cuda.max_memory_allocated()
    else:
        with memory:
            command(MAINS[name])
        peak = memory.peak
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print("MEASURED " + json.dumps({"tensors": peak / GIB, "process": process / GIB}), flush=True)


def output_of(command_line):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command_line, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise UserError(f"{' '.join(map(str, command_line))}: {done.stdout}{done.stderr}")
    return done.stdout


def turn(name, flags, processes, out):
    """Plan and run a command. Returns its figures, in GiB."""
    planned = output_of([sys.executable, ROOT / f"{name}.py", *flags, "--plan", str(processes)])
    last_row = re.search("at the peak(.*)", planned).group(1)
    peaks = [float(x) / (1 if unit == "GiB" else 1024) for x, unit in re.findall(r"(\S+) (.iB)", last_row)]
    runner = [sys.executable]
    if processes > 1:
        runner += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    text = output_of([*runner, __file__, "--measure", name, *flags, "--out", out])
    found = [json.loads(line) for line in re.findall(r"MEASURED ({.*?})", text)]
    row = {"command": name, "processes": processes, "plan": round(max(peaks), 4)}
    for kind in ("tensors", "process"):
        row[kind] = round(max(figures[kind] for figures in found), 4)
    row["ratio"] = round(row["plan"] / row["tensors"], 3)
    return row


def write_rows(path, rows, words):
    """Chat rows of random numbers of different lengths."""
    rng = random.Random(0)
    with open(path, "w") as f:
        for i in range(rows):
            text = " ".join(str(rng.randrange(10)) for _ in range(words * (i + rows) // (2 * rows)))
            f.write(to_json({"messages": [{"role": "user", "content": f"Question {i}"},
                                          {"role": "assistant", "content": text}]}) + "\n")


def arguments():
    p = parser(__doc__, out=None)
    p.add_argument("--processes", default="1,2", help="how many, separated by commas")
    p.add_argument("--commands", default="sft,grpo,sample", help="of these, separated by commas")
    p.add_argument("--rows", type=positive, default=16, help="of SFT")
    p.add_argument("--words", type=positive, default=500, help="of the longest row of SFT")
    p.add_argument("--max-new-tokens", type=positive, default=48, help="in sampling and GRPO")
    return p.parse_args()


def main():
    args = arguments()
    turns = []
    with tempfile.TemporaryDirectory() as folder:
        data = f"{folder}/rows.jsonl"
        write_rows(data, args.rows, args.words)
        model = ("--model", str(find_folder(args.model)), "--device", args.device, "--dtype", args.dtype)
        budget = ("--max-new-tokens", str(args.max_new_tokens))
        commands = {
            "sft": (*model, "--data", data, "--tokens-per-batch", "4096", "--epochs", "2", "--lr", "1e-6"),
            "grpo": (*model, *budget, "--steps", "2", "--questions-per-step", "8", "--mini-batch", "8",
                     "--reward", "random", "--kl", "0.01", "--lr", "1e-6"),
            "sample": (*model, *budget, "--questions", "16", "--attempts", "2"),
        }
        for processes in map(int, args.processes.split(",")):
            for name in args.commands.split(","):
                turns.append(turn(name, commands[name], processes, f"{folder}/{name}-{processes}"))
                print(turns[-1], flush=True)
    print(f"{machine()}: the plan over the tensors, {min(t['ratio'] for t in turns):.3f} to "
          f"{max(t['ratio'] for t in turns):.3f}")
    write(f"memory-{short_name(args.model)}-{args.dtype}", args, turns=turns)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measured(sys.argv[2], sys.argv[3:])
    else:
        command(main)
