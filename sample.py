"""Generate text: a key/value cache of slots, rows refilled as they finish. The command writes attempts and reflections.

    python sample.py                                            # the miniature, 200 small countdown questions
    python sample.py --model Qwen/Qwen2.5-1.5B-Instruct --task countdown-3 --questions 4000 --n 16 --reflections 4
    python sample.py --prompt "What is 2 + 3?"                  # try a model by hand

Four ideas carry the speed. A group's prompt is run once and its cache is forked to every sample. A row that ends gives its
slot to the next request at once. Live rows are kept in the first slots, so that a step is one dense batch. On a GPU a step, the
choice of the token included, is one CUDA graph, and the host looks at what was chosen every eighth token only.

One idea carries the trust: a token is drawn with one uniform number that depends on (seed, request, index, position) only.
So a completion is the same in whatever batch, slot, order or process it was made, as far as a matrix product of another
shape rounds the same (a near-tie can fall the other way).

Left out: paged cache, speculative decoding, quantised weights, prefixes shared between different prompts.
"""
import hashlib
import json
import math
import os
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from tqdm import tqdm

import tasks
from cli import UserError, command, natural, number, parser, positive, read_jsonl, run_record, to_json, write_whole
from kernels import decode_attention, next_tokens, uniform, uses_triton
from model import causal, load


@dataclass(frozen=True)
class Params:
    """How tokens are chosen. The cuts come in vLLM's order: repetition penalty, temperature, min-p, top-k, top-p."""
    max_new_tokens: int = 512
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # of tokens in the prompt or the output so far (Keskar et al. 2019)


@dataclass
class Request:
    """`indices` samples of one prompt. `key` names the question for the randomness; None takes the prompt itself."""
    prompt: list[int]
    indices: list[int]
    key: str | None = None
    max_new_tokens: int | None = None  # None takes the Params'
    tag: Any = None  # the caller's own, untouched
    started: int = 0  # how many of the indices have been given a slot


@dataclass
class Completion:
    """`tokens` and `logprobs` of a sample; a finished one ends with its stop token. The log-probabilities are the model's at
    the sampling temperature, before any cut or penalty: what a trainer computes again."""
    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: str = ""  # "stop" or "length"


@dataclass
class Row:
    """A sample in progress. Row i of `Sampler.rows` lives in slot i of the cache."""
    request: Request
    index: int
    budget: int
    completion: Completion


class KVCache:
    """Keys and values of every layer in slots of fixed capacity: k, v (layers, slots, K, capacity, D).

    A token of Qwen2.5-1.5B takes 28 KiB in bfloat16 (2 x 28 layers x 2 heads x 128 x 2 bytes): 128 slots of 4,608 tokens are 17 GB.
    """

    def __init__(self, config, slots, capacity, device, dtype):
        shape = (config.num_hidden_layers, slots, config.num_key_value_heads, capacity, config.head_dim)
        # Zeros, not empty: a masked position gets weight 0, and 0 * NaN would be NaN.
        self.k, self.v = torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype)
        self.slots, self.capacity = slots, capacity

    @staticmethod
    def bytes_per_token(config, dtype):
        return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize

    def prefill(self, slots):
        """An Attend for prompts padded on the right, one to each slot of the list. What lands beyond a prompt's length is
        overwritten by decoding before anything reads it."""
        slots = torch.tensor(slots, device=self.k.device)

        def attend(layer, q, k, v):
            self.k[layer, slots, :, :k.shape[1]] = k.transpose(1, 2)  # (B, K, T, D)
            self.v[layer, slots, :, :v.shape[1]] = v.transpose(1, 2)
            return causal(layer, q, k, v)
        return attend

    def decode(self, lengths, longest):
        """An Attend for one new token in each of the first len(lengths) slots, at position lengths[slot] <= longest."""
        B = len(lengths)

        def attend(layer, q, k, v):
            past_k, past_v = self.k[layer, :B, :, :longest + 1], self.v[layer, :B, :, :longest + 1]  # (B, K, S, D)
            return decode_attention(q[:, 0], k[:, 0], v[:, 0], past_k, past_v, lengths)[:, None]  # (B, 1, H, D)
        return attend

    def fork(self, source, targets, length):
        """Copy the first `length` positions of a slot to others."""
        self.k[:, targets, :, :length] = self.k[:, source, None, :, :length]
        self.v[:, targets, :, :length] = self.v[:, source, None, :, :length]


