"""Problems are solvable, splits share none, and a file that cannot be graded is refused with its row."""
import pytest
from conftest import write_jsonl

import tasks
from run.command import UserError
from tasks import find

@pytest.mark.parametrize("name", tasks.generated())
def test_every_problem_has_a_right_answer(name):
    task = find(name)
    assert task.name == name
    for p in task.problems("sft", 8 if name.startswith(("multiply-2", "countdown-2")) else 30, seed=5):
        assert task.grade(p, f"<answer>{p.truth['answer']}</answer>").correct, p
        assert not task.grade(p, "<answer></answer>").correct
        system, user = task.prompt(p, "plan")
        assert system["role"] == "system" and p.question in user["content"]


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


# ---- files ---------------------------------------------------------------------------------------
def ids(task, split):
    return {p.id for p in task.problems(split, 0)}


def test_a_file_of_ones_own(tmp_path):
    """One file, divided between the splits: no test question is trained on."""
    rows = [{"id": i, "question": f"{i}+1?", "answer": str(i + 1)} for i in range(200)]
    path = write_jsonl(tmp_path / "my.jsonl", rows)
    task = find(f"file:{path}:integer")
    assert len(task.problems("all", 0)) == 200
    parts = [ids(task, split) for split in ("sft", "rl", "val", "test")]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 200
    p, = task.problems("all", 1)
    text = f"<answer>${p.truth['answer']}.00</answer>"
    assert task.grade(p, text).correct
    assert not find(f"file:{path}").grade(p, text).correct  # graded `exact`
    with pytest.raises(UserError, match="has 200 questions in the split all"):
        task.problems("all", 201)


def gsm8k_with(tmp_path, **files):
    """(the task, its questions of the training file), of sets {name: questions} with their file."""
    for name, questions in files.items():
        folder, split = name.split("_")
        (tmp_path / folder).mkdir(exist_ok=True)
        rows = [{"question": question, "answer": "1"} for question in questions]
        write_jsonl(tmp_path / folder / f"{split}.jsonl", rows)
    tasks.test_identities.cache_clear()
    task = find("gsm8k", tmp_path)
    return task, [ids(task, split) for split in ("sft", "rl", "val")]


def test_a_set_with_one_training_file(tmp_path):
    task, parts = gsm8k_with(tmp_path, gsm8k_train=[f"{i}?" for i in range(200)])
    assert sum(map(len, parts)) == len(set.union(*parts)) == 200
    with pytest.raises(UserError, match="test.jsonl: no such file; gsm8k is not downloaded for you"):
        task.problems("test", 1)
    with pytest.raises(UserError, match="math500 has no split 'sft'; it has test"):
        find("math500", tmp_path).problems("sft", 1)


def test_a_test_question_that_is_also_in_the_training_file_is_not_trained_on(tmp_path):
    task, parts = gsm8k_with(tmp_path, gsm8k_train=[f"{i}?" for i in range(100)],
                             gsm8k_test=[f" {i}?\n" for i in range(30)])
    assert len(set.union(*parts)) == 70 and not set.union(*parts) & ids(task, "test")
    # A question of another test set that is there is not trained on either.
    task, parts = gsm8k_with(tmp_path, math500_test=[f"{i}?" for i in range(25, 50)])
    assert len(set.union(*parts)) == 50


# ---- splits and identity: a row is what it asks ---------------------------------------------------
QUESTIONS = [{"question": f"What is {i} plus caf\u00e9?", "answer": str(i)} for i in range(300)]


def splits(path, grading=":exact"):
    """{question: split}"""
    task = find(f"file:{path}{grading}")
    return {p.question: split for split in ("sft", "rl", "val", "test") for p in task.problems(split, 0)}


def test_the_split_of_a_row_is_its_own(tmp_path):
    """Before, a row on top moved 21 of 25 test questions, for the number of the row was its identity."""
    before = splits(write_jsonl(tmp_path / "a.jsonl", QUESTIONS))
    more = [{"question": "on top", "answer": "1"}, *reversed(QUESTIONS)]
    after = splits(write_jsonl(tmp_path / "b.jsonl", more))
    assert after.pop("on top") and after == before and len(before) == 300
    ids_given = [{**row, "id": 299 - i} for i, row in enumerate(QUESTIONS)]
    assert splits(write_jsonl(tmp_path / "c.jsonl", ids_given)) == before
    assert len(set(before.values())) == 4


