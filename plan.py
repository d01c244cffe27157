"""What a run will hold in memory and how much work it is, before it starts: the flag --plan.

    python sft.py --model Qwen/Qwen2.5-1.5B-Instruct --data silver.jsonl --plan      # on this machine
    python grpo.py --model Qwen/Qwen2.5-7B-Instruct --plan 4 --plan-memory 80        # on four GPUs of 80 GiB

There is no formula here that could be wrong. A plan runs the program's own code (model, optimizer, sharding,
sampler) on tensors that have a shape but no memory (torch's FakeTensor), among processes that send nothing
(torch's fake process group), and adds up the bytes of all tensors that live after each operation. For a GPU
the Triton operations run too, but for their kernels.

What it assumes: the largest micro-batch there is; in GRPO and sampling the longest prompts, each answered up
to the budget. What it cannot see is no tensor: CUDA itself, buffers of NCCL, gaps between tensors; MARGIN is
left for them. Left out: time, which depends on the machine.

A leaf: the commands import it where --plan is given, and nothing else does.
"""
import math
import os
import weakref
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import cache
import checkpoint
import grpo
import kernels
import model as model_module
import processes
import sample
import sft
import tasks
from cache import free_memory
from checkpoint import device_and_dtype, read_folder
from cli import UserError, say
from model import Config, Transformer
from sample import Completion, Params, Request, Sampler
from tokenizer import Tokenizer
from train import Optimizer, micro_batches

MIB, GIB = 2**20, 2**30
MARGIN = 0.1  # of a GPU's memory


# ---- counting bytes --------------------------------------------------------------------------------
class Memory(TorchDispatchMode):
    """While it is on: `now`, the bytes of all tensors that it has met and that live, and their `peak`.

    Storages are counted, each once, however many tensors are views of it; of a sharded tensor the part that
    is here. The arithmetic inside one operation is not seen.
    """

    def __init__(self):
        super().__init__()
        self.sizes: dict[int, int] = {}  # of each storage, by its address
        self.now = 0
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves((args, kwargs, out)):
            if isinstance(x, Tensor) and x.device.type != "meta":
                self._meet(getattr(x, "_local_tensor", x).untyped_storage())
        return out

    def _meet(self, storage):
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = 0
            weakref.finalize(storage, self._forget, storage._cdata)
            self._resize(storage)

    def _resize(self, storage):
        if storage._cdata in self.sizes:
            self.now += storage.nbytes() - self.sizes[storage._cdata]
            self.sizes[storage._cdata] = storage.nbytes()
            self.peak = max(self.peak, self.now)

    def _forget(self, address):
        self.now -= self.sizes.pop(address)

    def __enter__(self):
        resize = torch.UntypedStorage.resize_  # how FSDP2 frees a block's weights: no operation, so not seen

        def resize_and_tell(storage, size):
            resize(storage, size)
            self._resize(storage)
            return storage
        self.patch = patch.object(torch.UntypedStorage, "resize_", resize_and_tell)
        self.patch.start()
        return super().__enter__()

    def __exit__(self, *exception):
        self.patch.stop()
        return super().__exit__(*exception)


# ---- the machine that is planned for -----------------------------------------------------------------
@dataclass(frozen=True)
class Target:
    gpu: bool
    dtype: torch.dtype
    memory: float  # bytes that tensors may take, of one process
    processes: int


def target_of(args) -> Target:
    """What --plan and --plan-memory mean, together with --device and --dtype."""
    n = args.plan or int(os.environ.get("WORLD_SIZE", 1))
    if args.plan_memory is None:
        device, dtype = device_and_dtype(args.device, args.dtype)
        gpu = device.type == "cuda"
        memory = free_memory(device) / (1 if gpu else n)  # processes share a machine's memory, not a GPU
    else:
        gpu = args.device == "auto" or args.device.startswith("cuda")
        if not gpu:
            device_and_dtype(args.device, args.dtype)  # refuses what is no device
        auto = "bfloat16" if gpu else "float32"
        dtype = getattr(torch, auto if args.dtype == "auto" else args.dtype)
        memory = args.plan_memory * GIB
    return Target(gpu, dtype, memory * (1 - MARGIN if gpu else 1), n)


