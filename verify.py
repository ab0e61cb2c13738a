"""
What a problem is, how it is asked, and how an answer is judged. Every phase speaks through this file.

  problems    load_problems(path or hub name)           -> [Problem], and why the others were dropped
  tokens      chat_ids(tokenizer, problem)              -> x:  the prompt, by the tokenizer's own chat template
              revision_ids(tokenizer, x, y, correct, f) -> x, y without its end of turn, "\\n\\n" + P_r + "\\n\\n"
  verdicts    Judge()(problems, responses)              -> [Verdict], the binary reward, in worker processes

Departures from the official code, which has three different prompts and joins text in one phase, ids in another: here
there is one prompt, P_r meets tokens in one place, and ids are never decoded and encoded again.

    python verify.py --data gsm8k_test.jsonl                                  # what is kept, what is dropped, and why
    python verify.py --data gsm8k_test.jsonl --responses O/responses.jsonl    # judge again: what changed
"""
import argparse
import ast
import contextlib
import fcntl
import functools
import glob
import itertools
import json
import math
import os
import platform
import random
import re
import select
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

# ---------------------------------------------------------------------------------------------------------- ranks


class Ranks(NamedTuple):
    rank: int
    world: int
    device: object  # torch.device of this rank
    store: object  # a key-value store that all ranks share


def launch():
    """
    Joins the process group of torchrun (or makes one of a single process) and chooses this rank's device.
    Returns Ranks. cpu tensors go through gloo, cuda tensors through nccl.
    """
    import torch
    import torch.distributed as dist
    import transformers
    transformers.utils.logging.disable_progress_bar()  # of loading weights: it would run through the step lines
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        store, rank, world = next(dist.rendezvous("env://"))
    else:
        store, rank, world = dist.HashStore(), 0, 1
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=dist.PrefixStore("group", store), rank=rank,
                            world_size=world)
    shown = sys.excepthook  # torch's by now: a traceback with the rank before each line
    sys.excepthook = lambda kind, error, traceback: (
        print(f"error: {line}", file=sys.stderr, flush=True) if (line := mendable(error)) else shown(kind, error, traceback))
    return Ranks(rank, world, device, dist.PrefixStore("shared", store))


def mendable(error):
    """One line on an uncaught error that a user can mend (full disk, broken file, out of memory), None for any other."""
    import torch
    from safetensors import SafetensorError
    from torch.distributed.checkpoint.api import CheckpointException
    if isinstance(error, CheckpointException):  # what broke it, on whichever rank
        error = next(iter(error.failures.values()))[0]
    text = (str(error).splitlines() or [""])[0]
    if isinstance(error, torch.OutOfMemoryError):
        return f"{text}; lower --micro_tokens (training) or --vllm_memory (sampling), and give the same command again"
    if "inline_container.cc" in text:  # how torch.save says that the disk took no more
        text = f"a state could not be written, is the disk full? ({text})"
    elif not isinstance(error, (OSError, SafetensorError)):
        return None
    return f"{text}; nothing whole is lost: once this is mended, the same command goes on"


def catch_signals():
    """From here on SIGTERM and SIGINT (Ctrl-C) only fill the list that this returns: the caller stops where it is whole."""
    caught = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: caught.append(signal.Signals(number).name))
    return caught


def open_out(args, ranks, free):
    """
    Makes --out and records the flags of the run in its flags.json; with --fresh an old --out is renamed first, never
    deleted. Where a run with other flags is in it, they are named; the program ends if one is not among `free` (a string
    of names), for two runs would be mixed. It ends, too, where another process is at work in the folder.
    """
    import torch.distributed as dist
    if ranks.rank == 0:
        os.makedirs(args.out, exist_ok=True)
        hold(args.out)
        if args.fresh and os.listdir(args.out):
            old = f"{args.out.rstrip('/')}.old-{time.strftime('%Y%m%d-%H%M%S')}"
            os.rename(args.out, old)
            print(f"--fresh: {args.out} is now {old}")
            os.makedirs(args.out)
            hold(args.out)
        path = os.path.join(args.out, "flags.json")
        flags = {name.rstrip("_"): value for name, value in vars(args).items() if name not in ("out", "fresh")}
        begun = os.path.exists(path) and os.listdir(args.out) != ["flags.json"]
        before = {**flags, **json.load(open(path))} if begun else flags
        changed = [name for name in flags if before[name] != flags[name]]
        text = ", ".join(f"--{name} {before[name]} -> {flags[name]}" for name in changed)
        if set(changed) - set(free.split()):
            fail(f"--out {args.out} was made with other flags: {text}; give the old ones, another --out, or --fresh, which "
                 "renames the old folder and starts over")
        if changed:
            print(f"flags changed since this run began: {text}", flush=True)
        write_atomically(path, json.dumps(flags, indent=1) + "\n")
    dist.barrier()


def hold(folder, seconds=5):
    """Keeps other runs out of a folder as long as this process lives. One that was just killed is given time to go."""
    handle = os.open(folder, os.O_RDONLY)  # never closed
    until = time.time() + seconds
    while True:
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.time() > until:
                fail(f"--out {folder}: another run is at work there; wait for it, stop it, or give another --out")
            time.sleep(0.1)
        except OSError:  # a file system without locks
            return


def finished(out, product, **wanted):
    """True, and says so, if a run has ended here: summary.json, the last that it writes, has these values."""
    path = os.path.join(out, "summary.json")
    if not os.path.exists(path) or not os.path.exists(os.path.join(out, product)):
        return False
    with open(path) as f:
        if not wanted.items() <= json.load(f).items():
            return False
    say(f"{out}/{product} is there already: nothing to do (--fresh starts over)")
    return True


def say(message):
    """Prints on one rank, also before there is a process group."""
    if os.environ.get("RANK", "0") == "0":
        print(message, flush=True)


def write_atomically(path, text):
    with open(path + ".tmp", "w") as f:
        f.write(text)
    os.replace(path + ".tmp", path)


