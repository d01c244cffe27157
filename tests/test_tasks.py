"""Problems are solvable, splits share none, and a file that cannot be graded is refused with its row."""
import pytest
from conftest import write_jsonl

import tasks
from cli import UserError
from tasks import find

GENERATED = ["countdown-2", "countdown-3", "countdown-6", "countdown-3-small", "countdown-5-small",
             "letters-4", "letters-5", "acronym-4", "acronym-5",
             "multiply-2", "multiply-5", "multiply-2-small"]


@pytest.mark.parametrize("name", GENERATED)
def test_every_problem_has_a_right_answer(name):
    task = find(name)
    assert task.name == name
    for p in task.problems("sft", 8 if name == "multiply-2-small" else 30, seed=5):
        assert task.grade(p, f"<answer>{p.truth['answer']}</answer>").correct, p
        assert not task.grade(p, "<answer></answer>").correct
        system, user = task.prompt(p, "plan")
        assert system["role"] == "system" and p.question in user["content"]


def test_every_name_in_the_help_is_a_task():
    assert tasks.NAMES.startswith("countdown-2..6 and countdown-2..6-small, letters-4/5, acronym-4/5, "
                                  "multiply-2..5")
    for task in tasks.GENERATED:
        for size in task.sizes:
            assert isinstance(find(f"{task.kind}-{size}"), task)


@pytest.mark.parametrize("name", ["countdown-3-small", "countdown-4", "letters-4", "multiply-2"])
def test_splits_share_no_problem(name):
    """Whatever the seeds, no test problem is in another split, and none is twice in one."""
    task = find(name)
    seen = {}
    for split in tasks.SPLITS:
        for seed in (0, 1):
            problems = task.problems(split, 60, seed)
            assert len({p.id for p in problems}) == 60
            for p in problems:
                assert seen.setdefault(p.id, split) == split
    assert task.problems("test", 20, 3) == task.problems("test", 20, 3) != task.problems("test", 20, 4)


def test_a_problem_is_its_numbers_and_target():
    """The order in which the numbers are shown makes no new problem."""
    contents = {}
    for seed in range(20):
        for p in find("countdown-2-small").problems("test", 10, seed):
            content = (tuple(sorted(p.truth["numbers"])), p.truth["target"])
            assert contents.setdefault(p.id, content) == content


def test_countdown_ranges():
    for p in find("countdown-4").problems("test", 50):
        assert len(p.truth["numbers"]) == 4
        assert all(1 <= n <= 100 for n in p.truth["numbers"]) and 100 <= p.truth["target"] <= 999
    for p in find("countdown-4-small").problems("test", 50):
        assert all(1 <= n <= 12 for n in p.truth["numbers"]) and 10 <= p.truth["target"] <= 60


def test_too_many_questions_is_one_line():
    with pytest.raises(UserError, match="countdown-2-small has only about"):
        find("countdown-2-small").problems("test", 10_000)
    with pytest.raises(UserError, match="unknown; the tasks are"):
        find("countdown-9")


# ---- files ---------------------------------------------------------------------------------------
def ids(task, split):
    return {p.id for p in task.problems(split, 0)}


def test_a_file_of_ones_own(tmp_path):
    """One file, divided between the splits: no test question is trained on."""
    rows = [{"id": i, "question": f"{i}+1?", "answer": str(i + 1)} for i in range(20)]
    path = write_jsonl(tmp_path / "my.jsonl", rows)
    task = find(f"file:{path}:integer")
    assert len(task.problems("all", 0)) == 20
    parts = [ids(task, split) for split in ("sft", "rl", "val", "test")]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 20
    p, = task.problems("all", 1)
    text = f"<answer>${p.truth['answer']}.00</answer>"
    assert task.grade(p, text).correct
    assert not find(f"file:{path}").grade(p, text).correct  # graded `exact`
    with pytest.raises(UserError, match="has 20 questions in the split all"):
        task.problems("all", 21)


def test_a_set_with_one_training_file(tmp_path):
    (tmp_path / "gsm8k").mkdir()
    rows = [{"id": f"t{i}", "question": "?", "answer": "1"} for i in range(200)]
    write_jsonl(tmp_path / "gsm8k" / "train.jsonl", rows)
    task = find("gsm8k", tmp_path)
    parts = [ids(task, split) for split in ("sft", "rl", "val")]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 200
    with pytest.raises(UserError, match="test.jsonl: no such file; gsm8k is not downloaded for you"):
        task.problems("test", 1)
    with pytest.raises(UserError, match="math500 has no split 'sft'; it has test"):
        find("math500", tmp_path).problems("sft", 1)


@pytest.mark.parametrize("row, grading, message", [
    ({"question": "?", "answer": "two"}, ":integer", "'two' is not an integer"),
    ({"question": "?", "answer": "F", "choices": {"A": "x"}}, "", "is none of the choices"),
    ({"question": 1, "answer": "F"}, "", "must be text"),
])
def test_rows_that_cannot_be_graded_are_refused(tmp_path, row, grading, message):
    path = write_jsonl(tmp_path / "my.jsonl", [row])
    with pytest.raises(UserError, match=message):
        find(f"file:{path}{grading}").problems("all", 1)
