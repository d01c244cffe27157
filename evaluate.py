"""Accuracy with intervals, use of the skills, budget forcing.

    python evaluate.py                                # mini, and those of out/{rl,sft,grpo} that exist
    python evaluate.py --models base=mini,sft=out/sft,grpo=out/grpo --tasks countdown-4-small --budget-forcing
    python evaluate.py --models Qwen/Qwen2.5-1.5B-Instruct --tasks gsm8k --questions 0 --max-new-tokens 4096

All models get the same questions, so the difference to the first is paired. Intervals are at 95%. An answer
counts if it is the last one after </think> (strict); the lenient figure takes the last one anywhere. Beside
them stands the part without a readable answer: what training gains there is form, not reasoning.

`torchrun --nproc-per-node 8 evaluate.py ...` divides the questions among the processes. Left out: judging by
another model.
"""
import json
import os
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tasks
from checkpoint import device_and_dtype, load, model_fingerprint, read_folder
from checkpoint.tokenizer import Tokenizer
from report.figures import pass_at, printed_table, summarise
from report.page import renew
from run.command import (
    Progress, UserError, command, location, may_change, natural, number, parser, positive, resume_flag, say,
    split_list,
)
from run.files import to_json, write_whole
from run.processes import ALONE, joined_rows, own_part, rank, start_processes, world
from run.record import refuse_wrong_out, start_or_check, sweep
from sample import Completion, Request, Sampler, SamplingParams, check_lengths, still_to_do


# ---- budget forcing ------------------------------------------------------------------------------
def forced_prompt(tokenizer: Tokenizer, completion: Completion) -> tuple[list[int], list[int]]:
    """(the prompt to go on from, what it adds to the old one), for a response that ended within its budget.

    Cut before the last </think> (at the end, if there is none) and open a new <sample>. The ids that stay are
    the sampled ones: nothing before the cut is decoded and encoded again. Where the cut falls inside a token,
    what that token says before it is appended with the new <sample>.
    """
    sampled = completion.tokens[:-1]  # without the stop token
    text = tokenizer.decode(sampled)
    cut = text.rfind("</think>")
    if cut >= 0:
        text = text[:cut]
    # A prefix that ends inside a character can decode to 3 characters too many: go 4 beyond, then back.
    n = bisect_right(range(len(sampled)), len(text) + 4, key=lambda n: len(tokenizer.decode(sampled[:n])))
    while not text.startswith(tokenizer.decode(sampled[:n])):
        n -= 1
    beginning = sampled[:n]
    rest = text[len(tokenizer.decode(beginning)):]
    line = "" if text.endswith("\n") else "\n"
    beginning = beginning + tokenizer.encode(f"{rest}{line}<sample>\n")
    return completion.prompt + beginning, beginning


# ---- a cell: one model on one task ---------------------------------------------------------------
@dataclass
class Plan:
    """A task with its questions and how often each is asked."""
    task: tasks.Task
    problems: list[tasks.Problem]
    samples: int
    ks: list[int]  # of pass@k

    @property
    def wanted(self) -> set[tuple[str, int]]:
        """(id, index) of all rows."""
        return {(problem.id, j) for problem in self.problems for j in range(self.samples)}


def requests_of(plans: list[Plan], tokenizer: Tokenizer, args) -> list[Request]:
    """A request for each question that this process asks."""
    requests = []
    for plan in plans:
        for problem in plan.problems[rank()::world()]:
            prompt = tokenizer.chat(plan.task.prompt(problem, args.style))
            requests.append(Request(prompt, list(range(plan.samples)), problem.id, payload=problem))
    return requests


def run_cell(name: str, sampler: Sampler, plan: Plan, args, done: set) -> Iterator[dict]:
    """The rows of results.jsonl for one model and task, one per sample, as they come.

    This process's part of them, without those whose (id, index) is `done`.
    """
    tokenizer, task = sampler.tokenizer, plan.task
    params = SamplingParams(args.max_new_tokens, args.temperature, args.top_k, args.top_p)
    queue = still_to_do(requests_of([plan], tokenizer, args), done)
    forced = deque()
    work = sum(len(request.indices) for request in queue) * (2 if args.budget_forcing else 1)
    with Progress(f"{name} on {task.name}", work, unit="response") as progress:
        for request, j, completion in sampler.stream(queue, params, args.seed):
            progress.update()
            problem = request.payload
            row = result_row(name, task, problem, j, completion, tokenizer)
            if args.budget_forcing:
                longer = forced_request(sampler, problem, row, completion, params)
                if longer:
                    forced.append(longer)
                    continue  # the row is written when the rest has come
                row["forced"] = graded_response(task, problem, completion, tokenizer)
            yield row
        for request, _, completion in sampler.stream(forced, params, args.seed):
            progress.update()
            problem, row, beginning = request.payload
            completion.tokens = beginning + completion.tokens
            row["forced"] = graded_response(task, problem, completion, tokenizer)
            yield row


