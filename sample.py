"""Generate text with a key/value cache. The command writes attempts and reflections.

    python sample.py                                            # the miniature, 400 small countdown questions
    python sample.py --model Qwen/Qwen2.5-1.5B-Instruct --task countdown-3 --questions 4000 --n 16
    python sample.py --prompt "What is 2 + 3?"                  # try a model by hand

Four ideas carry the speed. A group's prompt is run once and its cache is forked to every sample. A row that
ends gives its slot to the next request at once. Live rows are kept in the first slots, so that a step is one
dense batch. On a GPU a step, the choice of the token included, is one CUDA graph, and the host reads what
was chosen every eighth token only. Slots and graphs are in `cache.py`.

One idea carries the trust: a token is drawn with one uniform number that depends on (seed, request, index,
position) only. So a completion is the same in whatever batch, slot, order or process it was made, as far as a
matrix product of another shape rounds the same (a near-tie can fall the other way).

Left out: paged cache, speculative decoding, quantised weights, prefixes shared between different prompts.
"""
import json
import math
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from run.command import (  # before torch: it says how threads wait
    Defaults, Progress, UserError, command, fill_in, if_not_given, may_change, natural, number, parser,
    positive, resume_flag, say, split_list,
)

import torch

import tasks
from cache import (
    GRAIN, MOST_SLOTS, PREFILL_TOKENS, Graphs, KVCache, Move, SlotState, bucket, slot_capacity,
    slot_count,
)
from checkpoint import device_and_dtype, load, model_fingerprint
from checkpoint.tokenizer import Tokenizer
from grading.answers import verdict
from kernels import next_tokens, uniform, uses_triton
from model import Transformer
from run.files import fingerprint, refuse_folder, to_json
from run.processes import (
    ALONE, free_memory, in_batches, join_parts, joined_rows, own_part, rank, start_processes, total, world,
)
from run.record import refuse_wrong_out, start_or_check


