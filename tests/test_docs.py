"""What the documents say is so: examples run, cited tests exist, links lead somewhere, line counts hold."""
import ast
import random
import re
from types import SimpleNamespace

import pytest
from conftest import ROOMS, ROOT, SOURCES

import grpo
import rearrange
import tasks

README = (ROOT / "README.md").read_text()
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
EXTEND = (ROOT / "docs" / "extend.md").read_text()
TASK, REWARD, RECIPE, SNIPPET = re.findall(r"```python\n(.*?)```", EXTEND, re.DOTALL)


# ---- docs/extend.md ------------------------------------------------------------------------------
def run_in(module, code):
    """Run an example as if it were written at the end of a module; returns the names it then has."""
    names = dict(vars(module))
    exec(code, names)
    return names


def test_the_task(monkeypatch):
    names = run_in(tasks, TASK)
    monkeypatch.setattr(tasks, "GENERATED", names["GENERATED"])
    task = tasks.find("remainder-2")
    train, test = task.problems("sft", 10), task.problems("test", 10)
    assert not {p.id for p in train} & {p.id for p in test}
    for problem in train:
        assert task.grade(problem, f"<answer>{problem.truth['answer']}</answer>").correct
        assert not task.grade(problem, "<answer>99</answer>").correct
    assert len(TASK.strip().splitlines()) <= 15


def test_the_reward():
    rewards_of = run_in(grpo, REWARD)["rewards_of"]
    completions = [SimpleNamespace(tokens=[0] * n) for n in (5, 10, 15)]
    grades = [SimpleNamespace(correct=correct) for correct in (True, True, False)]
    group = grpo.Group(0, None, None, [], completions, grades)
    assert rewards_of(group, None, 1) == [1.1, 1.0, 0.0]


def test_the_recipe():
    draw = run_in(rearrange, RECIPE)["RECIPES"].pop("until-right").draw
    pairs = [rearrange.Pair(f"{i}", "", "6", i % 3 == 0, "plain", i) for i in range(30)]
    traces = draw(pairs, random.Random(0), 3)
    assert len(traces) == 10
    for trace in traces:
        assert [pair.correct for pair in trace] == [False] * (len(trace) - 1) + [True]


# ---- README --------------------------------------------------------------------------------------
def test_the_snippet_runs(capsys):
    exec(SNIPPET, {})
    assert capsys.readouterr().out.strip()


def test_line_counts_are_near():
    """Of the chapters at the top, and of the rooms."""
    counts = dict(re.findall(r"^\| `([\w/.]+)` \| (\d+) \|", README, re.MULTILINE))
    assert {p.name for p in ROOT.glob("*.py")} | {f"{room}/" for room in ROOMS} == {*counts, "convert.py"}
    for name, said in counts.items():
        files = (ROOT / name).rglob("*") if name.endswith("/") else [ROOT / name]
        lines = sum(path.read_text().count("\n") for path in files if path.suffix in (".py", ".js", ".css"))
        assert abs(lines - int(said)) <= 0.1 * lines, f"{name} has {lines} lines"


def test_commands_of_the_readme_exist():
    """Every flag that a document names belongs to some command."""
    flags = set()
    for script in (*SOURCES, *(ROOT / "benchmarks").glob("*.py")):
        flags |= set(re.findall(r'"(--[a-z-]+)"', script.read_text()))
    torchrun = {"--nproc-per-node", "--max-restarts", "--nnodes", "--rdzv-backend", "--rdzv-endpoint"}
    others = {"--help", "--nodes", "--ntasks-per-node", *torchrun}
    for document in DOCUMENTS:
        named = set(re.findall(r"(?<![\w-])(--[a-z][a-z-]+)", document.read_text()))
        assert named <= flags | others, (document.name, named - flags - others)


def commands_of(text):
    """Lines that call a script, up to a variable of make or a sign of the shell. torchrun is only faster."""
    text = text.replace("torchrun --nproc-per-node 2", "python")
    return re.findall(r"^[ \t]*(python \w+\.py[^$;>|\n]*?) *(?:[$;>|].*)?$", text, re.MULTILINE)


def test_the_demo_is_the_readmes_commands():
    """README's six lines and those of make demo are the same strings, RL only aside in the same order."""
    block = README[README.index("    python sample.py\n"):]
    readme = commands_of(block[:block.index("\n\n")])
    makefile = (ROOT / "Makefile").read_text()
    demo = commands_of(makefile[makefile.index("\ndemo:"):])
    assert len(readme) == 6 and sorted(readme) == sorted(demo)
    beside, = [line for line in readme if "--model mini" in line]
    assert [line for line in readme if line != beside] == [line for line in demo if line != beside]


# ---- the house -----------------------------------------------------------------------------------
MAY_IMPORT = {  # of our own modules, beside those of the same room
    "kernels": set(), "run": set(), "grading": set(),
    "checkpoint": {"model", "kernels", "run"},
    "report": {"grading", "run", "checkpoint"},
}


def code_lines(path):
    """Without blank lines, comments and docstrings."""
    rows = path.read_text().splitlines()
    left_out = {i for i, row in enumerate(rows, 1) if re.match(r"\s*(#|//|/\*|$)", row)}
    for node in ast.walk(ast.parse("\n".join(rows))) if path.suffix == ".py" else ():
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            left_out |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
        if isinstance(node, ast.FunctionDef) and not node.name.endswith(("arguments", "_flags")):
            assert node.end_lineno - node.lineno < 64, f"{path}: {node.name} is longer than 64 lines"
    assert len(rows) <= 650, path
    return len(rows) - len(left_out)


def test_the_house_is_small():
    assert sum(map(code_lines, [*SOURCES, *ROOT.glob("report/page.*s")])) <= 6300


def test_rooms_know_no_chapter():
    """But for the model, in `checkpoint`."""
    ours = {path.stem for path in ROOT.glob("*.py")} | set(ROOMS)
    for room, allowed in MAY_IMPORT.items():
        for path in ROOT.glob(f"{room}/**/*.py"):
            imported = set(re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(), re.MULTILINE))
            assert imported & ours <= allowed | {room}, path


# ---- links and rules -----------------------------------------------------------------------------
def anchors(path):
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    for target, _, anchor in re.findall(r"\]\((?!http)([^)#]*)(#([^)]*))?\)", document.read_text()):
        path = (document.parent / target).resolve() if target else document
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), (target, anchor)


def test_rules_cite_tests_that_exist():
    text = (ROOT / "docs" / "rules.md").read_text()
    assert [int(n) for n in re.findall(r"^(\d+)\. \*\*", text, re.MULTILINE)] == list(range(1, 20))
    sources = {path: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    defined = set(re.findall(r"^def (test_\w+)", "\n".join(sources.values()), re.MULTILINE))
    for cited in re.findall(r"`(test_\w+)`|::(test_\w+)`", text):
        assert (cited[0] or cited[1]) in defined, cited
    numbers = re.findall(r"[Rr]ules? (\d+)(?:(?:,| and) (\d+))?", "\n".join(sources.values()))
    assert {int(n) for pair in numbers for n in pair if n} <= set(range(1, 20))