@contextmanager
def pretending(target: Target) -> Iterator[Memory]:
    """Inside, tensors have no memory, processes send nothing, and kernels do not run."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # imports torch's compiler, which takes seconds
    with ExitStack() as stack:
        def pretend(where, name, value):
            stack.enter_context(patch.object(where, name, value))

        pretend(Tensor, "item", lambda tensor: 1.0)
        pretend(Tensor, "__bool__", lambda tensor: True)
        pretend(torch.nn.Module, "float", to_float32)
        pretend(processes, "_reduced", lambda values, *_: list(values))
        pretend(kernels, "uses_triton", lambda *_: target.gpu and kernels.has_triton())
        if target.gpu:
            pretend(model_module, "linear_float32", lambda h, w: torch.empty(*h.shape[:-1], len(w)))
            for of_device in (cache.MOST_SLOTS, cache.GRAIN, sample.TOKENS_PER_SYNC):
                stack.enter_context(patch.dict(of_device, cpu=of_device["cuda"]))
        if target.gpu and kernels.has_triton():
            from triton.runtime.jit import KernelInterface
            pretend(KernelInterface, "__getitem__", lambda kernel, grid: lambda *args, **kwargs: None)
        if target.processes > 1:
            from torch.distributed import device_mesh
            from torch.testing._internal.distributed.fake_pg import FakeStore
            dist.init_process_group("fake", rank=0, world_size=target.processes, store=FakeStore())
            stack.callback(dist.destroy_process_group)
            mesh = device_mesh.init_device_mesh("cpu", (target.processes,))
            pretend(device_mesh, "init_device_mesh", lambda *_: mesh)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        memory = stack.enter_context(Memory())
        pretend(sample, "free_memory", lambda _: target.memory - memory.now)
        yield memory


def to_float32(module: torch.nn.Module) -> torch.nn.Module:
    """`module.float()`, which does not know how to exchange the memory of a FakeTensor."""
    for part in module.modules():
        for name, w in part._parameters.items():
            if w is not None and w.dtype != torch.float32:
                part._parameters[name] = torch.nn.Parameter(w.detach().float())
    return module


def build(config: Config, tokenizer: Tokenizer, dtype: torch.dtype) -> Transformer:
    """The model as `checkpoint.load` makes it, but for what the weights hold."""
    with torch.device("meta"):
        model = Transformer(config)
    weights = {name: torch.empty(w.shape, dtype=dtype) for name, w in model.state_dict().items()}
    model.load_state_dict(weights, assign=True)
    model.vocab = min(tokenizer.size, config.vocab_size)
    return model


# ---- the table -----------------------------------------------------------------------------------
PASSING = "logits, and what lives for a moment"


def in_units(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / MIB:.2f} MiB"


class Ledger:
    """What is held all the time, and what is held beside it in each phase of the work: bytes by name."""

    def __init__(self, memory: Memory, target: Target):
        self.memory = memory
        self.target = target
        self.held: dict[str, int] = {}
        self.phases: dict[str, dict[str, int]] = {}
        self.peaks: dict[str, int] = {}

    def hold(self, name: str) -> None:
        """Name what has come to stay since the last call."""
        self.held[name] = self.memory.now - sum(self.held.values())

    @contextmanager
    def phase(self, name: str) -> Iterator[dict[str, int]]:
        """Measure the peak of what runs inside, which may name what it holds for a time.

        Of several phases of one name, the one with the highest peak stays.
        """
        self.memory.peak = self.memory.now
        own = {}
        yield own
        if self.memory.peak < self.peaks.get(name, 0):
            return
        self.peaks[name] = self.memory.peak
        rows = {**self.held, **own}
        self.phases[name] = {**rows, PASSING: self.memory.peak - sum(rows.values())}

    def table(self) -> str:
        names = list(dict.fromkeys(name for rows in self.phases.values() for name in rows))
        names = [name for name in names if name != PASSING] + [PASSING]
        table = [("", *self.phases)]
        for name in names:
            sizes = [in_units(rows[name]) if name in rows else "" for rows in self.phases.values()]
            table.append((name, *sizes))
        table.append(("at the peak", *map(in_units, self.peaks.values())))
        return "\n".join(f"{name:38}" + "".join(f"{text:>14}" for text in texts) for name, *texts in table)


# ---- training --------------------------------------------------------------------------------------
def add_optimizer(model: Transformer, args, ledger: Ledger) -> Optimizer:
    """A trainer's. In several processes it takes its shards of the model here."""
    optimizer = Optimizer(model, args.weight_decay, max_norm=args.max_norm)
    model.recompute = args.recompute
    if processes.world() > 1:
        ledger.hold("weights in float32, a shard")
    elif model.dtype != torch.float32:
        ledger.hold("masters in float32")
    return optimizer


