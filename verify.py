"""
What a problem is, how it is asked, and how verdicts are given. Every phase speaks through this file.

  problems    load_problems(path or hub name, judge)    -> [Problem], and why others were dropped
  tokens      chat_ids(tokenizer, problem)              -> x: the prompt, by the tokenizer's chat template
              revision_ids(tokenizer, x, y, r, phrases) -> x, y without its end of turn, P_r in empty lines
  verdicts    Judge(mode).submit(problem, response)     -> a Future of a Verdict, the binary reward

What is right a verifier says: verifiers/math.py, verifiers/code.py, or your own file, --mode my_reward.py.

Departures from the official code, which has three prompts and joins text in one phase, ids in another: one
prompt, one place where P_r meets tokens, and ids are never decoded and encoded again.

    python verify.py --data gsm8k_test.jsonl                                  # what is kept, dropped, and why
    python verify.py --data gsm8k_test.jsonl --responses O/responses.jsonl    # judge again: what changed
"""
import argparse
import bisect
import contextlib
import itertools
import json
import os
import re
import sys
import traceback
from collections import Counter, defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

from common.run import fail, need, plain_errors, positive, read_jsonl, say
from verifiers.pool import Workers, load_verifier

# ------------------------------------------------------------------------------------------------ problems

PROBLEM_FIELDS = ("problem", "question", "prompt")
LONE = re.compile("[\ud800-\udfff]")  # half of a surrogate pair: JSON can spell it, UTF-8 cannot hold it


@dataclass
class Problem:
    id: str
    problem: str
    answer: object  # the gold, as the verifier gives it
    mode: str = "math"
    instruction: str = None  # after the problem in the prompt; None: the verifier's

    def __post_init__(self):
        if self.instruction is None:
            self.instruction = load_verifier(self.mode).INSTRUCTION

    @staticmethod
    def of_row(row):
        """The problem of a row of responses.jsonl (kind "init") or d_revision.jsonl."""
        return Problem(str(row["id"]), row["problem"], row.get("answer"), str(row.get("mode", "math")),
                       row.get("instruction"))


def load_rows(data, flag="--data"):
    """Yields (where, row) of a .jsonl, .json or .parquet file, or of a hub name `name[:config][@split]`."""
    end = os.path.splitext(data)[1]
    if end == ".jsonl":
        yield from ((f"{data}:{line}", row) for line, row in read_jsonl(data))
        return
    if data[:1] in ("", ":", "@") or (os.path.exists(data) and end not in (".json", ".parquet")):
        fail(f"{flag} {data} is not a .jsonl, .json or .parquet file, nor a hub name")
    try:
        if end == ".json":
            with open(data, encoding="utf-8-sig") as f:
                rows = json.load(f)
            if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
                fail(f"{flag} {data}: a list of objects is wanted")
        elif end == ".parquet":
            import pyarrow.parquet
            parts = pyarrow.parquet.ParquetFile(data).iter_batches(1024)
            rows = (row for part in parts for row in part.to_pylist())
        else:
            import datasets
            name, _, split = data.partition("@")
            name, _, config = name.partition(":")
            rows = datasets.load_dataset(name, config or None, split=split or "train")  # stays on disk
        yield from ((f"{data}: row {i}", row) for i, row in enumerate(rows))
    except (OSError, ValueError, RecursionError) as e:
        fail(f"{flag} {data} cannot be read: {str(e).splitlines()[0]}")