def within(kind, low, high=sys.maxsize, above=False):
    """An argparse type: a number within [low, high], or with `above` in (low, high]."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high or (above and value == low):  # nan neither
            raise argparse.ArgumentTypeError(f"{text} is not {'above' if above else 'at least'} {low}"
                                             + (f" and at most {high}" if high < sys.maxsize else ""))
        return value
    parse.__name__ = kind.__name__  # argparse says "invalid int value" where it is none
    return parse


natural, positive, share = within(int, 1), within(float, 0, above=True), within(float, 0, 1, above=True)


# ------------------------------------------------------------------------------------------------------- problems

INSTRUCTION = {
    "math": "Please reason step by step, and put your final answer within \\boxed{}.",
    "code": "Please reason step by step, and put your final program, in Python or C++, in one fenced code block that names "
            "its language.",
}
PROBLEM_FIELDS = ("problem", "question", "prompt")
ANSWER_FIELDS = ("answer", "final_answer", "solution", "output")


@dataclass
class Problem:
    id: str
    problem: str
    answer: str  # the gold answer alone, without the solution around it
    mode: str = "math"
    kind: str = ""  # of the gold answer or the tests, for the report of what was loaded
    tests: dict = None  # of a problem in code mode, see code_tests

    @staticmethod
    def of_row(row):
        """The problem of a row of responses.jsonl or d_revision.jsonl."""
        return Problem(str(row["id"]), row["problem"], row.get("answer"), row.get("mode", "math"))


def fail(message):
    """Bad input: ends the program with one line that says what was found and what to do."""
    raise SystemExit(f"error: {message}")


def read_jsonl(path, torn_ok=False):
    """
    Yields (line number, row) of a .jsonl file. torn_ok: a last line without its newline, left by a killed run, is
    skipped. Ends the program, naming file and line, on anything that is not one JSON object per line.
    """
    if not os.path.isfile(path):
        fail(f"{path} is {'a folder' if os.path.isdir(path) else 'not there'}; a .jsonl file is wanted")
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            if not line.strip() or (torn_ok and not line.endswith(b"\n")):
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as e:
                fail(f"{path}:{number}: not UTF-8 ({e.reason} at byte {e.start}); convert the file to UTF-8")
            except json.JSONDecodeError as e:
                torn = "" if line.endswith(b"\n") else ", the last line is torn, as a killed run leaves it"
                fail(f"{path}:{number}: not JSON ({e.msg} at column {e.colno}{torn}); mend or remove this line")
            except RecursionError:
                fail(f"{path}:{number}: nested too deeply; remove this line")
            if not isinstance(row, dict):
                fail(f"{path}:{number}: a JSON object is wanted, found {type(row).__name__}")
            yield number, row


def need(row, path, line, **fields):
    """Checks that a row has these fields with these types; ends the program naming file, line and field if not."""
    for name, kind in fields.items():
        if not isinstance(row.get(name), kind):
            found = f"found {type(row[name]).__name__}" if name in row else "it is missing"
            fail(f"{path}:{line}: field '{name}' should be {kind.__name__}, {found}")


def last_boxed(text):
    """The inside of the last complete \\boxed{...} or \\fbox{...} (braces balanced), or None; one pass, however long."""
    opened, last = [], None  # opened: where the inside of each open brace starts, and whether it is that of a box
    for token in re.finditer(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", text, re.DOTALL):
        if token[0] == "}":
            start, is_box = opened.pop() if opened else (0, False)
            if is_box and (last is None or start > last[0]):
                last = start, token.start()
        elif token[0][-1] == "{" and token[0] != r"\{":
            opened.append((token.end(), len(token[0]) > 1))
    return text[last[0]: last[1]].strip() if last else None


def gold_answer(row):
    """(gold answer, None) or (None, why there is none) of a row of a data set, whatever its fields are called."""
    for name in ANSWER_FIELDS:
        value = row.get(name)
        if isinstance(value, list):
            value = ", ".join(str(v) for v in value)
        if isinstance(value, (bool, dict)):
            return None, f"field '{name}' is {type(value).__name__}"
        if value is None or not str(value).strip():
            continue
        text = str(value)
        if "####" in text:  # GSM8K
            text = text.rsplit("####", 1)[1]
        elif last_boxed(text) is not None:
            text = last_boxed(text)
        elif name == "solution" or "\n" in text.strip():
            return None, f"no final answer in '{name}'"
        return text.strip(), None
    return None, "no answer"


def load_rows(data):
    """Yields (where, row) of a .jsonl, .json or .parquet file, or of a hub name `name[:config][@split]`."""
    if data.endswith(".jsonl"):
        yield from ((f"{data}:{line}", row) for line, row in read_jsonl(data))
        return
    kind = {".json": "JSON file", ".parquet": "parquet file"}.get(os.path.splitext(data)[1], "data set that the hub gives")
    if os.path.exists(data) and "file" not in kind:
        fail(f"--data {data} is not a .jsonl, .json or .parquet file")
    try:
        if kind == "JSON file":
            with open(data, encoding="utf-8") as f:
                rows = json.load(f)
        elif kind == "parquet file":
            import pyarrow.parquet
            rows = (row for part in pyarrow.parquet.ParquetFile(data).iter_batches(1024) for row in part.to_pylist())
        else:
            import datasets
            name, _, split_ = data.partition("@")
            name, _, config = name.partition(":")
            rows = datasets.load_dataset(name, config or None, split=split_ or "train")  # stays on disk; rows come one by one
    except (OSError, ValueError) as e:
        fail(f"--data {data}: not a {kind}: {str(e).splitlines()[0]}")
    if kind == "JSON file" and not isinstance(rows, list):
        fail(f"{data}: a list of rows is wanted, found {type(rows).__name__}")
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            fail(f"{data}: row {i}: an object is wanted, found {type(row).__name__}")
        yield f"{data}: row {i}", row


def load_problems(data, judge, mode="math", range_=None, max_problems=None):
    """
    Problems of a file or hub name, in order, and a Counter of why others were dropped (`--data` of every phase).

    judge: parses each gold answer once; one that cannot be parsed drops its problem. range_: "A:B", a slice of the
    rows as they stand in the file, so that phases given disjoint ranges see disjoint questions: a row that repeats the text
    of an earlier one, in the range or before it, is dropped. max_problems: at most so many of the kept. Ends the program
    if nothing is left, if two problems have one id, and on rows without a problem.
    """
    if mode == "code" and judge.sandbox:
        check_sandbox()
    start, stop = parse_range(range_)
    problems, dropped, seen, texts, i = [], Counter(), {}, set(), -1
    stem = os.path.basename(data).split(".")[0]
    for i, (where, row) in enumerate(itertools.islice(load_rows(data), stop)):
        name, text = next(((name, row[name]) for name in PROBLEM_FIELDS if row.get(name)), (None, ""))
        id_ = str(next((row[k] for k in ("id", "uuid") if row.get(k) is not None), f"{stem}-{i}"))
        if seen.setdefault(id_, (where, text))[1] != text:
            fail(f"{where}: id {id_!r} stands already at {seen[id_][0]}, with another problem; ids must differ")
        words = str(text).strip()
        if words and words in texts:  # codeforces-cots has a row for each of several solutions
            dropped["same problem as in an earlier row"] += i >= start
            continue
        texts.add(words)
        if i < start:
            continue
        if not isinstance(text, str):
            fail(f"{where}: field '{name}' should be text, found {type(text).__name__}")
        if not text.strip():
            fail(f"{where}: no problem text; one of the fields {', '.join(PROBLEM_FIELDS)} is wanted")
        gold, why = code_tests(row) if mode == "code" else gold_answer(row)
        if gold is None:
            dropped[why] += 1
        elif mode == "code":
            starter = row.get("starter_code")
            if gold["entry_point"] and isinstance(starter, str) and starter.strip() not in text:
                text = f"{text.strip()}\n\n```python\n{starter.strip()}\n```"
            problems.append(Problem(id_, text.strip(), None, mode, "function" if gold["entry_point"] else "stdin", gold))
        else:
            problems.append(Problem(id_, text.strip(), gold, mode))
    if mode == "math":
        parsed = judge.parse_golds(problems)
        dropped.update(why for why in parsed if why)
        problems = [problem for problem, why in zip(problems, parsed) if not why]
    problems, dropped = problems[:max_problems], +dropped
    if range_ and i < start:
        fail(f"--range {range_} is empty: the data has {i + 1} rows")
    if not problems:
        fail(f"--data {data}: no problem is left of {i + 1 - start}; dropped: {dict(dropped) or 'none, it is empty'}")
    return problems, dropped


def parse_range(range_):
    """'A:B' -> (A, B), either side may be left out; ends the program on anything else."""
    match = re.fullmatch(r"(\d*):(\d*)", range_ or ":")
    if not match:
        fail(f"--range {range_}: A:B is wanted, two row numbers such as 0:10000")
    start, stop = int(match[1] or 0), int(match[2] or sys.maxsize)
    if start >= stop:
        fail(f"--range {range_} is empty")
    return start, stop


# --------------------------------------------------------------------------------------------------------- tokens

# P_r: (after a wrong y_init, after a right one)
PHRASES = {
    "qwen": ("Wait, this response is wrong. Let me correct it.", "Let me rephrase the above solution."),
    "olmo": ("Wrong. I need to redo all.", "Let me rephrase the above solution."),
    "paper": ("Wait, this response is not correct, let me start over.", "Let me rephrase the above solution."),
}


def phrase_family(model, override=None):
    """The key of PHRASES for a model folder: --phrases, else what its config records, else by its model_type."""
    from transformers import AutoConfig
    if override:
        return override
    config = AutoConfig.from_pretrained(model)
    return getattr(config, "sdzero_phrases", None) or ("olmo" if config.model_type.startswith("olmo") else "qwen")


def load_tokenizer(model):
    """
    The tokenizer of a model folder, with one attribute more: `end_ids`, the ids that end a turn (what its generation
    config and itself call eos), the one that its chat template puts after an assistant message first.
    """
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig
    if not os.path.isfile(os.path.join(model, "config.json")) and (os.path.exists(model) or model.count("/") != 1):
        fail(f"model {model}: no config.json there; a folder with a Hugging Face model is wanted")
    try:
        AutoConfig.from_pretrained(model)
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, TypeError, KeyError) as e:  # as the file is missing, not JSON, or of another kind
        fail(f"model {model}: its config or tokenizer does not load: {(str(e).splitlines() or [''])[0]}")
    if not tokenizer.chat_template:
        fail(f"model {model}: its tokenizer has no chat template; use an instruct model or add chat_template.jinja")
    try:
        eos = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:  # the folder has none
        eos = None
    ends = {*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id} - {None}
    turn = tokenizer.apply_chat_template([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
                                         return_dict=False)
    last = next((i for i in reversed(turn) if i in ends), None)
    if last is None:
        fail(f"model {model}: its chat template ends an assistant turn with none of its eos ids {sorted(ends)}")
    tokenizer.end_ids = [last, *sorted(ends - {last})]
    return tokenizer


def context_length(model):
    """How many tokens a model takes, prompt and response together."""
    from transformers import AutoConfig
    return AutoConfig.from_pretrained(model).max_position_embeddings


def same_vocabulary(student, student_tokenizer, teacher, teacher_tokenizer):
    """Ends the program if the tokenizers of these two models differ."""
    if student_tokenizer.get_vocab() != teacher_tokenizer.get_vocab():
        fail(f"--teacher {teacher} and student {student} have different tokenizers: the KL needs one vocabulary")


def chat_ids(tokenizer, problem):
    """x: the ids of one user message (problem and instruction) with the generation prompt; a list."""
    message = {"role": "user", "content": problem.problem + "\n\n" + INSTRUCTION[problem.mode]}
    return tokenizer.apply_chat_template([message], add_generation_prompt=True, return_dict=False)


def without_end(tokenizer, y_ids):
    """y without a trailing end-of-turn."""
    return y_ids[:-1] if y_ids and y_ids[-1] in tokenizer.end_ids else y_ids


def control_ids(tokenizer, correct, family):
    """The ids of "\\n\\n" + P_r + "\\n\\n"; the only place where P_r meets the tokenizer."""
    return tokenizer.encode(f"\n\n{PHRASES[family][bool(correct)]}\n\n", add_special_tokens=False)


def revision_ids(tokenizer, x_ids, y_ids, correct, family):
    """x, y without its end-of-turn, P_r: what y_revised is sampled after and what the teacher sees before y."""
    return x_ids + without_end(tokenizer, y_ids) + control_ids(tokenizer, correct, family)


# -------------------------------------------------------------------------------------------------- math answers
# An answer is tidied, read as a tree of Parts (a tuple of values, a set of tuples, text, ...), and compared part by part.
# Values are read by latex2sympy, the parser of math-verify; two are equal if they agree to 40 digits, at several points
# where there are variables. math-verify's own comparison is not used: it rounds to six decimals (1e-9 = 2e-9), takes any
# equation for any value, and reads words as products of letters, so that anagrams are equal.


class Part(NamedTuple):
    kind: str  # value, text, choice, equation; list, set, union (in any order); tuple, interval, matrix, row (in this one)
    parts: tuple  # of Part; for the first four kinds (expression,), (words,), (letter,), (expression that is zero,)
    mark: str = ""  # the unit of a value, the brackets of a tuple or interval
    name: str = ""  # x of `x = 3` and `x \in [3, 4]`


UNICODE = str.maketrans(dict(zip("−–×·÷π∞≤≥≠∪∩∈±°²³½¼¾，（）：θ√≈∅€£", (
    r"-|-|\times |\cdot |/|\pi |\infty |\le |\ge |\ne |\cup |\cap |\in |\pm |^\circ |^2|^3|\frac{1}{2}|\frac{1}{4}|"
    r"\frac{3}{4}|,|(|)|:|\theta |\sqrt |\approx |\{\}|⟦euro⟧|⟦pound⟧").split("|"))))
# Words, units, currency and percent stand in ⟦⟧ after this.
SPELLINGS = [(re.compile(a), b) for a, b in (
    (r"\\[()\[\]]|\\(?:left|right|[bB]igg?[lr]?|displaystyle|boldsymbol|underline)(?![A-Za-z])", ""),  # \left( \) \big|
    (r"\\\$|(?<!\\)\$(?=\s*\d[^$]*$)", "⟦dollar⟧"), (r"\$", ""),  # \$5 and $5 are money, $x$ is not
    (r"(?<=\d)(?:\{,\}|,\\!|\\[,! ]|~)(?=\d{3}(?!\d))", ""),  # 10{,}000 10,\!000 10\,000
    (r"(?<!\\)\\(?:[,;:! ]|q?quad(?![a-z]))|[~\s]+|\\\\(?=\s*$)", " "),  # \, \quad ~
    (r"\\[dtc]frac(?![a-z])", r"\\frac"), (r"\\lbrace(?![a-z])", r"\\{"), (r"\\rbrace(?![a-z])", r"\\}"),
    (r"\\langle(?![a-z])", "("), (r"\\rangle(?![a-z])", ")"), (r"\\approx(?![a-z])", "="),
    (r"\\(?:varnothing|emptyset)(?![a-z])", r"\\{\\}"), (r"\{([^{}]*)\\choose([^{}]*)\}", r"\\binom{\1}{\2}"),
    (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"), (r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{"),  # \frac12 \frac1{2}
    (r"(\\frac\s*\{[^{}]*\})\s*(\d)", r"\1{\2}"), (r"\\sqrt\s*(\w)", r"\\sqrt{\1}"),  # \frac{1}2 \sqrt2
    (r"(?<![\\A-Za-z])sqrt\(([^()]*)\)", r"\\sqrt{\1}"), (r"\+\s*\\infty", r"\\infty "),  # sqrt(2) +\infty
    (r"\*\*", "^"), (r"\*", r"\\cdot "), (r"\\?%", "⟦percent⟧"),
    (r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![a-z])", "⟦degree⟧"),  # 30^\circ 30^{\circ}
    (r"(\\(?:sin|cos|tan)\W*)(\d+)\s*⟦degree⟧", r"\1(\2\\pi/180)"),  # \sin 30^\circ
    (r"(?<=\d)_\s*\{?\s*(\d+)\s*\}?", r"⟦base \1⟧"), (r"\\operatorname\*?\s*\{(\w+)\}", r"\1"),  # 101_2 101_{2}
)]
TEXT = re.compile(r"\\(text\w*|math\w+|mbox)\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
WORD = re.compile(r"(?<![\\A-Za-z⟦])(?<!\\begin\{)(?<!\\end\{)[A-Za-z]{2,}(?![^⟦]*⟧)")
FUNCTIONS = set("sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp max min gcd pi theta infty".split())
UNITS = {name: names.split()[0] for names in (
    "cm centimeter centimetre|mm millimeter millimetre|m meter metre|km kilometer kilometre|g gram|kg kilogram|mg milligram|"
    "s sec second|min minute|h hr hour|day|ft foot feet|in inch inches|mi mile|yd yard|l liter litre|ml milliliter|"
    "dollar usd|euro eur|pound gbp lb|cent|degree deg|percent pct|rad radian|unit|mph").split("|") for name in names.split()}
# What may stand on the left of `x = 3`: x, AB, f(x), x_1, |AB|, \angle ABC, words, (x, y).
NAME = re.compile(r"\|?(?:\\(?:angle|overline|vec|triangle) *)*\{?"
                  r"(?:[A-Za-z]|[A-Z]{2,3}|⟦[^⟧]*⟧( ?⟦[^⟧]*⟧)*|\\(?!pi)[A-Za-z]{2,7}) *\}?"
                  r"(?:_\{?\\?\w+ *\}?|')*(?:\^\{-1\})?(?:\([^()]{1,12}\))?\|?|\([A-Za-z](?:_\w)?(?:, ?[A-Za-z](?:_\w)?)+\)")
# What latex2sympy reads otherwise: mixed numbers, powers of ten, endless decimals; and x_{\max}, E_1, \gamma, x'.
QUIRKS = [(re.compile(a), b) for a, b in (
    (r"(?<=\d),(?=\d{3}(?!\d))", ""),  # (1,000)
    (r"^(-?)(\d+) ?(?:\\frac\{(\d+)\}\{(\d+)\}|(?<= )(\d+)/(\d+))$",
     lambda m: rf"{m[1]}\frac{{{int(m[2]) * int(m[4] or m[6]) + int(m[3] or m[5])}}}{{{m[4] or m[6]}}}"),
    (r"(?<![\w\\.])(\d+(?:\.\d+)?)[eE]([+-]?\d+)(?!\w)", r"\1 \\cdot 10^{\2}"),
    (r"(\d*\.(\d*))\\overline ?\{?(\d+)\}?",
     lambda m: rf"({m[1]}0+\frac{{{m[3]}}}{{{10 ** len(m[3]) - 1}\cdot 10^{{{len(m[2])}}}}})"),
    (r"_\{ ?\\(\w+) ?\}", r"_{\1}"), (r"(?<![\\A-Za-z])([eE])_\{?(\w+)\}?", r"X_{\1\2}"),
    (r"\\gamma(?![a-z])", r" X_{gamma} "), (r"([A-Za-z])(?:\^ ?\{?\\prime ?\}?|')", r"\1_{prime}"),
)]


def tidy(answer):
    """One spelling of an answer's LaTeX."""
    answer = answer.translate(UNICODE)
    for pattern, new in SPELLINGS:
        answer = pattern.sub(new, answer)
    while TEXT.search(answer):
        answer = TEXT.sub(marked_words, answer)
    answer = re.sub(r"_\s*\{?\s*⟦(\w+)⟧\s*\}?", r"_{\1}", answer)  # x_{\text{max}}
    return re.sub(r"\s+", " ", WORD.sub(bare_word, answer))