def first_step(optimizer: Optimizer, forward: Callable[[], Tensor], ledger: Ledger) -> None:
    """Makes the moments. `forward`: a micro-batch's, to the loss."""
    forward().backward()
    optimizer.step(0.0)
    ledger.hold("moments of AdamW")


def later_step(optimizer: Optimizer, forward: Callable[[], Tensor], several: bool, ledger: Ledger) -> None:
    """A step of one micro-batch or, where steps have several, of two."""
    memory = ledger.memory
    with ledger.phase("training") as own:
        start = memory.now
        for _ in range(2 if several else 1):
            before = memory.now
            loss = forward()
            activations = memory.now - before
            loss.backward()
            del loss
        own["gradients"] = memory.now - start
        name = "activations, gathered weights" if processes.world() > 1 else "activations"
        # Alone, a micro-batch gives its activations up while the gradients come.
        own[name] = min(activations, memory.peak - start - own["gradients"])
        optimizer.step(0.0)
        shard = []  # a checkpoint collects one in main memory
        for _, w in optimizer.whole_weights():
            if not ledger.target.gpu:
                shard.append(w)
            if sum(x.nbytes for x in shard) > checkpoint.SHARD_BYTES:
                shard = [w]


# ---- sampling --------------------------------------------------------------------------------------
def pretended_sampler(model: Transformer, tokenizer: Tokenizer, target: Target, *how) -> Sampler:
    sampler = Sampler(model, tokenizer, *how)
    sampler.graphed = target.gpu
    return sampler


class NoRoom(Exception):
    """For the cache of the sampler."""


def requests_of(prompts: list[list[int]], n: int) -> list[Request]:
    return [Request(prompt, list(range(n))) for prompt in prompts]


def longest_part(prompts: list[list[int]], target: Target) -> list[list[int]]:
    """As many as a process gets, the longest."""
    return prompts[-math.ceil(len(prompts) / target.processes):]