def make_problem(row, where, name, mode):
    """A row's Problem, still without its answer; name: its id where the row has none."""
    field = next((name for name in PROBLEM_FIELDS if str(row.get(name) or "").strip()), None)
    for part in filter(row.get, (field, "starter_code")):
        if not isinstance(row[part], str):
            fail(f"{where}: no problem text: field '{part}' is {type(row[part]).__name__}; text is wanted")
    if not field:
        fail(f"{where}: no problem text; one of the fields {', '.join(PROBLEM_FIELDS)} is wanted")
    text, starter = row[field].strip(), (row.get("starter_code") or "").strip()
    if row.get("entry_point") and starter not in text:
        text += f"\n\n```python\n{starter}\n```"
    ids = [row[field] for field in ("id", "uuid") if row.get(field) is not None]
    id_ = str(ids[0] if ids else name)
    if lone := LONE.search(id_ + text):
        fail(f"{where}: {lone[0]!r} in the problem or its id is half of a surrogate pair; mend or remove it")
    return Problem(id_, text, None, mode)


def range_of(flag):
    """The flag that chooses rows of what --data or --val names."""
    return "--range" if flag == "--data" else f"{flag}_range"


def load_problems(data, judge, range_=None, max_problems=None, flag="--data", tell=None):
    """
    Problems of a file or hub name (load_rows), in order, and a Counter of why others were dropped. range_:
    "A:B", rows as they stand in the file. A row that repeats the text of an earlier one, in the range or
    before it, is dropped, so that phases given disjoint ranges see disjoint questions. max_problems: read no
    further than they need, but for the 200 rows whose golds are asked for at once. flag: what named the data.
    tell: called with the id of each problem that is dropped, and why.
    Ends the program if nothing is left, if two problems have one id, and on rows without a problem.
    """
    match = re.fullmatch(r"(\d*):(\d*)", range_ or ":")
    if not match:
        fail(f"{range_of(flag)} {range_}: A:B is wanted, two row numbers such as 0:10000")
    start, stop = int(match[1] or 0), min(int(match[2] or sys.maxsize), sys.maxsize)
    stem = os.path.basename(data).split(".")[0]
    problems, dropped, text_of, texts, number = [], Counter(), {}, set(), 0

    def drop(problem, why):
        dropped[why] += 1
        if tell:
            tell(problem.id, why)

    def golds():
        """(Problem, Future of its gold and why it has none) of each row of the range, every text once."""
        nonlocal number
        for number, (where, row) in enumerate(itertools.islice(load_rows(data, flag), stop), 1):  # from 1
            problem = make_problem(row, where, f"{stem}-{number - 1}", judge.mode)
            text = problem.problem
            if text_of.setdefault(problem.id, text) != text:
                fail(f"{where}: an earlier row with other text has the id {problem.id!r}; ids must differ")
            if number > start and text in texts:  # codeforces-cots has a row for each of several solutions
                drop(problem, "same problem as in an earlier row")
            elif number > start:
                yield problem, judge.pool.submit(judge.gold, row)
            texts.add(text)

    asked = golds()
    waiting = deque(itertools.islice(asked, 200))  # no more rows than these are in memory
    while waiting and len(problems) != max_problems:
        problem, gold = waiting.popleft()
        problem.answer, why = gold.result()
        waiting.extend(itertools.islice(asked, 1))
        if LONE.search(json.dumps(problem.answer, ensure_ascii=False)):
            problem.answer, why = None, "half of a surrogate pair in the answer"
        if problem.answer is None:
            drop(problem, why)
        else:
            problems.append(problem)
    if range_ and number <= start:
        fail(f"{range_of(flag)} {range_} is empty: none of the {number} rows up to its end is in it")
    if not problems:
        why = dict(dropped) or "none, it is empty"
        fail(f"{flag} {data}: no problem is left of {number - start}; dropped: {why}")
    return problems, dropped


# -------------------------------------------------------------------------------------------------- tokens

# P_r: (after a wrong y_init, after a right one)
PHRASES = {
    "qwen": ("Wait, this response is wrong. Let me correct it.", "Let me rephrase the above solution."),
    "olmo": ("Wrong. I need to redo all.", "Let me rephrase the above solution."),
    "paper": ("Wait, this response is not correct, let me start over.",
              "Let me rephrase the above solution."),
}
FEW = 300  # wrong -> right tuples below which srt.py and sft.py warn
PHRASES_HELP = "P_r: qwen, olmo, paper, or two texts 'WRONG|RIGHT'; default: what the model records"


