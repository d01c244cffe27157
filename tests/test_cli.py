"""What all commands share, and what no file of the project may do."""
import errno
import re
import subprocess
import sys

import pytest
from conftest import MINI, ROOT, environment

import cli
import evaluate
import grpo
import rearrange
import sample
import sft

COMMANDS = [sample, rearrange, sft, grpo, evaluate]
SOURCES = [p for p in [*ROOT.glob("*.py"), *ROOT.glob("kernels/*.py"), *ROOT.glob("mini/*.py")]]


@pytest.mark.parametrize("module", COMMANDS)
def test_help_explains_every_flag_with_its_default(cmd, module):
    status, out, _ = cmd(module, "--help")
    options = out[out.index("options:"):]
    flags = re.findall(r"^  (--[a-z-]+)", options, re.MULTILINE)
    assert status == 0 and len(flags) >= 6
    for block in re.split(r"\n(?=  --)", options)[1:]:
        assert "(default: " in block.replace("\n", " ").replace("  ", "") or "--help" in block or "-h" in block, block


@pytest.mark.parametrize("module", [sample, sft, grpo, evaluate])
def test_bad_model_or_task_is_one_line(cmd, module, tmp_path):
    (tmp_path / "silver.jsonl").write_text('{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}\n')
    model = "--models" if module is evaluate else "--model"
    for flags, message in [((model, str(tmp_path / "none")), "no such folder"), ((model, MINI, "--device", "cuda"), "finds no GPU"), (("--device", "tpu"), "give cpu, cuda or cuda:N")]:
        if flags[-1] == "cuda" and __import__("torch").cuda.is_available():
            continue
        status, _, err = cmd(module, *flags)
        assert status == 2 and message in err and err.count("\n") == 1 and "Traceback" not in err
    if module is not sft:
        status, _, err = cmd(module, "--task" + "s" * (module is evaluate), "chess")
        assert status == 2 and "the tasks are countdown-2..6" in err


def test_full_disk_and_memory_are_one_line(cmd, monkeypatch):
    def full():
        raise OSError(errno.ENOSPC, "No space left on device", "samples.jsonl")
    module = type("m", (), {"__name__": "m", "main": staticmethod(full)})
    assert cmd(module)[::2] == (2, "m.py: the disk is full (samples.jsonl); free some space, then go on as after an interruption\n")

    def memory():
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")
    module.main = staticmethod(memory)
    assert cmd(module)[0] == 2 and "lower --slots" in cmd(module)[2]

    def bug():
        raise RuntimeError("a real bug")
    module.main = staticmethod(bug)
    with pytest.raises(RuntimeError, match="a real bug"):  # never hidden
        cmd(module)


def test_jsonl_errors_name_the_line(tmp_path):
    path = tmp_path / "a.jsonl"
    for content, message in [(b'{"a": 1}\n\n{"a": \n', "a.jsonl:3: not valid JSON"), (b'{"a": 1}\n\xff\n', "a.jsonl:2: not UTF-8 text"), (b'{"b": 1}\n', "a.jsonl:1: the key 'a' is missing"), (b"\n", "holds no rows"),
                             (b"[" * 100_000 + b"\n", "a.jsonl:1: not valid JSON")]:
        path.write_bytes(content)
        with pytest.raises(cli.UserError, match=message):
            list(cli.read_jsonl(path, ("a",)))


def test_no_code_from_data():
    """Rule 19: no pickle, no eval, no remote code anywhere in the program."""
    for path in SOURCES:
        text = re.sub(r"\.eval\(\)", "", path.read_text())
        assert not re.search(r"\b(eval|exec)\(|(?<!re\.)\bcompile\(|pickle|torch\.load|torch\.save|trust_remote_code|numpy\.load|np\.load|marshal|__import__\(", text), path


def test_light_files_import_no_torch():
    code = "import sys, tasks, rearrange; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment()).returncode == 0


def test_ctrl_c_is_130(cmd):
    def interrupted():
        raise KeyboardInterrupt
    status, _, err = cmd(type("m", (), {"__name__": "m", "main": staticmethod(interrupted)}))
    assert status == 130 and err.count("\n") == 1


def test_a_wrong_KERNELS_leaves_nothing_behind(cmd, monkeypatch, tmp_path):
    monkeypatch.setenv("KERNELS", "fast")
    status, _, err = cmd(grpo, "--model", MINI, "--device", "cpu", "--out", "run")
    assert status == 2 and "KERNELS=fast: give reference or triton" in err and not (tmp_path / "run").exists()
