"""Which tiles of the vocabulary's probabilities a backward pass could skip, as Cut Cross-Entropy does.

    python benchmarks/tiles.py --model FOLDER --data rows.jsonl     # rows with "question", of GSM8K say

A tile of 128 tokens and 256 entries could be skipped if all its probabilities are under 2^-12, the precision
of the sums in bfloat16. Counted with the vocabulary in its own order, and sorted by the mean logit.
"""
from common import load_model, short_name, write  # first of ours: it sets the path

import torch

from cli import UserError, command, parser, positive
from files import read_jsonl

ROWS, COLS = 128, 256
PRECISION = 2**-12


def hidden_states(model, tokenizer, args):
    """(N, C), of the last tokens of each question."""
    found = []
    for _, row in read_jsonl(args.data, ("question",)):
        ids = tokenizer.chat([{"role": "user", "content": row["question"]}])
        found.append(model(torch.tensor([ids], device=model.device))[0, -150:])
        if sum(map(len, found)) >= args.tokens:
            return torch.cat(found)[:args.tokens]
    raise UserError(f"--data {args.data}: fewer than {args.tokens} tokens")


def live_tiles(p):
    n, v = len(p) // ROWS, p.shape[1] // COLS
    tiles = p[:n * ROWS, :v * COLS].view(n, ROWS, v, COLS)
    return (tiles.amax((1, 3)) >= PRECISION).float().mean().item()


def main():
    p = parser(__doc__, out=None)
    p.add_argument("--data", required=True)
    p.add_argument("--tokens", type=positive, default=2048)
    args = p.parse_args()
    model, tokenizer = load_model(args.model, args)
    with torch.inference_mode():
        logits = model.logits(hidden_states(model, tokenizer, args))
        order = logits.mean(0).argsort(descending=True)
        p = logits.softmax(-1)
    figures = {
        "entries_over_precision": round((p >= PRECISION).float().mean().item(), 5),
        "live_tiles": round(live_tiles(p), 3),
        "live_tiles_sorted": round(live_tiles(p[:, order]), 3),
    }
    print(figures)
    write(f"tiles-{short_name(args.model)}", args, **figures)


if __name__ == "__main__":
    command(main)