def phrases_flag(text):
    """The argparse type of --phrases: a name in PHRASES, or 'WRONG|RIGHT'."""
    if text not in PHRASES and [bool(part.strip()) for part in text.split("|")] != [True, True]:
        names = ", ".join(PHRASES)
        raise argparse.ArgumentTypeError(f"invalid choice: {text!r}; {names} or 'WRONG|RIGHT' is wanted")
    return text


def phrases_of(model, override=None):
    """(wrong, right), two texts: --phrases, else what the model's config records, else by its model_type."""
    from transformers import AutoConfig
    config = AutoConfig.from_pretrained(model)
    family = "olmo" if config.model_type.startswith("olmo") else "qwen"
    recorded = getattr(config, "sdzero_phrases", family)
    phrases = override or recorded
    if isinstance(phrases, str):  # --phrases, or a name that a checkpoint of an earlier version records
        phrases = PHRASES.get(phrases) or phrases.split("|")
    if not isinstance(phrases, (list, tuple)) or list(map(type, phrases)) != [str, str]:
        fail(f"model {model} records phrases that are not in verify.PHRASES; give --phrases 'WRONG|RIGHT'")
    if isinstance(recorded, list) and recorded != list(phrases):
        say(f"note: model {model} was trained with other phrases than --phrases: {' | '.join(recorded)}")
    return tuple(phrases)


def load_tokenizer(model):
    """
    The tokenizer of a model folder, with two attributes more: `vocabulary`, the entries of the model's head,
    and `end_ids`, the ids that end a turn (what its generation config and itself call eos), first the one
    that its chat template ends an assistant turn with.
    """
    if os.path.exists(os.path.join(model, "final", "config.json")):
        fail(f"model {model} cannot be used: it is a run's folder; its model is {model.rstrip('/')}/final")
    if not os.path.exists(model) and (model.startswith(("/", ".")) or model.count("/") > 1):
        fail(f"model {model} cannot be used: it is not there, and no name on the hub")
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig
    try:
        config = AutoConfig.from_pretrained(model).get_text_config()
        tokenizer = AutoTokenizer.from_pretrained(model)
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        turn, eos = tokenizer.apply_chat_template(messages, return_dict=False), None
        try:
            eos = GenerationConfig.from_pretrained(model).eos_token_id
        except OSError as e:
            if "not a valid JSON" in str(e):  # else the folder has none
                raise
    except Exception as e:  # a file is missing, not JSON, or of another kind; a template may raise anything
        text = f"{type(e).__name__}: {str(e).strip()}".partition("\n")[0]
        fail(f"model {model}: its config, tokenizer or chat template cannot be used: {text}")
    ends = {*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id} - {None}
    last = next((i for i in reversed(turn) if i in ends), None)
    if last is None:
        fail(f"model {model}: its chat template ends no assistant turn with one of its eos {sorted(ends)}")
    tokenizer.end_ids, tokenizer.vocabulary = [last, *sorted(ends - {last})], config.vocab_size
    return tokenizer


def context_length(model):
    """How many tokens a model takes, prompt and response together."""
    from transformers import AutoConfig
    return AutoConfig.from_pretrained(model).max_position_embeddings


def same_vocabulary(student, student_tokenizer, teacher, teacher_tokenizer):
    """Ends the program if the tokenizers of these two models differ, or the sizes of their heads."""
    if student_tokenizer.get_vocab() != teacher_tokenizer.get_vocab():
        fail(f"--teacher {teacher} and {student} have different tokenizers: the KL needs one vocabulary")
    theirs, ours = teacher_tokenizer.vocabulary, student_tokenizer.vocabulary
    if theirs != ours:
        fail(f"--teacher {teacher} has {theirs} vocabulary entries, {student} has {ours}: the KL needs one "
             "vocabulary")


