"""Train the miniature: a base model that attempts small number problems once and judges one when asked.

    python mini/pretrain.py --out out/mini          # 16 million tokens, about 15 minutes on one core

It stands in for a pretrained model so that the whole method runs on a laptop. Its documents are the project's
own prompts, answered the way a weak model answers: an attempt is mostly a random expression that is worked
out with care, and only sometimes a hit; a judgement recomputes the attempt and compares. No document holds
two attempts, so whatever chaining appears later was taught by SkillFactory. All its problems come from the
split `pretrain`, which no other command uses.

The tokenizer is bytes, plus one token for each number up to 144, each line of the project's prompts and each
tag.
"""
import json
import math
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import torch  # noqa: E402
from tokenizers import AddedToken, decoders, models, pre_tokenizers  # noqa: E402
from tokenizers import Tokenizer as BPE  # noqa: E402

import tasks  # noqa: E402
from checkpoint import Tokenizer, config_of, save  # noqa: E402
from cli import command, number, parser, positive, refuse_existing  # noqa: E402
from model import Transformer  # noqa: E402
from train import micro_batches  # noqa: E402

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "use_cache": True,
}
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# ---- what the documents say ----------------------------------------------------------------------
MIX = {  # documents in 100
    "countdown-2-small": 8,
    "countdown-3-small": 30,
    "countdown-4-small": 27,
    "countdown-5-small": 20,
    "multiply-2-small": 15,
}
OPENINGS = {
    "plain": ("Let me work this out.\n", "I will go step by step.\n", "First I join two numbers.\n"),
    "plan": ("Plan: join two numbers, then bring in the others one by one.\n",
             "My plan is to build up from a first pair.\n"),
    "alternatives": ("One candidate is this.\n", "A first idea comes to mind.\n"),
    # Continued with the numbers of the problem.
    "rephrase": ("In short: numbers ", "What is needed: numbers "),
}
CHECKS = ("I compute it again.\n", "Let me redo the steps.\n", "Checking each step.\n")
HITS = (" is the target.\n", " is what was asked for.\n")
MISSES = (" is not ", " differs from ")  # continued with the target
MISUSED = ("The numbers are not the given ones.\n",)


@dataclass(frozen=True)
class Step:
    """One line of a solution: a op b = value."""
    a: int
    op: str
    b: int
    value: int


def random_chain(numbers: list[int], rng: random.Random) -> list[Step]:
    """The numbers in random order, each step going on from the last value, all within 0..60."""
    while True:
        first, *others = rng.sample(numbers, len(numbers))
        value = first
        steps = []
        for b in others:
            results = (("+", value + b), ("-", value - b), ("*", value * b))
            fitting = [(op, result) for op, result in results if 0 <= result <= 60]
            if not fitting:
                break
            op, result = rng.choice(fitting)
            steps.append(Step(value, op, b, result))
            value = result
        else:
            return steps


def expression(steps: list[Step]) -> str:
    """The chain as one expression: 2 + 3 = 5, 5 * 4 = 20 -> (2 + 3) * 4."""
    first, *others = steps
    text = f"{first.a} {first.op} {first.b}"
    for step in others:
        text = f"({text}) {step.op} {step.b}"
    return text


def chain_of(text: str) -> list[Step]:
    """The steps of a chain-shaped expression, the other way round."""
    first, *rest = text.replace("(", "").replace(")", "").split()
    value = int(first)
    steps = []
    for op, b in zip(rest[::2], map(int, rest[1::2]), strict=True):
        result = tasks.OPERATORS[op](value, b)
        steps.append(Step(value, op, b, result))
        value = result
    return steps


def lines(steps: list[Step]) -> str:
    return "".join(f"{step.a} {step.op} {step.b} = {step.value}\n" for step in steps)


def draw(task: tasks.Generated, rng: random.Random) -> tasks.Problem:
    """A problem of the split `pretrain`, of which no other split has a copy."""
    while True:
        made = task.make(rng)
        if made and tasks.hundredth(made[0]) in tasks.SPLITS["pretrain"]:
            return tasks.Problem("", task.name, made[1], made[2])