# ---- what is asked and what comes back -----------------------------------------------------------
@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen.

    The cuts come in vLLM's order: repetition penalty, temperature, top-k, top-p.
    """
    max_new_tokens: int = 512
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0
    repetition_penalty: float = 1.0  # of tokens in the prompt or the output so far (Keskar et al. 2019)


@dataclass
class Request:
    """Ask for the samples `indices` of one prompt. `Sampler.stream` uses it up."""
    prompt: list[int]
    indices: list[int]
    identity: str | None = None  # names the question for the randomness; None takes the prompt itself
    max_new_tokens: int | None = None  # None takes the SamplingParams'
    payload: Any = None  # the caller's own, untouched
    started: int = 0  # how many of the indices have been given a slot


@dataclass
class Completion:
    """`tokens` and `logprobs` of a sample; one whose `finish` is "stop" ends with its stop token.

    The log-probabilities are the model's at the sampling temperature, before any cut or penalty: what a
    trainer computes again.
    """
    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: str = ""  # "stop" or "length"


@dataclass
class Sequence:
    """A sample in progress. Sequence i of `Sampler.live` has slot i of the cache."""
    request: Request
    index: int
    budget: int  # tokens it may have
    completion: Completion

    @property
    def cached(self) -> int:
        """Positions of its slot that are filled: all but the newest token, which is fed next."""
        return len(self.completion.prompt) + len(self.completion.tokens) - 1


# ---- the sampler ---------------------------------------------------------------------------------
# Tokens that every row chooses before the host reads them back; those after a row's end are dropped.
TOKENS_PER_SYNC = {"cpu": 1, "cuda": 8}
# The share of slots that must be free before new prompts run. On a GPU a prompt, run without a graph, takes
# as long as about ten steps, however short it is.
FREE_TO_PREFILL = {"cpu": 0, "cuda": 1 / 8}
CACHE_FRACTION = 0.6  # of the free memory, for a cache that `release` gives back


def noise_key(seed: int, request: Request, index: int) -> int:
    """64 random-looking bits (as a signed number) that name the random numbers of one sample."""
    identity = request.identity if request.identity is not None else json.dumps(request.prompt)
    bits = bytes.fromhex(fingerprint(f"{seed}/{index}/{identity}"))
    return int.from_bytes(bits, "big", signed=True)


class Sampler:
    """Generates completions.

    The weights are the model's own, so a training step is seen with no copy, by CUDA graphs too.

    `slots` is the number of rows decoded at once; 0 lets free memory decide. With graphs the cache stays
    between calls, and takes `cache_fraction` of the memory that was free at first; without, it is given back
    by `release`.
    """

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, slots: int = 0,
        cache_fraction: float = CACHE_FRACTION,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.wanted_slots = slots
        self.cache_fraction = cache_fraction
        self.tokens_per_sync = TOKENS_PER_SYNC[model.device.type]
        self.free_to_prefill = FREE_TO_PREFILL[model.device.type]
        self.graphed = model.device.type == "cuda" and uses_triton(model.device, model.dtype)
        self.should_stop: Callable[[], bool] = lambda: False  # read between steps; what is not done is lost
        # Of the present call of `stream`.
        self.params = SamplingParams()
        self.seed = 0
        self.live: list[Sequence] = []
        # The cache, and what belongs to it. None until there is something to sample.
        self.cache: KVCache | None = None
        self.slot_state: SlotState | None = None
        self.graphs = Graphs()
        # Bytes. With graphs, the first measurement is the bound from then on.
        self.cache_budget: int | None = None

    def generate(
        self, prompts: list[list[int]], n: int, params: SamplingParams, seed: int = 0, identities=None,
    ) -> list[list[Completion]]:
        """n completions of each prompt (a list of ids), in order."""
        identities = identities or [None] * len(prompts)
        requests = deque()
        for i, (prompt, identity) in enumerate(zip(prompts, identities, strict=True)):
            requests.append(Request(prompt, list(range(n)), identity, payload=i))
        out = [[None] * n for _ in prompts]
        for request, index, completion in self.stream(requests, params, seed):
            out[request.payload][index] = completion
        return out

    def stream(
        self, queue: deque[Request], params: SamplingParams, seed: int = 0,
    ) -> Iterator[tuple[Request, int, Completion]]:
        """Yield (request, index, completion) as rows finish.

        The caller may add requests to the deque while it runs.
        """
        self.params = params
        self.seed = seed
        self.live = []
        refit = False  # the first cache is made for what waits, a later one because longer requests came
        while (queue or self.live) and not self.should_stop():
            if queue and not self.live:
                self.fit_cache(queue, refit)
                refit = True
            self.schedule(queue)
            self.step()
            yield from self.postprocess()

    def release(self) -> None:
        """Give the cache's memory back, for a training step to use.

        With graphs it stays, for they point into it.
        """
        if not self.graphed:
            self.cache = None

    # ---- the cache that the waiting requests need -------------------------------------------------
    @torch.inference_mode()
    def fit_cache(self, queue: Iterable[Request], refit: bool = False) -> None:
        """Make a cache for the longest request that waits, unless the present one will do.

        `refit`: longer requests came while others ran.
        """
        model, old = self.model, self.cache
        device = model.device
        # A row goes on until the host has read that it ended.
        needed = max(self.room(request) for request in queue) + self.tokens_per_sync - 1
        context = model.config.max_position_embeddings
        current_capacity = old.capacity if old else None
        capacity = slot_capacity(needed, current_capacity, refit, context, GRAIN[device.type])
        bytes_a_slot = capacity * KVCache.bytes_per_token(model.config, model.dtype)
        fitting = max(0, int(self.memory_for_cache() // bytes_a_slot))
        waiting = sum(len(request.indices) for request in queue)
        current_slots = old.slots if old else 0
        slots = slot_count(waiting, current_slots, self.wanted_slots, fitting, MOST_SLOTS[device.type])
        if slots > fitting:
            raise UserError(f"{slots} slots of {capacity} tokens need {slots * bytes_a_slot / 2**30:.1f} GiB "
                            f"of cache, {fitting} fit in memory; lower --slots or --max-new-tokens")
        if old is None or slots > old.slots or capacity != old.capacity:
            self.cache = self.slot_state = None
            self.graphs = Graphs()
            del old  # its memory is needed
            self.cache = KVCache(model.config, slots, capacity, device, model.dtype)
            self.slot_state = SlotState(slots, device)
        if self.params.repetition_penalty != 1:
            self.slot_state.track_seen(model.vocab)

    def memory_for_cache(self) -> float:
        """Bytes that a cache may take, the present one included."""
        if self.graphed and self.cache_budget:
            return self.cache_budget
        fraction = self.cache_fraction if self.graphed else CACHE_FRACTION
        held = self.cache.nbytes if self.cache else 0
        self.cache_budget = fraction * free_memory(self.model.device) + held
        return self.cache_budget

    def room(self, request: Request) -> int:
        """Positions that a sample of the request may need."""
        context = self.model.config.max_position_embeddings
        refuse_long_prompt(request.prompt, context, request.identity)
        budget = self.params.max_new_tokens if request.max_new_tokens is None else request.max_new_tokens
        return min(len(request.prompt) + budget, context)

    # ---- schedule: give free slots to waiting samples ---------------------------------------------
    @torch.inference_mode()
    def schedule(self, queue: deque[Request]) -> None:
        first = len(self.live)
        prompts_to_run = []  # (slot, prompt without its last token)
        forks = []
        may_prefill = self.is_worth_a_prefill(queue)
        while queue and len(self.live) < self.cache.slots:
            request = queue[0]
            if self.room(request) + self.tokens_per_sync - 1 > self.cache.capacity:
                break  # it came late: it and all behind it wait for the others to end, and for longer slots
            # Any live sample of the request has the prompt in its first positions, which never change.
            source = next((slot for slot, s in enumerate(self.live) if s.request is request), None)
            if source is None and not may_prefill:
                break
            prompt = request.prompt[:-1]
            free = self.cache.slots - len(self.live)
            for index in request.indices[request.started:request.started + free]:
                slot = len(self.live)
                if source is None:
                    source = slot
                    prompts_to_run.append((slot, prompt))
                else:
                    forks.append(Move(source, slot, len(prompt)))
                budget = self.room(request) - len(request.prompt)
                self.live.append(Sequence(request, index, budget, Completion(request.prompt)))
                request.started += 1
            if request.started == len(request.indices):
                queue.popleft()
        self.run_prompts(prompts_to_run)
        self.cache.copy(forks)
        if new := self.live[first:]:
            keys = [noise_key(self.seed, s.request, s.index) for s in new]
            self.slot_state.fill(first, [s.request.prompt for s in new], keys)

    def is_worth_a_prefill(self, queue: deque[Request]) -> bool:
        """Whether enough slots are free for new prompts, or all that waits fits into them."""
        free = self.cache.slots - len(self.live)
        if free >= self.free_to_prefill * self.cache.slots:
            return True
        return sum(len(r.indices) - r.started for r in islice(queue, free + 1)) <= free

    def run_prompts(self, prompts: list[tuple[int, list[int]]]) -> None:
        """Run prompts (slot, ids) through the model, to fill their slots of the cache."""
        prompts = [(slot, ids) for slot, ids in prompts if ids]
        for batch in in_batches(prompts, lambda pair: len(pair[1]), PREFILL_TOKENS, padded=True):
            width = max(len(ids) for _, ids in batch)
            padded = torch.zeros(len(batch), width, dtype=torch.long)  # (B, T)
            for row, (_, ids) in zip(padded, batch, strict=True):
                row[:len(ids)] = torch.tensor(ids)
            slots = [slot for slot, _ in batch]
            padded = padded.to(self.model.device, non_blocking=True)
            self.model(padded, attend=self.cache.prefill(slots))

    # ---- step: the next token, or the next few, of every live row ------------------------------------------
    @torch.inference_mode()
    def step(self) -> None:
        live = len(self.live)
        B = min(bucket(live), self.cache.slots) if self.graphed else live
        self.slot_state.lengths[live:B] = 0  # rows that only fill the bucket up: nothing to read
        chosen, logprobs = [], []
        for i in range(self.tokens_per_sync):
            # Without graphs the cache is read up to the longest row only.
            longest = self.cache.capacity - 1 if self.graphed else max(s.cached for s in self.live) + i
            self.decode_one(B, longest)
            chosen.append(self.slot_state.tokens[:live].clone())
            logprobs.append(self.slot_state.logprobs[:live].clone())
        chosen = torch.stack(chosen, 1).tolist()  # (live, tokens_per_sync): the one wait for the device
        logprobs = torch.stack(logprobs, 1).tolist()
        for sequence, new, new_logprobs in zip(self.live, chosen, logprobs, strict=True):
            if not math.isfinite(sum(new_logprobs)):
                raise UserError("the model's logits are not finite; "
                                "its weights are damaged, or --temperature is far too low")
            for token, logprob in zip(new, new_logprobs, strict=True):
                if not sequence.completion.finish:  # else it is dropped
                    self.append(sequence, token, logprob)

    def append(self, sequence: Sequence, token: int, logprob: float) -> None:
        """One more token of a sample, which may be its last."""
        completion = sequence.completion
        completion.tokens.append(token)
        completion.logprobs.append(logprob)
        if token in self.tokenizer.stop_ids:
            completion.finish = "stop"
        elif len(completion.tokens) == sequence.budget:
            completion.finish = "length"

    def decode_one(self, B: int, longest: int) -> None:
        """One token for each of the first B slots, whose caches end at `longest` or before."""
        if not self.graphed:
            self.feed_and_choose(B, longest)
            return
        kind = (B, replace(self.params, max_new_tokens=0))  # all that a graph bakes in
        self.graphs.run(kind, lambda: self.feed_and_choose(B, longest))

    def feed_and_choose(self, B: int, longest: int) -> None:
        """Feed each row's token, choose the next: all on the device and in place, as a CUDA graph needs."""
        p, state = self.params, self.slot_state
        tokens = state.tokens[:B]
        positions = state.lengths[:B]  # so many tokens lie before the one that is fed
        attend = self.cache.decode(positions, longest)
        hidden = self.model(tokens[:, None], positions[:, None], attend)  # (B, 1, C)
        chosen, logprobs = next_tokens(
            self.model.logits(hidden[:, 0]),
            uniform(state.noise_keys[:B], positions),
            temperature=p.temperature,
            top_k=p.top_k,
            top_p=p.top_p,
            penalty=p.repetition_penalty,
            seen=state.seen[:B] if p.repetition_penalty != 1 else None,
        )
        tokens.copy_(chosen)
        state.logprobs[:B] = logprobs
        positions += 1

    # ---- postprocess: hand out finished rows, close the gaps they leave ---------------------------
    def postprocess(self) -> list[tuple[Request, int, Completion]]:
        ended = [slot for slot, sequence in enumerate(self.live) if sequence.completion.finish]
        done = [self.live[slot] for slot in ended]
        if ended:
            self.close(ended)
        return [(sequence.request, sequence.index, sequence.completion) for sequence in done]

    @torch.inference_mode()
    def close(self, ended: list[int]) -> None:
        """Move the last live rows into the slots that ended, so that live rows stay a prefix of the cache."""
        remaining = len(self.live) - len(ended)
        gaps = [slot for slot in ended if slot < remaining]
        last = sorted(set(range(remaining, len(self.live))) - set(ended))
        moves = []
        for gap, slot in zip(gaps, last, strict=True):
            self.live[gap] = self.live[slot]
            moves.append(Move(slot, gap, self.live[gap].cached))
        del self.live[remaining:]
        self.cache.copy(moves)
        self.slot_state.move(moves)