def marked_words(match):
    """The inside of \\text{} and the like, its words in ⟦⟧; a letter in bold or in italics is a variable."""
    if re.fullmatch(r"[A-Za-z]" if match[1] not in ("text", "mathrm") else "[dei]", match[2].strip()):
        return match[2]
    return re.sub(r"(?<!⟦)\b[A-Za-z][A-Za-z']*(?![^⟦]*⟧)", r"⟦\g<0>⟧", match[2])


def bare_word(match):
    """A run of letters outside \\text{}: a function, a product of two or three variables in a formula, or a word."""
    word, before, after = match[0], match.string[:match.start()].rstrip()[-1:], match.string[match.end():].lstrip()[:1]
    if word in FUNCTIONS:
        return word if before in tuple("_{") else f"\\{word} "  # x_{max}
    in_formula = re.fullmatch(r"[\d^_{}/+=|-]", before) or re.fullmatch(r"[\d^_}/+=|(\\-]", after)
    return word if in_formula and len(word) < 4 and word not in UNITS else f"⟦{word}⟧"


def split(text, separator):
    """[piece, separator, piece, ...] of text at the separators outside all brackets; [] if its brackets do not match."""
    pieces, depth, at = [], 0, 0
    for m in re.finditer(rf"(\\begin|\\\{{|[(\[{{])|(\\end|\\\}}|[)\]}}])|{separator}", text):
        depth += bool(m[1]) - bool(m[2])
        if depth < 0:
            return []
        if depth == 0 and not m[2]:
            pieces += [text[at: m.start()].strip(), m[0]]
            at = m.end()
    return [] if depth else [*pieces, text[at:].strip()]


