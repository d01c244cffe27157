"""Train the miniature: a base model that attempts small number problems once and, when asked, judges one attempt.

    python mini/pretrain.py --out out/mini          # 16 million tokens, about 15 minutes on one core

It stands in for a pretrained model so that the whole method runs on a laptop. Its documents are the project's own prompts,
answered the way a weak model answers: an attempt is mostly a random expression that is worked out with care, and only
sometimes a hit; a judgement recomputes the attempt and compares. No document holds two attempts, so whatever chaining
appears later was taught by SkillFactory. All its problems come from the split `pretrain`, which no other command uses.

The tokenizer is bytes, plus one token for each number up to 144, each line of the project's prompts and each tag.
"""
import json
import math
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from tokenizers import AddedToken, Tokenizer as BPE, decoders, models, pre_tokenizers

import tasks
from cli import command, number, parser, positive, refuse_existing
from model import Config, Tokenizer, Transformer, save
from train import micro_batches

CONFIG = dict(architectures=["Qwen3ForCausalLM"], model_type="qwen3", hidden_size=96, intermediate_size=256, num_hidden_layers=3,
              num_attention_heads=4, num_key_value_heads=2, head_dim=24, hidden_act="silu", rms_norm_eps=1e-6, rope_theta=10000.0,
              max_position_embeddings=2048, tie_word_embeddings=True, torch_dtype="float32", use_cache=True)

OPENINGS = {
    "plain": ("Let me work this out.\n", "I will go step by step.\n", "First I join two numbers.\n"),
    "plan": ("Plan: join two numbers, then bring in the others one by one.\n", "My plan is to build up from a first pair.\n"),
    "alternatives": ("One candidate is this.\n", "A first idea comes to mind.\n"),
    "rephrase": ("In short: numbers ", "What is needed: numbers "),  # continued with the problem's own numbers
}
CHECKS = ("I compute it again.\n", "Let me redo the steps.\n", "Checking each step.\n")
HITS, MISSES = (" is the target.\n", " is what was asked for.\n"), (" is not ", " differs from ")  # a miss goes on with the target
MISUSED = ("The numbers are not the given ones.\n",)
MIX = {"countdown-2-small": 8, "countdown-3-small": 30, "countdown-4-small": 27, "countdown-5-small": 20, "multiply-2-small": 15}  # documents in 100
CHAT_TEMPLATE = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
                 "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


# ---- documents -------------------------------------------------------------------------------------------------------
def random_chain(numbers, rng):
    """[(a, operator, b, value)]: the numbers in random order, each step going on from the last value, all within 0..60."""
    while True:
        order = rng.sample(numbers, len(numbers))
        value, steps = order[0], []
        for b in order[1:]:
            fitting = [(op, v) for op, v in (("+", value + b), ("-", value - b), ("*", value * b)) if 0 <= v <= 60]
            if not fitting:
                break
            op, result = rng.choice(fitting)
            steps.append((value, op, b, result))
            value = result
        else:
            return steps


def expression(steps):
    text = str(steps[0][0])
    for i, (_, op, b, _) in enumerate(steps):
        text = f"({text}) {op} {b}" if i else f"{text} {op} {b}"
    return text


def chain_of(text):
    """The steps of a chain-shaped expression: chain_of("(2 + 3) * 4") -> [(2, "+", 3, 5), (5, "*", 4, 20)]."""
    parts = text.replace("(", "").replace(")", "").split()
    value, steps = int(parts[0]), []
    for op, b in zip(parts[1::2], map(int, parts[2::2])):
        result = {"+": value + b, "-": value - b, "*": value * b}[op]
        steps.append((value, op, b, result))
        value = result
    return steps


def lines(steps):
    return "".join(f"{a} {op} {b} = {c}\n" for a, op, b, c in steps)


def draw(task, rng):
    """A problem of the split `pretrain`, of which no other split has a copy."""
    while not (made := task.make(rng)) or tasks.hundredth(made[0]) not in tasks.SPLITS["pretrain"]:
        pass
    return tasks.Problem("", task.name, made[1], made[2])


