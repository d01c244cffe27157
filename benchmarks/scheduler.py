"""What the sampler's host does between steps: rows in use, prompts run, slots copied. No model computes.

    python benchmarks/scheduler.py --samples samples.jsonl --stretch 8       # the lengths of a sample.py run
    python benchmarks/scheduler.py --groups 20                               # made-up ones

The sampler is the real one as it runs on a GPU (8 tokens between two looks of the host), with a model that
ends each row where the file's attempt of that question ended, --stretch times as long. `operations` are those
of PyTorch that the host starts between steps, of which each is a kernel or a copy on a GPU. `steps_in_all`
counts a prefill as PREFILL_STEPS of them: about what launching its kernels takes, by arithmetic.
"""
import json
import random
import time
from collections import Counter, deque
from types import SimpleNamespace

from common import machine, write  # first of ours: it sets the path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sample
from cache import in_batches
from cli import command, natural, number, parser, positive
from sample import Params, Request, Sampler
from tokenizer import Tokenizer

STOP = 1
PREFILL_STEPS = 10


class Operations(TorchDispatchMode):
    """Counts PyTorch's operations that start work on a device, and the positions that slots copied."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and not name.startswith(("detach", "lift")):
            self.counts[name] += 1
        return out


class StubModel:
    device = torch.device("cpu")
    dtype = torch.float32
    config = SimpleNamespace(
        num_hidden_layers=1, num_key_value_heads=1, head_dim=1, max_position_embeddings=1 << 20)

    def __init__(self, counts):
        self.counts = counts

    def __call__(self, tokens, attend):
        self.counts["prefills"] += 1
        self.counts["prefill_positions"] += tokens.numel()


class StubSampler(Sampler):
    """Ends each row at its planned length, and counts what its host does."""

    def __init__(self, slots, planned, free_to_prefill):
        self.counts = Counter()
        super().__init__(StubModel(self.counts), SimpleNamespace(stop_ids=[STOP]), slots)
        self.tokens_per_sync = sample.TOKENS_PER_SYNC["cuda"]
        self.free_to_prefill = free_to_prefill
        self.planned = planned
        self.operations = Operations()

    def schedule(self, queue):
        started = time.perf_counter()
        with self.operations:
            super().schedule(queue)
        self.counts["host_seconds"] += time.perf_counter() - started
        self.counts["looks"] += 1
        self.counts["rows"] += len(self.live)

    def postprocess(self):
        started = time.perf_counter()
        with self.operations:
            done = super().postprocess()
        self.counts["host_seconds"] += time.perf_counter() - started
        return done

    def fit_cache(self, queue, growing=False):
        super().fit_cache(queue, growing)
        copy = type(self.cache).copy

        def counted(moves):
            self.counts["moved_slots"] += len(moves)
            batches = in_batches(moves, lambda move: move.length)  # as `copy` makes them
            self.counts["moved_positions"] += sum(len(batch) * batch[-1].length for batch in batches)
            copy(self.cache, moves)
        self.cache.copy = counted

    def feed_and_choose(self, B, longest):
        state = self.slot_state
        ends = [len(s.request.prompt) - 2 + self.planned[s.request.payload, s.index] for s in self.live]
        state.tokens[:B] = (state.lengths[:B] == torch.tensor(ends)).long()  # 1 is the stop token
        state.lengths[:B] += 1


# ---- the load --------------------------------------------------------------------------------------
def groups_of(args):
    """[(length of a prompt, [lengths of its samples])]"""
    if not args.samples:
        rng = random.Random(0)
        return [(rng.randint(80, 200), [max(2, round(rng.lognormvariate(4.5, 0.6))) for _ in range(16)])
                for _ in range(args.groups)]
    tokenizer = Tokenizer("mini")
    groups = {}
    with open(args.samples, encoding="utf-8") as f:
        for line in f:
            row = json.loads(line)
            prompt = len(tokenizer.encode(row["question"]))
            lengths = groups.setdefault((row["id"], row["style"]), (prompt, []))[1]
            lengths.append(len(tokenizer.encode(row["solution"])) + 1)
    return list(groups.values())[:args.groups or None]


def arguments():
    p = parser(__doc__, out=None, model=None)
    p.add_argument("--samples", default=None, help="a samples.jsonl; without it, lengths are made up")
    p.add_argument("--groups", type=natural, default=0, help="how many questions of it (0: all)")
    p.add_argument("--stretch", type=number(float, 0, open_low=True), default=1.0,
                   help="multiply all lengths by this")
    p.add_argument("--slots", type=positive, default=256)
    args = p.parse_args()
    if not args.samples:
        args.groups = args.groups or 200
    return args


def run(groups, slots, free_to_prefill):
    """One row of the table."""
    queue, planned = deque(), {}
    for i, (prompt, lengths) in enumerate(groups):
        queue.append(Request([0] * prompt, list(range(len(lengths))), f"{i}", payload=i,
                             max_new_tokens=1 << 19))
        planned.update({(i, index): n for index, n in enumerate(lengths)})
    longest = max(prompt + max(lengths) for prompt, lengths in groups)
    for request in queue:
        request.max_new_tokens = longest
    sampler = StubSampler(slots, planned, free_to_prefill)
    tokens = sum(len(c.tokens) for _, _, c in sampler.stream(queue, Params()))
    assert tokens == sum(planned.values())
    counts = sampler.counts
    looks = counts["looks"]
    return {
        "free_to_prefill": free_to_prefill,
        "rows_in_use": round(counts["rows"] / looks / slots, 3),
        "steps": looks * sampler.tokens_per_sync,
        "steps_in_all": looks * sampler.tokens_per_sync + PREFILL_STEPS * counts["prefills"],
        "tokens": tokens,
        "prefills_a_look": round(counts["prefills"] / looks, 3),
        "prefill_positions_a_token": round(counts["prefill_positions"] / tokens, 3),
        "moved_slots_a_look": round(counts["moved_slots"] / looks, 2),
        "moved_positions_a_token": round(counts["moved_positions"] / tokens, 3),
        "operations_a_look": round(sum(sampler.operations.counts.values()) / looks, 1),
        "host_milliseconds_a_look": round(1e3 * counts["host_seconds"] / looks, 2),
    }


def main():
    args = arguments()
    groups = groups_of(args)
    groups = [(max(2, round(args.stretch * prompt)), [max(2, round(args.stretch * n)) for n in lengths])
              for prompt, lengths in groups]
    run(groups[:20], args.slots, 0.0)  # does not count: torch sets itself up
    turns = []
    for share in (0.0, 1 / 16, 1 / 8, 1 / 4):
        turns.append(run(groups, args.slots, share))
        print(turns[-1], flush=True)
    print(machine())
    write(f"scheduler-{args.stretch:g}", args, turns=turns)


if __name__ == "__main__":
    command(main)