def read(text):
    """The Part of a tidied answer. Raises ValueError where there is none."""
    text = text.strip().rstrip(".;, ")
    if m := re.fullmatch(r"\(? ?([A-J]) ?[).:]?", text.replace("⟦", "").replace("⟧", "").strip()):
        return Part("choice", (m[1],))
    if text[:1] not in ("(", "[") and text[:2] != r"\{":  # 10,000 and 1, 10,000 but not (10,000)
        text = re.sub(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d|,\d)", lambda m: m[0].replace(",", ""), text)
    pieces = split(text, r"[,;]|⟦and⟧|⟦or⟧")[::2]
    if len(pieces) > 1:
        return Part("list", tuple(map(read, filter(None, pieces))))
    if m := re.fullmatch(r"\\begin\{([pbB]matrix|array)\}(?:\{[lcr| ]*\})?(.*)\\end\{\1\}", text):
        rows = [row.split("&") for row in re.split(r"\\\\(?:\[[^\]]*\])?", m[2]) if row.strip()]
        return Part("matrix", tuple(Part("row", tuple(map(read, row))) for row in rows))
    pieces = split(text, r"=|\\in(?![a-z])")
    if len(pieces) == 3 and NAME.fullmatch(pieces[0]):
        return read(pieces[2])._replace(name=pieces[0].replace(" ", ""))
    if len(pieces) == 3 and pieces[1] == "=":
        return Part("equation", (expression(pieces[0]) - expression(pieces[2]),))
    pieces = split(text, r"\\cup(?![a-z])")[::2]
    if len(pieces) > 1:
        return Part("union", tuple(map(read, pieces)))
    m = re.fullmatch(r"(\\\{|[(\[{])(.*?)(\\\}|[)\]}])", text)
    if pieces := split(m[2], "[,;]")[::2] if m else []:
        parts, brackets = tuple(map(read, filter(None, pieces))), m[1] + m[3]
        if brackets == r"\{\}":
            return Part("set", parts)
        if len(parts) == 1 and brackets in ("{}", "()", "[]"):
            return parts[0]
        if len(parts) > 1:
            return Part("tuple" if brackets == "()" else "interval", parts, brackets)
    if r"\pm" in text:
        return Part("list", (read(text.replace(r"\pm", "+")), read(text.replace(r"\pm", "-"))))
    return read_value(text)


def read_value(text):
    """A value with its unit in front or behind, or text."""
    m = re.fullmatch(r"(-?) ?((?:⟦(?:dollar|euro|pound)⟧)?)([^⟦⟧]*?)"
                     r"((?:[ /]*\{?⟦[^⟧]*⟧\}?(?: ?\^ ?\{?-?\d\}?)?|\s*\\cdot)*)", text)
    if m and m[3].strip():  # after a number any words may stand, after x only measures
        unit, value = unit_of(m[2] + m[4]), m[1] + m[3].strip()
        if re.search(r"\d|\\pi|\\sqrt", value) or all(w.partition("^")[0] in UNITS for w in unit.split()):
            return Part("value", (expression(value),), unit)
    words = re.sub(r"^(?:the|a|an) ", "", re.sub(r"[^\w+-]+", " ", text).strip().lower())
    if re.search(r"[\\^=]", text) or len(words) > 80 or words in ("", "nan", "inf", "null", "undefined"):
        raise ValueError(f"neither mathematics nor text: {text[:40]}")
    return Part("text", (words,))


def unit_of(text):
    """Words of a unit in one spelling: 'square centimeters' -> 'cm^2'."""
    text = re.sub(r"[⟦⟧{}/]|\\cdot|\b(?:of|the|per)\b", " ", text).lower()
    text = re.sub(r"\bcubic\s+(\w+)", r"\1^3", re.sub(r"\b(?:square|sq)\s+(\w+)", r"\1^2", re.sub(r"\s*\^\s*", "^", text)))
    return " ".join(sorted(UNITS.get(word, UNITS.get(word.rstrip("s"), word.rstrip("s"))) + power
                           for word, power in re.findall(r"(\w+)(\S*)", text)))


