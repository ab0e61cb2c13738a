"""
What a problem is, how it is asked, and how an answer is judged. Every phase speaks through this file.

  problems    load_problems(path or hub name)           -> [Problem], and why the others were dropped
  tokens      chat_ids(tokenizer, problem)              -> x:  the prompt, by the tokenizer's own chat template
              revision_ids(tokenizer, x, y, correct, f) -> x, y without its end of turn, "\\n\\n" + P_r + "\\n\\n"
  verdicts    Judge()(problems, responses)              -> [Verdict], the binary reward, by math-verify in worker processes

Departures from the official code, which has three different prompts and joins text in one phase, ids in another: here
there is one prompt, P_r meets tokens in one place, and ids are never decoded and encoded again.

    python verify.py --data gsm8k_test.jsonl                                  # what is kept, what is dropped, and why
    python verify.py --data gsm8k_test.jsonl --responses O/responses.jsonl    # judge again: what changed
"""
import argparse
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
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
    of names), for two runs would be mixed.
    """
    import torch.distributed as dist
    if ranks.rank == 0:
        if args.fresh and os.path.isdir(args.out) and os.listdir(args.out):
            old = f"{args.out.rstrip('/')}.old-{time.strftime('%Y%m%d-%H%M%S')}"
            os.rename(args.out, old)
            print(f"--fresh: {args.out} is now {old}")
        os.makedirs(args.out, exist_ok=True)
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


def write_atomically(path, text):
    with open(path + ".tmp", "w") as f:
        f.write(text)
    os.replace(path + ".tmp", path)


def number(kind, low, high=sys.maxsize, above=False):
    """An argparse type: a number within [low, high], or with `above` in (low, high]."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high or (above and value == low):  # nan neither
            raise argparse.ArgumentTypeError(f"{text} is not {'above' if above else 'at least'} {low}"
                                             + (f" and at most {high}" if high < sys.maxsize else ""))
        return value
    parse.__name__ = kind.__name__  # argparse says "invalid int value" where it is none
    return parse


natural, positive, share = number(int, 1), number(float, 0, above=True), number(float, 0, 1, above=True)


# ------------------------------------------------------------------------------------------------------- problems

INSTRUCTION = {
    "math": "Please reason step by step, and put your final answer within \\boxed{}.",
    "code": "Please reason step by step, and put your final program in one fenced code block.",
}
PROBLEM_FIELDS = ("problem", "question", "prompt")
ANSWER_FIELDS = ("answer", "final_answer", "solution", "output")


@dataclass
class Problem:
    id: str
    problem: str
    answer: str  # the gold answer alone, without the solution around it
    mode: str = "math"

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
                fail(f"{path}:{number}: not JSON ({e.msg} at column {e.colno}); mend or remove this line")
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
    """The inside of the last complete \\boxed{...} or \\fbox{...} (braces balanced), or None."""
    for start in reversed(list(re.finditer(r"\\(?:boxed|fbox)\s*\{", text))):
        depth = 1
        for brace in re.finditer(r"\\.|[{}]", text[start.end():], re.DOTALL):
            depth += {"{": 1, "}": -1}.get(brace.group(), 0)
            if depth == 0:
                return text[start.end(): start.end() + brace.start()].strip()
    return None


def gold_answer(row):
    """(gold answer, None) or (None, why there is none) of a row of a data set, whatever its fields are called."""
    for name in ANSWER_FIELDS:
        value = row.get(name)
        if isinstance(value, list):
            value = ", ".join(str(v) for v in value)
        if value is None or isinstance(value, (bool, dict)) or not str(value).strip():
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
    elif data.endswith((".json", ".parquet")) or os.path.exists(data):
        if not os.path.isfile(data) or not data.endswith((".json", ".parquet")):
            fail(f"--data {data} is not a .jsonl, .json or .parquet file")
        if data.endswith(".parquet"):
            import pyarrow.parquet
            rows = pyarrow.parquet.read_table(data).to_pylist()
        else:
            try:
                with open(data, encoding="utf-8") as f:
                    rows = json.load(f)
            except ValueError as e:  # JSONDecodeError and UnicodeDecodeError
                fail(f"{data}: not a JSON file in UTF-8 ({e})")
        if not isinstance(rows, list):
            fail(f"{data}: a list of rows is wanted, found {type(rows).__name__}")
        for i, row in enumerate(rows):
            if not isinstance(row, dict):
                fail(f"{data}: row {i}: an object is wanted, found {type(row).__name__}")
            yield f"{data}: row {i}", row
    else:
        import datasets
        name, _, split = data.partition("@")
        name, _, config = name.partition(":")
        try:
            rows = datasets.load_dataset(name, config or None, split=split or "train")
        except (OSError, ValueError) as e:
            fail(f"--data {data} is neither a file here nor a data set that the hub gives: {str(e).splitlines()[0]}")
        yield from ((f"{data}: row {i}", row) for i, row in enumerate(rows))