def chat_ids(tokenizer, problem):
    """x: the ids of one user message, problem and the verifier's instruction, with the generation prompt."""
    message = {"role": "user", "content": problem.problem + "\n\n" + problem.instruction}
    return tokenizer.apply_chat_template([message], add_generation_prompt=True, return_dict=False)


def without_end(tokenizer, y_ids):
    """y without a trailing end-of-turn."""
    return y_ids[:-1] if y_ids and y_ids[-1] in tokenizer.end_ids else y_ids


def control_ids(tokenizer, correct, phrases):
    """The ids of "\\n\\n" + P_r + "\\n\\n"; the only place where P_r meets the tokenizer."""
    return tokenizer.encode(f"\n\n{phrases[bool(correct)]}\n\n", add_special_tokens=False)


def revision_ids(tokenizer, x_ids, y_ids, correct, phrases):
    """x, y without its end-of-turn, P_r: what y_revised is sampled after and the teacher sees before y."""
    return x_ids + without_end(tokenizer, y_ids) + control_ids(tokenizer, correct, phrases)


def teacher_reads(tokenizer, problem, x_ids, y_ids, correct, phrases):
    """What the teacher of phase 2 reads before the y that it scores. The one place to change it."""
    return revision_ids(tokenizer, x_ids, y_ids, correct, phrases)


def fitting(tokenizer, problem, x_ids, y_ids, correct, phrases, most):
    """The longest start of y which the teacher can score in `most` tokens, with what it reads before."""
    tokens = lambda n: len(teacher_reads(tokenizer, problem, x_ids, y_ids[:n], correct, phrases)) + n
    return y_ids[:bisect.bisect_right(range(1, len(y_ids) + 1), most, key=tokens)]


# ------------------------------------------------------------------------------------------------ verdicts
UNSAFE = ("MODEL-WRITTEN PROGRAMS RUN WITH ALL YOUR RIGHTS: THEY CAN READ, CHANGE AND DELETE YOUR FILES AND "
          "USE YOUR NETWORK")


def mode_flag(text):
    """The argparse type of --mode: a path is made whole, so that one file is the same flag anywhere."""
    return os.path.abspath(text) if text.endswith(".py") else text


class Verdict(NamedTuple):
    correct: bool
    reason: str  # the verifier's word, or timeout, crash


class Judge(contextlib.AbstractContextManager):
    """
    Gives verdicts, in processes of their own (verifiers/pool.py); any thread may use it. One that takes too
    long, or whose process dies (memory), counts as wrong, with the reason 'timeout' or 'crash', and so does
    one on which the verifier raises. limit: seconds of a verdict, or of one test of a program that states
    none. memory: GiB of address space of a process; a program may have 1 GiB.
    """

    def __init__(self, mode="math", workers=None, limit=5.0, memory=4.0, sandbox=True):
        if not sandbox:
            say(f"--unsafe_no_sandbox: {UNSAFE}")
        cores = len(os.sched_getaffinity(0))
        workers = workers or max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        self.mode, self.verifier = mode, load_verifier(mode)
        self.limits = {"seconds": limit, "memory": 1.0, "sandbox": sandbox}
        self.verifier.check(self.limits)
        self.workers = Workers(mode, memory)
        self.pool = ThreadPoolExecutor(workers)  # each of its threads takes an idle worker, or starts one

    def gold(self, row):
        """(gold, None) or (None, why there is none) of a row of a data set."""
        value, failed = self.workers.ask("gold", [row], self.limits["seconds"])
        return (None, f"gold: {failed}") if failed else value

    def verdict(self, problem, response):
        try:
            seconds = float(self.verifier.longest(problem.answer, self.limits))
            if not 0 < seconds < 1e6:
                raise ValueError(f"{seconds} is no number of seconds to wait")
        except Exception:  # it runs here, and is the user's
            self.workers.tell("longest", traceback.format_exc(limit=-1).strip())
            return Verdict(False, "crash")
        reason, failed = self.workers.ask("judge", [problem.answer, response, self.limits], seconds)
        return Verdict(reason == "right", failed or reason)

    def submit(self, problem, response):
        """A Future of the Verdict on a response (text)."""
        return self.pool.submit(self.verdict, problem, response)

    def __call__(self, problems, responses):
        """Verdicts of responses[i] to problems[i], in order."""
        return [f.result() for f in [self.submit(p, r) for p, r in zip(problems, responses, strict=True)]]

    def close(self, error=None, *_):
        """After an error those that wait are not asked, and those that are being asked are stopped."""
        self.pool.shutdown(wait=not error, cancel_futures=True)
        self.workers.close()

    __exit__ = close