def refuse_long_prompt(prompt: list[int], context: int, name: str | None) -> None:
    if len(prompt) >= context:
        raise UserError(f"the prompt of {name or 'a request'} has {len(prompt)} tokens and does not fit the "
                        f"model's context of {context}; shorten it or leave it out")


def check_lengths(prompts: dict[str, list[int]], context: int, max_new_tokens: int) -> None:
    """Raises UserError, naming the prompt, if one does not fit the context.

    Prints for how many prompts, of all processes, the context ends before the budget.
    """
    for name, prompt in prompts.items():
        refuse_long_prompt(prompt, context, name)
    cut = sum(len(prompt) + max_new_tokens > context for prompt in prompts.values())
    cut, prompts_in_all = total([cut, len(prompts)])
    if cut:
        say(f"the context of {context} tokens leaves {cut:.0f} of {prompts_in_all:.0f} prompts less than "
            f"--max-new-tokens {max_new_tokens} for the response, which is cut off there")


# ---- the command ---------------------------------------------------------------------------------
# How tokens are chosen if no flag says so. On an earlier miniature the paper's cuts made a chain repeat its
# attempts.
CHOICE: Defaults = {
    "temperature": (1.0, 0.7),
    "top_p": (1.0, 0.8),
    "top_k": (0, 20),
    "repetition_penalty": (1.0, 1.1),
}


