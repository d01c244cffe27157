"""Bad input, by command and flag: one line that names the mistake, exit status 2, nothing written.

Every flag of every command is in the table; what is wrong with the content of files is here or in the tests
of what reads them. Interruptions are in test_signals.py.
"""
import json
import re
from pathlib import Path

import pytest
from conftest import CHAT, MINI, bytes_below, refused, tiny, write_jsonl

import convert
import evaluate
import grpo
import rearrange
import sample
import sft
from checkpoint import save

NONE = "none/of/it"
MODULES = {"sample": sample, "rearrange": rearrange, "sft": sft, "grpo": grpo, "evaluate": evaluate}
MODEL = {  # what the commands that load a model share
    "--device tpu": "--device tpu: give cpu, cuda or cuda:N",
    "--device cuda:99": "--device cuda:99",
    "--dtype float16": "argument --dtype: invalid choice: 'float16'",
    "--chat-template-kwargs [1]": "argument --chat-template-kwargs: invalid JSON object value",
    "--seed x": "argument --seed: invalid int value: 'x'",
    "--seed 99999999999999999999": "argument --seed: 99999999999999999999 must be at least",
    "--chat-template-kwargs {\"a\":NaN}": "argument --chat-template-kwargs: invalid JSON object value",
    "--chat-template-kwargs {\"tools\":[]}": "argument --chat-template-kwargs: tools cannot be given",
    "--out there.jsonl/x": "argument --out: there.jsonl/x cannot be made",
    "--out ": "argument --out: give a path that is not empty",
    "--see 1": "unrecognized arguments: --see 1",  # not taken for --seed
}
TASK = {
    "--task chess": "task chess: unknown; the tasks are countdown-2, countdown-3",
    "--task countdown-3,countdown-3": "countdown-3 appears twice",
    "--task countdown-3,": "nothing between two commas",
    "--task file:none.jsonl --split all": "none.jsonl: no such file",
    "--task gsm8k --data-dir nowhere": "nowhere/gsm8k/train.jsonl: no such file; gsm8k is not downloaded",
    "--questions -1": "argument --questions: -1 must be at least 0",
    "--questions 99999999 --task file:rows.jsonl --split all": "99999999 were asked for",
    "--split nowhere": "has no split 'nowhere'",
    "--max-new-tokens 0": "argument --max-new-tokens: 0 must be at least 1",
    "--slots -1": "argument --slots: -1 must be at least 0",
    "--resume": "--resume: ",
}
CHOICE = {
    "--temperature -1": "argument --temperature: -1 must be at least 0",
    "--top-p 7": "argument --top-p: 7 must be above 0 and at most 1",
    "--top-k -1": "argument --top-k: -1 must be at least 0",
}
TRAINING = {
    "--lr x": "argument --lr: invalid float value: 'x'",
    "--lr inf": "argument --lr: inf must be a finite number",
    "--weight-decay -1": "argument --weight-decay: -1 must be at least 0",
    "--max-norm nan": "argument --max-norm: nan must be a finite number",
    "--micro-batch-tokens 0": "argument --micro-batch-tokens: 0 must be at least 1",
    "--recompute=1": "argument --recompute: ignored explicit argument '1'",
    "--save-every -1": "argument --save-every: -1 must be at least 0",
    "--keep 0": "argument --keep: 0 must be at least 1",
    "--timeout 0": "argument --timeout: 0 must be above 0",
    "--eval-every -1": "argument --eval-every: -1 must be at least 0",
}
LOADED = {
    f"--model {NONE}": f"--model {NONE}: no such folder",
    "--model shapes": "shapes: the weights do not fit config.json",
    "--model family": "model_type 'gpt2' is not supported",
    "--model bare": "bare: tokenizer.json is missing",
}
TABLE = {
    "sample": {
        **MODEL, **CHOICE, **TASK, **LOADED,
        "--styles odd": "--styles odd: unknown; the styles are plain",
        "--n 0": "argument --n/--attempts: 0 must be at least 1",
        "--reflections -1": "argument --reflections: -1 must be at least 0",
        "--hint --task file:pool.jsonl:countdown --split all --questions 0": "have no right answer to tell",
        "--prompt LONG": "tokens and does not fit the model's context of",
        "--repetition-penalty 0": "argument --repetition-penalty: 0 must be above 0",
        "--task file:long.jsonl --split all --questions 1": "tokens and does not fit the model's context of",
        "--out there.jsonl": "--out there.jsonl exists and holds no run",
        "--out folder/": "--out folder/: must be a file, not a folder",
    },
    "rearrange": {
        "--data none.jsonl": "none.jsonl: no such file",
        "--data there.jsonl": "there.jsonl:1: the key 'id' is missing",
        "--data empty.jsonl": "empty.jsonl: the file holds no rows",
        "--data wrong.jsonl": "none of the 1 sampled attempts is correct; sample more",
        "--data wrong.jsonl --out there.jsonl": "--out there.jsonl exists",
        "--recipe odd": "argument --recipe: invalid choice: 'odd'",
        "--max-correct 0": "argument --max-correct: 0 must be at least 1",
        "--traces-per-question -1": "argument --traces-per-question: -1 must be at least 0",
        "--show -1": "argument --show: -1 must be at least 0",
        "--seed x": MODEL["--seed x"],
    },
    "sft": {
        **MODEL, **TRAINING,
        f"--model {NONE}": f"--model {NONE}: no such folder",
        "--resume": "--resume: ",
        "--data none.jsonl": "none.jsonl: no such file",
        "--data cut.jsonl": "cut.jsonl:2: not valid JSON",
        "--data empty.jsonl": "empty.jsonl: the file holds no rows",
        "--data chat.jsonl,chat.jsonl": "chat.jsonl appears twice",
        "--epochs 0": "argument --epochs: 0 must be at least 1",
        "--tokens-per-batch 0": "argument --tokens-per-batch: 0 must be at least 1",
        "--context 1 --data chat.jsonl": "every row is longer than --context 1 tokens",
        "--context 99999999 --data chat.jsonl": "has a context of",
        "--held-out 99": "argument --held-out: 99 must be at least 1 and at most 50",
        "--data chat.jsonl --out folder": "--out folder exists and holds no run",
        "--data chat.jsonl --out folder --resume": "--out folder exists and holds no run",
        "--data chat.jsonl --out folder --resume auto": "--out folder exists and holds no run",
        "--data chat.jsonl --out there.jsonl": "--out there.jsonl exists",
    },
    "grpo": {
        **MODEL, **TASK, **TRAINING,
        f"--model {NONE}": f"--model {NONE}: no such folder",
        "--steps 0": "argument --steps: 0 must be at least 1",
        "--questions-per-step 0": "argument --questions-per-step: 0 must be at least 1",
        "--questions 4": "--questions-per-step 16: there are only 4 questions",
        "--rollouts 1": "--rollouts 1: a group needs at least 2 responses",
        "--mini-batch 3": "--mini-batch 3 must divide --questions-per-step 16",
        "--temperature 0": "argument --temperature: 0 must be above 0",
        "--clip-low 2": "argument --clip-low: 2 must be at least 0 and at most 1",
        "--clip-high -1": "argument --clip-high: -1 must be at least 0",
        "--kl -1": "argument --kl: -1 must be at least 0",
        "--loss odd": "argument --loss: invalid choice: 'odd'",
        "--no-std=1": "argument --no-std: ignored explicit argument '1'",
        "--truncated odd": "argument --truncated: invalid choice: 'odd'",
        "--reward odd": "argument --reward: invalid choice: 'odd'",
        "--eval-questions 0": "argument --eval-questions: 0 must be at least 1",
        "--log-groups -1": "argument --log-groups: -1 must be at least 0",
        "--eval-every 1 --split val": "--eval-every measures on the split val",
        "--out folder": "--out folder exists and holds no run",
    },
    "evaluate": {
        **MODEL, **CHOICE,
        **{flags.replace("--task ", "--tasks "): message.replace("train.jsonl", "test.jsonl")
           for flags, message in TASK.items()},
        f"--models a={NONE}": f"--model {NONE}: no such folder",
        f"--models a={MINI},a={MINI}": "appears twice; name it once",
        f"--models a={MINI},a=shapes": "two models have the same name",
        "--tasks file:long.jsonl --split all --questions 1": "tokens and does not fit the model's context of",
        "--models a=shapes": "shapes: the weights do not fit config.json",
        "--samples -1": "argument --samples: -1 must be at least 0",
        "--k 0": "argument --k: 0 must be at least 1",
        "--k 9 --samples 4": "pass@9 needs at least 9 samples",
        "--questions 0": "makes its questions",
        "--budget-forcing=1": "argument --budget-forcing: ignored explicit argument '1'",
        "--style odd": "argument --style: invalid choice: 'odd'",
        "--out folder": "--out folder exists and holds no run",
    },
}
CASES = [(name, flags, message) for name, table in TABLE.items() for flags, message in table.items()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the table names. No case writes there, which is asserted."""
    folder = tmp_path_factory.mktemp("input")
    with pytest.MonkeyPatch.context() as m:
        m.chdir(folder)
        Path("folder").mkdir()
        Path("folder/thesis.tex").write_text("x")
        write_jsonl("there.jsonl", [{"a": 1}])
        write_jsonl("chat.jsonl", CHAT)
        write_jsonl("rows.jsonl", [{"question": f"{i}?", "answer": str(i)} for i in range(20)])
        write_jsonl("pool.jsonl", [{"nums": [1, 2, 3], "target": 6}])
        write_jsonl("long.jsonl", [{"question": "word " * 20_000, "answer": "1"}])
        wrong = dict.fromkeys(rearrange.SAMPLE, "x")
        wrong |= {"index": 0, "correct": False, "reflections": [], "problem": {}}
        write_jsonl("wrong.jsonl", [wrong])
        Path("cut.jsonl").write_text(json.dumps(CHAT[0]) + '\n{"mess')
        Path("empty.jsonl").write_text("")
        for name in ("shapes", "family", "bare"):
            save(name, *tiny())
        change_config("shapes", intermediate_size=24)
        change_config("family", model_type="gpt2")
        Path("bare/tokenizer.json").unlink()
    return folder


@pytest.fixture
def here(cmd, folder, monkeypatch):
    monkeypatch.chdir(folder)


def change_config(folder, **values):
    path = Path(folder, "config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("name, flags, message", CASES, ids=[f"{name} {flags}" for name, flags, _ in CASES])
def test_one_line_and_nothing_written(cmd, here, name, flags, message):
    argv = ["x" * 100_000 if word == "LONG" else word for word in flags.split(" ")]
    before = bytes_below()
    refused(cmd, MODULES[name], ("--device", "cpu", *argv) if name != "rearrange" else argv, message)
    assert bytes_below() == before


@pytest.mark.parametrize("name", MODULES)
def test_flags_are_those_of_the_table(cmd, name):
    """So a flag is added or removed on purpose."""
    _, out, _ = cmd(MODULES[name], "--help")
    flags = set(re.findall(r"^  (--[a-z-]+)", out[out.index("options:"):], re.MULTILINE))
    words = {word.partition("=")[0] for line in TABLE[name] for word in line.split(" ")} | {"--out"}
    assert flags == {word for word in words if word.startswith("--")} - {"--see"}
    for block in re.split(r"\n(?=  --)", out[out.index("options:"):])[1:]:
        assert "(default: " in block.replace("\n", " ").replace("  ", "") or "-h" in block, block


@pytest.mark.parametrize("argv, message", [
    (("none.jsonl", "--out", "x.jsonl"), "none.jsonl: no such file"),
    (("rows.jsonl", "--out", "there.jsonl"), "--out there.jsonl exists"),
    (("cut.jsonl", "--out", "x.jsonl"), "cut.jsonl:2: not valid JSON"),
    ((), "the following arguments are required"),
])
def test_convert(cmd, here, argv, message):
    before = bytes_below()
    refused(cmd, convert, argv, message)
    assert bytes_below() == before
