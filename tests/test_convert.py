"""Published shapes become rows that train and are graded, and where they are refused a line leads here."""
import csv
import sys

import pytest
from conftest import read_rows, refused, write_jsonl

import convert
import tasks


def chat(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


EXCHANGE = chat(("user", "Q"), ("assistant", "A"))
def gpqa(i):
    return {"Question": f"Q{i}", "Correct Answer": "right",
            **{f"Incorrect Answer {j}": f"wrong {j}" for j in (1, 2, 3)}}


SHAPES = {  # name: (row, ours)
    "trl-messages": ({"prompt": EXCHANGE["messages"][:1], "completion": EXCHANGE["messages"][1:]}, EXCHANGE),
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


@pytest.mark.parametrize("name, content, message", [
    ("x.csv", "question,answer\ncaf\xe9,1\n".encode("latin-1"), "x.csv: not a CSV file in UTF-8; save it"),
    ("x.csv", "a,b\n".encode("utf-16"), "x.csv: not a CSV file in UTF-8; save it as that"),
    ("x.parquet", b"", "x.parquet: reading Parquet needs pyarrow: pip install pyarrow"),
])
def test_files_that_cannot_be_read(cmd, tmp_path, monkeypatch, name, content, message):
    (tmp_path / name).write_bytes(content)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(cmd, convert, (name,), message)


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
