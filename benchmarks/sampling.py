"""Sampling against other engines on the same requests, and one decoding step against the memory's bandwidth.

    python benchmarks/sampling.py --load nano-vllm --peers transformers,vllm    # 256 rows of 100-1024 tokens
    python benchmarks/sampling.py --load group --peers transformers             # the method's own: 32 x 64
    python benchmarks/sampling.py --load decode                                 # a step of 1 to 128 rows
    python benchmarks/sampling.py --load chat --model FOLDER --peers generate   # 8 x 16 rows: for a CPU
    python benchmarks/sampling.py --load group --model mini --scale 0.1 --repeats 1      # to see that it runs

Each engine is a process of its own, so that its peak memory is its own too. Peers: `transformers` is its
continuous batching, `generate` its plain generate (all rows of a batch to the slowest); `vllm` and `openvino`
(GenAI) are not among the requirements. OpenVINO reads a folder that optimum-cli exported: --openvino FOLDER.
On a GPU ours takes 0.3 of the free memory for its cache when a peer runs beside it, transformers 0.4, vllm
0.3 of all. Random weights unless --model says otherwise; stops are ignored but for chat.
"""
import multiprocessing
import os
import random
import resource
import time
from collections import deque
from dataclasses import dataclass
from types import SimpleNamespace

from common import (  # first of ours: it sets the path
    compare, folder_of, load_model, name_of, refuse_missing, roofline, seconds_of, short_name, synchronize,
    torchs_own_settings, write,
)

import torch

from checkpoint import device_and_dtype, find_folder
from cli import UserError, command, number, parser, positive
from sample import KVCache, Params, Request, Sampler
from tokenizer import Tokenizer

QUESTIONS = (
    "What is 17 * 23?",
    "Name three fruits and say how they taste.",
    "Write a short poem on rain.",
    "Explain gravity to a child.",
    "Who wrote Hamlet, and what is it about?",
    "Count from 1 to 40.",
    "What is a prime number? Give examples.",
    "Tell me a joke about cats.",
)


@dataclass
class Work:
    """Some samples of one prompt."""
    prompt: list[int]
    samples: int
    budget: int


def requests(args, tokenizer):
    """([Work], temperature) of a load."""
    rng = random.Random(0)

    def scaled(n):
        return max(1, round(args.scale * n))

    def prompt(length):
        return [rng.randrange(10, tokenizer.size - 10) for _ in range(length)]

    if args.load == "nano-vllm":
        work = []
        for _ in range(scaled(256)):
            ids = prompt(rng.randint(scaled(100), scaled(1024)))
            work.append(Work(ids, 1, rng.randint(scaled(100), scaled(1024))))
        return work, 0.6
    if args.load == "group":
        return [Work(prompt(scaled(150)), scaled(64), scaled(512)) for _ in range(scaled(32))], 1.0
    chats = [tokenizer.chat([{"role": "user", "content": question}]) for question in QUESTIONS]
    return [Work(ids, scaled(16), scaled(256)) for ids in chats], 1.0


# ---- engines: each returns a function that takes a seed, does the work and returns the tokens it made ---
def ours(args, folder, device, dtype, tokenizer, work, temperature):
    model, _ = load_model(folder, args)
    sampler = Sampler(model, tokenizer, cache_fraction=0.3 if args.peers else 0.6)

    def run(seed):
        queue = deque()
        for i, w in enumerate(work):
            queue.append(Request(w.prompt, list(range(w.samples)), f"{i}", max_new_tokens=w.budget))
        return sum(len(c.tokens) for _, _, c in sampler.stream(queue, Params(temperature=temperature), seed))
    return run


