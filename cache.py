"""The sampler's cache: slots of keys and values, how many and how long, and the CUDA graphs that point there.

    cache = KVCache(config, slots=128, capacity=4608, device=device, dtype=dtype)
    model(prompts, attend=cache.prefill([0, 1]))                # the keys and values of two prompts
    cache.copy([Move(0, 2, length=150), Move(0, 3, length=150)])  # one of them forked to two more samples
    model(tokens[:, None], lengths[:, None], attend=cache.decode(lengths, longest))     # one more in each

`model.py` knows nothing of it: `prefill` and `decode` return an Attend, which writes the cache and then
attends. When a row ends, the sampler copies the last live row into its slot (`Sampler.close`). What the host
tells a GPU is sent without waiting for it, and all that changes between two steps goes together.

Left out: pages (a slot is one stretch of memory), quantised caches, moving slots to the host.
"""
import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import decode_attention
from model import Attend, Config, causal
from run.processes import in_batches


# ---- keys and values -----------------------------------------------------------------------------
PREFILL_TOKENS = 8192  # of prompts that are run together, or of slots that are copied together


def sent(numbers: list, device: torch.device) -> Tensor:
    """A list of integers as a tensor on the device, without waiting until the device has caught up."""
    return torch.tensor(numbers, dtype=torch.long).to(device, non_blocking=True)


class Move(NamedTuple):
    """An order to copy the first `length` positions of the slot `source` to `target`."""
    source: int
    target: int
    length: int


class KVCache:
    """Keys and values of every layer in slots of fixed capacity: k, v (layers, slots, K, capacity, D).

    A token of Qwen2.5-1.5B takes 28 KiB in bfloat16 (2 x 28 layers x 2 heads x 128 x 2 bytes): 128 slots of
    4,608 tokens are 17 GB.
    """

    def __init__(self, config: Config, slots: int, capacity: int, device: torch.device, dtype: torch.dtype):
        shape = (config.num_hidden_layers, slots, config.num_key_value_heads, capacity, config.head_dim)
        # Zeros, not empty: a masked position gets weight 0, and 0 * NaN would be NaN.
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.slots = slots
        self.capacity = capacity

    @property
    def nbytes(self) -> int:
        return 2 * self.k.nbytes

    @staticmethod
    def bytes_per_token(config: Config, dtype: torch.dtype) -> int:
        return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize

    def prefill(self, slot_ids: list[int]) -> Attend:
        """An Attend for prompts padded on the right, one to each slot of the list.

        What lands beyond a prompt's length is overwritten by decoding before anything reads it.
        """
        slots = sent(slot_ids, self.k.device)

        def attend(layer, q, k, v):
            width = k.shape[1]
            self.k[layer, slots, :, :width] = k.transpose(1, 2)  # (B, K, T, D)
            self.v[layer, slots, :, :width] = v.transpose(1, 2)
            return causal(layer, q, k, v)
        return attend

    def decode(self, lengths: Tensor, longest: int) -> Attend:
        """An Attend for one new token in each of the first len(lengths) slots.

        It lands at position lengths[slot] <= longest.
        """
        B = len(lengths)

        def attend(layer, q, k, v):
            past_k = self.k[layer, :B, :, :longest + 1]  # (B, K, S, D)
            past_v = self.v[layer, :B, :, :longest + 1]
            o = decode_attention(q[:, 0], k[:, 0], v[:, 0], past_k, past_v, lengths)  # (B, H, D)
            return o[:, None]  # (B, 1, H, D)
        return attend

    def copy(self, moves: list[Move]) -> None:
        """Copy slots. None may be both source and target. Positions past `length` may be copied too."""
        for batch in in_batches(moves, lambda move: move.length, PREFILL_TOKENS, padded=True):
            sources = sent([move.source for move in batch], self.k.device)
            targets = sent([move.target for move in batch], self.k.device)
            longest = batch[-1].length
            for cache in (self.k, self.v):
                cache[:, targets, :, :longest] = cache[:, sources, :, :longest]  # (layers, n, K, longest, D)