def forced_request(sampler, problem, row, completion, params) -> Request | None:
    """A request that makes a finished response think on, up to twice the budget; None if it cannot."""
    if completion.finish != "stop":
        return None
    prompt, beginning = forced_prompt(sampler.tokenizer, completion)
    left = 2 * params.max_new_tokens - len(beginning)
    if left <= 0 or len(prompt) >= sampler.model.config.max_position_embeddings:
        return None
    return Request(prompt, [row["index"]], f"forced/{problem.id}", max_new_tokens=left,
                   payload=(problem, row, beginning))


def result_row(name, task, problem, index, completion, tokenizer):
    graded = graded_response(task, problem, completion, tokenizer)
    text = graded["response"]
    return {
        "model": name,
        "task": task.name,
        "id": problem.id,
        "index": index,
        "question": problem.question,
        "reference": problem.truth["answer"],
        **graded,
        "lenient": task.grade(problem, text, lenient=True).correct,
    }


def graded_response(task, problem, completion, tokenizer):
    text = tokenizer.decode_response(completion.tokens)
    return task.shown(problem, text, len(completion.tokens), completion.finish)


# ---- the command ---------------------------------------------------------------------------------
# Where the README's commands leave their models.
ARMS = {"base": "mini", "rl-only": "out/rl", "sft": "out/sft", "sft+grpo": "out/grpo"}


def arguments():
    p = parser(__doc__, out="out/evaluate", model="")
    location(p.add_argument("--models", help="name=folder or hub id, with commas; others are compared with "
                         f"the first; if not given, those that exist of {', '.join(ARMS.values())}"))
    p.add_argument("--tasks", default="countdown-3-small,countdown-4-small,countdown-5-small",
                   help=f"with commas between: {tasks.NAMES}")
    p.add_argument("--split", default="test", help=f"{', '.join(tasks.SPLITS)}; of a file: also all")
    p.add_argument("--questions", type=natural, default=100, help="of each task; 0: all of a file")
    p.add_argument("--samples", type=natural, default=0,
                   help="responses to each question; 0: 4, or 34 where fewer than 100 questions are asked")
    p.add_argument("--k", type=numbers,
                   help="pass@k for these k, with commas; if not given, for the number of samples")
    p.add_argument("--max-new-tokens", type=positive, default=1024, help="budget of a response")
    p.add_argument("--budget-forcing", action="store_true",
                   help="also let responses that ended go on with a new <sample>, up to twice the budget")
    p.add_argument("--style", default="plain", choices=list(tasks.STYLES),
                   help="of the prompt; `instruct` explains the tags to a model that was not trained on them")
    p.add_argument("--temperature", type=number(float, 0), default=1.0, help="0 is greedy")
    p.add_argument("--top-p", type=number(float, 0, 1, open_low=True), default=1.0,
                   help="keep the likeliest tokens up to this mass")
    p.add_argument("--top-k", type=natural, default=0, help="keep so many of the likeliest tokens; 0: all")
    location(p.add_argument("--data-dir", default="data", help="where gsm8k/, csqa/, math500/ and such lie"))
    may_change(p.add_argument("--slots", type=natural, default=0, help="rows decoded at once; 0: what fits"))
    resume_flag(p)
    args = p.parse_args()
    if args.models is None:
        args.models = [(name, folder) for name, folder in ARMS.items()
                       if folder == "mini" or Path(folder, "config.json").is_file()]
    else:
        args.models = [named_model(text) for text in split_list(args.models, "--models")]
    if len({name for name, _ in args.models}) < len(args.models):
        raise UserError("--models: two models have the same name; give them as name=folder")
    return args


def numbers(text: str) -> list[int]:
    """An argparse type: "1,4" -> [1, 4]"""
    return [positive(k) for k in text.split(",")]