def add_judge_flags(parser):
    """The flags of verdicts, the same in each script that asks for them."""
    add = parser.add_argument
    add("--mode", type=mode_flag, default="math",
        help="what judges: math, code, or the path of a verifier of your own, a .py file")
    add("--judge_seconds", type=positive, default=5.0, help="limit of one verdict; for code, of one test")
    add("--unsafe_no_sandbox", action="store_true", help=UNSAFE)


def make_judge(args):
    """The Judge that these flags ask for."""
    return Judge(args.mode, limit=args.judge_seconds, sandbox=not args.unsafe_no_sandbox)


# --------------------------------------------------------------------------------------------- as a script


def main():
    parser = argparse.ArgumentParser(description="Check a data set, or judge responses again.")
    add = parser.add_argument
    add("--data", required=True, help=".jsonl, .json, .parquet or hub name[:config][@split]")
    add("--responses", help="responses.jsonl of srt.py: judge it again, print what changed")
    add("--range", metavar="A:B", help="rows of the data")
    add_judge_flags(parser)
    args = parser.parse_args()
    plain_errors()
    with make_judge(args) as judge:
        names = defaultdict(list)
        problems, dropped = load_problems(args.data, judge, args.range,
                                          tell=lambda name, why: names[why].append(name))
        print(f"{args.data}: {len(problems)} kept, {sum(dropped.values())} dropped")
        for why, count in dropped.most_common():
            print(f"  {count:6d}  dropped  {why}: {', '.join(names[why][:5])}{', ...' * (count > 5)}")
        print(f"an empty response is judged: {judge.verdict(problems[0], '').reason}")
        if args.responses:
            judge_again(args.responses, {problem.id: problem for problem in problems}, judge)


def judge_again(path, by_id, judge):
    """Judges each response of a responses.jsonl anew and prints where the verdict is another one."""
    asked, others, changed, reasons = [], 0, 0, Counter()
    for line, row in read_jsonl(path):
        need(row, path, line, id=str, kind=str)
        y = {"init": "y_init", "revision": "y_revised"}.get(row["kind"]) or fail(
            f"{path}:{line}: kind {row['kind']!r}, not init or revision; remove this line")
        need(row, path, line, **{y: str, f"{y}_correct": bool})
        if row["id"] in by_id:
            asked.append((line, y, row, judge.submit(by_id[row["id"]], row[y])))
        else:
            others += 1
    if not asked:
        fail(f"--responses {path}: {others} responses, none of them to a problem of --data")
    for line, y, row, verdict in asked:
        correct, reason = verdict.result()
        reasons[reason] += 1
        if correct != row[f"{y}_correct"]:
            changed += 1
            print(f"  {path}:{line}: {y} of {row['id']}: {'wrong' if correct else 'right'} -> {reason}")
    counts = ", ".join(f"{n} {why}" for why, n in reasons.most_common())
    print(f"{path}: {len(asked)} judged ({counts}), {changed} changed, {others} to problems not in the data")


if __name__ == "__main__":
    main()