def attempt(problem: tasks.Problem, style: str, rng: random.Random, hit: float) -> tuple[str, list[Step]]:
    """What a weak solver writes: (text, its steps).

    It hits the target with probability `hit`, else by luck.
    """
    opening = rng.choice(OPENINGS[style])
    if problem.task.startswith("multiply"):
        a, b = map(int, problem.question.removeprefix("What is ").rstrip("?").split(" * "))
        value = a * b
        if rng.random() >= hit:
            value = max(0, value + rng.choice((-10, -2, -1, 1, 2, 10)))
        if style == "rephrase":
            opening = OPENINGS["plain"][1]
        return f"{opening}{a} * {b} = {value}\n<answer>{value}</answer>", [Step(a, "*", b, value)]
    numbers, target = problem.truth["numbers"], problem.truth["target"]
    steps = chain_of(problem.truth["answer"]) if rng.random() < hit else random_chain(numbers, rng)
    if style == "rephrase":
        opening += f"{' '.join(map(str, numbers))}, target {target}.\n"
    return f"{opening}{lines(steps)}<answer>{expression(steps)}</answer>", steps


def slip(problem: tasks.Problem, rng: random.Random) -> list[Step]:
    """The steps of a solver who swapped one number for another, as the model itself does at times.

    Best of all so that the target comes out, or a judge would learn to look at the result alone.
    """
    for _ in range(100):
        numbers = list(problem.truth["numbers"])
        numbers[rng.randrange(len(numbers))] = rng.randint(1, 12)
        steps = random_chain(numbers, rng)
        if steps[-1].value == problem.truth["target"]:
            break
    return steps


def judgement(problem: tasks.Problem, steps: list[Step], rng: random.Random) -> str:
    """A check of an attempt: recompute, compare, verdict. 4% are wrong, like a weak judge's."""
    opening = rng.choice(CHECKS)
    if problem.task.startswith("multiply"):
        claim, = steps
        target = claim.value
        again = [Step(claim.a, "*", claim.b, claim.a * claim.b)]
        misused = False
    else:
        target = problem.truth["target"]
        again = steps
        used = [steps[0].a, *(step.b for step in steps)]
        misused = sorted(used) != sorted(problem.truth["numbers"])
    value = again[-1].value
    right = value == target and not misused
    if misused:
        result = rng.choice(MISUSED)
    elif right:
        result = f"{value}{rng.choice(HITS)}"
    else:
        result = f"{value}{rng.choice(MISSES)}{target}.\n"
    mistaken = rng.random() < 0.04
    said = "Correct" if right != mistaken else "Incorrect"
    return f"{opening}{lines(again)}{result}<verdict>{said}</verdict>"


def document(rng: random.Random) -> tuple[list[dict], str]:
    """(chat messages, response) of one training document."""
    name = rng.choices(list(MIX), MIX.values())[0]
    task = tasks.find(name)
    problem = draw(task, rng)
    style = rng.choice(list(OPENINGS))
    if rng.random() < 0.55:
        text, _ = attempt(problem, style, rng, hit=0.6 if name.startswith("multiply") else 0.25)
        return task.prompt(problem, style), text
    text, steps = attempt(problem, style, rng, hit=0.5)
    if "numbers" in problem.truth and rng.random() < 0.2:
        steps = slip(problem, rng)
        text = f"{rng.choice(OPENINGS['plain'])}{lines(steps)}<answer>{expression(steps)}</answer>"
    return tasks.reflection_prompt(problem.question, text), judgement(problem, steps, rng)


# ---- tokenizer -----------------------------------------------------------------------------------
def phrases() -> list[str]:
    """Every fixed piece of text in the prompts, the documents and the traces: one token each."""
    question = tasks.find("countdown-2-small").problems("pretrain", 1)[0].question
    pieces = {"system\n", "user\n", "assistant\n", "Numbers: ", "\nTarget: "}
    pieces.add(question[question.index("\nReach"):])
    pieces |= {"What is ", ", target ", ".\n", " + ", " - ", " * ", " = ", "\n\n"}
    pieces |= {"<verdict>Correct</verdict>", "<verdict>Incorrect</verdict>"}
    for tag in ("think", "sample", "reflect", "answer"):
        pieces |= {f"<{tag}>", f"</{tag}>"}
    pieces |= {tasks.MUST_ANSWER, *(instruction for _, instruction in tasks.STYLES.values())}
    for part in tasks.REFLECT.split("{question}"):
        pieces |= set(part.split("{attempt}"))
    glue = json.loads((ROOT / "phrases.json").read_text())
    for texts in (*OPENINGS.values(), CHECKS, HITS, MISSES, MISUSED, *glue.values()):
        pieces |= set(texts)
    return sorted(pieces)