@functools.lru_cache(4096)
def expression(text):
    """A sympy expression of one LaTeX value, decimals as fractions. Raises ValueError where it has none."""
    import sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
    for pattern, new in QUIRKS:
        text = pattern.sub(new, text)
    if re.fullmatch(r"-? ?(?:\d+\.?\d*|\.\d+)", text):
        return sympy.Rational(text.replace(" ", "").rstrip("."))
    if re.fullmatch(r"-? ?\\infty ?", text):
        return -sympy.oo if text[0] == "-" else sympy.oo
    if re.search(r"\\infty|[⟦⟧&;\"?@#]|\.\.|\d\s+\.?\d|[^\x00-\x7f]", text):
        raise ValueError(f"no expression: {text[:40]}")
    try:
        parsed = latex2sympy(text, is_real=None, normalization_config=None,
                             conversion_config=ConversionConfig(lowercase_symbols=False))
        if not isinstance(parsed, sympy.Expr) or parsed.has(sympy.zoo, sympy.nan):
            raise ValueError(f"no expression: {text[:40]}")
        parsed = parsed.xreplace({f: sympy.Rational(str(f)) for f in parsed.atoms(sympy.Float)})
        applied = parsed.atoms(sympy.core.function.AppliedUndef)  # f(x) of an unknown f is a variable as any other
        parsed = parsed.xreplace({f: sympy.Symbol(str(f).replace(" ", "")) for f in applied})
        parsed = parsed.xreplace({s: sympy.I for s in parsed.free_symbols if str(s) == "i"})
        return parsed if parsed.free_symbols else parsed.doit()  # 2^{200}+1 is an integer, to the last digit
    except MemoryError:
        raise
    except Exception as e:  # its grammar raises bare Exceptions
        raise ValueError(f"no expression: {text[:40]}") from e


def samples(e, f):
    """
    Yields the values of two expressions to 50 digits, where both are finite: at three points if there are variables (the
    same for the same names in every call, one of them negative), else once.
    """
    import sympy
    symbols = e.free_symbols | f.free_symbols
    for scale in (7, -71, 500) if symbols else (1,):  # large for floors, small for x^{200}+1
        at = {s: sympy.Rational(random.Random(f"{s} {scale}").randint(100, 999), scale) for s in symbols}
        x, y = e.subs(at).evalf(50), f.subs(at).evalf(50)
        if all(value.is_number and value.is_finite for value in (x, y)):
            yield x, y


def agree(x, y):
    """Whether two numbers of 50 digits are the same number."""
    return bool(abs(x - y) <= max(1e-40 * max(abs(x), abs(y)), 1e-100))


def equal(e, f):
    """Whether two expressions have one value."""
    if e == f or e.is_infinite or f.is_infinite or (e.is_Rational and f.is_Rational):
        return e == f
    points = 0
    for points, (x, y) in enumerate(samples(e, f), 1):
        if not agree(x, y):
            return False
    return points > bool(e.free_symbols or f.free_symbols)


def same_value(gold, answer):
    """
    A unit may be left out; given on both sides it must be the same one (no conversion). 50 % is 50 or 0.5; a gold without
    percent takes p % as p/100, and as p where gold is over 1.
    """
    (e,), (f,) = gold.parts, answer.parts
    if gold.mark == "percent" and not answer.mark:
        return equal(e, f) or equal(e, 100 * f)
    if answer.mark == "percent" and not gold.mark:
        return equal(e, f / 100) or bool(e.is_Rational and e > 1 and equal(e, f))
    return (not gold.mark or not answer.mark or gold.mark == answer.mark) and equal(e, f)


def says_zero(part):
    """What an equation says is zero; None for a part of another kind."""
    if part.name and part.kind == "value":
        return expression(part.name) - part.parts[0]
    return part.parts[0] if part.kind == "equation" else None


def same_equation(e, f):
    """Whether two equations say the same: what is zero in one is a constant times that in the other."""
    if e is None or f is None or not e.free_symbols or e.free_symbols != f.free_symbols:
        return False
    pairs = [(x, y) for x, y in samples(e, f) if x and y]
    return len(pairs) > 1 and all(agree(x * pairs[0][1], y * pairs[0][0]) for x, y in pairs[1:])


def pair_up(gold, answer):
    """Whether each gold part has an answer part of its own, in any order, and none is left."""
    left = list(answer)
    for g in gold:
        match = next((i for i, a in enumerate(left) if same(g, a)), None)
        if match is None:
            return False
        del left[match]
    return not left


def same(gold, answer):
    """Whether a Part is a right answer to a gold one."""
    kinds = {gold.kind, answer.kind}
    if "equation" in kinds or (gold.name and answer.name and gold.name != answer.name):  # else a name may be left out
        return same_equation(says_zero(gold), says_zero(answer))
    if kinds <= {"list", "set"} or kinds == {"union"}:
        names = {part.name for part in gold.parts}  # of x = 2, y = 3 no name may be left out
        return (len(names) < 2 or names == {part.name for part in answer.parts}) and pair_up(gold.parts, answer.parts)
    if gold.kind == "choice":  # the letter alone, in either case
        return [str(part) for part in answer.parts] in ([gold.parts[0]], [gold.parts[0].lower()])
    if len(kinds) > 1:
        return False
    if gold.kind == "value":
        return same_value(gold, answer)
    if gold.kind == "text":
        return gold.parts == answer.parts
    return gold.mark == answer.mark and len(gold.parts) == len(answer.parts) and all(map(same, gold.parts, answer.parts))


# What sympy and the reading raise for what they cannot take. MemoryError is not among them: it ends the worker.
UNREADABLE = (ValueError, TypeError, AttributeError, ArithmeticError, RecursionError, NotImplementedError)


def gold_kind(gold):
    """The kind of a gold answer ('number', 'tuple', ...), for the report; 'bad' if it cannot be judged against."""
    try:
        part = read(tidy(gold))
    except UNREADABLE:
        return "bad"
    return part.kind if part.kind != "value" else "number" if part.parts[0].is_Rational else "expression"


def right_answer(gold, answer):
    """'right' if the inside of a \\boxed{} is a right answer to a gold one, else, or if it cannot be read, 'wrong'."""
    try:
        gold, answer = tidy(gold), tidy(answer)
        return "right" if gold == answer or same(read(gold), read(answer)) else "wrong"
    except UNREADABLE:
        return "wrong"


# ------------------------------------------------------------------------------------------------ programs and tests
# Model-written code is hostile. It runs under bubblewrap as nobody, with every namespace unshared: no network, no host
# process in sight, a read-only /usr, a small tmpfs, nothing else. One sandbox per test; the compiled program travels
# through memory, so that nothing is ever on the host's disk. What goes in is the program and one test's input. The
# expected output and the verdict stay outside, so there is nothing to read, patch or forge.


class Language(NamedTuple):
    names: tuple  # of the fence
    tool: str  # that must be installed
    file: str
    compile: str  # shell line that leaves `program` in the working directory; "" if there is nothing to compile
    run: str
    processes: int = 16  # threads included; runtimes with many also reserve more address space than they use