def choice_of(args, model: Transformer) -> SamplingParams:
    fill_in(args, CHOICE, model.is_miniature)
    return SamplingParams(
        args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.repetition_penalty)


def arguments():
    p = parser(__doc__, out="samples.jsonl")
    g = p.add_argument_group("what to sample")
    tasks.question_flags(g, split="sft", paper=4000)
    g.add_argument("--styles", default="plain,plan,alternatives,rephrase", help="of prompts, with commas")
    g.add_argument("--n", "--attempts", type=positive, default=6,
                   help="attempts of each question and style (paper: 16); torchrun takes --attempts only")
    g.add_argument("--reflections", type=natural, default=1, help="on each attempt (paper: 4)")
    g.add_argument("--hint", action="store_true",
                   help="rationalisation: also make attempts whose prompt tells the right answer")
    g.add_argument("--prompt", help="only answer this text, with --n samples, and print them")
    g = p.add_argument_group("how to choose tokens")
    g.add_argument("--temperature", type=number(float, 0), help="0 is greedy; "
                   + if_not_given(CHOICE["temperature"]))
    g.add_argument("--top-p", type=number(float, 0, 1, open_low=True),
                   help="keep the likeliest tokens up to this mass; " + if_not_given(CHOICE["top_p"]))
    g.add_argument("--top-k", type=natural, help="keep so many, 0 for all; "
                   + if_not_given(CHOICE["top_k"]))
    g.add_argument("--repetition-penalty", type=number(float, 0, open_low=True), help="divides the positive "
                   "logits of tokens already seen; " + if_not_given(CHOICE["repetition_penalty"]))
    g.add_argument("--max-new-tokens", type=positive, default=512, help="budget of an attempt or reflection")
    may_change(g.add_argument("--slots", type=natural, default=0, help="rows decoded at once; 0: what fits"))
    resume_flag(p)
    args = p.parse_args()
    for style in split_list(args.styles, "--styles"):
        if style not in tasks.STYLES:
            raise UserError(f"--styles {style}: unknown; the styles are {', '.join(tasks.STYLES)}")
    return args