def attempt(problem, style, rng, hit):
    """What a weak solver writes: (text, its steps). It hits the target with probability `hit`, else by luck."""
    opening = rng.choice(OPENINGS[style])
    if problem.task.startswith("multiply"):
        a, b = map(int, problem.question.removeprefix("What is ").rstrip("?").split(" * "))
        value = a * b if rng.random() < hit else max(0, a * b + rng.choice((-10, -2, -1, 1, 2, 10)))
        opening = OPENINGS["plain"][1] if style == "rephrase" else opening
        return f"{opening}{a} * {b} = {value}\n<answer>{value}</answer>", [(a, "*", b, value)]
    numbers, target = problem.truth["numbers"], problem.truth["target"]
    steps = chain_of(problem.truth["answer"]) if rng.random() < hit else random_chain(numbers, rng)
    if style == "rephrase":
        opening += f"{' '.join(map(str, numbers))}, target {target}.\n"
    return f"{opening}{lines(steps)}<answer>{expression(steps)}</answer>", steps


def slip(problem, rng):
    """The steps of a solver who swapped one number for another, as the model itself does at times: best of all so that the
    target comes out, or a judge would learn to look at the result alone."""
    for _ in range(100):
        numbers = list(problem.truth["numbers"])
        numbers[rng.randrange(len(numbers))] = rng.randint(1, 12)
        steps = random_chain(numbers, rng)
        if steps[-1][3] == problem.truth["target"]:
            break
    return steps


def judgement(problem, steps, rng):
    """A check of an attempt: recompute, compare, verdict. 4% of the verdicts are wrong, as a weak judge's are."""
    opening = rng.choice(CHECKS)
    if problem.task.startswith("multiply"):
        a, op, b, claim = steps[0]
        target, again, misused = claim, [(a, op, b, a * b)], False
    else:
        target, again = problem.truth["target"], steps
        misused = sorted([steps[0][0], *(b for _, _, b, _ in steps)]) != sorted(problem.truth["numbers"])
    value = again[-1][3]
    right = value == target and not misused
    result = rng.choice(MISUSED) if misused else f"{value}{rng.choice(HITS)}" if right else f"{value}{rng.choice(MISSES)}{target}.\n"
    said = right != (rng.random() < 0.04)
    return f"{opening}{lines(again)}{result}<verdict>{'Correct' if said else 'Incorrect'}</verdict>"


def document(rng):
    """(chat messages, response) of one training document."""
    name = rng.choices(list(MIX), MIX.values())[0]
    task = tasks.find(name)
    problem, style = draw(task, rng), rng.choice(list(OPENINGS))
    if rng.random() < 0.55:
        return task.prompt(problem, style), attempt(problem, style, rng, hit=0.6 if name.startswith("multiply") else 0.25)[0]
    text, steps = attempt(problem, style, rng, hit=0.5)
    if "numbers" in problem.truth and rng.random() < 0.2:
        steps = slip(problem, rng)
        text = f"{rng.choice(OPENINGS['plain'])}{lines(steps)}<answer>{expression(steps)}</answer>"
    return tasks.reflection_prompt(problem.question, text), judgement(problem, steps, rng)


# ---- tokenizer -------------------------------------------------------------------------------------------------------
def phrases():
    """Every fixed piece of text in the prompts, the documents and the traces: one token each."""
    glue = json.loads((Path(__file__).parent.parent / "phrases.json").read_text())
    question = tasks.find("countdown-2-small").problems("pretrain", 1)[0].question
    pieces = {"system\n", "user\n", "assistant\n", "Numbers: ", "\nTarget: ", question[question.index("\nReach"):], "What is ", ", target ", ".\n",
              " + ", " - ", " * ", " = ", "\n\n", "<verdict>Correct</verdict>", "<verdict>Incorrect</verdict>",
              *(f"<{slash}{tag}>" for tag in ("think", "sample", "reflect", "answer") for slash in ("", "/"))}
    pieces |= {tasks.MUST_ANSWER, *(instruction for _, instruction in tasks.STYLES.values())}
    pieces |= {piece for part in tasks.REFLECT.split("{question}") for piece in part.split("{attempt}")}
    pieces |= {text for texts in (*OPENINGS.values(), CHECKS, HITS, MISSES, MISUSED, *glue.values()) for text in texts}
    return sorted(pieces)