def sampling(
    sampler: Sampler, requests: list[Request], params: Params, ledger: Ledger, later: Sequence[Request] = (),
) -> str:
    """The cache for the requests (shortest first), as many of them as fill it, and a step of all slots.

    `later` are longer ones that come while those run. Returns a line about the cache.
    """
    memory = ledger.memory
    sampler.params = params
    longest = max(map(sampler.room, [*requests, *later]))
    with ledger.phase("sampling") as own, torch.inference_mode():
        before = memory.now
        try:
            sampler.fit_cache(requests)
            if later:
                requests = later
                sampler.fit_cache(requests, growing=True)
        except UserError as e:
            raise NoRoom(str(e)) from e
        cache_bytes = sampler.cache.nbytes
        slots, capacity = sampler.cache.slots, sampler.cache.capacity
        if memory.now > before:
            own["cache of the sampler"] = memory.now - before
        at_once = requests[-math.ceil(slots / len(requests[-1].indices)):]
        sampler.run_prompts([(slot, request.prompt[:-1]) for slot, request in enumerate(at_once)])
        of_prompts = memory.peak
        memory.peak = before = memory.now
        sampler.feed_and_choose(slots, (capacity if sampler.graphed else longest) - 1)
        of_a_step = memory.peak - before
        if sampler.graphed:  # what a graph computes with stays its own
            own["CUDA graphs"] = of_a_step
            sampler.graphs.pool = torch.empty(of_a_step, dtype=torch.uint8)
        memory.peak = max(memory.peak, of_prompts)
    sampler.release()
    if sampler.graphed:
        ledger.held.update(own)
    fitting = int(sampler.cache_budget // (cache_bytes / slots))
    return f"{slots} slots of {capacity:,} tokens; {fitting:,} would fit"


# ---- a plan for each command -----------------------------------------------------------------------
def of_sft(args) -> None:
    _, config, tokenizer = read_folder(args.model, args.chat_template_kwargs, weights=False)
    sft.refuse_long_context(args, config)
    examples = sft.read_examples(args.data, tokenizer, args.context)

    def run(args, target):
        with pretending(target) as memory:
            ledger = Ledger(memory, target)
            model = build(config, tokenizer, target.dtype)
            if target.processes == 1:
                ledger.hold("weights")
            batches = sft.all_batches(examples, args, model)
            first, later = [], []  # micro-batches, of all processes and steps
            for batch in batches:
                for r in range(target.processes):
                    part = micro_batches(batch[r::target.processes], len, args.micro_batch_tokens)
                    first += part[:1]
                    later += part[1:]
            optimizer = add_optimizer(model, args, ledger)
            first_step(optimizer, lambda: sft.loss_of(model, widest_of(first)), ledger)
            later_step(optimizer, lambda: sft.loss_of(model, widest_of(first)), False, ledger)
            if later:  # there are gradients already
                later_step(optimizer, lambda: sft.loss_of(model, widest_of(later)), True, ledger)
            widest = widest_of(first + later)
            tokens = sum(len(example) for batch in batches for example in batch)
            return ledger, [
                about(model, args, target),
                f"the largest micro-batch: {len(widest)} rows of up to {max(map(len, widest)):,} tokens",
                f"{len(examples):,} rows; {len(batches):,} steps, {tokens:,} tokens in all",
                on_disk(model, target),
            ]
    answer(args, run)


def widest_of(micros: list) -> list:
    """The micro-batch with most tokens, padding included."""
    return max(micros, key=lambda micro: len(micro) * max(map(len, micro)))


def of_grpo(args) -> None:
    args.model, args.out = grpo.from_where_to_where(args.model, args.out)
    _, config, tokenizer = read_folder(args.model, args.chat_template_kwargs, weights=False)
    problems, held_out = grpo.read_problems(args)
    context = config.max_position_embeddings
    prompts = sorted(grpo.prompts_of(problems, tokenizer, context), key=len)
    to_validate = sorted(grpo.prompts_of(held_out, tokenizer, context), key=len)
    params = Params(args.max_new_tokens, args.temperature)

    def run(args, target):
        with pretending(target) as memory:
            ledger = Ledger(memory, target)
            model = build(config, tokenizer, target.dtype)
            policy, reference = grpo.copies_of(model, torch.device("cpu"), args.kl)
            with_reference = " and the reference's" if args.kl else ""
            ledger.hold(("the sampler's weights" if target.processes > 1 else "weights") + with_reference)
            optimizer = add_optimizer(model, args, ledger)
            sampler = pretended_sampler(policy, tokenizer, target, args.slots, grpo.SAMPLER_CACHE_FRACTION)
            parts = longest_parts(prompts[-1], context, args)
            responses = [response.tokens for response in parts[0]]

            def forward():
                logp, _ = grpo.response_logprobs(model, prompts[-1], responses, args.temperature)
                if reference is not None:
                    with torch.no_grad():
                        grpo.response_logprobs(reference, prompts[-1], responses, args.temperature)
                return logp.sum()
            asked = prompts[-args.questions_per_step:]
            mine = requests_of(longest_part(asked, target), args.rollouts)
            sampling(sampler, mine, params, ledger)  # as many slots as the first step finds
            first_step(optimizer, forward, ledger)
            of_cache = sampling(sampler, mine, params, ledger)
            if to_validate:
                sampling(sampler, requests_of(longest_part(to_validate, target), 1), params, ledger)
            several = len(parts) * args.mini_batch > target.processes
            later_step(optimizer, forward, several, ledger)
            rollouts = args.questions_per_step * args.rollouts
            updates = args.questions_per_step // args.mini_batch
            return ledger, [
                about(model, args, target),
                f"the sampler: {of_cache}",
                f"the largest micro-batch: {len(responses)} responses of {len(responses[0]):,} tokens to a "
                f"prompt of {len(prompts[-1]):,}",
                f"{args.steps:,} steps of {rollouts:,} rollouts and {updates:,} updates; at most "
                f"{args.steps * rollouts * args.max_new_tokens:,} sampled tokens, and as many to train on",
                on_disk(model, target),
            ]
    answer(args, run)


def longest_parts(prompt: list[int], context: int, args) -> list:
    """The micro-batches of a group whose responses all reach the budget."""
    length = min(args.max_new_tokens, context - len(prompt))
    completion = Completion(prompt, [0] * length, [0.0] * length, "stop")
    group = grpo.Group(0, None, None, prompt, [completion] * args.rollouts, advantages=[1.0] * args.rollouts)
    responses = grpo.responses_to_train(group, args, 1, 1, keep_all=True)
    return micro_batches(responses, lambda response: response.cost, args.micro_batch_tokens)


def of_sample(args) -> None:
    if args.prompt is not None:
        raise UserError("--plan is about the questions of --task; leave --prompt out")
    _, config, tokenizer = read_folder(args.model, args.chat_template_kwargs, weights=False)
    found = tasks.find_all(args.task, args.data_dir)
    problems = tasks.problems_of(found, args.split, args.questions, args.seed)
    queue = sample.attempt_requests(args, problems, set(), tokenizer)
    prompts = sorted((request.prompt for request in queue), key=len)
    reflections = []
    if args.reflections:  # on attempts that used their budget up
        _, longest = max(problems, key=lambda pair: len(pair[1].question))
        asked = tokenizer.chat(tasks.reflection_prompt(longest.question, ""))
        prompt = (asked + [0] * args.max_new_tokens)[:config.max_position_embeddings - 1]
        reflections = requests_of([prompt] * (len(prompts) * args.n), args.reflections)

    def run(args, target):
        with pretending(target) as memory:
            ledger = Ledger(memory, target)
            model = build(config, tokenizer, target.dtype)
            ledger.hold("weights")
            sampler = pretended_sampler(model, tokenizer, target, args.slots)
            mine = requests_of(longest_part(prompts, target), args.n)
            later = reflections[:len(mine) * args.n]
            of_cache = sampling(sampler, mine, sample.choice_of(args, model), ledger, later)
            attempts = len(queue) * args.n
            texts = attempts * (1 + args.reflections)
            return ledger, [
                about(model, args, target),
                f"the sampler: {of_cache}",
                f"{len(problems):,} questions, {attempts:,} attempts and at most {texts - attempts:,} "
                f"reflections: at most {texts * args.max_new_tokens:,} sampled tokens",
            ]
    answer(args, run)


# ---- what is said ----------------------------------------------------------------------------------
def about(model: Transformer, args, target: Target) -> str:
    n = sum(w.numel() for w in model.parameters())
    count = f"{target.processes} processes, each" if target.processes > 1 else "one process"
    place = "a GPU" if target.gpu else "a CPU"
    dtype = str(target.dtype).removeprefix("torch.")
    return (f"{args.model}: {n:,} parameters, {dtype}; {count} on {place} where tensors may take "
            f"{in_units(target.memory)}")


def on_disk(model: Transformer, target: Target) -> str:
    n = sum(w.numel() for w in model.parameters())
    return (f"on disk: {in_units(n * target.dtype.itemsize)} of weights and {in_units(n * 12)} of state, "
            "twice that while a checkpoint is written")


def answer(args, run: Callable) -> None:
    """Print the plan. Raises UserError if the run does not fit, with a change that would make it fit."""
    if os.environ.get("RANK", "0") != "0":
        return
    target = target_of(args)
    ledger, lines = outcome(run, args, target)
    say("\n".join(lines))
    if ledger:
        say(f"\n{ledger.table()}\n")
    if fits(ledger, target):
        say("it fits")
        return
    say("it does not fit; trying what would")
    refusal = f"--plan: it does not fit into {in_units(target.memory)}"
    words = ""
    for words, changed, other in changes(args, target):
        ledger, _ = outcome(run, changed, other)
        if fits(ledger, other):
            raise UserError(f"{refusal}; {words} it takes {in_units(max(ledger.peaks.values()))}")
    raise UserError(f"{refusal}{f', nor {words}' if words else ''}; take a smaller model or larger devices")


def outcome(run: Callable, args, target: Target) -> tuple[Ledger | None, list[str]]:
    """What `run` returns; None instead of a table if the sampler finds no room for its cache."""
    try:
        return run(args, target)
    except NoRoom as e:
        return None, [str(e)]


def fits(ledger: Ledger | None, target: Target) -> bool:
    return ledger is not None and max(ledger.peaks.values()) <= target.memory


def changes(args, target: Target) -> Iterator[tuple[str, Namespace, Target]]:
    """(words, flags, target): what to try, the cheapest first, each with those before it."""
    flags = dict(vars(args))
    given = []

    def change(word, **changed):
        flags.update(changed)
        given.append(word)
        return f"with {' '.join(given)}", Namespace(**flags), target

    if not flags.get("recompute", True):
        yield change("--recompute", recompute=True)
    if flags.get("micro_batch_tokens", 0) > 512:
        yield change("--micro-batch-tokens 512", micro_batch_tokens=512)
    if "slots" in flags and not 0 < flags["slots"] <= 16:
        yield change("--slots 16", slots=16)
    # A sampler holds all weights, however many processes there are; those on CPUs share one memory.
    if "recompute" in flags and target.gpu:
        target = replace(target, processes=2 * target.processes)
        words = f"with {' '.join(given)} and " if given else "with "
        yield f"{words}{target.processes} processes", Namespace(**flags), target