@dataclass
class Attempts:
    """The payload of a request for attempts: what was asked."""
    task: tasks.Task
    problem: tasks.Problem
    style: str  # with "-hint" if the prompt told the answer
    system: str | None


@dataclass
class Reflections:
    """The payload of a request for reflections: the attempt's line of samples.jsonl, and what has come."""
    row: dict
    by_index: dict[int, dict] = field(default_factory=dict)


def attempt_requests(args, problems: list, tokenizer: Tokenizer) -> list[Request]:
    """A request for each question and style."""
    requests = []
    styles = split_list(args.styles, "--styles")
    for task, problem in problems:
        for hint in (False, True) if args.hint else (False,):
            for style in styles:
                messages = task.prompt(problem, style, hint)
                system = messages[0]["content"] if messages[0]["role"] == "system" else None
                name = style + ("-hint" if hint else "")
                requests.append(Request(
                    tokenizer.chat(messages), list(range(args.n)), identity=f"{problem.id}/{name}",
                    payload=Attempts(task, problem, name, system)))
    return requests


def still_to_do(requests: list[Request], done: set[tuple[str, int]]) -> deque[Request]:
    """The requests, without the samples that are `done`: (identity, index)."""
    for request in requests:
        request.indices = [i for i in request.indices if (request.identity, i) not in done]
    return deque(request for request in requests if request.indices)


def attempt_row(attempt: Attempts, index: int, completion: Completion, text: str) -> dict:
    """A line of samples.jsonl, before its reflections."""
    problem = attempt.problem
    grade = attempt.task.grade(problem, text)
    return {
        "id": problem.id,
        "task": problem.task,
        "problem": problem.truth,
        "question": problem.question,
        "style": attempt.style,
        "index": index,
        "system": attempt.system,
        "solution": text,
        "finish": completion.finish,
        "answer": grade.answer,
        "correct": grade.correct,
        "reason": grade.reason,
        "reflections": [],
    }


def reflection_request(row: dict, n: int, tokenizer: Tokenizer) -> Request:
    prompt = tokenizer.chat(tasks.reflection_prompt(row["question"], row["solution"]))
    identity = f"{row['id']}/{row['style']}/{row['index']}/reflection"
    return Request(prompt, list(range(n)), identity, payload=Reflections(row))


