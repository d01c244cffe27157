"""What a run will hold in memory and how much work it is, before it starts: the flag --plan.

    python sft.py --model Qwen/Qwen2.5-1.5B-Instruct --data silver.jsonl --plan      # on this machine
    python grpo.py --model Qwen/Qwen2.5-7B-Instruct --plan 4 --plan-memory 80        # on four GPUs of 80 GiB

What is held is not computed by formulas. A plan runs the program's own code (model, optimizer, sharding,
sampler) on tensors that have a shape but no memory (torch's FakeTensor), among processes that send nothing
(torch's fake process group), and adds up the bytes of all tensors that live after each operation. For a GPU
the Triton operations run too, but for their kernels, if Triton is installed here.

It takes the worst case: the longest prompts, answered up to the budget; the micro-batch with most tokens.
What it cannot see is no tensor: CUDA itself, buffers of NCCL, gaps between tensors; MARGIN of a GPU is left
for them. Left out: time, which depends on the machine.

A leaf: the commands import it where a plan is asked for.
"""
import math
import os
import weakref
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import cache
import grpo
import kernels
import model as model_module
import processes
import sample
import sft
import tasks
import tensors
from cache import free_memory, host_memory
from checkpoint import device_and_dtype, read_folder
from cli import UserError
from diagnostics import BYTES_A_TOKEN
from model import Config, Transformer
from sample import Completion, NoRoom, Params, Request, Sampler
from screen import say
from tokenizer import Tokenizer
from train import Optimizer, micro_batches, settle_flags

MIB, GIB = 2**20, 2**30
MARGIN = 0.1  # of a GPU's memory


# ---- counting bytes --------------------------------------------------------------------------------
class Memory(TorchDispatchMode):
    """While it is on: `now`, the bytes of all tensors that it has met and that live, and their `peak`.

    Storages are counted, each once, however many tensors are views of it; of a sharded tensor the part that
    is here. FSDP2 frees a block's weights by resizing their storage, which is no operation: so that is
    watched too. What one operation uses inside is not seen.
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
        resize = torch.UntypedStorage.resize_

        def resize_and_tell(storage, size):
            resize(storage, size)
            self._resize(storage)
            return storage
        self.watch = patch.object(torch.UntypedStorage, "resize_", resize_and_tell)
        self.watch.start()
        return super().__enter__()

    def __exit__(self, *exception):
        self.watch.stop()
        return super().__exit__(*exception)


# ---- the machine that is planned for -----------------------------------------------------------------
@dataclass(frozen=True)
class Target:
    gpu: bool
    fused: bool  # by Triton's kernels and CUDA graphs
    dtype: torch.dtype
    memory: float  # bytes that tensors of one process may take
    processes: int


def target_of(args) -> Target:
    """What --plan and --plan-memory mean, together with --device and --dtype."""
    n = args.plan or int(os.environ.get("WORLD_SIZE", 1))
    gpu = args.device == "auto" or args.device.startswith("cuda")
    if args.plan_memory is None or not gpu:
        device, dtype = device_and_dtype(args.device, args.dtype)
        gpu = device.type == "cuda"
        memory = free_memory(device) if gpu else host_memory()
    else:
        dtype = torch.bfloat16 if args.dtype == "auto" else getattr(torch, args.dtype)
    if args.plan_memory is not None:
        memory = args.plan_memory * GIB
    # Processes share a machine's memory, but have a GPU each.
    memory = memory * (1 - MARGIN) if gpu else memory / n
    fused = gpu and os.environ.get("KERNELS") != "reference"
    return Target(gpu, fused, dtype, memory, n)


@contextmanager
def pretending(target: Target) -> Iterator[Memory]:
    """Inside, tensors have no memory, processes send nothing, and kernels do not run."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # imports torch's compiler, which takes seconds
    with ExitStack() as stack:
        def pretend(where, name, value):
            stack.enter_context(patch.object(where, name, value))

        triton = target.fused and kernels.has_triton()
        pretend(Tensor, "item", lambda tensor: 1.0)  # any number will do
        pretend(Tensor, "__bool__", lambda tensor: True)
        pretend(torch.nn.Module, "float", to_float32)
        pretend(processes, "_reduced", lambda values, *_: list(values))
        pretend(kernels, "uses_triton", lambda *_: triton)
        if triton:
            from triton.runtime.jit import KernelInterface
            pretend(KernelInterface, "__getitem__", lambda kernel, grid: lambda *args, **kwargs: None)
        if target.gpu:  # though our tensors say that they are on a CPU
            pretend(model_module, "linear_float32", lambda h, w: torch.empty(*h.shape[:-1], len(w)))
            for limits in (cache.MOST_SLOTS, cache.GRAIN, sample.TOKENS_PER_SYNC):
                stack.enter_context(patch.dict(limits, cpu=limits["cuda"]))
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
        self.phases: dict[str, dict[str, int]] = {}  # each adds up to its peak

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
        rows = {**self.held, **own}
        if self.memory.peak > sum(self.phases.get(name, {}).values()):
            self.phases[name] = {**rows, PASSING: self.memory.peak - sum(rows.values())}

    @property
    def peak(self) -> int:
        return max(sum(rows.values()) for rows in self.phases.values())

    def table(self) -> str:
        names = list(dict.fromkeys(name for rows in self.phases.values() for name in rows))
        names = [name for name in names if name != PASSING] + [PASSING]
        table = [("", *self.phases)]
        for name in names:
            sizes = [in_units(rows[name]) if name in rows else "" for rows in self.phases.values()]
            table.append((name, *sizes))
        table.append(("at the peak", *(in_units(sum(rows.values())) for rows in self.phases.values())))
        return "\n".join(f"{name:38}" + "".join(f"{text:>14}" for text in texts) for name, *texts in table)


