"""Sampling against transformers on the same requests, and one decoding step against the memory's bandwidth.

    python benchmarks/sampling.py --load nano-vllm                              # 256 rows of 100-1024 tokens
    python benchmarks/sampling.py --load group                                  # the method's own: 32 x 64
    python benchmarks/sampling.py --load decode                                 # a step of 1 to 128 rows
    python benchmarks/sampling.py --load chat --model FOLDER --peers generate   # 8 x 16 rows: for a CPU

Each turn is a process of its own, so that its peak memory is its own too. Random weights, of Qwen2.5-0.5B's
shape, unless --model says otherwise; stops are ignored but for chat.
"""
import random
import statistics
import time
from collections import deque
from pathlib import Path

from common import (  # first of ours: it sets the path
    compare, folder_of, load_model, name_of, roofline, seconds_of,
    synchronize, torchs_own_settings, write,
)

import torch

import tasks
from cache import KVCache
from checkpoint import device_and_dtype, find_folder
from checkpoint.tokenizer import Tokenizer
from run.command import command, number, parser, positive
from sample import Request, Sampler, SamplingParams


def requests(args, tokenizer):
    """([Request], temperature) of a load."""
    rng = random.Random(0)

    def scaled(n):
        return max(1, round(args.scale * n))

    def request(prompt, samples, budget):
        if isinstance(prompt, int):  # its length
            prompt = [rng.randrange(10, tokenizer.size - 10) for _ in range(prompt)]
        return Request(prompt, list(range(samples)), max_new_tokens=budget)

    if args.load != "chat":
        tokenizer.stop_ids = []
    if args.load == "nano-vllm":
        lengths = [(rng.randint(scaled(100), scaled(1024)), rng.randint(scaled(100), scaled(1024)))
                   for _ in range(scaled(256))]
        return [request(prompt, 1, budget) for prompt, budget in lengths], 0.6
    if args.load == "group":
        return [request(scaled(150), scaled(64), scaled(512)) for _ in range(scaled(32))], 1.0
    task = tasks.find("countdown-3")
    chats = [tokenizer.chat(task.prompt(problem)) for problem in task.problems("val", 8)]
    return [request(ids, scaled(16), scaled(256)) for ids in chats], 1.0


# ---- engines: each does the work of --load and returns its figures -----------------------------------
def ours(args):
    model, tokenizer = load_model(args.folder, args)
    sampler = Sampler(model, tokenizer)

    def run(seed):
        work, temperature = requests(args, tokenizer)
        stream = sampler.stream(deque(work), SamplingParams(temperature=temperature), seed)
        return sum(len(completion.tokens) for _, _, completion in stream)
    return timed(run, model.device)


def generate(args):
    """transformers': all rows of a batch go on to the slowest."""
    import transformers
    torchs_own_settings()
    device, dtype = device_and_dtype(args.device, args.dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.folder, dtype=dtype).to(device).eval()
    tokenizer = Tokenizer(find_folder(args.folder))
    work, temperature = requests(args, tokenizer)
    rows = [w for w in work for _ in w.indices]

    def run_batch(batch):
        width = max(len(w.prompt) for w in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        real = torch.zeros_like(ids)
        for i, w in enumerate(batch):  # padded on the left
            ids[i, width - len(w.prompt):] = torch.tensor(w.prompt)
            real[i, width - len(w.prompt):] = 1
        with torch.inference_mode():
            return model.generate(
                input_ids=ids.to(device), attention_mask=real.to(device), do_sample=True, top_k=0, top_p=1.0,
                temperature=temperature, max_new_tokens=max(w.max_new_tokens for w in batch),
                eos_token_id=tokenizer.stop_ids or None, pad_token_id=0)[:, width:].tolist()

    def length(row, budget):
        """Tokens up to and with the first stop token."""
        for n, token in enumerate(row[:budget], 1):
            if token in tokenizer.stop_ids:
                return n
        return budget

    def run(seed):
        torch.manual_seed(seed)
        tokens = 0
        for start in range(0, len(rows), 128):
            batch = rows[start:start + 128]
            for row, w in zip(run_batch(batch), batch, strict=True):
                tokens += length(row, w.max_new_tokens)
        return tokens
    return timed(run, device)


def timed(run, device):
    """The figures of run(seed). On a GPU its first call does not count: kernels compile, graphs are made."""
    if device.type == "cuda":
        run(1)
    synchronize(device)
    started = time.perf_counter()
    tokens = run(0)
    synchronize(device)
    return {"seconds": time.perf_counter() - started, "tokens": tokens}


# ---- one decoding step ---------------------------------------------------------------------------
def decode(args, model, tokenizer, device, dtype):
    """Time of a step at several batch sizes, and the bytes it must read, in relation to a copy's.

    It reads the weights once and the cache of every row.
    """
    bandwidth, _ = roofline(device, dtype)
    context = max(8, round(args.scale * 1024))
    weights = sum(w.nbytes for w in model.parameters())
    steps = []
    for B in (1, 8, 32, 128):
        sampler = Sampler(model, tokenizer, B)
        with torch.inference_mode():
            sampler.fit_cache([Request([5] * context, list(range(B)), max_new_tokens=64)])
            longest = sampler.cache.capacity - 1

            def sixteen(sampler=sampler, B=B, longest=longest):
                for _ in range(16):
                    sampler.decode_one(B, longest)

            times = []
            for _ in range(args.repeats + 1):
                sampler.slot_state.lengths[:] = context
                times.append(seconds_of(sixteen, device) / 16)
        times = sorted(times[1:])  # the first holds the eager step and the capture, and does not count
        seconds = statistics.median(times)
        read = weights + B * (context + 8) * KVCache.bytes_per_token(model.config, dtype)
        steps.append({"rows": B, "milliseconds": [round(1e3 * t, 3) for t in times],
                      "tokens_per_second": round(B / seconds),
                      "of_bandwidth": round(read / seconds / bandwidth, 3)})
        print(steps[-1], flush=True)
    print(f"a copy moves {bandwidth / 1e9:,.0f} GB/s on this machine")
    write(f"decode-{Path(args.model).name}-{name_of(dtype)}", args, context=context, steps=steps,
          copy_gigabytes_per_second=round(bandwidth / 1e9, 1))


# ---- the command ---------------------------------------------------------------------------------
def arguments():
    p = parser(__doc__, out=None, model="random")
    p.add_argument("--load", choices=["nano-vllm", "group", "chat", "decode"], default="group",
                   help="which requests")
    p.add_argument("--peers", choices=["generate", "none"], default="none")
    p.add_argument("--scale", type=number(float, 0, 1, open_low=True), default=1.0,
                   help="shrink counts and lengths by this, to try it out")
    p.add_argument("--repeats", type=positive, default=5, help="turns of each engine")
    return p.parse_args()


def main():
    args = arguments()
    shape = Path(args.model).name
    device, dtype = device_and_dtype(args.device, args.dtype)
    args.folder = folder_of(args.model, dtype)
    print(f"{shape}, {args.load}, {dtype}, {device}", flush=True)
    if args.load == "decode":
        model, tokenizer = load_model(args.folder, args)
        decode(args, model, tokenizer, device, dtype)
        return
    runs = {"ours": ours, "generate": generate} if args.peers == "generate" else {"ours": ours}
    compare(f"sampling-{args.load}-{shape}-{name_of(dtype)}", args, runs)


if __name__ == "__main__":
    command(main)
