"""Sampling against other engines on the same requests, in turns; and one decoding step against the memory's bandwidth.

    python benchmarks/sampling.py --load nano-vllm --peers transformers,vllm      # 256 sequences, 100-1024 in, 100-1024 out
    python benchmarks/sampling.py --load group --peers transformers               # the method's own: 32 prompts x 64 samples, 512 out
    python benchmarks/sampling.py --load decode                                   # a step of 1, 8, 32 and 128 rows over 1,024 positions
    python benchmarks/sampling.py --load chat --model SMOLLM2_FOLDER --peers generate    # 8 x 16, natural stops: the one for a CPU
    python benchmarks/sampling.py --load group --model mini --scale 0.1 --repeats 1      # small, to see that it runs

Peers: `transformers` is its continuous batching, `generate` its plain generate (all rows of a batch to the slowest), `vllm` is not among
the requirements (pip install vllm). On a GPU ours takes 0.3 of the free memory for its cache when a peer runs beside it, transformers 0.4,
vllm 0.3 of all. Random weights unless --model says otherwise; stops are ignored but for chat.
"""
import random

from common import SHAPES, compare, load_model, model_folder, refuse_missing, roofline, seconds_of, synchronize, write

import time
from collections import deque

import torch

from cli import UserError, command, number, parser, positive
from model import device_and_dtype
from sample import KVCache, Params, Request, Sampler

QUESTIONS = ("What is 17 * 23?", "Name three fruits and say how they taste.", "Write a short poem on rain.", "Explain gravity to a child.", "Who wrote Hamlet, and what is it about?",
             "Count from 1 to 40.", "What is a prime number? Give examples.", "Tell me a joke about cats.")


def requests(args, tokenizer):
    """([(prompt, samples, new tokens)], temperature) of a load."""
    rng, scale = random.Random(0), lambda n: max(1, round(args.scale * n))
    ids = lambda n: [rng.randrange(10, tokenizer.size - 10) for _ in range(n)]
    if args.load == "nano-vllm":
        return [(ids(rng.randint(scale(100), scale(1024))), 1, rng.randint(scale(100), scale(1024))) for _ in range(scale(256))], 0.6
    if args.load == "group":
        return [(ids(scale(150)), scale(64), scale(512)) for _ in range(scale(32))], 1.0
    return [(tokenizer.chat([{"role": "user", "content": q}]), scale(16), scale(256)) for q in QUESTIONS], 1.0


def ours(model, tokenizer, work, temperature, alone):
    sampler = Sampler(model, tokenizer, share=0.6 if alone else 0.3)

    def run(seed):
        queue = deque(Request(prompt, list(range(n)), f"{i}", max_new_tokens=budget) for i, (prompt, n, budget) in enumerate(work))
        return sum(len(c.tokens) for _, _, c in sampler.stream(queue, Params(temperature=temperature), seed))
    return run


def transformers_(folder, device, dtype, tokenizer, work, temperature):
    import transformers
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    config = transformers.GenerationConfig(do_sample=True, temperature=temperature, top_k=0, top_p=1.0, max_new_tokens=max(b for *_, b in work),
                                           eos_token_id=tokenizer.stop_ids or -1, pad_token_id=0)
    manager = model.init_continuous_batching(generation_config=config, continuous_batching_config=transformers.ContinuousBatchingConfig(max_memory_percent=0.4))

    def run(seed):
        if not manager.is_running():  # not before: it takes its memory at once
            manager.start()
        wanted = [(prompt, budget) for prompt, n, budget in work for _ in range(n)]
        for prompt, budget in wanted:
            manager.add_request(prompt, max_new_tokens=budget)
        tokens = done = 0
        while done < len(wanted):
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                tokens, done = tokens + len(result.generated_tokens), done + 1
            elif result is None and not manager.is_running():
                raise UserError("transformers' continuous batching stopped before all requests were done")
        return tokens
    run.stop = lambda: manager.stop(block=True)  # its thread would keep the process alive
    return run


def generate(folder, device, dtype, tokenizer, work, temperature):
    import transformers
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()

    def run(seed):
        torch.manual_seed(seed)
        rows, tokens = [(prompt, budget) for prompt, n, budget in work for _ in range(n)], 0
        for start in range(0, len(rows), 128):
            batch = rows[start:start + 128]
            width = max(len(p) for p, _ in batch)
            ids = torch.tensor([[0] * (width - len(p)) + p for p, _ in batch], device=device)
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p, _ in batch], device=device)
            with torch.inference_mode():
                out = model.generate(input_ids=ids, attention_mask=mask, do_sample=True, temperature=temperature, top_k=0, top_p=1.0, max_new_tokens=max(b for _, b in batch),
                                     eos_token_id=tokenizer.stop_ids or None, pad_token_id=0)[:, width:].tolist()
            for row, (_, budget) in zip(out, batch):  # up to and with the first stop token
                tokens += next((i + 1 for i, t in enumerate(row[:budget]) if t in tokenizer.stop_ids), budget)
        return tokens
    return run


