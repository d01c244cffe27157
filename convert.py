"""Data in the shapes in which others publish it, into ours. A leaf: only what refuses such data knows of it.

    python convert.py sharegpt.json --out chat.jsonl            # conversations, for sft.py --data chat.jsonl
    python convert.py gpqa_diamond.csv --out gpqa/test.jsonl    # questions, for --task file:... or --data-dir
    python convert.py openthoughts.jsonl --math --out train.jsonl     # only what the math grader can compare

Reads JSON Lines, a JSON array (.json), either of them compressed (.gz), CSV, and Parquet if pyarrow is there.
A row is known by its columns. What a shape does not use of them is kept, so that `sft.py` refuses what it
would refuse (`"weight": 0`); a row in our shape stays as it is.

To add a shape, write a function of a row and name it in SHAPES.
"""
import csv
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from grading.answers import last_boxed
from grading.math import flaw_of_gold
from run.command import UserError, command, parser, say
from run.files import read_jsonl, refuse_existing, to_json, write_whole
from tasks import as_text

Row = dict  # what a function below pops from it is used; the rest is kept


# ---- conversations -------------------------------------------------------------------------------
ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
         "model": "assistant"}


def prompt_completion(row: Row, seed: int) -> Row:
    messages = []
    for role, part in (("user", row.pop("prompt")), ("assistant", row.pop("completion"))):
        messages += [{"role": role, "content": part}] if isinstance(part, str) else part
    return {"messages": messages}


def sharegpt(row: Row, seed: int) -> Row:
    messages = system_turn(row)
    for turn in row.pop("conversations"):
        turn = dict(turn)
        role = turn.pop("from", None) or turn.pop("role", None)
        if role not in ROLES:
            raise UserError(f"no turns of {role!r} are known, only {', '.join(ROLES)}; leave this row out")
        content = turn.pop("value", None) or turn.pop("content", "")
        messages.append({"role": ROLES[role], "content": content, **turn})
    return {"messages": messages}


def alpaca(row: Row, seed: int) -> Row:
    messages = system_turn(row)
    parts = [row.pop("instruction"), row.pop("input", "")]
    question = "\n\n".join(text for text in parts if text)
    for user, assistant in [*(row.pop("history", None) or []), [question, row.pop("output")]]:
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return {"messages": messages}


def system_turn(row: Row) -> list[Row]:
    system = row.pop("system", None)
    return [{"role": "system", "content": system}] if system else []


# ---- questions -----------------------------------------------------------------------------------
def gsm8k(row: Row, seed: int) -> Row:
    """The answer ends in `#### 18`; the steps before it, with marks for a calculator, are left out."""
    return {"question": row.pop("question"), "answer": row.pop("answer").rpartition("####")[2].strip()}


def problem(row: Row, seed: int) -> Row:
    """MATH, MATH-500, AIME, AMC, OpenThoughts: a column of its own, or the last \\boxed of the solution."""
    fields = {name.lower(): row.pop(name) for name in list(row)}
    answer = fields.get("answer")
    if answer in (None, ""):
        answer = last_boxed(fields.get("solution") or fields.get("ground_truth_solution") or "")
    return {"question": fields.get("problem") or fields["question"], "answer": answer}


def labelled_choices(row: Row, seed: int) -> Row:
    """CommonsenseQA (as its authors and as the hub have it) and ARC."""
    question, choices = row.pop("question"), row.pop("choices", None)
    if isinstance(question, dict):
        question, choices = question["stem"], question["choices"]
    if isinstance(choices, list):
        pairs = [(choice["label"], choice["text"]) for choice in choices]
    else:
        pairs = list(zip(choices["label"], choices["text"], strict=True))
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a label appears twice")
    return {"question": question, "choices": dict(pairs), "answer": row.pop("answerKey")}


def listed_choices(row: Row, seed: int) -> Row:
    """MMLU: the answer is a place in the list."""
    choices = dict(zip("ABCDEFGHIJ", row.pop("choices"), strict=False))
    place = int(row.pop("answer"))
    if place not in range(len(choices)):
        raise ValueError("no such choice")
    return {"question": row.pop("question"), "choices": choices, "answer": list(choices)[place]}


def gpqa(row: Row, seed: int) -> Row:
    """The right answer comes first in the file: the choices are shuffled, each question by its own text."""
    question = row.pop("Question").strip()
    texts = [row.pop("Correct Answer"), *(row.pop(f"Incorrect Answer {i}") for i in (1, 2, 3))]
    if not all(text and text.strip() for text in texts):
        raise ValueError("a choice is empty")
    row.clear()  # half a hundred columns of its making
    order = random.Random(f"{seed}/{question}").sample(range(4), 4)
    choices = {label: texts[i].strip() for label, i in zip("ABCD", order, strict=True)}
    return {"question": question, "choices": choices, "answer": "ABCD"[order.index(0)]}