# ---- training --------------------------------------------------------------------------------------
def make_optimizer(model: Transformer, args, ledger: Ledger) -> Optimizer:
    """A trainer's, of a model that recomputes if it is to. Several processes shard the model here."""
    optimizer = Optimizer(model, args.weight_decay, max_norm=args.max_norm)
    model.recompute = args.recompute
    if processes.world() > 1:
        ledger.hold("weights in float32, a shard")
    elif model.dtype != torch.float32:
        ledger.hold("masters in float32")
    return optimizer


def training_step(optimizer: Optimizer, losses: list[Callable[[], Tensor]], ledger: Ledger) -> None:
    """An optimizer step of some micro-batches, each a function that runs it forward, and a checkpoint."""
    memory = ledger.memory
    with ledger.phase("training") as own:
        start = memory.now
        for forward in losses:
            before = memory.now
            loss = forward()
            activations = memory.now - before
            loss.backward()
            del loss
        own["gradients"] = memory.now - start
        # In a step of one micro-batch activations go while gradients come: the two are never whole together.
        activations = min(activations, memory.peak - start - own["gradients"])
        own["activations, gathered weights" if processes.world() > 1 else "activations"] = activations
        optimizer.step(0.0)
        weights = optimizer.whole_weights()
        for _ in weights if ledger.target.gpu else tensors.shards_of(weights):
            pass


# ---- sampling --------------------------------------------------------------------------------------
def requests_of(prompts: list[list[int]], n: int) -> list[Request]:
    return [Request(prompt, list(range(n))) for prompt in prompts]


def of_a_process(prompts: list[list[int]], target: Target) -> list[list[int]]:
    """As many prompts as a process gets: the longest ones."""
    return prompts[-math.ceil(len(prompts) / target.processes):]