def test_copies_of_a_question_are_left_out_and_counted(tmp_path, capsys):
    """Before, copies were on both sides of the split: other ids, white space or forms of Unicode hid them."""
    copies = [{"id": f"x{i}",
               "question": "  " + row["question"].replace(" ", "\n ").replace("\u00e9", "e\u0301"),
               "answer": row["answer"]} for i, row in enumerate(QUESTIONS)]
    path = write_jsonl(tmp_path / "a.jsonl", QUESTIONS + copies)
    task = find(f"file:{path}")
    sets = [ids(task, split) for split in ("sft", "rl", "val", "test")]
    assert sum(map(len, sets)) == len(set.union(*sets)) == 300
    assert capsys.readouterr().out == f"{path}: left out 300 rows that repeat a question\n"
    case = [{"question": "What is He?", "answer": "1"}, {"question": "What is he?", "answer": "2"}]
    assert len(find(f"file:{write_jsonl(tmp_path / 'b.jsonl', case)}").problems("all", 0)) == 2
    spelt = [{"question": "?", "answer": answer} for answer in ("1,000", "1000.0", "$1000")]
    assert len(find(f"file:{write_jsonl(tmp_path / 'c.jsonl', spelt)}:integer").problems("all", 0)) == 1


def test_a_question_of_two_tasks_is_asked_once(tmp_path, capsys):
    a = write_jsonl(tmp_path / "a.jsonl", QUESTIONS[:20])
    b = write_jsonl(tmp_path / "b.jsonl", QUESTIONS[15:30])
    problems = tasks.problems_of(tasks.find_all(f"file:{a},file:{b}"), "all", 0, seed=0)
    assert len({p.id for _, p in problems}) == len(problems) == 30
    assert "left out 5 questions that an earlier task has too" in capsys.readouterr().out


def test_permuted_choices_are_the_same_question(tmp_path):
    rows = [{"question": "Where?", "choices": {"A": "mall", "B": "bank"}, "answer": "B"},
            {"question": "Where?", "choices": {"A": "bank", "B": "mall"}, "answer": "A"},
            {"question": "Where?", "choices": {"A": "bank", "B": "river"}, "answer": "A"}]
    assert len(find(f"file:{write_jsonl(tmp_path / 'a.jsonl', rows)}:choice").problems("all", 0)) == 2
    rows[1]["answer"] = "B"
    with pytest.raises(UserError, match="a.jsonl:2: an earlier row asks the same and has another answer"):
        find(f"file:{write_jsonl(tmp_path / 'a.jsonl', rows)}:choice").problems("all", 0)


def test_a_path_is_in_no_key(tmp_path, monkeypatch):
    """Three spellings of a path: the same questions, in the same order, with the same identities."""
    monkeypatch.chdir(tmp_path)
    for name in ("own.jsonl", "copy.jsonl"):
        write_jsonl(name, QUESTIONS)
    chosen = []
    for spelling in ("own.jsonl", "./own.jsonl", str(tmp_path / "own.jsonl"), "copy.jsonl"):
        problems = find(f"file:{spelling}").problems("sft", 20, seed=3)
        chosen.append([(p.id, p.question) for p in problems])
    assert all(other == chosen[0] for other in chosen)
    assert "own" not in chosen[0][0][0]
    with pytest.raises(UserError, match="appears twice"):
        tasks.find_all("file:own.jsonl,file:./own.jsonl")


def test_a_countdown_file_has_the_splits_of_the_generated_task(tmp_path):
    generated = {split: find("countdown-3").problems(split, 40) for split in ("val", "test")}
    rows = [{"nums": p.truth["numbers"][::-1],
             "target": p.truth["target"]} for part in generated.values() for p in part]
    task = find(f"file:{write_jsonl(tmp_path / 'cd.jsonl', rows + rows[:5])}:countdown")
    for split, problems in generated.items():
        found = {p.id.partition("/")[2]: p for p in task.problems(split, 0)}
        assert found.keys() == {p.id.partition("/")[2] for p in problems}
        for p in problems:
            answer = f"<answer>{p.truth['answer']}</answer>"
            assert task.grade(found[p.id.partition("/")[2]], answer).correct


def test_an_empty_split_is_refused(tmp_path):
    """One row cannot be in both."""
    path = write_jsonl(tmp_path / "one.jsonl", [{"question": "?", "answer": "1"}])
    with pytest.raises(UserError, match="has no question in the split (sft|rl)"):
        for split in ("sft", "rl"):
            find(f"file:{path}").problems(split, 0)