@dataclass(frozen=True)
class Shape:
    about: str
    columns: tuple[str, ...]  # that a row of it has
    convert: Callable[[Row, int], Row]  # (row, seed) -> our row
    fits: Callable[[Row], bool] = lambda row: True  # what else is true of its rows


SHAPES = [
    Shape("a row of TRL's prompt and completion", ("prompt", "completion"), prompt_completion),
    Shape("a row of ShareGPT's conversations", ("conversations",), sharegpt),
    Shape("a row of Alpaca's instruction and output", ("instruction", "output"), alpaca),
    Shape("GSM8K as it is published", ("question", "answer"), gsm8k,
          fits=lambda row: "####" in str(row["answer"])),
    Shape("MMLU as it is published", ("question", "choices", "answer"), listed_choices,
          fits=lambda row: isinstance(row["choices"], list)),
    Shape("CommonsenseQA or ARC as it is published", ("question", "answerKey"), labelled_choices),
    Shape("GPQA as it is published", ("Question", "Correct Answer"), gpqa),
    Shape("AIME, AMC or MATH-500 as it is published", ("problem", "answer"), problem),
    Shape("AIME as it is published", ("Problem", "Answer"), problem),
    Shape("AIME as it is published", ("Question", "Answer"), problem),
    Shape("MATH as it is published", ("problem", "solution"), problem),
    Shape("OpenThoughts as it is published", ("problem", "ground_truth_solution"), problem),
]


def shape_of(row: Row) -> Shape | None:
    """The shape of a row that is not ours."""
    if "messages" in row:
        return None
    asks = "question" in row and "answer" in row  # ours, unless these very columns tell another shape
    for shape in SHAPES:
        known = all(name in row for name in shape.columns) and shape.fits(row)
        if known and (not asks or "answer" in shape.columns and "question" in shape.columns):
            return shape
    return None


# ---- the command ---------------------------------------------------------------------------------
def read_rows(path: str) -> Iterator[tuple[str, Row]]:
    """("file:line", row) of a file of any kind."""
    if path.endswith((".csv", ".tsv")):
        csv.field_size_limit(2**24)
        try:
            with open(path, encoding="utf-8-sig", newline="") as f:
                reader = csv.DictReader(f, delimiter="\t" if path.endswith(".tsv") else ",")
                for row in reader:
                    if None in row or None in row.values():
                        raise UserError(f"{path}:{reader.line_num}: more or fewer cells than columns; "
                                        "fix this row")
                    yield f"{path}:{reader.line_num}", row
        except (UnicodeDecodeError, csv.Error) as e:
            raise UserError(f"{path}: not a CSV file in UTF-8; save it as that") from e
    elif path.endswith(".parquet"):
        try:
            import pyarrow.parquet
        except ImportError as e:
            raise UserError(f"{path}: reading Parquet needs pyarrow: pip install pyarrow") from e
        for number, row in enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1):
            yield f"{path}: row {number}", row
    else:
        yield from read_jsonl(path)


def converted(row: Row, shape: Shape | None, where: str, seed: int) -> Row:
    """Our row of a row. Raises UserError with its line."""
    try:
        rest = dict(row)
        ours = shape.convert(rest, seed) if shape else row
        return {**rest, **ours}
    except UserError as e:
        raise UserError(f"{where}: {e}") from e
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as e:
        raise UserError(f"{where}: looks like {shape.about}, but is not whole; fix or remove it") from e


def arguments():
    p = parser(__doc__, out="converted.jsonl", model=None)
    p.add_argument("data", help="the file to convert")
    p.add_argument("--math", action="store_true",
                   help="leave out, and count, questions without an answer that can be compared as math")
    return p.parse_args()


def main():
    args = arguments()
    refuse_existing(args.out)
    rows = []
    counts = Counter()
    for where, row in read_rows(args.data):
        shape = shape_of(row)
        ours = (("messages",), ("question", "answer"), ("nums", "target"))
        if shape is None and not any(all(name in row for name in columns) for columns in ours):
            raise UserError(f"{where}: no shape that is known; its columns are {', '.join(map(str, row))}")
        ours = converted(row, shape, where, args.seed)
        answer = as_text(ours.get("answer"))
        if args.math and "question" in ours and (not answer or flaw_of_gold(answer)):
            counts["left out: no answer that can be compared as math"] += 1
            continue
        if "question" in ours and not answer:
            raise UserError(f"{where}: it has no answer; leave this row out")
        rows.append(ours)
        counts[shape.about if shape else "as it was"] += 1
    if not rows:
        raise UserError(f"{args.data}: no rows to convert")
    write_whole(args.out, "".join(to_json(row) + "\n" for row in rows))
    say(f"wrote {args.out}: " + ", ".join(f"{n} rows ({about})" for about, n in counts.items()))


if __name__ == "__main__":
    command(main)