def sampling_step(
    sampler: Sampler, requests: list[Request], params: Params, ledger: Ledger, later=(),
) -> str:
    """The cache for the requests (shortest first), a step of all slots, and the prompts that fill them.

    `later` are longer requests that come while those run. Returns a line about the cache, which stays if
    there are graphs.
    """
    memory = ledger.memory
    sampler.params = params
    sampler.graphed = ledger.target.fused
    longest = max(map(sampler.room, [*requests, *later]))
    with ledger.phase("sampling") as own, torch.inference_mode():
        sampler.graphs.pool = None
        sampler.fit_cache(requests)
        if later:
            requests = later
            sampler.fit_cache(requests, growing=True)
        cache = sampler.cache
        own["cache of the sampler"] = cache.nbytes
        fitting = int(sampler.cache_budget // (cache.nbytes / cache.slots))
        memory.peak = before = memory.now
        sampler.feed_and_choose(cache.slots, (cache.capacity if sampler.graphed else longest) - 1)
        if sampler.graphed:  # what a graph computes with stays its own
            own["CUDA graphs"] = memory.peak - before
            sampler.graphs.pool = torch.empty(own["CUDA graphs"], dtype=torch.uint8)
        # As many groups as fill the slots; which slots their prompts are in makes no difference.
        groups = requests[-math.ceil(cache.slots / len(requests[-1].indices)):]
        sampler.run_prompts([(slot, request.prompt[:-1]) for slot, request in enumerate(groups)])
    line = f"the sampler: {cache.slots} slots of {cache.capacity:,} tokens; {fitting:,} would fit"
    del cache
    sampler.release()
    if sampler.graphed:
        ledger.held.update(own)
    return line


# ---- a plan for each command -----------------------------------------------------------------------
# Each names what is held in the ledger, lets its phases run, and returns lines to print above the table.
def of_sft(args) -> None:
    folder = read_folder(args.model, args.chat_template_kwargs, weights=False)
    _, config, tokenizer = folder
    sft.refuse_long_context(args, config)
    examples, _ = sft.hold_out(sft.read_examples(args.data, tokenizer, args.context), args)

    def measure(model: Transformer, flags, ledger: Ledger) -> list[str]:
        n = ledger.target.processes
        batches = sft.all_batches(examples, flags, model)
        onto_nothing, onto_gradients = [], []  # micro-batches that are the first in a step, or are not
        for batch in batches:
            dealt = [processes.balanced(batch, len, r, n) for r in range(n)]
            parts = [micro_batches(mine, len, flags.micro_batch_tokens) for mine in dealt]
            for part in parts:
                onto_nothing += part[:1]
                onto_gradients += part[1:]
            if min(map(len, parts)) < max(map(len, parts)):
                onto_gradients.append(batch[:1])  # what a process runs that has no more
        if n == 1:
            ledger.hold("weights")
        optimizer = make_optimizer(model, flags, ledger)
        first = partial(sft.loss_of, model, widest(onto_nothing))
        training_step(optimizer, [first], ledger)
        ledger.hold("moments of AdamW")
        training_step(optimizer, [first], ledger)
        if onto_gradients:
            later = partial(sft.loss_of, model, widest(onto_gradients))
            training_step(optimizer, [later, later], ledger)
        largest = widest(onto_nothing + onto_gradients)
        tokens = sum(len(example) for batch in batches for example in batch)
        return [
            f"the largest micro-batch: {len(largest)} rows of up to {max(map(len, largest)):,} tokens",
            f"{len(examples):,} rows; {len(batches):,} steps, {tokens:,} tokens in all",
        ]
    print_plan(args, folder, measure)


def widest(micros: list) -> list:
    """The micro-batch with most tokens, padding included."""
    return max(micros, key=lambda micro: len(micro) * max(map(len, micro)))


def of_grpo(args) -> None:
    args.model, args.out = grpo.from_where_to_where(args.model, args.out)
    folder = read_folder(args.model, args.chat_template_kwargs, weights=False)
    _, config, tokenizer = folder
    context = config.max_position_embeddings
    problems, held_out = grpo.read_problems(args)
    prompts = sorted(grpo.prompts_of(problems, tokenizer, context), key=len)
    to_validate = sorted(grpo.prompts_of(held_out, tokenizer, context), key=len)
    params = Params(args.max_new_tokens, args.temperature)

    def measure(model: Transformer, flags, ledger: Ledger) -> list[str]:
        target = ledger.target
        policy, reference = grpo.copies_of(model, torch.device("cpu"), flags.kl)
        name = "weights of the sampler" if target.processes > 1 else "weights"
        ledger.hold(f"{name} and the reference" if flags.kl else name)
        optimizer = make_optimizer(model, flags, ledger)
        sampler = Sampler(policy, tokenizer, flags.slots, grpo.SAMPLER_CACHE_FRACTION)
        prompt = prompts[-1]
        responses = largest_responses(prompt, context, flags, target.processes)

        part = grpo.Part(
            grpo.Group(0, None, None, prompt),
            [grpo.Response(0, Completion(prompt, tokens), 0.0, 0.0, 0) for tokens in responses])
        groups = min(flags.micro_batch_tokens // grpo.size_of(part),
                     math.ceil(flags.mini_batch / target.processes))
        groups = max(1, groups)
        micro_batch = [(prompt, responses)] * groups

        def forward():
            logp, _ = grpo.response_logprobs(model, micro_batch, flags.temperature)
            if reference is not None:
                with torch.no_grad():
                    grpo.response_logprobs(reference, micro_batch, flags.temperature)
            return logp.sum()
        asked = of_a_process(prompts[-flags.questions_per_step:], target)
        sampling_step(sampler, requests_of(asked, flags.rollouts), params, ledger)  # this decides the slots
        training_step(optimizer, [forward], ledger)
        ledger.hold("moments of AdamW")
        cache_line = sampling_step(sampler, requests_of(asked, flags.rollouts), params, ledger)
        if to_validate:
            sampling_step(sampler, requests_of(of_a_process(to_validate, target), 1), params, ledger)
        alone = groups * len(responses) * target.processes >= flags.mini_batch * flags.rollouts
        training_step(optimizer, [forward] if alone else [forward, forward], ledger)
        optimizer.refresh(policy)
        rollouts = flags.questions_per_step * flags.rollouts
        logged = min(flags.log_groups, flags.questions_per_step) * flags.rollouts * flags.max_new_tokens
        updates = flags.questions_per_step // flags.mini_batch
        return [
            cache_line,
            f"the largest micro-batch: {len(responses)} responses of {len(responses[0]):,} tokens to "
            f"{'a prompt' if groups == 1 else f'each of {groups} prompts'} of {len(prompt):,}",
            f"{flags.steps:,} steps of {rollouts:,} rollouts and {updates:,} updates; at most "
            f"{flags.steps * rollouts * flags.max_new_tokens:,} sampled tokens, and as many to train on",
            f"rollouts.jsonl: at most about {in_units(flags.steps * logged * BYTES_A_TOKEN)}",
        ]
    print_plan(args, folder, measure)


def largest_responses(prompt: list[int], context: int, flags, processes: int) -> list[list[int]]:
    """Responses that fill --micro-batch-tokens best, or one that is longer than that."""
    prompt_share = len(prompt) // flags.rollouts  # of the prompt, in what a response costs
    longest = min(flags.max_new_tokens, context - len(prompt))
    of_a_process = flags.mini_batch * flags.rollouts * (longest + prompt_share) // processes
    budget = min(flags.micro_batch_tokens, of_a_process)

    def length(rows):
        return max(1, min(longest, budget // rows - prompt_share)) if rows > 1 else longest
    rows = max(range(1, flags.rollouts + 1), key=lambda rows: rows * (length(rows) + prompt_share))
    return [[0] * length(rows)] * rows


def of_sample(args) -> None:
    if args.prompt is not None:
        raise UserError("--plan is about the questions of --task; leave --prompt out")
    folder = read_folder(args.model, args.chat_template_kwargs, weights=False)
    _, config, tokenizer = folder
    found = tasks.find_all(args.task, args.data_dir)
    problems = tasks.problems_of(found, args.split, args.questions, args.seed)
    queue = sample.attempt_requests(args, problems, tokenizer)
    prompts = sorted((request.prompt for request in queue), key=len)
    _, longest = max(problems, key=lambda pair: len(pair[1].question))
    reflection = tokenizer.chat(tasks.reflection_prompt(longest.question, "")) + [0] * args.max_new_tokens
    reflection = reflection[:config.max_position_embeddings - 1]

    def measure(model: Transformer, flags, ledger: Ledger) -> list[str]:
        ledger.hold("weights")
        sampler = Sampler(model, tokenizer, flags.slots)
        mine = of_a_process(prompts, ledger.target)
        later = []
        if flags.reflections:
            later = requests_of([reflection] * (len(mine) * flags.n), flags.reflections)
        params = sample.choice_of(flags, model)
        cache_line = sampling_step(sampler, requests_of(mine, flags.n), params, ledger, later)
        attempts = len(queue) * flags.n
        texts = attempts * (1 + flags.reflections)
        return [
            cache_line,
            f"{len(problems):,} questions, {attempts:,} attempts and at most {texts - attempts:,} "
            f"reflections: at most {texts * flags.max_new_tokens:,} sampled tokens",
        ]
    print_plan(args, folder, measure)


# ---- what is said ----------------------------------------------------------------------------------
def print_plan(args, folder: tuple, measure: Callable) -> None:
    """Print the plan. Raises UserError if the run does not fit, with a change that would make it fit."""
    if os.environ.get("RANK", "0") != "0":
        return
    target = target_of(args)
    if hasattr(args, "micro_batch_tokens"):
        settle_flags(args, torch.device("cuda" if target.gpu else "cpu"))
    if target.fused and not kernels.has_triton():
        say("Triton is not installed here: this plan is of plain PyTorch's operations, which hold more")
    ledger, lines = measured(folder, measure, args, target)
    say("\n".join(lines))
    if ledger:
        say(f"\n{ledger.table()}\n")
    if fits(ledger, target):
        say("it fits")
        return
    say("it does not fit; trying what would")
    refusal = f"--plan: it does not fit into {in_units(target.memory)}"
    tried = ""
    for words, changed, other in changes(args, target):
        ledger, _ = measured(folder, measure, changed, other)
        if fits(ledger, other):
            raise UserError(f"{refusal}; {words} it takes {in_units(ledger.peak)}")
        tried = f", nor {words}"
    raise UserError(f"{refusal}{tried}; take a smaller model or larger devices")


def measured(folder: tuple, measure: Callable, args, target: Target) -> tuple[Ledger | None, list[str]]:
    """A ledger and lines about it; no ledger, but the reason, if the sampler finds no room for its cache."""
    _, config, tokenizer = folder
    with pretending(target) as memory:
        ledger = Ledger(memory, target)
        model = build(config, tokenizer, target.dtype)
        n = sum(w.numel() for w in model.parameters())
        try:
            lines = measure(model, args, ledger)
        except NoRoom as e:
            return None, [str(e)]
    count = f"{target.processes} processes, each" if target.processes > 1 else "one process"
    dtype = str(target.dtype).removeprefix("torch.")
    lines.insert(0, f"{args.model}: {n:,} parameters, {dtype}; {count} on a {'GPU' if target.gpu else 'CPU'} "
                    f"where tensors may take {in_units(target.memory)}")
    if "training" in ledger.phases:
        lines.append(f"on disk: {in_units(n * target.dtype.itemsize)} of weights and {in_units(n * 12)} of "
                     "state, up to twice that while a checkpoint is written")
    return ledger, lines


def fits(ledger: Ledger | None, target: Target) -> bool:
    return ledger is not None and ledger.peak <= target.memory


CHEAPER = {"recompute": True, "micro_batch_tokens": 512, "slots": 16}  # what to try, the cheapest first


def changes(args, target: Target) -> Iterator[tuple[str, Namespace, Target]]:
    """(words, flags, target): each with the changes before it."""
    given = []
    for name, value in CHEAPER.items():
        now = getattr(args, name, value)
        if not now or now > value:
            args = Namespace(**{**vars(args), name: value})
            flag = f"--{name.replace('_', '-')}"
            given.append(flag if value is True else f"{flag} {value}")
            yield f"with {' '.join(given)}", args, target
    # More processes divide what training holds; sampling has nothing to divide, and CPUs share one memory.
    if hasattr(args, "recompute") and target.gpu:
        given.append(f"{'and ' if given else ''}{2 * target.processes} processes")
        yield f"with {' '.join(given)}", args, replace(target, processes=2 * target.processes)
