"""Published shapes become rows that train and are graded, and where they are refused a line leads here."""
import csv
import gzip
import json
import sys

import pytest
from conftest import MINI, read_rows, refused, write_jsonl

import convert
import evaluate
import sft
import tasks


def chat(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


EXCHANGE = chat(("user", "Q"), ("assistant", "A"))
def gpqa(i):
    return {"Question": f"Q{i}", "Correct Answer": "right",
            **{f"Incorrect Answer {j}": f"wrong {j}" for j in (1, 2, 3)}}


SHAPES = {  # name: (row, ours)
    "trl": ({"prompt": "Q", "completion": "A"}, EXCHANGE),
    "trl-messages": ({"prompt": EXCHANGE["messages"][:1], "completion": EXCHANGE["messages"][1:]}, EXCHANGE),
    "sharegpt": ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
                 EXCHANGE),
    "openthoughts": ({"system": "S",
                      "conversations": [{"from": "user", "value": "Q"}, {"from": "assistant", "value": "A"}]},
                     chat(("system", "S"), ("user", "Q"), ("assistant", "A"))),
    "alpaca": ({"instruction": "Q", "input": "", "output": "A"}, EXCHANGE),
    "alpaca-input": ({"instruction": "Q", "input": "I", "output": "A", "history": [["q", "a"]]},
                     chat(("user", "q"), ("assistant", "a"), ("user", "Q\n\nI"), ("assistant", "A"))),
    "gsm8k": ({"question": "Q", "answer": "He has 48/2=<<48/2=24>>24.\n#### 1,024"},
              {"question": "Q", "answer": "1,024"}),
    "math500": ({"problem": "Q", "solution": "so \\boxed{2}", "answer": "2", "unique_id": "x"},
                {"question": "Q", "answer": "2"}),
    "math": ({"problem": "Q", "solution": "\\boxed{1} no, \\boxed{\\frac{1}{2}}.", "level": "1"},
             {"question": "Q", "answer": "\\frac{1}{2}"}),
    "openthoughts-metadata": ({"problem": "Q", "deepseek_solution": "3",
                               "ground_truth_solution": "\\boxed{2}"},
                              {"question": "Q", "answer": "2"}),
    "aime": ({"Problem": "Q", "Answer": 33, "ID": "2024-I-1"}, {"question": "Q", "answer": 33}),
    "aime-csv": ({"Question": "Q", "Answer": "33"}, {"question": "Q", "answer": "33"}),
    "aime25": ({"problem": "Q", "answer": "033", "problem_idx": 1}, {"question": "Q", "answer": "033"}),
    "mmlu": ({"question": "Q", "choices": ["x", "y", "z"], "answer": 2, "subject": "law"},
             {"subject": "law", "question": "Q", "choices": {"A": "x", "B": "y", "C": "z"}, "answer": "C"}),
    # What a shape does not use is kept, for sft.py to use or to refuse.
    "sharegpt-marks": ({"conversations": [{"from": "human", "value": "Q"},
                                          {"from": "gpt", "value": "A", "weight": 0}],
                        "tools": ["t"]},
                       {"tools": ["t"], "messages": [{"role": "user", "content": "Q"},
                                                     {"role": "assistant", "content": "A", "weight": 0}]}),
    "trl-label": ({"prompt": "Q", "completion": "A", "label": False}, {"label": False, **EXCHANGE}),
    # Ours, though they have a column of another shape.
    "ours-and-more": ({**EXCHANGE, "prompt": "x", "completion": "y"},
                      {**EXCHANGE, "prompt": "x", "completion": "y"}),
    "question-and-more": ({"question": "Q", "answer": "2", "problem": "x", "instruction": "y", "output": "z"},
                          {"question": "Q", "answer": "2", "problem": "x", "instruction": "y",
                           "output": "z"}),
    "csqa": ({"question": "Q", "choices": {"label": ["A", "B"], "text": ["x", "y"]}, "answerKey": "B"},
             {"question": "Q", "choices": {"A": "x", "B": "y"}, "answer": "B"}),
    "csqa-authors": ({"question": {"stem": "Q",
                                   "choices": [{"label": "A", "text": "x"}, {"label": "B", "text": "y"}]},
                      "answerKey": "B"}, {"question": "Q", "choices": {"A": "x", "B": "y"}, "answer": "B"}),
    "ours": (EXCHANGE, EXCHANGE),
    "our-question": ({"id": 1, "question": "Q", "answer": "2"}, {"id": 1, "question": "Q", "answer": "2"}),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(cmd, name):
    row, ours = SHAPES[name]
    write_jsonl("in.jsonl", [row, row])
    status, out, err = cmd(convert, "in.jsonl", "--out", "out.jsonl")
    assert status == 0, err
    assert read_rows("out.jsonl") == [ours, ours] and "2 rows" in out


def test_gpqa_is_shuffled_by_a_seed(cmd):
    """In its CSV file the right answer always comes first."""
    rows = [gpqa(i) for i in range(200)]
    with open("gpqa.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    assert cmd(convert, "gpqa.csv", "--out", "a.jsonl")[0] == 0
    assert cmd(convert, "gpqa.csv", "--out", "b.jsonl", "--seed", "1")[0] == 0
    write_jsonl("reversed.jsonl", rows[::-1])
    assert cmd(convert, "reversed.jsonl", "--out", "c.jsonl")[0] == 0
    made = read_rows("a.jsonl")
    assert made == read_rows("c.jsonl")[::-1] != read_rows("b.jsonl")
    for row in made:
        assert row["choices"][row["answer"]] == "right" and len(set(row["choices"].values())) == 4
    labels = [row["answer"] for row in made]
    assert all(30 < labels.count(label) < 70 for label in "ABCD")
    assert len(tasks.find("file:a.jsonl:choice").problems("all", 0)) == 200


def test_what_cannot_be_compared_as_math_is_left_out_and_counted(cmd):
    pytest.importorskip("math_verify")
    answers = ["2", "0.\\overline{3}", "7 \\\\ 6", "\\frac12"]
    write_jsonl("in.jsonl", [{"problem": f"Q{i}", "answer": answer} for i, answer in enumerate(answers)]
                + [{"problem": "Q", "ground_truth_solution": None}])
    status, out, _ = cmd(convert, "in.jsonl", "--math", "--out", "out.jsonl")
    assert status == 0 and "3 rows (left out: no answer that can be compared as math)" in out
    assert len(tasks.find("file:out.jsonl:math").problems("all", 0)) == 2


@pytest.mark.parametrize("content",
                         ["question,answer\ncaf\xe9,1\n".encode("latin-1"), "a,b\n".encode("utf-16")])
def test_a_csv_of_another_encoding(cmd, tmp_path, content):
    (tmp_path / "x.csv").write_bytes(content)
    refused(cmd, convert, ("x.csv",), "x.csv: not a CSV file in UTF-8; save it as that")


def test_parquet(cmd, monkeypatch):
    (open("x.parquet", "wb")).close()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(cmd, convert, ("x.parquet",), "x.parquet: reading Parquet needs pyarrow: pip install pyarrow")


@pytest.mark.parametrize("row, message", [
    ({"text": "x"}, "in.jsonl:2: no shape that is known; its columns are text"),
    ({"conversations": [{"from": "tool", "value": "x"}]}, "in.jsonl:2: no turns of 'tool' are known"),
    ({"conversations": "x"}, "in.jsonl:2: looks like a row of ShareGPT's conversations, but is not whole"),
    ({"problem": "Q", "solution": "none"}, "in.jsonl:2: it has no answer; leave this row out"),
    ({"question": "Q", "answer": "no steps\n#### "}, "in.jsonl:2: it has no answer"),
    ({"question": "Q", "choices": {"label": ["A", "B"], "text": ["x", "y"]}, "answerKey": ""},
     "it has no answer"),
    ({"question": "Q", "choices": {"label": ["A", "A"], "text": ["x", "y"]}, "answerKey": "A"},
     "is not whole"),
    ({"instruction": "Q"}, "no shape that is known"),
    ({"question": "Q", "choices": ["x", "y"], "answer": -1}, "MMLU as it is published, but is not whole"),
    ({**gpqa(1), "Incorrect Answer 2": " "}, "GPQA as it is published, but is not whole"),
])
def test_rows_that_cannot_be_converted(cmd, row, message):
    write_jsonl("in.jsonl", [EXCHANGE, row])
    refused(cmd, convert, ("in.jsonl",), message)
    write_jsonl("in.jsonl", [EXCHANGE])
    cmd(convert, "in.jsonl")
    refused(cmd, convert, ("in.jsonl",), "--out converted.jsonl exists")


def test_from_a_published_chat_to_a_trained_model(cmd):
    """The line that refuses the file names the command that makes it trainable."""
    rows = [{"conversations": [{"from": "human", "value": f"What is {i} * 2?"},
                               {"from": "gpt", "value": str(2 * i)}]}
            for i in range(8)]
    with open("share.json", "w") as f:
        json.dump(rows, f)
    flags = ("--model", MINI, "--device", "cpu", "--epochs", "1")
    _, _, err = cmd(sft, *flags, "--data", "share.json")
    assert "python convert.py FILE makes published data ours" in err
    assert cmd(convert, "share.json", "--out", "chat.jsonl")[0] == 0
    assert cmd(sft, *flags, "--data", "chat.jsonl")[0] == 0


def test_from_published_gsm8k_to_a_right_answer(cmd):
    """Before, the advice was to grade it with `exact`, by which 0 of 400 are right."""
    with gzip.open("raw.jsonl.gz", "wt") as f:
        f.writelines(json.dumps({"question": f"{i}?",
                                 "answer": f"That is <<{i}+0={i}>>{i}.\n#### {i}"}) + "\n" for i in range(40))
    flags = ("--models", MINI, "--device", "cpu", "--split", "all", "--max-new-tokens", "2")
    for task in ("file:raw.jsonl.gz", "file:raw.jsonl.gz:integer"):
        _, _, err = cmd(evaluate, *flags, "--tasks", task)
        assert "has GSM8K's #### in it; python convert.py FILE makes it ours" in err
    assert cmd(convert, "raw.jsonl.gz", "--out", "questions.jsonl")[0] == 0
    task = tasks.find("file:questions.jsonl:integer")
    for p in task.problems("all", 0):
        assert task.grade(p, f"<answer>${p.truth['answer']}.00</answer>").correct