def named_model(text: str) -> tuple[str, str]:
    """ "sft=out/sft" -> ("sft", "out/sft");  "out/lr=1/" -> ("lr=1", "out/lr=1/") """
    name, equals, folder = text.partition("=")
    if equals and "/" not in name and "." not in name:
        return name, folder
    return os.path.basename(text.rstrip("/")), text


def make_plans(args) -> list[Plan]:
    plans = []
    for task in tasks.find_all(args.tasks, args.data_dir, "--tasks"):
        problems = task.problems(args.split, args.questions, args.seed)
        samples = args.samples or (4 if len(problems) >= 100 else 34)
        ks = args.k or [samples]
        pass_at(max(ks), samples, 0)  # refuses a k above the samples: before the work, not after
        plans.append(Plan(task, problems, samples, ks))
    return plans


def inputs(args, plans: list[Plan], template_kwargs: list) -> dict:
    """Fingerprints of all that is read."""
    models = [[name, model_fingerprint(folder)] for name, folder in args.models]
    questions = ((plan.task, problem) for plan in plans for problem in plan.problems)
    return {"--models": models, "--tasks": tasks.questions_fingerprint(questions),
            "--chat-template-kwargs": template_kwargs}


def main():
    args = arguments()
    out = Path(args.out)
    refuse_wrong_out(args.resume, out, out / "run.json")
    device, _ = device_and_dtype(args.device)
    start_processes(device, minutes=ALONE)
    plans = make_plans(args)
    template_kwargs = []  # of each model
    for _, folder in args.models:  # a name mistyped at the end of the list must not cost hours
        _, config, tokenizer = read_folder(folder, args.chat_template_kwargs)
        template_kwargs.append(tokenizer.template_kwargs)
        prompts = {request.identity: request.prompt for request in requests_of(plans, tokenizer, args)}
        check_lengths(prompts, config.max_position_embeddings, args.max_new_tokens)
    start_or_check(out / "run.json", args, lambda: inputs(args, plans, template_kwargs))
    if rank() == 0:
        sweep(out)
    results = read_results(out)
    cells = []
    for (name, folder), kwargs in zip(args.models, template_kwargs, strict=True):
        sampler = None  # while nothing is missing
        for plan in plans:
            done = results.get((name, plan.task.name), {}).keys()
            if not plan.wanted <= done:
                if sampler is None:
                    loaded = load(folder, args.device, args.dtype, args.chat_template_kwargs)
                    sampler = Sampler(*loaded, args.slots)
                with open(own_part(f"{out}/results.jsonl"), "a", encoding="utf-8") as f:
                    for row in run_cell(name, sampler, plan, args, done):
                        f.write(to_json(row) + "\n")
                        f.flush()
                results = read_results(out)
            if rank() == 0:
                rows = in_order(results, name, plan)
                cell = summarise(rows, in_order(results, args.models[0][0], plan), plan.samples, plan.ks)
                cells.append({**cell, "chat_template_kwargs": kwargs})
                write_summary(out, cells)
                say(f"{name} on {plan.task.name}: {cell['accuracy']:.1%}")
    if rank() == 0:
        say(f"\n{printed_table(cells)}\n")
        say(f"wrote {out}/results.jsonl, {out}/summary.json and {out}/report.html")


# The names in a row of results.jsonl.
ROW = ("model", "task", "id", "index", "question", "reference", "response", "tokens", "finish", "answer",
       "correct", "reason", "lenient", "answers", "reflections", "attempts", "verdicts")


def read_results(out: Path) -> dict:
    """{(model, task): {(id, index): row}} of results.jsonl, the parts of all processes joined."""
    results = {}
    for _, row in joined_rows(f"{out}/results.jsonl", ROW):
        results.setdefault((row["model"], row["task"]), {})[row["id"], row["index"]] = row
    return results


def in_order(results: dict, name: str, plan: Plan) -> list[dict]:
    rows = results[name, plan.task.name]
    return [rows[problem.id, j] for problem in plan.problems for j in range(plan.samples)]


def write_summary(out: Path, cells: list[dict]) -> None:
    """Make summary.json and the page anew."""
    write_whole(out / "summary.json", json.dumps(cells, indent=2))
    renew(out)


if __name__ == "__main__":
    command(main, resumable=True)