LANGUAGES = (
    Language(("python", "python3", "py"), "python3", "main.py", "", "python3 -I main.py"),
    Language(("cpp", "c++", "cc", "cxx"), "g++", "main.cpp", "g++ -O2 -std=c++17 -o program main.cpp", "./program"),
    Language(("c",), "gcc", "main.c", "gcc -O2 -std=c17 -o program main.c -lm", "./program"),
    Language(("rust", "rs"), "rustc", "main.rs", "rustc -O --edition 2021 -o program main.rs", "./program"),
    Language(("go", "golang"), "go", "main.go", "GOCACHE=/tmp/go HOME=/tmp go build -o program main.go", "./program", 64),
    Language(("java",), "javac", "Main.java", "", "java -Xmx512m -Xss64m -XX:+UseSerialGC Main.java", 64),
)
SANDBOX_PATH = "/usr/local/go/bin:/usr/local/bin:/usr/bin"
OUTPUT_BYTES, TMPFS_BYTES = 64 << 20, 128 << 20  # of any one file, of which the output is one; of all files
COMPILE_SECONDS = 20.0
ALL_TESTS = 20  # all tests of a program together may take so many times the limit of one
# Calls entry_point on one test's arguments. Its result goes out by a descriptor of its own; what is printed does not.
DRIVER = """import json, os, sys
out = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
sys.setrecursionlimit(100000)
names = {"__name__": "solution"}
exec("import bisect, collections, functools, heapq, itertools, math, operator, random, re, string, sys\\n"
     "from bisect import *; from collections import *; from functools import *; from heapq import *\\n"
     "from itertools import *; from math import *; from typing import *", names)
exec(compile(open("main.py").read(), "main.py", "exec"), names)
entry, args, kwargs = json.load(sys.stdin)
if entry.isidentifier() and entry not in names:
    entry = "Solution()." + entry
json.dump(eval(entry, names)(*args, **kwargs), out)
out.flush()
"""


class Run(NamedTuple):
    ended: str  # ok (exit status 0), failed, timeout, memory
    output: bytes


# A fenced block: its language and the lines until the next fence, which must be a bare one.
BLOCK = re.compile(r"^[ \t]*```[ \t]*([^\s`]+)[^`\n]*\n((?:(?![ \t]*```).*\n)*)[ \t]*```[ \t]*$", re.MULTILINE)


def last_program(response):
    """(Language, source) of the last closed fenced block that names a known, installed language, or None."""
    if "<think>" in response and "</think>" not in response:
        return None
    for name, source in reversed(BLOCK.findall(response.rpartition("</think>")[2].replace("\r\n", "\n"))):
        for language in LANGUAGES:
            if name.lower() in language.names and installed(language):
                return language, source
    return None


@functools.cache
def installed(language):
    """Whether a language's tool is where the sandbox sees it."""
    return shutil.which(language.tool, path=SANDBOX_PATH) is not None


# Calls that a program may not make, by machine: those that keep memory which no process maps, where the memory limit
# does not see it (memfd_create, shmget, msgget, semget, mq_open, add_key, request_key, keyctl, memfd_secret), and doors
# that kernel bugs tend to have (bpf, perf_event_open, userfaultfd, io_uring_setup).
FORBIDDEN = {
    "x86_64": (0xC000003E, (319, 29, 68, 64, 240, 248, 249, 250, 447, 321, 298, 323, 425)),
    "aarch64": (0xC00000B7, (279, 194, 186, 190, 180, 217, 218, 219, 447, 280, 241, 282, 425)),
}


def seccomp_filter():
    """The bytes of a BPF program by which FORBIDDEN calls, and all calls of another architecture, fail with EPERM."""
    arch, numbers = FORBIDDEN[platform.machine()]
    load, equal, at_least, result = 0x20, 0x15, 0x35, 0x06  # operation codes
    rest = len(numbers)
    program = [(load, 0, 0, 4), (equal, 0, rest + 3, arch), (load, 0, 0, 0), (at_least, rest + 1, 0, 0x40000000)]
    program += [(equal, rest - i, 0, number) for i, number in enumerate(numbers)]
    program += [(result, 0, 0, 0x7FFF0000), (result, 0, 0, 0x00050001)]  # allowed; EPERM
    return b"".join(struct.pack("HBBI", *step) for step in program)


def run_program(shell, files, stdin=b"", seconds=5.0, memory=1.0, processes=16, sandbox=True):
    """
    Runs a shell line over files ({name: bytes}) in a sandbox of its own and returns Run, with all its processes gone.

    Limits: `seconds` of wall time and of CPU per process; `processes`, threads included; `memory` GiB, as resident memory
    of all together (looked at every 20 ms) and, up to 32 processes, as address space of each; the size of files, the output
    among them, and of the temporary file system. sandbox=False: no protection at all, only the limits. Raises
    RuntimeError where the sandbox itself does not start.
    """
    limits = f"prlimit --core=0 --nofile=256 --fsize={OUTPUT_BYTES} --cpu={math.ceil(seconds) + 1}"
    if processes <= 32:
        limits += f" --as={int(memory * 2**30)} --stack={int(memory * 2**28)}"
    with contextlib.ExitStack() as stack:
        def in_memory(data):
            file = stack.enter_context(os.fdopen(os.memfd_create("data"), "wb+"))
            file.write(data)
            file.seek(0)
            return file.fileno()

        fds = {name: in_memory(data) for name, data in files.items()}
        info, how = in_memory(b""), {}
        if sandbox:
            seccomp = in_memory(seccomp_filter())
            command = [shutil.which("bwrap"), "--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent",
                       "--new-session", "--as-pid-1",  # when the shell ends, the kernel ends every process that is left
                       "--uid", "65534", "--gid", "65534", "--hostname", "sandbox", "--cap-drop", "ALL", "--clearenv",
                       "--setenv", "PATH", SANDBOX_PATH, "--setenv", "LANG", "C.UTF-8", "--info-fd", str(info),
                       "--seccomp", str(seccomp), "--ro-bind", "/usr", "/usr", "--symlink", "usr/bin", "/bin",
                       "--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev"]
            for name in filter(os.path.islink, ("/lib", "/lib32", "/lib64", "/libx32")):
                command += ["--symlink", "usr" + name, name]
            for path in ["/etc/ld.so.cache", "/etc/alternatives", *glob.glob("/etc/java-*")]:
                command += ["--ro-bind-try", path, path]
            command += ["--size", str(TMPFS_BYTES), "--tmpfs", "/tmp", "--chdir", "/tmp"]
            for name, fd in fds.items():
                command += ["--perms", "0755", "--file", str(fd), "/tmp/" + name]
            command += ["--remount-ro", "/"]
            limits += f" --nproc={processes}"
            how = {"env": {}, "cwd": "/", "pass_fds": [*fds.values(), info, seccomp]}
            if os.geteuid() == 0:  # the process limit does not hold for root, not even inside a user namespace
                how |= {"user": 65534, "group": 65534, "extra_groups": []}
        else:
            command, how = [], {"cwd": stack.enter_context(tempfile.TemporaryDirectory())}
            for name, data in files.items():
                with open(os.path.join(how["cwd"], name), "wb", opener=lambda p, flags: os.open(p, flags, 0o755)) as f:
                    f.write(data)
        command += ["sh", "-c", f"{limits} sh -c {shlex.quote(shell)}; exit $?"]
        output, ended = in_memory(b""), None
        process = subprocess.Popen(command, stdin=in_memory(stdin), stdout=output, stderr=subprocess.DEVNULL, **how)
        try:
            over, deadline = os.pidfd_open(process.pid), time.monotonic() + seconds
            stack.callback(os.close, over)
            while not ended and not select.select([over], [], [], 0.02)[0]:
                if time.monotonic() > deadline:
                    ended = "timeout"
                elif resident(process.pid) > memory * 2**30:
                    ended = "memory"
        finally:
            while process.poll() is None:  # it ends once all below it have: the kernel sees to those of the sandbox
                kill(descendants(process.pid)[1:])
                time.sleep(0.002)
        if sandbox and process.returncode and not ended and not os.fstat(info).st_size:
            raise RuntimeError("bubblewrap did not start")
        return Run(ended or ("failed" if process.returncode else "ok"), os.pread(output, OUTPUT_BYTES, 0))


def descendants(pid):
    """The ids of a process and of all that descend from it."""
    found = [pid]
    for pid in found:
        for path in glob.glob(f"/proc/{pid}/task/*/children"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError), open(path) as f:  # it may have ended meanwhile
                found += map(int, f.read().split())
    return found


