"""Sampling against transformers' generate: the same prompts, rows, dtype and stops, in turns, in one process.

    python benchmarks/sampling.py --model SMOLLM2_FOLDER                       # 8 prompts x 16 samples, up to 256 new tokens
    python benchmarks/sampling.py --model mini --rows 2 --max-new-tokens 16 --repeats 1

Needs transformers (tests/requirements.txt). Prints tokens per second of each turn, medians with their spread, and the ratio;
writes benchmarks/results/sampling-*.json with the machine and the versions.
"""
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
import transformers

from cli import command, parser, positive
from common import conclude
from model import device_and_dtype, load
from sample import Params, Sampler

QUESTIONS = ("What is 17 * 23?", "Name three fruits and say how they taste.", "Write a short poem on rain.", "Explain gravity to a child.", "Who wrote Hamlet, and what is it about?",
             "Count from 1 to 40.", "What is a prime number? Give examples.", "Tell me a joke about cats.")


def main():
    p = parser(__doc__, out="")
    p.add_argument("--prompts", type=positive, default=8)
    p.add_argument("--rows", type=positive, default=16, help="samples of a prompt")
    p.add_argument("--max-new-tokens", type=positive, default=256)
    p.add_argument("--peer-batch", type=positive, default=128, help="rows of one call of generate")
    p.add_argument("--repeats", type=positive, default=5)
    args = p.parse_args()
    device, dtype = device_and_dtype(args.device, args.dtype)
    model, tokenizer = load(args.model, args.device, args.dtype)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(args.model if args.model != "mini" else Path(__file__).parent.parent / "mini", dtype=dtype).to(device).eval()
    prompts = [tokenizer.chat([{"role": "user", "content": q}]) for q in QUESTIONS[:args.prompts]]
    sampler = Sampler(model, tokenizer)
    print(f"{args.model}: {len(prompts)} prompts x {args.rows} samples, up to {args.max_new_tokens} new tokens, temperature 1, {dtype}, {device}", flush=True)

    def ours(seed):
        return sum(len(c.tokens) for group in sampler.generate(prompts, args.rows, Params(args.max_new_tokens), seed) for c in group)

    def peer(seed):
        torch.manual_seed(seed)
        rows, count = [p for p in prompts for _ in range(args.rows)], 0
        for start in range(0, len(rows), args.peer_batch):
            batch = rows[start:start + args.peer_batch]
            width = max(map(len, batch))
            ids = torch.tensor([[tokenizer.pad_id] * (width - len(r)) + r for r in batch], device=device)
            mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in batch], device=device)
            with torch.inference_mode():
                out = theirs.generate(input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=args.max_new_tokens,
                                      eos_token_id=tokenizer.stop_ids, pad_token_id=tokenizer.pad_id)[:, width:].tolist()
            for row in out:  # up to and with the first stop token
                count += next((i + 1 for i, t in enumerate(row) if t in tokenizer.stop_ids), len(row))
        return count

    turns = []
    for repeat in range(args.repeats):
        for name, run in (("ours", ours), ("transformers", peer)):
            started = time.time()
            tokens = run(repeat)
            seconds = time.time() - started
            turns.append({"who": name, "tokens": tokens, "seconds": round(seconds, 2), "tokens_per_second": round(tokens / seconds, 1)})
            print(turns[-1], flush=True)
    conclude(f"sampling-{Path(args.model).name}-{str(dtype)[6:]}", args, turns, "tokens_per_second", "transformers", better="higher")


if __name__ == "__main__":
    command(main)