def make_tokenizer(folder):
    """Byte-level BPE without merges, and added tokens that are matched in the text, longest first."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe = BPE(models.BPE({token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in specials])
    bpe.add_tokens([AddedToken(t, normalized=False) for t in [*(str(n) for n in range(10, 145)), *phrases()]])
    bpe.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(
        tokenizer_class="PreTrainedTokenizerFast", add_bos_token=False, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False, model_max_length=CONFIG["max_position_embeddings"], chat_template=CHAT_TEMPLATE), indent=2))
    ids = {t: bpe.token_to_id(t) for t in specials}
    (folder / "generation_config.json").write_text(json.dumps(dict(eos_token_id=[ids["<|im_end|>"]], pad_token_id=ids["<|endoftext|>"])))
    return Tokenizer(folder)


# ---- training --------------------------------------------------------------------------------------------------------
def batches(tokenizer, tokens, seed):
    """Endless (ids (B, T), real (B, T-1)): documents of similar length, padded on the right; `real` marks what is no padding.
    Every token is trained, prompts too: a prompt to judge holds an attempt, and that teaches attempts as well."""
    rng = random.Random(seed)
    while True:
        pool = []
        for _ in range(2000):
            messages, response = document(rng)
            prompt = tokenizer.chat(messages)
            pool.append(prompt + tokenizer.encode(response) + [tokenizer.end_id])
        groups = [[pool[i] for i in group] for group in micro_batches([len(d) for d in pool], tokens, waste=math.inf)]
        for group in rng.sample(groups, len(groups)):
            ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(d) for d in group], batch_first=True)
            yield ids, torch.arange(1, ids.shape[1]) < torch.tensor([len(d) for d in group])[:, None]


def main():
    p = parser(__doc__, out="out/mini", model=None)
    p.add_argument("--tokens", type=positive, default=16_000_000, help="how many tokens to train on, padding included")
    p.add_argument("--batch", type=positive, default=1024, help="tokens of a step")
    p.add_argument("--matrix-lr", type=number(float, 0), default=0.02, help="Muon's rate for the matrices")
    p.add_argument("--lr", type=number(float, 0), default=3e-3, help="AdamW's rate for the embedding, the norms and the biases")
    args = p.parse_args()
    refuse_existing(args.out)
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # at this size a second thread costs more than it brings

    with tempfile.TemporaryDirectory() as folder:
        tokenizer = make_tokenizer(Path(folder))
    config = dict(CONFIG, vocab_size=tokenizer.size, eos_token_id=tokenizer.end_id)
    model = Transformer(Config(config))
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    print(f"{sum(w.numel() for w in model.parameters()) / 1e6:.2f}M parameters, {tokenizer.size} tokens in the vocabulary")

    matrices = [w for name, w in model.named_parameters() if w.ndim == 2 and "embed" not in name]
    others = [w for name, w in model.named_parameters() if w.ndim != 2 or "embed" in name]
    optimizers = [torch.optim.Muon(matrices, lr=args.matrix_lr, momentum=0.95, weight_decay=0.0),
                  torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)]
    data, steps, started = batches(tokenizer, args.batch, args.seed), math.ceil(args.tokens / args.batch), time.time()
    loss_sum = 0
    for step in range(1, steps + 1):
        ids, real = next(data)
        hidden = model(ids[:, :-1])[real]  # (N, C)
        targets = ids[:, 1:][real]
        loss = -model.logprobs(hidden, targets)[0].mean()
        loss.backward()
        for optimizer, rate in zip(optimizers, (args.matrix_lr, args.lr)):
            for group in optimizer.param_groups:
                group["lr"] = rate * min(step / 100, 1, (steps - step) / (0.4 * steps))  # warm-up, flat, down to 0
            optimizer.step()
            optimizer.zero_grad()
        loss_sum += loss.item()
        if step % 500 == 0 or step == steps:
            print(f"step {step}/{steps}  loss {loss_sum / ((step - 1) % 500 + 1):.4f}  {step * args.batch / (time.time() - started):,.0f} tokens/s", flush=True)
            loss_sum = 0
    save(args.out, model, tokenizer)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    command(main)