def load_problems(data, judge, mode="math", range_=None, max_problems=None):
    """
    Problems of a file or hub name, in order, and a Counter of why others were dropped (`--data` of every phase).

    judge: parses each gold answer once; one that cannot be parsed drops its problem. range_: "A:B", a slice of the
    rows as they stand in the file, so that phases given disjoint ranges see disjoint questions. max_problems: at most
    so many of the kept. Ends the program if nothing is left, on duplicate ids, and on rows without a problem.
    """
    if mode == "code":
        fail("--mode code: code verdicts are not part of this version; use --mode math")
    rows = list(load_rows(data))
    start, stop = parse_range(range_, len(rows))
    problems, dropped, seen = [], Counter(), {}
    stem = os.path.basename(data).split(".")[0]
    for i, (where, row) in list(enumerate(rows))[start:stop]:
        text = next((row[name] for name in PROBLEM_FIELDS if isinstance(row.get(name), str) and row[name].strip()), None)
        if text is None:
            fail(f"{where}: no problem text; one of the fields {', '.join(PROBLEM_FIELDS)} is wanted")
        id_ = str(next((row[k] for k in ("id", "uuid") if row.get(k) is not None), f"{stem}-{i}"))
        if id_ in seen:
            fail(f"{where}: id {id_!r} stands already at {seen[id_]}; ids must differ")
        seen[id_] = where
        answer, why = gold_answer(row)
        if answer is None:
            dropped[why] += 1
        else:
            problems.append(Problem(id_, text.strip(), answer, mode))
    parsed = judge.parse_golds(problems)
    dropped.update(why for why in parsed if why)
    problems = [problem for problem, why in zip(problems, parsed) if not why][:max_problems]
    if not problems:
        fail(f"--data {data}: no problem is left of {stop - start}; dropped: {dict(dropped) or 'none, it is empty'}")
    return problems, dropped


def parse_range(range_, total):
    """'A:B' -> (start, stop) within total, either side may be left out; ends the program on anything else."""
    match = re.fullmatch(r"(\d*):(\d*)", range_ or ":")
    if not match:
        fail(f"--range {range_}: A:B is wanted, two row numbers such as 0:10000")
    start, stop = int(match[1] or 0), min(int(match[2] or total), total)
    if range_ and start >= stop:
        fail(f"--range {range_} is empty: the data has {total} rows")
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


# ------------------------------------------------------------------------------------------------------- verdicts


class Verdict(NamedTuple):
    correct: bool
    reason: str  # right, wrong, no answer, timeout, crash


def boxed_for_parser(answer):
    """An answer as math-verify reads it best: in one \\boxed{}, no dollars, 4.5e33 as a power of ten."""
    answer = re.sub(r"(?<!\\)\$", "", answer)
    answer = re.sub(r"(?<![\w\\.])(\d+(?:\.\d+)?)[eE]([+-]?\d+)(?!\w)", r"\1 \\times 10^{\2}", answer)
    return f"\\boxed{{{answer}}}"


def worker():
    """The judge's worker process: one JSON line in ([gold, answer or null]), one line out (1 or 0), until stdin ends."""
    import logging
    import resource
    limit, memory = float(sys.argv[2]), float(sys.argv[3])
    resource.setrlimit(resource.RLIMIT_AS, (int(memory * 2**30),) * 2)
    logging.disable(logging.WARNING)  # math-verify warns that its own time-outs are off; ours are outside
    import math_verify
    configs = (math_verify.LatexExtractionConfig(boxed_match_priority=0), math_verify.ExprExtractionConfig())

    def parse(answer):
        return math_verify.parse(boxed_for_parser(answer), configs, parsing_timeout=None)

    print("ready", flush=True)
    for line in sys.stdin:
        gold, answer = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, limit + 1)  # SIGALRM's default ends the process, should the parent be gone
        if answer is None:
            ok = bool(parse(gold))
        else:
            ok = math_verify.verify(parse(gold), parse(answer), timeout_seconds=None)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(int(ok), flush=True)