def resident(pid):
    """Bytes of resident memory of a process and all its descendants; what they share is counted for each."""
    pages = 0
    for pid in descendants(pid):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/{pid}/statm") as f:
            pages += int(f.read().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def kill(pids):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def check_sandbox():
    """Ends the program with what to install or allow if bubblewrap cannot be used here."""
    refuse = "; --unsafe_no_sandbox would run model-written programs WITH ALL YOUR RIGHTS"
    if not shutil.which("bwrap") or not os.path.exists("/usr/bin/prlimit") or not installed(LANGUAGES[0]):
        fail(f"--mode code needs bubblewrap, prlimit and python3: apt-get install bubblewrap util-linux python3{refuse}")
    if platform.machine() not in FORBIDDEN:
        fail(f"--mode code: the sandbox knows {' and '.join(FORBIDDEN)}, this machine is {platform.machine()}{refuse}")
    with contextlib.suppress(RuntimeError):
        if run_program("cat", {}, b"ok", seconds=10).output == b"ok":
            if not installed(LANGUAGES[1]):
                say("note: no g++ here, so no program in C++ counts as an answer; apt-get install g++")
            return
    fail("--mode code: bubblewrap is installed but makes no sandbox here; it must be 0.8 or newer and may need user "
         "namespaces allowed (sysctl kernel.apparmor_restrict_unprivileged_userns=0; for a container docker run "
         f"--security-opt seccomp=unconfined --security-opt systempaths=unconfined){refuse}")


def judge_program(language, source, tests, seconds, memory, sandbox):
    """'right', 'wrong' or 'timeout' of a program on its tests, one sandbox for each; the first that fails decides."""
    language, entry, seconds = Language(*language), tests["entry_point"], tests["seconds"] or seconds
    files, shell = {language.file: source.encode("utf-8", "replace")}, language.run
    if entry:  # a call of a Python function, for which other languages have no file main.py
        files["driver.py"], shell = DRIVER.encode(), "python3 -I driver.py"
    if language.compile:
        run = run_program(f"{{ {language.compile}; }} >/dev/null && cat program", files, b"", COMPILE_SECONDS, memory,
                          max(32, language.processes), sandbox)
        if run.ended != "ok":
            return "timeout" if run.ended == "timeout" else "wrong"
        files = {"program": run.output}
    deadline = time.monotonic() + ALL_TESTS * seconds
    for given, expected in tests["cases"]:
        if time.monotonic() > deadline:
            return "timeout"
        run = run_program(shell, files, given.encode("utf-8", "replace"), seconds, memory, language.processes, sandbox)
        if run.ended == "timeout":
            return "timeout"
        output = run.output.decode("utf-8", "replace")
        if run.ended != "ok" or not same_output(output, expected, tests["tolerance"], is_json=bool(entry)):
            return "wrong"
    return "right"


NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d{1,3})?")


def same_output(output, expected, tolerance=None, is_json=False):
    """
    Whether two outputs, or results of a function in JSON, are the same line by line, trailing blanks ignored. With a
    tolerance, their numbers may differ by so much, absolutely or relatively; without one, 1, 1.0 and true are three things.
    """
    if is_json:
        try:  # in one spelling, each value a word of its own
            output, expected = (json.dumps(json.loads(text), sort_keys=True, indent=0, separators=(" ,", " : "))
                                for text in (output, expected))
        except (ValueError, RecursionError):
            return False
    mine, theirs = ([line.rstrip() for line in text.rstrip().splitlines()] for text in (output, expected))
    if mine == theirs or tolerance is None:
        return mine == theirs
    mine, theirs = ([line.split() for line in lines] for lines in (mine, theirs))
    return list(map(len, mine)) == list(map(len, theirs)) and all(
        a == b or (NUMBER.fullmatch(a) and NUMBER.fullmatch(b)
                   and abs(float(a) - float(b)) <= tolerance * max(1, abs(float(b))))
        for x, y in zip(mine, theirs) for a, b in zip(x, y))


# What the rows of data sets call their tests.
TEST_FIELDS = ("official_tests", "tests", "public_test_cases", "examples", "input_output")


def code_tests(row):
    """
    (tests, None) or (None, why there are none) of a row. tests: cases, a list of [input, expected output]; entry_point,
    None or the function to call, then each input is JSON [entry_point, args, kwargs] and each output JSON; seconds and
    tolerance, None where the problem does not state them.
    """
    if row.get("generated_checker") or row.get("checker"):
        return None, "several outputs are right (it has a checker of its own)"
    if row.get("input_mode") == "file":
        return None, "its programs read files"
    entry = row.get("entry_point")
    if entry is not None and not re.fullmatch(r"(?:[A-Za-z_]\w*\(\)\.)?[A-Za-z_]\w*", str(entry)):
        return None, "field 'entry_point' names no function"
    cases, why = [], "no tests"
    for field in filter(row.get, TEST_FIELDS):
        try:
            found = read_cases(row[field], entry)
        except (ValueError, SyntaxError, TypeError, KeyError, RecursionError, MemoryError):
            found = []
        cases += [case for case in found if case not in cases]
        why = why if found else f"field '{field}' gives no test"
    statement = str(next(filter(None, map(row.get, PROBLEM_FIELDS)), "")) + str(row.get("output_format") or "")
    stated = re.search(r"(?:absolute|relative)[^.]{0,40}error[^.]{0,80}?(?:10 *\^ *\{? *[-−–] *|1e-)(\d+)", statement)
    tolerance, seconds = row.get("tolerance"), row.get("time_limit")
    if not isinstance(tolerance, (int, float)):
        tolerance = 10.0 ** -int(stated[1]) if stated else None
    seconds = min(seconds, 60.0) if isinstance(seconds, (int, float)) and seconds > 0 else None
    tests = {"cases": cases, "entry_point": entry, "seconds": seconds, "tolerance": tolerance}
    return (tests, None) if cases else (None, why)


def read_cases(value, entry):
    """[[input, expected], ...] of one field: a list of {input, output}, two columns, or the JSON of either."""
    if isinstance(value, str):
        value = json.loads(value)
    if isinstance(value, dict):
        inputs, outputs = (value.get(name, value.get(name + "s")) for name in ("input", "output"))
        inputs, outputs = ([x] if isinstance(x, str) else x for x in (inputs, outputs))
        value = [{"input": i, "output": o} for i, o in zip(inputs, outputs, strict=True)]
    pairs = [(case["input"], case["output"]) for case in value]
    if entry:
        return [[json.dumps([entry, *arguments(given)]), json.dumps(literal(expected))] for given, expected in pairs]
    lines = [["\n".join(map(str, x)) if isinstance(x, list) else x for x in pair] for pair in pairs]
    return [pair for pair in lines if {type(x) for x in pair} == {str} and not pair[0].rstrip().endswith("...")]  # cut short


def arguments(given):
    """(args, kwargs) of a function test's input: a list, 'nums = [1], k = 2', or a value per line."""
    if isinstance(given, list):
        return given, {}
    if re.match(r"\s*[A-Za-z_]\w*\s*=", given):
        return [], {k.arg: ast.literal_eval(k.value) for k in ast.parse(f"f({given})", mode="eval").body.keywords}
    return [literal(line) for line in given.splitlines() if line.strip()], {}


def literal(text):
    """A value from its JSON or Python text; anything but text is itself."""
    try:
        return json.loads(text) if isinstance(text, str) else text
    except json.JSONDecodeError:
        return ast.literal_eval(text)


# ------------------------------------------------------------------------------------------------------- verdicts

UNSAFE = "MODEL-WRITTEN PROGRAMS RUN WITH ALL YOUR RIGHTS: THEY CAN READ, CHANGE AND DELETE YOUR FILES AND USE YOUR NETWORK"