PREFILL_TOKENS = 8192  # of one prefill batch, padding included: bounds its activations
MOST_SLOTS = {"cpu": 128, "cuda": 512}  # more rows no longer make a step cheaper per token
GRAIN = {"cpu": 64, "cuda": 256}  # positions of a slot, a multiple of this: prompts a little longer must not cost all graphs
LOOK = {"cpu": 1, "cuda": 8}  # tokens of every row between two looks of the host; what a row chose after its end is dropped


class Sampler:
    """Generates completions. The weights are the model's own, so a training step is seen with no copy, by the CUDA graphs too.

    `slots` is the number of rows decoded at once; 0 lets free memory decide, of which a cache that stays (with graphs) takes `share`.
    """

    def __init__(self, model, tokenizer, slots=0, share=0.6):
        self.model, self.tokenizer, self.wanted_slots, self.share = model, tokenizer, slots, share
        self.look = LOOK[model.device.type]
        self.graphed = model.device.type == "cuda" and uses_triton(model.device, model.dtype)
        self.cache = self.memory = None

    def generate(self, prompts, n, params, seed=0, keys=None, bar=None):
        """n completions of each prompt (a list of ids): a list of lists of Completion, in order."""
        requests = [Request(p, list(range(n)), keys[i] if keys else None, tag=i) for i, p in enumerate(prompts)]
        out = [[None] * n for _ in prompts]
        for request, index, completion in self.stream(deque(requests), params, seed):
            out[request.tag][index] = completion
            if bar is not None:
                bar.update()
        return out

    def stream(self, queue, params, seed=0):
        """Yield (request, index, Completion) as rows finish. The caller may add requests to the deque while it runs."""
        self.params, self.seed = params, seed
        self.rows, self.fitted = [], False
        while queue or self.rows:
            self.schedule(queue)
            self.step()
            yield from self.postprocess()

    def release(self):
        """Give the cache's memory back, for a training step to use. With graphs it stays, for they point into it."""
        if not self.graphed:
            self.cache = None

    # ---- schedule: give free slots to waiting samples
    @torch.inference_mode()
    def schedule(self, queue):
        if not queue:
            return
        if not self.rows:
            self._make_cache(queue)
        taken, forks = [], []  # taken: (slot, prompt) to prefill; forks: (source, targets, length)
        while queue and len(self.rows) < self.cache.slots:
            request = queue[0]
            if self._room(request) + self.look - 1 > self.cache.capacity:
                break  # it came late: it waits until the others are done and a cache with longer slots can be made
            indices = request.indices[request.started:request.started + self.cache.slots - len(self.rows)]
            targets = list(range(len(self.rows), len(self.rows) + len(indices)))
            # Any live row of the request holds the prompt in its first positions, which never change: a source to fork.
            source = next((slot for slot, row in enumerate(self.rows) if row.request is request), None)
            if source is None and targets:
                source = targets.pop(0)
                taken.append((source, request.prompt))
            if targets:
                forks.append((source, targets, len(request.prompt) - 1))
            for index in indices:
                self._open(request, index)
            request.started += len(indices)
            if request.started == len(request.indices):
                queue.popleft()
        self._prefill(taken)
        for fork in forks:
            self.cache.fork(*fork)

    def _room(self, request):
        """Positions that a sample of the request may need."""
        context = self.model.config.max_position_embeddings
        if len(request.prompt) >= context:
            raise UserError(f"a prompt of {len(request.prompt)} tokens does not fit the model's context of {context}; shorten it")
        budget = self.params.max_new_tokens if request.max_new_tokens is None else request.max_new_tokens
        return min(len(request.prompt) + budget, context)

    def _make_cache(self, queue):
        """A cache for the longest request that waits. Free memory decides the number of slots, if the caller did not. With graphs,
        what the first cache took is the bound for good, and a cache stays as long as it is large enough: a new one costs them all."""
        model, old, grain = self.model, self.cache, GRAIN[self.model.device.type]
        capacity = max(self._room(r) for r in queue) + self.look - 1  # a row goes on after its end until the host looks
        if self.fitted and old.capacity < capacity:  # longer requests came while others ran, and more will: grow by doubling
            capacity = max(capacity, min(2 * old.capacity, model.config.max_position_embeddings))
        capacity = -(-capacity // grain) * grain
        if old and capacity <= old.capacity <= 4 * capacity:
            capacity = old.capacity
        self.fitted = True
        each = capacity * KVCache.bytes_per_token(model.config, model.dtype)
        if not (self.graphed and self.memory):
            self.memory = (self.share if self.graphed else 0.6) * free_memory(model.device) + (2 * old.k.nbytes if old else 0)
        fit = int(self.memory // each)
        wanted = self.wanted_slots or min(MOST_SLOTS[model.device.type], max(fit, 1))
        slots = min(wanted, max(sum(len(r.indices) for r in queue), old.slots if old else 0))
        if slots > fit:
            raise UserError(f"{slots} slots of {capacity} tokens need {slots * each / 2**30:.1f} GiB of cache, {fit} fit in memory; "
                            "lower --slots or --max-new-tokens")
        if not old or slots > old.slots or capacity != old.capacity:
            self.cache, self.graphs, self.pool = None, {}, None
            del old  # its memory is needed
            self.cache = KVCache(model.config, slots, capacity, model.device, model.dtype)
            # The token that each row feeds next, the positions in its cache, its key. Graphs point at them too: written in place.
            self.tokens, self.lengths, self.keys = torch.zeros(3, slots, dtype=torch.long, device=model.device)
            self.logprobs, self.seen = torch.zeros(slots, device=model.device), None
        if self.params.repetition_penalty != 1 and self.seen is None:  # the ids that each row has seen
            self.seen = torch.zeros(self.cache.slots, model.vocab, dtype=torch.bool, device=model.device)

    def _open(self, request, index):
        slot, prompt = len(self.rows), request.prompt
        budget = self._room(request) - len(prompt)
        self.rows.append(Row(request, index, budget, Completion(prompt)))
        # Prefill leaves out the last prompt token: the first decoding step feeds it, so tokens are chosen in one place only.
        self.tokens[slot], self.lengths[slot] = prompt[-1], len(prompt) - 1
        self.keys[slot] = key_of(self.seed, request, index)
        if self.seen is not None:
            self.seen[slot] = False
            self.seen[slot, torch.tensor(prompt, device=self.seen.device)] = True

    def _prefill(self, taken):
        taken = sorted(((slot, prompt[:-1]) for slot, prompt in taken if len(prompt) > 1), key=lambda t: len(t[1]))
        while taken:
            batch, width = [], 0
            while taken and (not batch or (len(batch) + 1) * len(taken[0][1]) <= PREFILL_TOKENS):
                batch.append(taken.pop(0))
                width = len(batch[-1][1])
            padded = torch.zeros(len(batch), width, dtype=torch.long)
            for i, (_, prompt) in enumerate(batch):
                padded[i, :len(prompt)] = torch.tensor(prompt)
            self.model(padded.to(self.model.device), attend=self.cache.prefill([slot for slot, _ in batch]))

    # ---- step: the next token, or few, of every live row
    @torch.inference_mode()
    def step(self):
        live = len(self.rows)
        B = self._bucket(live)
        self.lengths[live:B] = 0  # rows that only fill the bucket up: nothing to read
        chosen, logprobs = [], []
        for i in range(self.look):
            longest = self.cache.capacity - 1 if self.graphed else max(len(r.completion.prompt) + len(r.completion.tokens) for r in self.rows) - 1 + i
            self._run(B, longest)
            chosen.append(self.tokens[:live].clone())
            logprobs.append(self.logprobs[:live].clone())
        chosen, logprobs = torch.stack(chosen, 1).tolist(), torch.stack(logprobs, 1).tolist()  # (live, look): the one sync
        for row, tokens, logps in zip(self.rows, chosen, logprobs):
            if not math.isfinite(sum(logps)):
                raise UserError("the model's logits are not finite; its weights are damaged, or --temperature is far too low")
            n = min(self.look, row.budget - len(row.completion.tokens))
            n = next((i + 1 for i in range(n) if tokens[i] in self.tokenizer.stop_ids), n)
            row.completion.tokens += tokens[:n]
            row.completion.logprobs += logps[:n]

    def _bucket(self, live):
        """How many slots a step runs. With graphs, one of few numbers: a graph is captured for each."""
        if not self.graphed:
            return live
        grain = 1 << (live - 1).bit_length() if live <= 16 else 16 if live <= 128 else 64
        return min(-(-live // grain) * grain, self.cache.slots)

    def _run(self, B, longest):
        """One step of the first B slots. With graphs, the first step of a kind is run as it is, which compiles its kernels; the
        second is captured, and replayed from then on."""
        if not self.graphed:
            return self._advance(B, longest)
        kind = (B, replace(self.params, max_new_tokens=0))  # all that a graph bakes in
        if kind not in self.graphs:
            self._advance(B, longest)
            self.graphs[kind] = None
        else:
            self.graphs[kind] = self.graphs[kind] or self._capture(B, longest)
            self.graphs[kind]()

    def _capture(self, B, longest):
        """A CUDA graph of a step. All share one pool of memory: they never run at the same time, and the first is usually the largest."""
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            self._advance(B, longest)
        return graph.replay

    def _advance(self, B, longest):
        """Feed each row's token, choose the next: all on the device, in place, without asking it anything."""
        tokens, lengths, p = self.tokens[:B], self.lengths[:B], self.params
        hidden = self.model(tokens[:, None], lengths[:, None], self.cache.decode(lengths, longest))[:, 0]  # (B, C)
        seen = None if p.repetition_penalty == 1 else self.seen[:B]
        chosen, logprobs = next_tokens(self.model.logits(hidden), uniform(self.keys[:B], lengths), p.temperature, p.top_k, p.top_p, p.min_p,
                                       p.repetition_penalty, seen)
        tokens.copy_(chosen)
        self.logprobs[:B] = logprobs
        lengths += 1

    # ---- postprocess: hand out finished rows, close the gaps they leave
    def postprocess(self):
        done = []
        for slot in reversed(range(len(self.rows))):  # from the end: closing moves the last row into the gap
            row = self.rows[slot]
            c = row.completion
            if c.tokens[-1] in self.tokenizer.stop_ids:
                c.finish = "stop"
            elif len(c.tokens) == row.budget:
                c.finish = "length"
            else:
                continue
            done.append((row.request, row.index, c))
            self._close(slot)
        return reversed(done)

    @torch.inference_mode()
    def _close(self, slot):
        """Move the last live row into the slot, so that live rows stay a prefix of the cache."""
        last = self.rows.pop()
        end = len(self.rows)
        if slot == end:
            return
        self.rows[slot] = last
        self.cache.fork(end, [slot], len(last.completion.prompt) + len(last.completion.tokens) - 1)
        for state in (self.tokens, self.lengths, self.keys, *([self.seen] if self.seen is not None else [])):
            state[slot] = state[end]


def key_of(seed, request, index):
    """64 random-looking bits (as a signed number) of a sample's identity."""
    name = request.key if request.key is not None else json.dumps(request.prompt)
    digest = hashlib.blake2b(f"{seed}/{index}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def free_memory(device):
    """Bytes that can still be allocated."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        with open("/proc/meminfo") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


# ---- the command -----------------------------------------------------------------------------------------------------
SETTINGS = ("model", "task", "questions", "split", "styles", "n", "reflections", "temperature", "top_k", "top_p", "min_p",
            "repetition_penalty", "max_new_tokens", "hint", "shard", "seed")  # what makes two runs one: these must agree to go on


def arguments():
    p = parser(__doc__, out="samples.jsonl")
    g = p.add_argument_group("what to sample")
    g.add_argument("--task", default="countdown-3-small", help=f"tasks, separated by commas: {tasks.NAMES}")
    g.add_argument("--questions", type=natural, default=200, help="how many of each task (0: all rows of a file)")
    g.add_argument("--split", default="sft", help=f"which problems: {', '.join(tasks.SPLITS)}")
    g.add_argument("--styles", default="plain,plan,alternatives,rephrase", help="prompt styles, separated by commas")
    g.add_argument("--n", type=positive, default=4, help="attempts of each question and style")
    g.add_argument("--reflections", type=natural, default=2, help="reflections on each attempt")
    g.add_argument("--hint", action="store_true", help="rationalisation: besides, attempts whose prompt tells the right answer")
    g.add_argument("--data-dir", default="data", help="where gsm8k/, csqa/, math500/ and the like lie")
    g.add_argument("--shard", default="0/1", help="i/n: only every n-th question from the i-th on, to share the work among n processes (give each its own --out)")
    g.add_argument("--prompt", default=None, help="only answer this text, with --n samples, and print them")
    g = p.add_argument_group("how to choose tokens")
    g.add_argument("--temperature", type=number(float, 0), default=0.7, help="0 is greedy")
    g.add_argument("--top-p", type=number(float, 0, 1, open_low=True), default=0.8, help="keep the likeliest tokens up to this mass")
    g.add_argument("--top-k", type=natural, default=20, help="keep this many of the likeliest tokens; 0 keeps all")
    g.add_argument("--min-p", type=number(float, 0, 1), default=0.0, help="drop tokens less likely than this share of the likeliest")
    g.add_argument("--repetition-penalty", type=number(float, 0, open_low=True), default=1.1, help="divides the positive logits of tokens already seen")
    g.add_argument("--max-new-tokens", type=positive, default=512, help="budget of an attempt or reflection")
    g.add_argument("--slots", type=natural, default=0, help="rows decoded at once; 0: as many as fit in memory")
    args = p.parse_args()
    for style in args.styles.split(","):
        if style not in tasks.STYLES:
            raise UserError(f"--styles {style}: unknown; the styles are {', '.join(tasks.STYLES)}")
    i, _, n = args.shard.partition("/")
    if not (i.isdecimal() and n.isdecimal() and int(i) < int(n)):
        raise UserError(f"--shard {args.shard}: give i/n with 0 <= i < n, such as 0/8")
    return args


def attempt_row(task, problem, style, index, messages, c, text):
    """A line of samples.jsonl, before its reflections."""
    grade = task.grade(problem, text)
    return {"id": problem.id, "task": problem.task, "problem": problem.truth, "question": problem.question, "style": style, "index": index,
            "system": messages[0]["content"] if messages[0]["role"] == "system" else None, "solution": text, "finish": c.finish,
            "answer": grade.answer, "correct": grade.correct, "reason": grade.reason, "reflections": []}


def resume(args):
    """The (id, style, index) already in --out. Checks that it was made with the same settings; mends a half-written last line."""
    record = f"{args.out}.run.json"
    settings = {name: getattr(args, name) for name in SETTINGS}
    if not os.path.exists(args.out):
        write_whole(record, json.dumps({**run_record(args), "settings": settings}, indent=2))
        return set()
    if not os.path.exists(record):
        raise UserError(f"--out {args.out} exists, but not {record} that says how it was made; give another --out")
    with open(record) as f:
        before = json.load(f)["settings"]
    for name, value in settings.items():
        if before.get(name) != value:
            raise UserError(f"--out {args.out} was made with --{name.replace('_', '-')} {before.get(name)}, not {value}; give the same or another --out")
    with open(args.out, "rb+") as f:
        content = f.read()
        f.truncate(content.rfind(b"\n") + 1)  # a line that a kill cut short
    rows = read_jsonl(args.out, ("id", "style", "index")) if b"\n" in content else []
    done = {(row["id"], row["style"], row["index"]) for row in rows}
    print(f"{args.out} has {len(done)} attempts already; going on")
    return done


def main():
    args = arguments()
    params = Params(args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty)
    if args.prompt is not None:
        model, tokenizer = load(args.model, args.device, args.dtype)
        prompt = tokenizer.chat([{"role": "user", "content": args.prompt}])
        for completion in Sampler(model, tokenizer, args.slots).generate([prompt], args.n, params, args.seed)[0]:
            print(tokenizer.text(completion.tokens), f"\n--- {len(completion.tokens)} tokens, {completion.finish}")
        return

    first, every = map(int, args.shard.split("/"))
    problems = [(task, problem) for task in tasks.find_all(args.task, args.data_dir)
                for problem in task.problems(args.split, args.questions, args.seed)][first::every]
    model, tokenizer = load(args.model, args.device, args.dtype)
    done = resume(args)
    queue = deque()
    for task, problem in problems:
        for style, hint in [(s, h) for h in ((False, True) if args.hint else (False,)) for s in args.styles.split(",")]:
            messages, name = task.prompt(problem, style, hint), style + "-hint" * hint
            indices = [i for i in range(args.n) if (problem.id, name, i) not in done]
            if indices:
                queue.append(Request(tokenizer.chat(messages), indices, f"{problem.id}/{name}", tag=(task, problem, name, messages)))
    waiting = sum(len(r.indices) for r in queue)
    print(f"sampling {waiting} attempts on {len(problems)} questions, {args.reflections} reflections each, with {args.model}")

    counts = dict(attempts=0, correct=0, verdicts=0, agree=0, unasked=0)
    with open(args.out, "a", encoding="utf-8") as f, tqdm(total=waiting, desc="attempts", unit="", disable=None) as bar:
        for request, index, c in Sampler(model, tokenizer, args.slots).stream(queue, params, args.seed):
            text = tokenizer.text(c.tokens)
            if isinstance(request.tag, dict):  # a reflection; the tag is the row of its attempt
                row = request.tag
                row["reflections"][index] = {"text": text, "verdict": tasks.verdict(text), "finish": c.finish}
            else:
                task, problem, style, messages = request.tag
                row = attempt_row(task, problem, style, index, messages, c, text)
                if args.reflections and c.finish == "stop":  # an attempt without an end is no sample to judge
                    prompt = tokenizer.chat(tasks.reflection_prompt(problem.question, text))
                    if len(prompt) < model.config.max_position_embeddings:
                        row["reflections"] = [None] * args.reflections
                        key = f"{problem.id}/{style}/{index}/reflection"
                        queue.appendleft(Request(prompt, list(range(args.reflections)), key, tag=row))
                    else:
                        counts["unasked"] += 1
            if None not in row["reflections"]:
                f.write(to_json(row) + "\n")
                f.flush()
                counts["attempts"] += 1
                counts["correct"] += row["correct"]
                counts["verdicts"] += len(row["reflections"])
                counts["agree"] += sum(r["verdict"] == row["correct"] for r in row["reflections"])
                bar.update()
    if counts["attempts"]:
        print(f"{counts['correct'] / counts['attempts']:.1%} of {counts['attempts']} attempts are correct; "
              f"{counts['agree'] / max(counts['verdicts'], 1):.1%} of {counts['verdicts']} reflections agree with the grade")
    if counts["unasked"]:
        print(f"{counts['unasked']} attempts are too long to be reflected on within the context of {model.config.max_position_embeddings}")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    command(main)
