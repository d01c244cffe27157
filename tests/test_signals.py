"""Nothing that a terminal, a pipe or a scheduler does loses a run: it saves first, and prints if it can."""
import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from conftest import CHAT, MINI, ROOT, default_signals, environment, start, write_jsonl


SFT = ("--model", MINI, "--data", "chat.jsonl", "--tokens-per-batch", "256", "--device", "cpu",
       "--save-every", "0", "--out", "run")
LONG = ("--epochs", "400")
GRPO = ("--model", MINI, "--device", "cpu", "--questions", "16", "--questions-per-step", "4", "--mini-batch",
        "2", "--rollouts", "4", "--reward", "random", "--save-every", "0", "--out", "run")


@pytest.fixture(autouse=True)
def in_a_folder_with_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl("chat.jsonl", CHAT)


def shell(line, **kw):
    line = line.replace("python", sys.executable).replace("ROOT", str(ROOT))
    return subprocess.Popen(["sh", "-c", line], env=environment(), start_new_session=True,
                            preexec_fn=default_signals, **kw)


def command(script, *flags):
    process = [sys.executable, str(ROOT / script), *map(str, flags)]
    return subprocess.Popen(process, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, preexec_fn=default_signals)


def steps_done():
    path = Path("run/metrics.jsonl")
    return path.read_text().count("\n") if path.exists() else 0


def wait_for_steps(process, n):
    while steps_done() < n:
        assert process.poll() is None, process.stdout and process.stdout.read()
        time.sleep(0.002)


def saved():
    state, = Path("run/state").iterdir()
    return json.loads((state / "state.json").read_text())["step"]


def flags_as_text(*flags):
    return " ".join(map(str, flags))


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"])
def test_signals_that_ask_to_stop(name):
    number = getattr(signal, name)
    process = command("sft.py", *SFT, *LONG)
    wait_for_steps(process, 3)
    process.send_signal(number)
    assert process.wait() == 128 + number
    assert process.stdout.read().endswith("what was written is whole, go on with --resume auto\n")
    assert saved() == steps_done() >= 3


def test_two_signals_at_once_are_one_wish():
    """torchrun may repeat what the terminal has sent; only Ctrl-C some time later means to end at once."""
    process = command("sft.py", *SFT, *LONG)
    wait_for_steps(process, 3)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait() in (128 + signal.SIGTERM, 128 + signal.SIGINT)  # in whatever order they came
    assert saved() == steps_done() >= 3


def test_a_signal_that_is_ignored_stays_so():
    """nohup."""
    process = shell(f"nohup python ROOT/sft.py {flags_as_text(*SFT, '--epochs', 30)} > log 2>&1 & "
                    "echo $!; wait", stdout=subprocess.PIPE, text=True)
    pid = int(process.stdout.readline())
    wait_for_steps(process, 3)
    os.kill(pid, signal.SIGHUP)
    process.wait()
    assert "wrote run" in Path("log").read_text()


def test_a_rollout_is_left_between_two_steps_of_the_sampler():
    """A rollout of an hour is not waited for."""
    process = command("grpo.py", *GRPO, "--max-new-tokens", "1900", "--questions", "64", "--steps", "1",
                      "--questions-per-step", "64", "--mini-batch", "64", "--rollouts", "64")
    while not Path("run/run.json").exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(1)
    asked = time.time()
    process.send_signal(signal.SIGUSR1)
    assert process.wait() == 128 + signal.SIGUSR1 and time.time() - asked < 20
    assert not Path("run/state").exists()  # no step was done


@pytest.mark.parametrize("line", ["{} 2>&1 | head -1", "{} >&- 2>&-", "{} >&-", "{} 2>&-", "{} > /dev/full",
                                  "PYTHONIOENCODING=ascii {}"])
def test_nothing_printed_decides_the_run(line):
    """A reader that has seen enough, closed streams, a full disk under them, a terminal without letters."""
    before = f"python ROOT/grpo.py {flags_as_text(*GRPO, '--steps', 3, '--max-new-tokens', 30)}"
    process = shell(line.format(before), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert process.wait() == 0
    deadline = time.time() + 30
    while steps_done() < 3 and time.time() < deadline:
        time.sleep(0.01)
    time.sleep(0.5)
    assert saved() == 3 and json.loads(Path("run/run.json").read_text())["flags"]["steps"] == 3


def test_no_file_takes_the_place_of_a_closed_stream():
    """Or what some library prints would land in it."""
    Path("m.py").write_text("import cli\n"
                            "def main():\n"
                            "    with open('number', 'w') as f: f.write(str(f.fileno()))\n"
                            "cli.command(main)\n")
    assert shell("python m.py <&- >&- 2>&-").wait() == 0
    assert int(Path("number").read_text()) > 2


def test_a_terminal_that_vanishes():
    """The window is closed: SIGHUP, and a stream whose every write fails."""
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 80))  # or there is no bar

    def own_terminal():
        default_signals()
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "sft.py"), *SFT, *LONG], env=environment(), stdin=slave, stdout=slave,
        stderr=slave, start_new_session=True, preexec_fn=own_terminal)
    os.close(slave)
    while steps_done() < 3:
        os.read(master, 10_000)  # the bar
    os.close(master)
    assert process.wait() == 128 + signal.SIGHUP
    assert saved() == steps_done() >= 3


TORCHRUN = f"{Path(sys.executable).parent}/torchrun --standalone --nproc-per-node 2"
HANDLED = "PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGUSR1,SIGUSR2"  # as docs/paper.md has it


@pytest.mark.parametrize("number, to, before", [
    (signal.SIGINT, "all", ""),
    (signal.SIGUSR1, "agent", HANDLED),  # Slurm's warning
])
def test_stops_under_torchrun(number, to, before):
    process = shell(f"{before} exec {TORCHRUN} ROOT/sft.py {flags_as_text(*SFT, *LONG)} > log 2>&1")
    wait_for_steps(process, 3)
    (os.killpg if to == "all" else os.kill)(process.pid, number)
    process.wait()
    assert saved() == steps_done() >= 3
    assert Path("log").read_text().count("interrupted; what was written is whole") == 1


def test_a_mistake_under_torchrun_is_one_line():
    for flags in (("--lr", "much"), ("--data", "none.jsonl"), ("--context", "100000")):
        process = start("sft.py", *SFT, *flags, processes=2)
        assert process.wait() != 0
        lines = [line for line in process.stdout.read().splitlines() if line.startswith("sft.py: ")]
        assert len(lines) == 1, lines