def continuous_batching(args, folder, device, dtype, tokenizer, work, temperature):
    import transformers
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    config = transformers.GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max(w.budget for w in work),
        eos_token_id=tokenizer.stop_ids or -1,
        pad_token_id=0,
    )
    memory = transformers.ContinuousBatchingConfig(max_memory_percent=0.4)
    manager = model.init_continuous_batching(generation_config=config, continuous_batching_config=memory)

    def run(seed):
        if not manager.is_running():  # not before: it takes its memory at once
            manager.start()
        waiting = 0
        for w in work:
            for _ in range(w.samples):
                manager.add_request(w.prompt, max_new_tokens=w.budget)
                waiting += 1
        tokens = 0
        while waiting:
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                tokens += len(result.generated_tokens)
                waiting -= 1
            elif result is None and not manager.is_running():
                raise UserError("transformers' continuous batching stopped before all requests were done")
        return tokens
    return run


def generate(args, folder, device, dtype, tokenizer, work, temperature):
    import transformers
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    rows = [w for w in work for _ in range(w.samples)]

    def run_batch(batch):
        width = max(len(w.prompt) for w in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        real = torch.zeros_like(ids)
        for i, w in enumerate(batch):  # padded on the left
            ids[i, width - len(w.prompt):] = torch.tensor(w.prompt)
            real[i, width - len(w.prompt):] = 1
        with torch.inference_mode():
            return model.generate(
                input_ids=ids.to(device),
                attention_mask=real.to(device),
                do_sample=True,
                temperature=temperature,
                top_k=0,
                top_p=1.0,
                max_new_tokens=max(w.budget for w in batch),
                eos_token_id=tokenizer.stop_ids or None,
                pad_token_id=0,
            )[:, width:].tolist()

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
                tokens += length(row, w.budget)
        return tokens
    return run


def vllm(args, folder, device, dtype, tokenizer, work, temperature):
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # its memory is to be this process's
    from vllm import LLM, SamplingParams
    longest = max(len(w.prompt) + w.budget for w in work)
    engine = LLM(folder, dtype=name_of(dtype), skip_tokenizer_init=True, max_model_len=longest,
                 gpu_memory_utilization=0.3)

    def run(seed):
        engine.reset_prefix_cache()  # else a turn finds the prompts of the one before
        params = []
        for w in work:
            params.append(SamplingParams(
                n=w.samples,
                temperature=temperature,
                max_tokens=w.budget,
                ignore_eos=not tokenizer.stop_ids,
                stop_token_ids=tokenizer.stop_ids,
                detokenize=False,
            ))
        out = engine.generate([{"prompt_token_ids": w.prompt} for w in work], params, use_tqdm=False)
        return sum(len(c.token_ids) for request in out for c in request.outputs)
    return run


def openvino(args, folder, device, dtype, tokenizer, work, temperature):
    import numpy
    import openvino_genai
    from openvino import Tensor
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.max_num_seqs = 256
    scheduler.cache_size = 4  # GB
    scheduler.enable_prefix_caching = False
    precision = {"INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[name_of(dtype)],
                 "INFERENCE_NUM_THREADS": torch.get_num_threads(), "KV_CACHE_PRECISION": "f32"}
    engine = openvino_genai.ContinuousBatchingPipeline(args.openvino, scheduler, "CPU", precision)

    def run(seed):
        ids, configs = [], []
        for i, w in enumerate(work):
            config = openvino_genai.GenerationConfig()
            config.num_return_sequences = w.samples
            config.do_sample = True
            config.temperature = temperature
            config.max_new_tokens = w.budget
            config.ignore_eos = not tokenizer.stop_ids
            config.stop_token_ids = set(tokenizer.stop_ids)
            config.rng_seed = 1000 * seed + i
            ids.append(Tensor(numpy.array([w.prompt])))
            configs.append(config)
        out = engine.generate(ids, configs)
        return sum(len(tokens) for result in out for tokens in result.m_generation_ids)
    return run


PEERS = {  # name: (package, engine)
    "transformers": ("transformers", continuous_batching),
    "generate": ("transformers", generate),
    "vllm": ("vllm", vllm),
    "openvino": ("openvino_genai", openvino),
}


def serve(name, args, folder, pipe):
    """An engine's process: a turn for every seed that comes."""
    device, dtype = device_and_dtype(args.device, args.dtype)
    tokenizer = Tokenizer(find_folder(folder))
    work, temperature = requests(args, tokenizer)
    if args.load != "chat":
        tokenizer.stop_ids = []
    engine = ours
    if name != "ours":
        engine = PEERS[name][1]
        torchs_own_settings()
    run = engine(args, folder, device, dtype, tokenizer, work, temperature)
    while True:
        seed = pipe.recv()
        started = time.perf_counter()
        tokens = run(seed)
        synchronize(device)
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        if device.type == "cuda":
            peak = torch.cuda.max_memory_reserved() / 2**30
        pipe.send({"tokens": tokens, "seconds": round(seconds, 2),
                   "tokens_per_second": round(tokens / seconds, 1), "peak_gib": round(peak, 2)})


def turns_of(name, args, folder):
    """A function that has one turn of an engine done, in a process that stays."""
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    args = SimpleNamespace(**vars(args))  # argparse's own cannot be sent
    process = context.Process(target=serve, args=(name, args, folder, other), daemon=name != "vllm")
    process.start()
    other.close()

    def turn(seed):
        try:
            pipe.send(seed)
            return pipe.recv()
        except (EOFError, ConnectionError) as e:
            raise UserError(f"the process of {name} has ended; its last words are above") from e
    turn.end = process.kill
    return turn


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
        seconds = times[args.repeats // 2]
        read = weights + B * (context + 8) * KVCache.bytes_per_token(model.config, dtype)
        steps.append({
            "rows": B,
            "milliseconds": round(1e3 * seconds, 3),
            "lowest": round(1e3 * times[0], 3),
            "highest": round(1e3 * times[-1], 3),
            "tokens_per_second": round(B / seconds),
            "gigabytes_per_second": round(read / seconds / 1e9, 1),
            "of_bandwidth": round(read / seconds / bandwidth, 3),
        })
        print(steps[-1], flush=True)
    print(f"a copy moves {bandwidth / 1e9:,.0f} GB/s on this machine")
    write(f"decode-{args.shape}-{name_of(dtype)}", args, copy_gigabytes_per_second=round(bandwidth / 1e9, 1),
          context=context, steps=steps)


# ---- the command ---------------------------------------------------------------------------------
def arguments():
    p = parser(__doc__, out=None, model="qwen2.5-0.5b")
    p.add_argument("--load", choices=["nano-vllm", "group", "chat", "decode"], default="group",
                   help="which requests")
    p.add_argument("--peers", default="none", help=f"separated by commas: {', '.join(PEERS)}, or none")
    p.add_argument("--openvino", default=None, help="the folder that OpenVINO reads")
    p.add_argument("--scale", type=number(float, 0, 1, open_low=True), default=1.0,
                   help="shrink counts and lengths by this, to try it out")
    p.add_argument("--repeats", type=positive, default=5, help="turns of each engine")
    args = p.parse_args()
    args.peers = [] if args.peers == "none" else args.peers.split(",")
    for peer in args.peers:
        if peer not in PEERS:
            raise UserError(f"--peers {peer}: give {', '.join(PEERS)} or none")
        refuse_missing(PEERS[peer][0])
    if "openvino" in args.peers and not args.openvino:
        raise UserError("--peers openvino: give the folder that optimum-cli exported as --openvino")
    args.shape = short_name(args.model)
    return args


def main():
    args = arguments()
    device, dtype = device_and_dtype(args.device, args.dtype)
    folder = folder_of(args.model, dtype)
    print(f"{args.shape}, {args.load}, {dtype}, {device}", flush=True)
    if args.load == "decode":
        model, tokenizer = load_model(folder, args)
        decode(args, model, tokenizer, device, dtype)
        return
    runs = {name: turns_of(name, args, folder) for name in ("ours", *args.peers)}
    try:
        if device.type == "cuda":  # a turn that does not count: kernels compile, graphs are captured
            for name, turn in runs.items():
                print(f"warming up {name}: {turn(0)}", flush=True)
        compare(f"sampling-{args.load}-{args.shape}-{name_of(dtype)}", args, runs, "tokens_per_second")
    finally:
        for turn in runs.values():
            turn.end()


if __name__ == "__main__":
    command(main)