class Judge:
    """
    A pool of worker processes that give verdicts. A worker that takes longer than `limit` seconds or dies (memory) is
    killed and replaced; its answer counts as wrong, with the reason 'timeout' or 'crash'. math-verify's own time-outs
    need signals and the main thread; these need neither, so a Judge may be used from any thread and any rank.

    workers: processes (default: the cores, shared among the ranks of this node). limit: seconds a verdict may take.
    memory: GiB of address space a worker may have.
    """

    def __init__(self, workers=None, limit=5.0, memory=4.0):
        workers = workers or max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        self.limit, self.memory, self.known = limit, memory, {}
        self.local, self.lock, self.processes = threading.local(), threading.Lock(), set()
        self.spare = [self.start() for _ in range(workers)]  # all at once: their imports take a second
        self.pool = ThreadPoolExecutor(workers, thread_name_prefix="judge")

    def start(self):
        command = [sys.executable, os.path.abspath(__file__), "--worker", str(self.limit), str(self.memory)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"})
        process.is_ready = False
        with self.lock:
            self.processes.add(process)
        return process

    def ask(self, gold, answer):
        """'1', '0', 'timeout' or 'crash'; one worker process per thread of the pool."""
        key = (gold, answer)
        if key in self.known:
            return self.known[key]
        process = getattr(self.local, "process", None)
        if process is None:
            with self.lock:
                process = self.spare.pop() if self.spare else None
            process = self.local.process = process or self.start()
        if not process.is_ready:
            if self.read(process, 60) != "ready":
                raise RuntimeError(f"a judge worker did not start; run this to see why: {' '.join(process.args)}")
            process.is_ready = True
        try:
            process.stdin.write((json.dumps([gold, answer]) + "\n").encode())
            process.stdin.flush()
            reply = self.read(process, self.limit)
        except BrokenPipeError:
            reply = "crash"
        if reply in ("timeout", "crash"):
            self.stop(process)
            self.local.process = None
        elif len(gold) + len(answer or "") < 200:
            self.known[key] = reply  # a pure function of two short strings, asked again for every sample of a problem
        return reply

    def read(self, process, seconds):
        poll = select.poll()
        poll.register(process.stdout, select.POLLIN)
        if not poll.poll(seconds * 1000):
            return "timeout"
        return process.stdout.readline().decode().strip() or "crash"

    def stop(self, process):
        process.kill()
        process.wait()
        process.stdin = process.stdout = None
        with self.lock:
            self.processes.discard(process)

    def submit(self, problem, response):
        """A Future of the Verdict on a response (text). Only its last \\boxed{} counts; without one it is wrong."""
        answer = last_boxed(response)
        if answer is None or len(answer) > 10_000:  # nobody's final answer is 10,000 characters long
            done = Future()
            done.set_result(Verdict(False, "no answer"))
            return done
        return self.pool.submit(self.verdict, problem.answer, answer)

    def verdict(self, gold, answer):
        reply = self.ask(gold, answer)
        return Verdict(reply == "1", {"1": "right", "0": "wrong"}.get(reply, reply))

    def __call__(self, problems, responses):
        """Verdicts of responses[i] to problems[i], in order."""
        return [f.result() for f in [self.submit(p, r) for p, r in zip(problems, responses, strict=True)]]

    def parse_golds(self, problems):
        """For each problem None, or the reason why its gold answer cannot be used."""
        replies = self.pool.map(lambda p: self.ask(p.answer, None), problems)
        return [None if r == "1" else f"gold cannot be parsed{'' if r == '0' else f' ({r})'}" for r in replies]

    def close(self):
        self.pool.shutdown()
        for process in list(self.processes):
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
    args = parser.parse_args()
    with Judge() as judge:
        problems, dropped = load_problems(args.data, judge, args.mode, args.range_)
        print(f"{args.data}: {len(problems)} kept, {sum(dropped.values())} dropped"
              + "".join(f"\n  {count:6d}  {why}" for why, count in dropped.most_common()))
        if not args.responses:
            return
        by_id = {problem.id: problem for problem in problems}
        asked, unknown = [], set()
        for line, row in read_jsonl(args.responses, torn_ok=True):
            need(row, args.responses, line, y_init=str, y_init_correct=bool)
            if str(row.get("id")) not in by_id:
                unknown.add(str(row.get("id")))
                continue
            which = "y_init" if row.get("revision") is None else "y_revised"
            asked.append((line, by_id[str(row["id"])], which, row[which], row[f"{which}_correct"]))
        verdicts = judge([a[1] for a in asked], [a[3] for a in asked])
        changed = [(a, v) for a, v in zip(asked, verdicts) if v.correct != a[4]]
        for (line, problem, which, _, before), verdict in changed:
            print(f"  {args.responses}:{line}: {which} of {problem.id}: {'right' if before else 'wrong'} -> {verdict.reason}")
        counts = Counter(v.reason for v in verdicts)
        print(f"{args.responses}: {len(asked)} judged ({', '.join(f'{n} {why}' for why, n in counts.most_common())}), "
              f"{len(changed)} changed, {len(unknown)} ids not in the data")


if __name__ == "__main__":
    worker() if sys.argv[1:2] == ["--worker"] else main()
