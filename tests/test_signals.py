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

import conftest
import pytest
from conftest import ROOT, default_signals, environment, start, steps_done, stop_at, wait_for_steps

import sft

SFT = (*conftest.SFT, "--save-every", "0", "--out", "run")
LONG = ("--epochs", "400")
GRPO = (*conftest.GRPO, "--reward", "random", "--save-every", "0", "--out", "run")
pytestmark = pytest.mark.usefixtures("data")


def shell(line, **kw):
    line = line.replace("python", sys.executable).replace("ROOT", str(ROOT))
    return subprocess.Popen(["sh", "-c", line], env=environment(), start_new_session=True,
                            preexec_fn=default_signals, **kw)


def saved():
    state, = Path("run/state").iterdir()
    return json.loads((state / "state.json").read_text())["step"]


def flags_as_text(*flags):
    return " ".join(map(str, flags))


def test_two_signals_at_once_are_one_wish():
    """torchrun may repeat what the terminal has sent; only Ctrl-C some time later means to end at once."""
    process = start("sft.py", *SFT, *LONG)
    wait_for_steps(process, 3)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait() in (128 + signal.SIGTERM, 128 + signal.SIGINT)  # in whatever order they came
    assert process.stdout.read().endswith("what was written is whole, go on with --resume auto\n")
    assert saved() == steps_done() >= 3


def test_a_signal_that_is_ignored_stays_so(cmd, monkeypatch):
    """nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop_at(monkeypatch, sft, "loss_of", 3, signal.SIGHUP)
    assert cmd(sft, *SFT, "--epochs", "1")[0] == 0
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("line", ["{} 2>&1 | head -1", "{} >&- 2>&-", "{} > /dev/full",
                                  "PYTHONIOENCODING=ascii {}"])
def test_nothing_printed_decides_the_run(line):
    """A reader that has seen enough, closed streams, a full disk under them, a terminal without letters."""
    before = f"python ROOT/grpo.py {flags_as_text(*GRPO, '--steps', 1, '--max-new-tokens', 30)}"
    process = shell(line.format(before), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert process.wait() == 0
    deadline = time.time() + 30
    while steps_done() < 1 and time.time() < deadline:
        time.sleep(0.01)
    time.sleep(0.5)
    assert saved() == 1 and json.loads(Path("run/run.json").read_text())["flags"]["steps"] == 1


def test_no_file_takes_the_place_of_a_closed_stream():
    """Or what some library prints would land in it."""
    Path("m.py").write_text("from run import command as cli\n"
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
    """One that all processes find, after they have joined."""
    process = start("sft.py", *SFT, "--context", "100000", processes=2)
    assert process.wait() != 0
    lines = [line for line in process.stdout.read().splitlines() if line.startswith("sft.py: ")]
    assert len(lines) == 1, lines