class Verdict(NamedTuple):
    correct: bool
    reason: str  # right, wrong, no answer, timeout, crash


def worker():
    """
    The judge's worker process, until stdin ends. One JSON line in, [seconds it may take, function, arguments], where
    function is gold_kind, right_answer or judge_program; one line out, what it returns.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C and torchrun's end reach the whole group; the Judge decides
        signal.signal(number, signal.SIG_IGN)
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (int(float(sys.argv[2]) * 2**30), resource.RLIM_INFINITY))
    sys.set_int_max_str_digits(20_000)
    expression("2x")  # imports the parser
    print("ready", flush=True)
    for line in sys.stdin:
        seconds, function, arguments = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, seconds + 1)  # its default ends the process, should the parent be gone
        if function == "judge_program":
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)  # programs have a limit of their own
        reply = globals()[function](*arguments)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(reply, flush=True)


class Judge:
    """
    A pool of worker processes that give verdicts. A worker that takes longer than `limit` seconds or dies (memory) is
    killed and replaced; its answer counts as wrong, with the reason 'timeout' or 'crash'. math-verify's own time-outs
    need signals and the main thread; these need neither, so a Judge may be used from any thread and any rank.

    workers: processes (default: the cores, shared among the ranks of this node). limit: seconds a verdict may take; for
    a program, seconds of one test whose problem states none. memory: GiB of address space of a worker. program_memory:
    GiB that a program may have. sandbox=False runs programs without any protection.
    """

    def __init__(self, workers=None, limit=5.0, memory=4.0, program_memory=1.0, sandbox=True):
        if not sandbox:
            say(f"--unsafe_no_sandbox: {UNSAFE}")
        workers = workers or max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        self.limit, self.memory, self.program_memory, self.sandbox = limit, memory, program_memory, sandbox
        self.known = {}  # a verdict is a pure function of two strings, asked again for every sample of a problem
        self.idle = deque(self.start() for _ in range(workers))  # all at once: their imports take a second
        self.pool = ThreadPoolExecutor(workers, thread_name_prefix="judge")  # each of its threads takes one that is idle

    def start(self):
        process = subprocess.Popen([sys.executable, os.path.abspath(__file__), "--worker", str(self.memory)],
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"})
        process.is_ready = False
        return process

    def ask(self, function, arguments, seconds):
        """What a worker replies, or 'timeout' or 'crash'."""
        process = self.idle.pop()
        if not process.is_ready and not self.read(process, 60):
            raise RuntimeError(f"a judge worker did not start; run this to see why: {' '.join(process.args)}")
        process.is_ready = True
        try:
            process.stdin.write((json.dumps([seconds, function, arguments]) + "\n").encode())
            process.stdin.flush()
            reply = self.read(process, seconds)
        except BrokenPipeError:
            reply = ""
        if not reply:
            self.stop(process)
            process = self.start()
        self.idle.append(process)
        return reply or ("timeout" if reply is None else "crash")

    def read(self, process, seconds):
        """A line of a worker, "" if it is dead, None if it takes too long."""
        if select.select([process.stdout], [], [], seconds)[0]:
            return process.stdout.readline().decode().strip()
        return None

    def stop(self, process):
        process.send_signal(signal.SIGSTOP)  # so that it starts nothing more
        kill(descendants(process.pid))  # bubblewrap, killed alone while it sets up, leaves a child that waits for ever
        process.wait()
        process.stdin = process.stdout = None

    def submit(self, problem, response):
        """A Future of the Verdict on a response (text)."""
        return self.pool.submit(self.verdict, problem, response)

    def verdict(self, problem, response):
        """The Verdict on a response: on its last \\boxed{}, for code its last fenced block; without one it is wrong."""
        answer = last_program(response) if problem.mode == "code" else last_boxed(response)
        if answer is None:
            return Verdict(False, "no answer")
        if problem.mode == "code":
            most = COMPILE_SECONDS + 10 + (ALL_TESTS + 1) * (problem.tests["seconds"] or self.limit)
            how = problem.tests, self.limit, self.program_memory, self.sandbox
            reason = self.ask("judge_program", [*answer, *how], most)
        elif len(answer) > 10_000:  # nobody's final answer is that long
            reason = "wrong"
        else:
            key = problem.answer, answer
            reason = self.known.get(key) or self.ask("right_answer", key, self.limit)
            if len(answer) <= 200 and reason in ("right", "wrong"):
                self.known[key] = reason
        return Verdict(reason == "right", reason)

    def __call__(self, problems, responses):
        """Verdicts of responses[i] to problems[i], in order."""
        return [f.result() for f in [self.submit(p, r) for p, r in zip(problems, responses, strict=True)]]

    def parse_golds(self, problems):
        """Sets the kind of each problem's answer. For each None, or the reason why its gold answer cannot be used."""
        for problem, kind in zip(problems, self.pool.map(lambda p: self.ask("gold_kind", [p.answer], self.limit), problems)):
            problem.kind = kind
        return [f"gold cannot be parsed{'' if problem.kind == 'bad' else f' ({problem.kind})'}"
                if problem.kind in ("bad", "timeout", "crash") else None for problem in problems]

    def close(self):
        self.pool.shutdown()
        for process in self.idle:
            self.stop(process)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


# -------------------------------------------------------------------------------------------------- as a script


def main():
    parser = argparse.ArgumentParser(description="Check a data set, or judge responses again.")
    parser.add_argument("--data", required=True, help=".jsonl, .json, .parquet or hub name[:config][@split]")
    parser.add_argument("--responses", help="responses.jsonl of srt.py: judge it again and print what changed")
    parser.add_argument("--range", dest="range_", metavar="A:B", help="rows of the data")
    parser.add_argument("--mode", choices=sorted(INSTRUCTION), default="math")
    parser.add_argument("--judge_seconds", type=positive, default=5.0, help="limit of one verdict; for code, of one test")
    parser.add_argument("--unsafe_no_sandbox", action="store_true", help=UNSAFE)
    args = parser.parse_args()
    with Judge(limit=args.judge_seconds, sandbox=not args.unsafe_no_sandbox) as judge:
        problems, dropped = load_problems(args.data, judge, args.mode, args.range_)
        print(f"{args.data}: {len(problems)} kept, {sum(dropped.values())} dropped")
        for kind, count in Counter(problem.kind for problem in problems).most_common():
            print(f"  {count:6d}  kept     {kind}")
        for why, count in dropped.most_common():
            print(f"  {count:6d}  dropped  {why}")
        if args.responses:
            judge_again(args.responses, {problem.id: problem for problem in problems}, judge)


def judge_again(path, by_id, judge):
    """Judges the last response of each row of a responses.jsonl anew and prints where the verdict is another one."""
    asked, unknown = [], set()
    for line, row in read_jsonl(path):
        which = "y_init" if row.get("revision") is None else "y_revised"
        need(row, path, line, **{"id": str, which: str, f"{which}_correct": bool})
        if row["id"] in by_id:
            asked.append((line, by_id[row["id"]], which, row[which], row[f"{which}_correct"]))
        else:
            unknown.add(row["id"])
    if not asked:
        fail(f"{path}: no response to a problem of --data; {len(unknown)} ids that are not in the data")
    verdicts = judge([a[1] for a in asked], [a[3] for a in asked])
    changed = [(a, v) for a, v in zip(asked, verdicts) if v.correct != a[4]]
    for (line, problem, which, _, before), verdict in changed:
        print(f"  {path}:{line}: {which} of {problem.id}: {'right' if before else 'wrong'} -> {verdict.reason}")
    counts = Counter(v.reason for v in verdicts)
    print(f"{path}: {len(asked)} judged ({', '.join(f'{n} {why}' for why, n in counts.most_common())}), "
          f"{len(changed)} changed, {len(unknown)} ids not in the data")


if __name__ == "__main__":
    worker() if sys.argv[1:2] == ["--worker"] else main()
