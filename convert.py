"""Data in the shapes in which others publish it, into ours. A leaf: only what refuses such data knows of it.

    python convert.py sharegpt.json --out chat.jsonl            # conversations, for sft.py --data chat.jsonl
    python convert.py gpqa_diamond.csv --out gpqa/test.jsonl    # questions, for --task file:... or --data-dir

Reads JSON Lines, a JSON array (.json), either of them compressed (.gz), CSV, and Parquet if pyarrow is there.
Each row goes by the columns it has; rows that are in our shape already stay as they are.

To add a shape, write a function of a row and name it in SHAPES.
"""
import csv
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cli import UserError, command, parser, read_jsonl, refuse_existing, to_json, write_whole
from grading import last_boxed


# ---- conversations -------------------------------------------------------------------------------
ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
         "model": "assistant"}


def prompt_completion(row: dict, seed: int) -> dict:
    messages = []
    for role, part in (("user", row["prompt"]), ("assistant", row["completion"])):
        messages += [{"role": role, "content": part}] if isinstance(part, str) else part
    return {"messages": messages}


def sharegpt(row: dict, seed: int) -> dict:
    messages = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    for turn in row["conversations"]:
        role = turn.get("from", turn.get("role"))
        if role not in ROLES:
            raise UserError(f"no turns of {role!r} are known, only {', '.join(ROLES)}; leave this row out")
        messages.append({"role": ROLES[role], "content": turn.get("value", turn.get("content"))})
    return {"messages": messages}


def alpaca(row: dict, seed: int) -> dict:
    messages = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    asked = [row["instruction"], row.get("input")]
    turns = [*(row.get("history") or []), ["\n\n".join(text for text in asked if text), row["output"]]]
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages}


# ---- questions -----------------------------------------------------------------------------------
def gsm8k(row: dict, seed: int) -> dict:
    """The answer ends in `#### 18`; before it come the steps, with marks for a calculator, which go."""
    return {"question": row["question"], "answer": row["answer"].rpartition("####")[2].strip()}


def problem(row: dict, seed: int) -> dict:
    """MATH, MATH-500, AIME, AMC, OpenThoughts: a column of its own, or the last \\boxed of the solution."""
    fields = {name.lower(): value for name, value in row.items()}
    answer = fields.get("answer")
    if answer in (None, ""):
        answer = last_boxed(fields.get("solution") or fields.get("ground_truth_solution") or "")
    if answer is None:
        raise UserError("neither an answer nor a \\boxed one at the end of the solution; leave this row out")
    return {"question": fields["problem"], "answer": answer}


def labelled_choices(row: dict, seed: int) -> dict:
    """CommonsenseQA (as its authors and as the hub have it) and ARC."""
    question, choices = row["question"], row.get("choices")
    if isinstance(question, dict):
        question, choices = question["stem"], question["choices"]
    if isinstance(choices, list):
        choices = {choice["label"]: choice["text"] for choice in choices}
    else:
        choices = dict(zip(choices["label"], choices["text"], strict=True))
    return {"question": question, "choices": choices, "answer": row["answerKey"]}


def gpqa(row: dict, seed: int) -> dict:
    """The right answer comes first in the file: the choices are shuffled, each question by its own text."""
    texts = [row["Correct Answer"], *(row[f"Incorrect Answer {i}"] for i in (1, 2, 3))]
    texts = [text.strip() for text in texts]
    shuffled = random.Random(f"{seed}/{row['Question']}").sample(texts, len(texts))
    choices = dict(zip("ABCD", shuffled, strict=True))
    answer = "ABCD"[shuffled.index(texts[0])]
    return {"question": row["Question"].strip(), "choices": choices, "answer": answer}


@dataclass(frozen=True)
class Shape:
    about: str
    columns: tuple[str, ...]  # that a row of it has
    convert: Callable[[dict, int], dict]  # (row, seed) -> our row
    example: str = "chat.jsonl"  # an --out
    mark: str = ""  # what its answer holds


SHAPES = [
    Shape("a row of TRL's prompt and completion", ("prompt", "completion"), prompt_completion),
    Shape("a row of ShareGPT's conversations", ("conversations",), sharegpt),
    Shape("a row of Alpaca's instruction and output", ("instruction", "output"), alpaca),
    Shape("GSM8K as it is published", ("question", "answer"), gsm8k, "questions.jsonl", mark="####"),
    Shape("a row of CommonsenseQA or ARC as it is published", ("question", "answerKey"), labelled_choices,
          "questions.jsonl"),
    Shape("GPQA as it is published", ("Question", "Correct Answer"), gpqa, "questions.jsonl"),
    Shape("AIME, AMC or MATH-500 as it is published", ("problem", "answer"), problem, "questions.jsonl"),
    Shape("AIME as it is published", ("Problem", "Answer"), problem, "questions.jsonl"),
    Shape("MATH as it is published", ("problem", "solution"), problem, "questions.jsonl"),
    Shape("OpenThoughts as it is published", ("problem", "ground_truth_solution"), problem,
          "questions.jsonl"),
]


def shape_of(row: dict) -> Shape | None:
    for shape in SHAPES:
        if all(name in row for name in shape.columns) and shape.mark in str(row.get("answer", shape.mark)):
            return shape
    return None


# ---- the command ---------------------------------------------------------------------------------
def read_rows(path: str) -> Iterator[tuple[str, dict]]:
    """("file:line", row) of a file of any kind."""
    if path.endswith((".csv", ".tsv")):
        csv.field_size_limit(2**24)
        with open(path, encoding="utf-8-sig", newline="") as f:
            reader = csv.DictReader(f, delimiter="\t" if path.endswith(".tsv") else ",")
            for row in reader:
                yield f"{path}:{reader.line_num}", row
    elif path.endswith(".parquet"):
        try:
            import pyarrow.parquet
        except ImportError as e:
            raise UserError(f"{path}: reading Parquet needs pyarrow: pip install pyarrow") from e
        for number, row in enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1):
            yield f"{path}: row {number}", row
    else:
        yield from read_jsonl(path)


def arguments():
    p = parser(__doc__, out="converted.jsonl", model=None)
    p.add_argument("data", help="the file to convert")
    return p.parse_args()


def main():
    args = arguments()
    refuse_existing(args.out)
    rows = []
    counts = Counter()
    for where, row in read_rows(args.data):
        shape = shape_of(row)
        if shape is None and "messages" not in row and not ("question" in row and "answer" in row):
            raise UserError(f"{where}: no shape that is known; its columns are {', '.join(map(str, row))}")
        try:
            rows.append(shape.convert(row, args.seed) if shape else row)
        except UserError as e:
            raise UserError(f"{where}: {e}") from e
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as e:
            raise UserError(f"{where}: looks like {shape.about}, but is not whole; fix or remove it") from e
        counts[shape.about if shape else "as it was"] += 1
    if not rows:
        raise UserError(f"{args.data}: the file holds no rows")
    write_whole(args.out, "".join(to_json(row) + "\n" for row in rows))
    print(f"wrote {args.out}: " + ", ".join(f"{n} rows ({about})" for about, n in counts.items()))


if __name__ == "__main__":
    command(main)