# ---- rows as people have them --------------------------------------------------------------------
@pytest.mark.parametrize("answer, grading, right, wrong", [
    (18, ":integer", "18", "19"),
    (18.0, ":integer", "18", "18.5"),
    (18.0, "", "18", "18.0"),
    (0.5, ":math", "1/2", "0.4"),
    (0.0000001, ":math", "10^{-7}", "e-7"),
    ("$1,234", ":integer", "1234", "1"),
])
def test_numbers_as_answers(tmp_path, answer, grading, right, wrong):
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "?", "answer": answer}])
    if grading == ":math":
        pytest.importorskip("math_verify")
    task = find(f"file:{path}{grading}")
    p, = task.problems("all", 0)
    assert task.grade(p, f"<answer>{right}</answer>").correct
    assert not task.grade(p, f"<answer>{wrong}</answer>").correct


def test_rows_with_choices_are_graded_as_choices(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl",
                       [{"question": "Where?", "choices": {"A": "mall", "B": "bank"}, "answer": "B"}])
    for grading in ("", ":choice"):
        task = find(f"file:{path}{grading}")
        p, = task.problems("all", 0)
        assert task.grade(p, "<answer>(B) bank</answer>").correct and "A. mall" in p.question


def test_choices_that_are_all_the_first_are_a_warning(tmp_path, capsys):
    rows = [{"question": f"{i}?", "choices": {"A": "x", "B": "y"}, "answer": "A"} for i in range(9)]
    find(f"file:{write_jsonl(tmp_path / 'a.jsonl', rows)}").problems("all", 0)
    assert "warning: the right choice is A in all rows" in capsys.readouterr().out
    rows[1:] = [{"question": "2 + 3?", "answer": "5"}]  # one row with choices says nothing
    find(f"file:{write_jsonl(tmp_path / 'b.jsonl', rows)}").problems("all", 0)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name, message", [
    ("file:%s:intger", "no grading 'intger'; there are exact, integer, math, choice, countdown"),
    ("file:%s.old", "no such file"),
    ("file:no/such:file.jsonl", "no such file"),
])
def test_a_mistyped_grading_is_no_path(tmp_path, name, message):
    path = write_jsonl(tmp_path / "a.jsonl", QUESTIONS)
    with pytest.raises(UserError, match=message):
        find(name.replace("%s", str(path))).problems("all", 0)


@pytest.mark.parametrize("row, grading, message", [
    ({"question": "?", "answer": "two"}, ":integer", "'two' is not an integer"),
    ({"question": "?", "answer": "F", "choices": {"A": "x"}}, "", "is none of the choices"),
    ({"question": 1, "answer": "F"}, "", "must be text"),
    ({"question": "?", "answer": True}, "", "answer text or a number"),
    ({"question": "?"}, "", "answer text or a number .found: question."),
    ({"question": "?", "answer": "  "}, "", "the answer '  ' is empty"),
    ({"question": "?", "answer": "$$"}, ":exact", "is empty"),
    ({"question": "?", "answer": "7 \\\\ 6"}, ":math", "only a part of it could be read"),
    ({"question": "?", "answer": "A"}, ":choice", "choices must be an object"),
    ({"question": "?", "answer": "A", "choices": ["x"]}, "", "choices must be an object"),
    ({"question": "?", "answer": "A", "context": "It says"}, "",
     "context is not supported; put it into the question"),
    ({"nums": [1, 2], "target": 3}, "", "grade it with file:PATH:countdown"),
    ({"nums": [1, 2]}, ":countdown", "expected nums"),
    ({"nums": [1, "2"], "target": 3}, ":countdown", "expected nums"),
    ({"nums": [1, 2], "target": 3, "answer": "1 - 2"}, ":countdown", "the answer '1 - 2' is wrong"),
    ({"question": "?", "answer": "He has 2. #### 2"}, "", "GSM8K's ####.*; python convert.py FILE"),
    ({"problem": "?", "solution": "2", "answer": "2"}, ":math", "question must be text.*convert.py FILE"),
])
def test_rows_that_cannot_be_graded_are_refused(tmp_path, row, grading, message):
    path = write_jsonl(tmp_path / "my.jsonl", [row])
    if grading == ":math":
        pytest.importorskip("math_verify")
    with pytest.raises(UserError, match=f"my.jsonl:1: .*{message}"):
        find(f"file:{path}{grading}").problems("all", 1)