def vllm_(folder, device, dtype, tokenizer, work, temperature):
    from vllm import LLM, SamplingParams
    engine = LLM(folder, dtype=str(dtype)[6:], skip_tokenizer_init=True, max_model_len=max(len(p) + b for p, _, b in work), gpu_memory_utilization=0.3)

    def run(seed):
        params = [SamplingParams(n=n, temperature=temperature, max_tokens=budget, ignore_eos=not tokenizer.stop_ids, stop_token_ids=tokenizer.stop_ids, detokenize=False)
                  for _, n, budget in work]
        out = engine.generate([{"prompt_token_ids": prompt} for prompt, *_ in work], params, use_tqdm=False)
        return sum(len(c.token_ids) for request in out for c in request.outputs)
    return run


PEERS = {"transformers": ("transformers", transformers_), "generate": ("transformers", generate), "vllm": ("vllm", vllm_)}


def decode(args, model, tokenizer, device, dtype):
    """Time of a step at several batch sizes, and the bytes it must read (weights once, the cache of every row) in relation to a copy's."""
    bandwidth, _ = roofline(device, dtype)
    context, rows = max(8, round(args.scale * 1024)), []
    weights = sum(w.nbytes for w in model.parameters())
    for B in (1, 8, 32, 128):
        sampler = Sampler(model, tokenizer, B)
        sampler.params, sampler.rows, sampler.fitted, sampler.seed = Params(), [], False, 0
        with torch.inference_mode():
            sampler._make_cache(deque([Request([5] * context, list(range(B)), max_new_tokens=64)]))
            times = []
            for repeat in range(args.repeats + 1):  # the first holds the eager step and the capture, and does not count
                sampler.lengths[:] = context
                times.append(seconds_of(lambda: [sampler._run(B, sampler.cache.capacity - 1) for _ in range(16)], device) / 16)
        times = sorted(times[1:])
        seconds, read = times[args.repeats // 2], weights + B * (context + 8) * KVCache.bytes_per_token(model.config, dtype)
        rows.append({"rows": B, "milliseconds": round(1e3 * seconds, 3), "lowest": round(1e3 * times[0], 3), "highest": round(1e3 * times[-1], 3), "tokens_per_second": round(B / seconds),
                     "gigabytes_per_second": round(read / seconds / 1e9, 1), "of_bandwidth": round(read / seconds / bandwidth, 3)})
        print(rows[-1], flush=True)
    print(f"a copy moves {bandwidth / 1e9:,.0f} GB/s on this machine")
    write(f"decode-{args.shape}-{str(dtype)[6:]}", args, copy_gigabytes_per_second=round(bandwidth / 1e9, 1), context=context, steps=rows)


def main():
    p = parser(__doc__, out="", model="qwen2.5-0.5b")
    p.add_argument("--load", choices=["nano-vllm", "group", "chat", "decode"], default="group", help="which requests")
    p.add_argument("--peers", default="none", help=f"separated by commas: {', '.join(PEERS)}, or none")
    p.add_argument("--scale", type=number(float, 0, 1, open_low=True), default=1.0, help="shrink counts and lengths by this, to try it out")
    p.add_argument("--repeats", type=positive, default=5, help="turns of each engine")
    args = p.parse_args()
    peers = [] if args.peers == "none" else args.peers.split(",")
    for peer in peers:
        if peer not in PEERS:
            raise UserError(f"--peers {peer}: give {', '.join(PEERS)} or none")
        refuse_missing(PEERS[peer][0])
    device, dtype = device_and_dtype(args.device, args.dtype)
    args.shape = args.model if args.model in SHAPES else args.model.rstrip("/").rpartition("/")[2]
    folder = model_folder(args.model, dtype)
    model, tokenizer = load_model(folder, args)
    print(f"{args.shape}, {args.load}, {dtype}, {device}", flush=True)
    if args.load == "decode":
        return decode(args, model, tokenizer, device, dtype)
    work, temperature = requests(args, tokenizer)
    if args.load != "chat":
        tokenizer.stop_ids = []
    engines = {"ours": ours(model, tokenizer, work, temperature, alone=not peers)}
    engines |= {peer: PEERS[peer][1](folder, device, dtype, tokenizer, work, temperature) for peer in peers}

    def timed(engine):
        def turn(seed):
            synchronize(device)
            started = time.perf_counter()
            tokens = engine(seed)
            seconds = time.perf_counter() - started
            return {"tokens": tokens, "seconds": round(seconds, 2), "tokens_per_second": round(tokens / seconds, 1)}
        return turn
    try:
        for name, engine in engines.items() if device.type == "cuda" else ():  # a turn that does not count: kernels compile, graphs are captured
            print(f"warming up {name}: {engine(0):,} tokens", flush=True)
        compare(f"sampling-{args.load}-{args.shape}-{str(dtype)[6:]}", args, {name: timed(engine) for name, engine in engines.items()}, "tokens_per_second")
    finally:
        for engine in engines.values():
            getattr(engine, "stop", lambda: None)()


if __name__ == "__main__":
    command(main)