class SlotState:
    """What a decoding step knows of each slot beside its keys and values.

    CUDA graphs hold its addresses, so it is only ever written in place.
    """

    def __init__(self, slots: int, device: torch.device):
        self.of_slots = torch.zeros(3, slots, dtype=torch.long, device=device)  # these move together:
        self.tokens = self.of_slots[0]  # what each feeds next
        self.lengths = self.of_slots[1]  # positions in its cache
        self.noise_keys = self.of_slots[2]  # names its random numbers
        self.logprobs = torch.zeros(slots, device=device)  # of `tokens`, once they were sampled
        self.seen: Tensor | None = None  # (slots, vocab) bool: the ids it has met, for a repetition penalty

    def track_seen(self, vocab: int) -> None:
        """Begin to keep `seen`, which takes a byte a slot and token."""
        if self.seen is None:
            self.seen = torch.zeros(len(self.tokens), vocab, dtype=torch.bool, device=self.tokens.device)

    def fill(self, first: int, prompts: list[list[int]], noise_keys: list[int]) -> None:
        """Start samples of these prompts in the slots first, first + 1, ..."""
        # Prefill leaves out the last prompt token: the first decoding step feeds it, so tokens are chosen in
        # one place only.
        device = self.of_slots.device
        last_tokens = [prompt[-1] for prompt in prompts]
        lengths = [len(prompt) - 1 for prompt in prompts]
        end = first + len(prompts)
        self.of_slots[:, first:end] = sent([last_tokens, lengths, noise_keys], device)
        if self.seen is not None:
            self.seen[first:end] = False
            slots = [slot for slot, prompt in enumerate(prompts, first) for _ in prompt]
            ids = [token for prompt in prompts for token in prompt]
            self.seen[sent(slots, device), sent(ids, device)] = True

    def move(self, moves: list[Move]) -> None:
        """Move rows, as `KVCache.copy` does, but for their log-probabilities: the host has read those."""
        sources = sent([move.source for move in moves], self.of_slots.device)
        targets = sent([move.target for move in moves], self.of_slots.device)
        self.of_slots[:, targets] = self.of_slots[:, sources]
        if self.seen is not None:
            self.seen[targets] = self.seen[sources]


# ---- how long a slot is, how many there are, how many a step runs --------------------------------
MOST_SLOTS = {"cpu": 256, "cuda": 512}  # more rows no longer make a step cheaper per token
# A slot has a multiple of this many positions: a prompt a little longer must not cost all graphs.
GRAIN = {"cpu": 64, "cuda": 256}


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def slot_capacity(needed: int, current: int | None, refit: bool, context: int, grain: int) -> int:
    """How many positions a slot gets, if the longest waiting request needs `needed` and slots have `current`.

    `refit`: longer requests came while others ran. More will, so slots double rather than grow by a little
    each time. A cache whose slots are long enough, and at most four times too long, stays as it is.

    slot_capacity(100, None, False, 2048, 64)  ->  128
    slot_capacity(100, 256, False, 2048, 64)   ->  256
    slot_capacity(300, 256, True, 2048, 64)    ->  512
    """
    if refit and current is not None and current < needed:
        needed = max(needed, min(2 * current, context))
    needed = round_up(needed, grain)
    if current is not None and needed <= current <= 4 * needed:
        return current
    return needed


def slot_count(waiting: int, current: int, wanted: int, fitting: int, most: int) -> int:
    """How many slots to have, if `waiting` samples wait and `fitting` slots fit in memory.

    `wanted` is what the caller asks for; 0 takes what fits, up to `most`. The result may exceed `fitting`:
    the caller checks.

    slot_count(waiting=10, current=0, wanted=0, fitting=50, most=128)  ->  10
    slot_count(waiting=999, current=0, wanted=0, fitting=50, most=128)  ->  50
    """
    wanted = wanted or min(most, max(fitting, 1))
    return min(wanted, max(waiting, current))


def bucket(live: int) -> int:
    """How many slots a step with `live` rows runs under CUDA graphs: few numbers, as each costs a graph.

    bucket(5) -> 8      bucket(20) -> 32      bucket(130) -> 192
    """
    if live <= 16:
        return 1 << (live - 1).bit_length()  # 1, 2, 4, 8, 16
    return round_up(live, 16 if live <= 128 else 64)


# ---- graphs --------------------------------------------------------------------------------------
class Graphs:
    """CUDA graphs of one decoding step, one for each kind of step."""

    def __init__(self):
        self.replays: dict[Any, Callable | None] = {}
        # Their memory. One for all: they never run at the same time, and the first is usually the largest.
        self.pool = None

    def run(self, kind: Any, step: Callable[[], None]) -> None:
        """Run a step. The first of a kind runs as it is, which compiles its kernels.

        The second is captured, and from then on replayed.
        """
        if kind not in self.replays:
            self.replays[kind] = None
            step()
            return
        if self.replays[kind] is None:
            self.replays[kind] = self.capture(step)
        self.replays[kind]()

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        gc.collect()
        gc.disable()  # a capture fails if anything, such as another graph, is freed during it
        try:
            with torch.cuda.graph(graph, pool=self.pool):
                step()
        finally:
            gc.enable()
        return graph.replay
