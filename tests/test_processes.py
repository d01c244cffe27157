"""Commands that torchrun starts in several processes write what one process writes, after a kill too."""
import json
import os
import signal
import time
from pathlib import Path

import pytest
from conftest import MINI, children, finish, read_rows, refused, start

import evaluate
import sample
from run.processes import join_parts

SAMPLE = ("--model", MINI, "--device", "cpu", "--questions", "5", "--attempts", "2",
          "--max-new-tokens", "60", "--slots", "4")
EVALUATE = ("--models", f"a={MINI},b={MINI}", "--device", "cpu", "--questions", "7", "--samples", "2",
            "--tasks", "countdown-3-small,countdown-2-small", "--max-new-tokens", "60", "--budget-forcing")


pytestmark = pytest.mark.usefixtures("data")


def test_parts_are_joined_by_whole_lines_each_once():
    Path("f").write_bytes(b"one\ntwo\nhal")  # a kill cut the last line
    Path("f.rank0").write_bytes(b"three\ntwo\nfo")  # and came after `two` was copied
    Path("f.rank1").write_bytes(b"four\n")
    Path("g.rank0").write_bytes(b"not of f\n")
    for _ in range(2):
        join_parts("f")
        assert Path("f").read_bytes() == b"one\ntwo\nthree\nfour\n"
    assert sorted(path.name for path in Path().glob("[fg]*")) == ["f", "g.rank0"]
    join_parts("new")
    assert Path("new").read_bytes() == b""


def rows(path):
    """The rows of a file, in an order of their own."""
    return sorted(json.dumps(row) for row in read_rows(path))


def lose_a_process(torchrun, path, lines):
    """SIGKILL one process once its part of a file has so many lines; torchrun ends the other."""
    part = Path(f"{path}.rank1")
    while not part.exists() or part.read_bytes().count(b"\n") < lines:
        assert torchrun.poll() is None, torchrun.stdout.read()
        time.sleep(0.002)
    os.kill(children(torchrun)[-1], signal.SIGKILL)
    assert torchrun.wait() != 0


def test_sampling_in_two_processes_writes_the_rows_of_one(cmd):
    """After the loss of one, too."""
    assert cmd(sample, *SAMPLE, "--out", "one.jsonl")[0] == 0
    lose_a_process(start("sample.py", *SAMPLE, "--out", "cut.jsonl", processes=2), "cut.jsonl", 3)
    assert Path("cut.jsonl.rank1").exists() and len(rows("cut.jsonl")) == 0
    finish(start("sample.py", *SAMPLE, "--out", "cut.jsonl", processes=2))
    assert rows("cut.jsonl") == rows("one.jsonl") and len(rows("one.jsonl")) == 40
    assert sorted(path.name for path in Path().glob("cut.jsonl*")) == ["cut.jsonl", "cut.jsonl.run.json"]


def test_parts_of_another_run_are_not_taken(cmd):
    Path("samples.jsonl.rank1").write_text("{}\n")
    refused(cmd, sample, SAMPLE, "--out samples.jsonl exists and holds no run")


def test_evaluating_in_two_processes_writes_the_rows_of_one(cmd):
    assert cmd(evaluate, *EVALUATE, "--out", "one")[0] == 0
    lose_a_process(start("evaluate.py", *EVALUATE, "--out", "cut", processes=2), "cut/results.jsonl", 2)
    finish(start("evaluate.py", *EVALUATE, "--out", "cut", "--resume", processes=2))
    assert rows("cut/results.jsonl") == rows("one/results.jsonl") and len(rows("one/results.jsonl")) == 56
    assert Path("cut/summary.json").read_bytes() == Path("one/summary.json").read_bytes()
    assert sorted(os.listdir("cut")) == ["report.html", "results.jsonl", "run.json", "summary.json"]