def start_or_go_on(args, problems: list) -> set[tuple[str, int]]:
    """Start --out and its run.json, or go on with them. Returns each (identity, index) that is there."""
    there = os.path.exists(args.out)
    start_or_check(Path(f"{args.out}.run.json"), args, lambda: {
        "--model": model_fingerprint(args.model), "--task": tasks.questions_fingerprint(problems)})
    rows = joined_rows(args.out, {"id": str, "style": str, "index": int})
    done = {(f"{row['id']}/{row['style']}", row["index"]) for _, row in rows}
    if there:
        say(f"{args.out} has {len(done)} attempts already; going on")
    return done


def answer_by_hand(args) -> None:
    """--prompt: print samples of one text."""
    model, tokenizer = load(args.model, args.device, args.dtype, args.chat_template_kwargs)
    params = choice_of(args, model)
    prompt = tokenizer.chat([{"role": "user", "content": args.prompt}])
    check_lengths({"--prompt": prompt}, model.config.max_position_embeddings, args.max_new_tokens)
    completions, = Sampler(model, tokenizer, args.slots).generate([prompt], args.n, params, args.seed)
    for completion in completions:
        text = tokenizer.decode_response(completion.tokens)
        say(f"{text} \n--- {len(completion.tokens)} tokens, {completion.finish}")


def main():
    args = arguments()
    if args.prompt is not None:
        answer_by_hand(args)
        return

    refuse_folder(args.out)
    refuse_wrong_out(args.resume or "auto", Path(args.out), Path(f"{args.out}.run.json"))
    device, _ = device_and_dtype(args.device)
    start_processes(device, minutes=ALONE)
    all_tasks = tasks.find_all(args.task, args.data_dir)
    problems = tasks.problems_of(all_tasks, args.split, args.questions, args.seed)
    model, tokenizer = load(args.model, args.device, args.dtype, args.chat_template_kwargs)
    args.chat_template_kwargs = tokenizer.template_kwargs
    params = choice_of(args, model)
    context = model.config.max_position_embeddings
    sampler = Sampler(model, tokenizer, args.slots)
    requests = attempt_requests(args, problems[rank()::world()], tokenizer)
    prompts = {request.identity: request.prompt for request in requests}
    check_lengths(prompts, context, args.max_new_tokens)  # before anything is written
    queue = still_to_do(requests, start_or_go_on(args, problems))
    waiting = sum(len(request.indices) for request in queue)
    everywhere, = total([waiting])
    say(f"sampling {everywhere:.0f} attempts on {len(problems)} questions, {args.reflections} reflections "
        f"each, with {args.model}")

    tally = Counter()  # of what is written in this call
    with (open(own_part(args.out), "a", encoding="utf-8") as f,
          Progress("sample", waiting, unit="attempt") as progress):
        for request, index, completion in sampler.stream(queue, params, args.seed):
            text = tokenizer.after_own_thought(completion.tokens)
            if isinstance(request.payload, Attempts):
                row = attempt_row(request.payload, index, completion, text)
                # A truncated attempt gets no reflections.
                if args.reflections and completion.finish == "stop":
                    reflect = reflection_request(row, args.reflections, tokenizer)
                    if len(reflect.prompt) < context:
                        queue.appendleft(reflect)
                        continue  # the row is written when its reflections have come
                    tally["too long"] += 1
            else:
                row, by_index = request.payload.row, request.payload.by_index
                by_index[index] = {"text": text, "verdict": verdict(text), "finish": completion.finish}
                if len(by_index) < args.reflections:
                    continue
                row["reflections"] = [by_index[i] for i in range(args.reflections)]
            f.write(to_json(row) + "\n")
            f.flush()
            tally["attempts"] += 1
            tally["correct"] += row["correct"]
            tally["reflections"] += len(row["reflections"])
            tally["agreeing"] += sum(r["verdict"] == row["correct"] for r in row["reflections"])
            progress.update(correct=f"{tally['correct'] / tally['attempts']:.1%}")
    names = ("attempts", "correct", "reflections", "agreeing", "too long")
    attempts, correct, reflections, agreeing, too_long = total([tally[name] for name in names])
    if rank() == 0:  # all have written their part
        join_parts(args.out)
    if attempts:
        say(f"{correct / attempts:.1%} of {attempts:.0f} attempts are correct; "
            f"{agreeing / max(reflections, 1):.1%} of {reflections:.0f} reflections agree with the grade")
    if too_long:
        say(f"{too_long:.0f} attempts are too long to be reflected on within the context of {context}")
    say(f"wrote {args.out}")


if __name__ == "__main__":
    command(main, resumable=True)
