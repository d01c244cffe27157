"""What all commands share: help, one line for a mistake, no code from data."""
import errno
import gzip
import json
import re
import subprocess
import sys

import pytest
from conftest import MINI, ROOT, SOURCES, environment, refused

import grpo
import run.command as cli
import run.files as files



class Module:
    """A stand-in for a command that only raises."""
    __name__ = "m"

    def __init__(self, error):
        self.error = error

    def main(self):
        raise self.error


def test_full_disk_and_memory_are_one_line(cmd):
    full = Module(OSError(errno.ENOSPC, "No space left on device", "samples.jsonl"))
    refused(cmd, full, (), "m.py: the disk is full (samples.jsonl); free some space, then go on")
    allocator = "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to"
    refused(cmd, Module(RuntimeError(allocator)), (), "lower --slots")


def test_a_bug_keeps_its_traceback(cmd):
    with pytest.raises(RuntimeError, match="a real bug"):
        cmd(Module(RuntimeError("a real bug")))


ROWS = [{"a": 1}, {"a": "é"}, {"a": [2]}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
ARRAY = json.dumps(ROWS, indent=2, ensure_ascii=False).encode()


@pytest.mark.parametrize("name, content, places", [
    ("a.jsonl", LINES, ":1 :2 :3"),
    ("a.jsonl", b"\xef\xbb\xbf" + LINES, ":1 :2 :3"),
    ("a.jsonl", b"\n\n" + LINES.replace(b"\n", b"\r\n\r\n"), ":3 :5 :7"),
    ("a.jsonl", LINES[:-1], ":1 :2 :3"),
    ("a.jsonl.gz", gzip.compress(LINES, mtime=0), ":1 :2 :3"),
    ("a.json", ARRAY, ": item 1:: item 2:: item 3"),
    ("a.json", b"\xef\xbb\xbf\n" + ARRAY, ": item 1:: item 2:: item 3"),
    ("a.json.gz", gzip.compress(ARRAY, mtime=0), ": item 1:: item 2:: item 3"),
])
def test_rows_as_people_have_them(tmp_path, name, content, places):
    path = tmp_path / name
    path.write_bytes(content)
    found = list(files.read_jsonl(path, ("a",)))
    assert [row for _, row in found] == ROWS
    places = places.split("::") if "item" in places else places.split()
    assert [where.removeprefix(str(path)).strip(":") for where, _ in found] == [p.strip(":") for p in places]


@pytest.mark.parametrize("name, content, message", [
    ("a.jsonl", b'{"a": 1}\n\n{"a": \n', "a.jsonl:3: not valid JSON"),
    ("a.jsonl", b'{"a": 1}\n\xff\n', "a.jsonl:2: not UTF-8 text"),
    ("a.jsonl", b'{"a": "\\ud800"}\n', "a.jsonl:1: not UTF-8 text"),
    ("a.jsonl", b'{"b": 1}\n', "a.jsonl:1: the key 'a' is missing"),
    ("a.jsonl", b"[" * 100_000 + b"\n", "a.jsonl:1: not valid JSON"),
    ("a.jsonl", b'{"a": NaN}\n', "a.jsonl:1: not UTF-8 text, or not JSON"),
    ("a.jsonl", b"[1]\n", "expected an object"),
    ("a.jsonl", b'{"a": ' + b"1" * 5000 + b"}\n", "not valid JSON"),
    ("a.parquet", b"PAR1", "not JSON Lines; make it that: python convert.py .*a.parquet --out rows.jsonl"),
    ("a.jsonl.gz", LINES, "not a whole gzip file"),
    ("a.jsonl.gz", gzip.compress(LINES, mtime=0)[:-12], "not a whole gzip file"),
    ("a.json", b"[]", "holds no rows"),
    ("a.json", b"[1]", "a.json: item 1: expected an object"),
    ("a.json", b'[{"a": 1},', "a.json: not valid JSON"),
], ids=lambda value: str(value)[:20])
def test_rows_that_cannot_be_read_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(cli.UserError, match=message):
        list(files.read_jsonl(tmp_path / name, ("a",)))


def test_no_code_from_data():
    """Rule 19: no pickle, no eval, no remote code anywhere in the program."""
    forbidden = re.compile(
        r"\b(eval|exec)\(|(?<!re\.)\bcompile\(|pickle|torch\.load|torch\.save|trust_remote_code"
        r"|numpy\.load|np\.load|marshal|__import__\(")
    for path in SOURCES:
        text = path.read_text().replace(".eval()", "")
        assert not forbidden.search(text), path


def test_light_files_import_no_torch():
    code = "import sys, tasks, rearrange; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment()).returncode == 0


def test_a_wrong_KERNELS_leaves_nothing_behind(cmd, monkeypatch, tmp_path):
    monkeypatch.setenv("KERNELS", "fast")
    flags = ("--model", MINI, "--device", "cpu", "--out", "run")
    refused(cmd, grpo, flags, "KERNELS=fast: give reference or triton")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["sample", "sft", "grpo", "evaluate"])
def test_threads_that_wait_sleep(name):
    """Beside other work spinning threads made an evaluation 3 times as slow. Torch reads it when imported."""
    said = ("import sys, os; from importlib.abc import MetaPathFinder\n"
            "class Watch(MetaPathFinder):\n"
            "    def find_spec(self, name, *more):\n"
            "        if name == 'torch':\n"
            "            print(os.environ.get('OMP_WAIT_POLICY'), flush=True)\n"
            "            os._exit(0)\n"
            f"sys.meta_path.insert(0, Watch()); import {name}")
    kept = {key: value for key, value in environment().items() if key != "OMP_WAIT_POLICY"}
    done = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, env=kept)
    assert done.stdout == "passive\n", done.stderr