def make_tokenizer(folder: Path) -> Tokenizer:
    """Byte-level BPE without merges, and added tokens that are matched in the text, longest first."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = BPE(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    numbers = [str(n) for n in range(10, 145)]
    bpe.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in specials])
    bpe.add_tokens([AddedToken(t, normalized=False) for t in [*numbers, *phrases()]])
    bpe.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONFIG["max_position_embeddings"],
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    end, pad = bpe.token_to_id("<|im_end|>"), bpe.token_to_id("<|endoftext|>")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [end], "pad_token_id": pad}))
    return Tokenizer(folder)


# ---- training ------------------------------------------------------------------------------------
def batches(tokenizer: Tokenizer, tokens: int, seed: int):
    """Endless (ids (B, T), real (B, T-1)), rows padded on the right; `real` marks what is no padding.

    Every token is trained, prompts too: a prompt to judge holds an attempt, and that teaches attempts as
    well.
    """
    rng = random.Random(seed)
    while True:
        pool = []
        for _ in range(2000):
            messages, response = document(rng)
            pool.append(tokenizer.chat(messages) + tokenizer.encode(response) + [tokenizer.end_id])
        groups = micro_batches(pool, len, tokens, waste=math.inf)
        for group in rng.sample(groups, len(groups)):
            ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(d) for d in group], batch_first=True)
            lengths = torch.tensor([len(d) for d in group])
            yield ids, torch.arange(1, ids.shape[1]) < lengths[:, None]


def new_model(tokenizer: Tokenizer) -> Transformer:
    config = {**CONFIG, "vocab_size": tokenizer.size, "eos_token_id": tokenizer.end_id}
    model = Transformer(config_of(config))
    for w in model.parameters():
        if w.ndim == 2:
            torch.nn.init.normal_(w, std=w.shape[1] ** -0.5)
    return model


def arguments():
    p = parser(__doc__, out="out/mini", model=None)
    p.add_argument("--tokens", type=positive, default=16_000_000,
                   help="how many tokens to train on, padding included")
    p.add_argument("--batch", type=positive, default=1024, help="tokens of a step")
    p.add_argument("--matrix-lr", type=number(float, 0), default=0.02, help="Muon's rate for the matrices")
    p.add_argument("--lr", type=number(float, 0), default=3e-3,
                   help="AdamW's rate for the embedding, the norms and the biases")
    return p.parse_args()


def main():
    args = arguments()
    refuse_existing(args.out)
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # at this size a second thread costs more than it brings

    with tempfile.TemporaryDirectory() as folder:
        tokenizer = make_tokenizer(Path(folder))
    model = new_model(tokenizer)
    size = sum(w.numel() for w in model.parameters())
    print(f"{size / 1e6:.2f}M parameters, {tokenizer.size} tokens in the vocabulary")

    matrices, others = [], []
    for name, w in model.named_parameters():
        (matrices if w.ndim == 2 and "embed" not in name else others).append(w)
    optimizers = [  # (peak rate, optimizer)
        (args.matrix_lr, torch.optim.Muon(matrices, lr=args.matrix_lr, momentum=0.95, weight_decay=0.0)),
        (args.lr, torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)),
    ]
    data = batches(tokenizer, args.batch, args.seed)
    steps = math.ceil(args.tokens / args.batch)
    started = time.time()
    losses = []
    for step in range(1, steps + 1):
        ids, real = next(data)
        hidden = model(ids[:, :-1])[real]  # (N, C)
        logp, _ = model.logprobs(hidden, ids[:, 1:][real])
        loss = -logp.mean()
        loss.backward()
        schedule = min(step / 100, 1, (steps - step) / (0.4 * steps))  # warm-up, flat, down to 0
        for rate, optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * schedule
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        if step % 500 == 0 or step == steps:
            speed = step * args.batch / (time.time() - started)
            print(f"step {step}/{steps}  loss {sum(losses) / len(losses):.4f}  {speed:,.0f} "
                  "tokens/s", flush=True)
            losses.clear()
    save(args.out, model, tokenizer)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    command(main)
