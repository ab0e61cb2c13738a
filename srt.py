"""
Phase 1a of SD-Zero: sample, judge, revise, judge, keep -> D_revision. With --eval the same loop evaluates.

  for each problem x
    1. y_init ~ pi(. | x)                            --num_responses
    2. r = 1 if the verifier calls y_init right, else 0
    3. P_r tells the outcome: "Wait, this response is wrong. ..." or "Let me rephrase ..."
    4. y_revised ~ pi(. | x, y_init, P_r)            --num_revisions
    5. keep (x, y_init, P_r, y_revised) if y_revised is right, up to --target

Departures from the official code: every GPU samples, problem by problem; verdicts come in meanwhile; each
response is on disk once it is judged, so the same command goes on after a kill; no text is tokenised again.

    python srt.py --model Qwen/Qwen3-4B-Instruct-2507 --data open-r1/OpenR1-Math-220k --range 0:10000 \\
        --out runs/collect
    torchrun --nproc_per_node 8 srt.py ... the same
    python srt.py --eval --model runs/sdzero/final --data aime24.jsonl --num_responses 8 --temperature 0.7 \\
        --max_tokens 32768 --out runs/aime
"""
import argparse
import asyncio
import glob
import json
import math
import os
import sys
import time
from collections import Counter, defaultdict, deque

import torch
import torch.distributed as dist
from tqdm import tqdm

import verify
from common import run
from common.metrics import wilson
from common.run import fail, natural, share, within
from common.sampler import Request, check_lengths, close, engine_name, make_sampler, request_seed, serve

# a run that goes on may change these: what is asked stays, but ids may differ by rounding and engine
FREE = "target engine dtype vllm_memory judge_seconds unsafe_no_sandbox"

# ---------------------------------------------------------------------------------------------------- rows
# responses.jsonl, while ranks are at work responses.rankN.jsonl: a row for each judged response, of kind
# "init" or "revision". d_revision.jsonl: a row for each tuple kept, with the fields of both.

TRUNCATED = {"y_init": "truncated", "y_revised": "revised_truncated"}  # the field that says so of each
FIELDS = {  # that each kind must have
    "init": {"problem": str, "y_init": str, "y_init_correct": bool, "y_init_verdict": str,
             "y_init_tokens": list, "truncated": bool, "first_correct": bool, "no_room": bool},
    "revision": {"revision": int, "y_revised": str, "y_revised_correct": bool, "y_revised_verdict": str,
                 "y_revised_tokens": list, "revised_truncated": bool}}


def row_key(row):
    """What a row answers: the problem's id, the number of its y_init, and of a revision its own number."""
    return tuple(row[name] for name in ("id", "sample", "revision") if name in row)


def read_rows(out):
    """{row_key: row} of everything that ranks have written in this folder."""
    rows = {}
    for path in glob.glob("responses.jsonl", root_dir=out) + glob.glob("responses.rank*.jsonl", root_dir=out):
        path = os.path.join(out, path)
        for line, row in run.read_jsonl(path, torn_ok=True):
            run.need(row, path, line, kind=str, id=str, sample=int)
            fields = FIELDS.get(row["kind"]) or fail(f"{path}:{line}: kind {row['kind']!r}; remove this line")
            run.need(row, path, line, **fields)
            rows[row_key(row)] = row
    return rows


def merge(out, problems):
    """Makes one responses.jsonl of all ranks' files, in the order of the problems, and returns its rows."""
    order, rows = {problem.id: i for i, problem in enumerate(problems)}, list(read_rows(out).values())
    if lost := {row["id"] for row in rows} - {*order}:
        fail(f"--out {out} has responses to {len(lost)} problems, {min(lost)!r} is one, that --data does not "
             "give now: rows have changed, or gold answers took longer than --judge_seconds; mend the data, "
             "raise that, or give --fresh, which renames the old folder and starts over")
    rows.sort(key=lambda row: (order[row["id"]], *row_key(row)[1:]))
    if rows:
        write_rows(os.path.join(out, "responses.jsonl"), rows)
    for path in glob.glob("responses.rank*.jsonl", root_dir=out):
        os.remove(os.path.join(out, path))  # every line of it now stands in responses.jsonl
    return rows


def write_rows(path, rows):
    run.write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def first_answer(y_init, phrases):
    """What stands before the first P_r that a response says by itself; and whether it says right, or None."""
    at, says_right = min(((y_init.find(p_r), says_right) for says_right, p_r in enumerate(phrases)
                          if p_r in y_init), default=(len(y_init), None))
    return y_init[:at], says_right


def tuples(rows):
    """The revisions among the rows of responses.jsonl, each with the fields of its y_init before its own."""
    inits = {row_key(row)[:2]: row for row in rows if row["kind"] == "init"}
    both = [inits[row_key(row)[:2]] | row for row in rows if row["kind"] == "revision"]
    return [{name: value for name, value in row.items() if name != "kind"} for row in both]


# ------------------------------------------------------------------------------------------------- summary


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else None


def measures(name, rows):
    y = f"y_{name}"
    return {
        f"{name}_total": len(rows), f"{name}_correct": sum(row[f"{y}_correct"] for row in rows),
        f"{name}_accuracy": mean(row[f"{y}_correct"] for row in rows),
        f"{name}_verdicts": dict(Counter(row[f"{y}_verdict"] for row in rows)),
        f"{name}_mean_tokens": mean(len(row[f"{y}_tokens"]) for row in rows),
        f"{name}_truncated": mean(row[TRUNCATED[y]] for row in rows)}


def summarise(rows, kept, num_responses, phrases):
    """The counts of the official code, the measures of the paper; kept: the tuples, None where none are."""
    inits, revised = [row for row in rows if row["kind"] == "init"], tuples(rows)
    by_problem = {}
    for row in inits:
        by_problem.setdefault(row["id"], []).append(row["y_init_correct"])
    s = {"problems": len(by_problem), **measures("init", inits), **measures("revised", revised)}
    p, q = s["init_accuracy"], s["revised_accuracy"]
    # y_init that say P_r by themselves: how many, and do they doubt wrong first answers more than right ones?
    says_right = [first_answer(row["y_init"], phrases)[1] for row in inits]
    s["init_self_revised"] = mean(said is not None for said in says_right)
    first = [row["first_correct"] for row in inits]  # before P_r; init_accuracy is of the last answer
    s["init_first_accuracy"] = mean(first)
    for name, right in (("right", True), ("wrong", False)):  # P_r for wrong, after a first answer that is
        s[f"init_doubted_{name}"] = mean(told == 0 for told, ok in zip(says_right, first) if ok == right)
    s["init_accuracy_95"] = wilson(p, len(by_problem)) if inits else None  # a problem's samples count as one
    s[f"avg@{num_responses}"] = mean(map(mean, by_problem.values()))
    s[f"pass@{num_responses}"] = mean(map(any, by_problem.values()))
    for name, told in (("right", True), ("wrong", False)):
        s[f"revised_accuracy_of_{name}"] = mean(
            row["y_revised_correct"] for row in revised if row["y_init_correct"] == told)
    counts = Counter(row_key(row)[:2] for row in revised)
    # share of the errors that one revision removes; none where q weighs some y_init more than p does
    alike = len(counts) == len(inits) and len({*counts.values()}) == 1
    s["net_correction"] = (q - p) / (1 - p) if alike and p < 1 else None
    if kept is not None:
        s["kept"], s["wrong_to_right"] = len(kept), sum(not row["y_init_correct"] for row in kept)
        s["no_answer_revised"] = mean(row["y_revised_verdict"] == "no answer" for row in revised)
        s["dropped"] = {f"y_revised {why}": n for why, n in s["revised_verdicts"].items() if why != "right"}
        s["dropped"] |= {"over the target": s["revised_correct"] - len(kept),
                         "no room to revise": sum(row["no_room"] for row in inits)}
    return s


def enough(summary, target):
    """Whether D_revision will do: it is from wrong -> right tuples that the teacher learns to correct."""
    few = " (few: the teacher may only copy; see docs/real.md)"
    line = (f"D_revision: {summary['wrong_to_right']} wrong -> right tuples"
            f"{few if summary['wrong_to_right'] < verify.FEW else ''}; "
            f"{100 * (summary['revised_accuracy_of_wrong'] or 0):.1f} % of the revisions of wrong answers "
            f"are right; {100 * (summary['no_answer_revised'] or 0):.1f} % of all revisions have no answer")
    if summary["kept"] < target:
        line += f"\nnote: --target {target} was not reached; all problems gave {summary['kept']} tuples"
    return line


# ------------------------------------------------------------------------------------------------ progress


class Progress:
    """A line on rank 0's stderr: in a terminal it stays in its place, elsewhere there is one a minute."""

    def __init__(self, ranks, problems, target):
        self.ranks, self.problems, self.target, self.tokens = ranks, problems, target, 0
        self.right, self.started, self.shown = defaultdict(list), time.perf_counter(), time.perf_counter()

    def judged(self, y, row, tokens=0):
        """A verdict on this rank's y_init or y_revised, for which this run has sampled so many tokens."""
        self.right[y].append(row[f"{y}_correct"])
        self.tokens += tokens
        if time.perf_counter() - self.shown > (0.5 if sys.stderr.isatty() else 60):
            self.show()

    def show(self, end=""):
        self.shown = time.perf_counter()
        if self.ranks.rank:
            return
        count = lambda name: self.ranks.store.add(name, 0)
        seconds, ended = max(1e-3, time.perf_counter() - self.started), count("ended")
        time_left = tqdm.format_interval(seconds / ended * (self.problems - ended)) if ended else "?"
        line = f"problems {ended}/{self.problems} [{tqdm.format_interval(seconds)}<{time_left}]"
        if self.target is not None:
            line += f"  kept {count('kept')}" + f"/{self.target}" * (self.target > 0)
        line += "".join(f"  {y[2:]} {mean(right):.3f}" for y, right in sorted(self.right.items()))
        line = f"{line}  {self.tokens / seconds:.0f} tok/s/rank"[:100]
        print(f"\r\033[K{line}{end}" if sys.stderr.isatty() else line, file=sys.stderr, flush=True,
              end="" if sys.stderr.isatty() else "\n")


# ---------------------------------------------------------------------------------------------------- main


def parse_args():
    parser = argparse.ArgumentParser(description="Collect D_revision (SRT, phase 1a), or evaluate: --eval.")
    add = parser.add_argument
    add("--model", required=True, help="Hugging Face folder or hub name")
    add("--data", required=True, help=".jsonl, .json, .parquet or hub name[:config][@split]")
    add("--out", required=True, help="folder for responses, d_revision, summary.json")
    add("--range", metavar="A:B", help="rows of the data; others than those of distill.py")
    add("--max_problems", type=natural, help="at most so many problems")
    add("--eval", action="store_true", help="keep nothing: measure only")
    # how much
    add("--num_responses", type=natural, default=1, help="y_init per problem")
    add("--num_revisions", type=within(int, 0), help="per y_init; default: 3, with --eval 0")
    add("--revisions_of_right", type=within(int, 0), help="of a right y_init; default: --num_revisions")
    add("--target", type=within(int, 0), default=6000, help="tuples to keep; 0: no limit")
    # sampling
    add("--temperature", type=within(float, 0), default=1.0)
    add("--top_p", type=share, default=0.9)
    add("--max_tokens", type=natural, default=16384, help="per response")
    add("--seed", type=int, default=0)
    add("--phrases", type=verify.phrases_flag, help=verify.PHRASES_HELP)
    # engine
    add("--engine", type=engine_name, choices=("vllm", "hf"), help="default: vllm if there")
    add("--dtype", choices=("bfloat16", "float32"), help="default: float32 on a cpu")
    add("--vllm_memory", type=share, default=0.85, help="share of the GPU's memory for vLLM")
    verify.add_judge_flags(parser)
    add("--fresh", action="store_true", help="start over; an old --out is renamed")
    args = run.parse(parser)
    if args.num_revisions is None:
        args.num_revisions = 0 if args.eval else 3
    if (args.revisions_of_right or 0) > args.num_revisions:
        parser.error("--revisions_of_right is more than --num_revisions; lower it")
    if args.eval or not args.num_revisions:
        args.target = 0
    return args


def collect(args, ranks, judge):
    """Steps 1 to 5 for all problems, with all ranks; with --eval the first four, and their measures."""
    tokenizer = verify.load_tokenizer(args.model)
    phrases = verify.phrases_of(args.model, args.phrases)
    problems, dropped = run.from_rank_0(
        verify.load_problems, args.data, judge, args.range, args.max_problems)
    prompts = [verify.chat_ids(tokenizer, problem) for problem in problems]
    longest = check_lengths(args.model, problems, prompts, args.max_tokens)
    keeps = args.num_revisions and not args.eval
    if run.open_out(args, ranks, FREE, "responses.jsonl", problems, target=args.target):
        return run.leave()
    if ranks.rank == 0:  # a killed run may have left half a line
        merge(args.out, problems)
    run.begin(args, ranks)

    dtype = getattr(torch, args.dtype or ("bfloat16" if ranks.device.type == "cuda" else "float32"))
    p_r = max(len(verify.control_ids(tokenizer, correct, phrases)) for correct in (False, True))
    max_len = longest + args.max_tokens + (p_r + args.max_tokens if args.num_revisions else 0)
    sampler = make_sampler(args.engine, args.model, tokenizer, max_len, ranks.device, dtype, args.vllm_memory)
    run.say(f"{len(problems)} problems ({sum(dropped.values())} dropped), judged by {args.mode}, "
            f"{ranks.world} rank(s) on {ranks.device.type}, {type(sampler).__name__} {dtype}, "
            f"P_r {'|'.join(phrases)}")

    dist.barrier()  # the first engine that is up would take what the others could do
    done = read_rows(args.out)  # what an earlier run of the same command has finished
    for row in done.values():  # on each rank, as long as it runs: nothing asks for these
        row.pop("y_revised", None), row.pop("y_revised_tokens", None)
    file = open(os.path.join(args.out, f"responses.rank{ranks.rank}.jsonl"), "a", encoding="utf-8")
    progress = Progress(ranks, len(problems), args.target if keeps else None)
    waiting, judging = deque(), set()  # for serve: requests, whose keys get the Samples; verdicts to come
    stopped = lambda: ranks.store.add("stop", len(caught)) > 0  # as soon as any rank has had a signal

    async def work():
        """One of many alike: problem after problem, until none is left or the target is reached."""
        while not args.target or ranks.store.add("kept", 0) < args.target:
            i = ranks.store.add("taken", 1) - 1
            if i >= len(problems):
                return
            await asyncio.gather(*(attempt(problems[i], prompts[i], k) for k in range(args.num_responses)))
            ranks.store.add("ended", 1)

    async def attempt(problem, x, k):
        """Steps 1 to 4 for the k-th y_init of a problem; counts its right revisions, for --target."""
        init = await respond("y_init", problem, x, {
            "kind": "init", "id": problem.id, "problem": problem.problem,
            "answer": None if problem.mode == "code" else problem.answer,  # there: tests, which may be large
            "mode": problem.mode, "instruction": problem.instruction, "sample": k})
        r = init["y_init_correct"]
        if init["no_room"]:
            return
        ids, told = seen(x, init), {"kind": "revision", "id": problem.id, "sample": k, "p_r": phrases[r]}
        count = args.num_revisions
        if r and args.revisions_of_right is not None:
            count = args.revisions_of_right
        revised = await asyncio.gather(*(respond("y_revised", problem, ids, {**told, "revision": n})
                                         for n in range(count)))
        ranks.store.add("kept", sum(row["y_revised_correct"] for row in revised))

    def seen(x, init):
        """What y_revised is sampled after."""
        return verify.revision_ids(tokenizer, x, init["y_init_tokens"], init["y_init_correct"], phrases)

    async def respond(y, problem, ids, row):
        """`row` with a response after `ids`, sampled, judged and written, now or by an earlier run."""
        if row_key(row) in done:
            progress.judged(y, done[row_key(row)])
            return done[row_key(row)]
        sampled = asyncio.get_running_loop().create_future()
        waiting.append(Request(sampled, ids, request_seed(args.seed, *row_key(row))))
        sample = await sampled
        row[y] = tokenizer.decode(sample.ids, skip_special_tokens=True)
        verdict = await judged(problem, row[y])
        row |= {f"{y}_correct": verdict.correct, f"{y}_verdict": verdict.reason,
                f"{y}_tokens": sample.ids, TRUNCATED[y]: sample.truncated}
        if y == "y_init":
            text = first_answer(row[y], phrases)[0]
            row["first_correct"] = (verdict if text == row[y] else await judged(problem, text)).correct
            row["no_room"] = bool(args.num_revisions) and len(seen(ids, row)) >= sampler.max_len
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()
        progress.judged(y, row, len(sample.ids))
        return row

    async def judged(problem, text):
        future = asyncio.wrap_future(judge.submit(problem, text))
        judging.add(future)
        future.add_done_callback(judging.discard)
        return await future

    caught, started = run.catch_signals(), time.perf_counter()
    workers = [work() for _ in range(min(sampler.max_seqs, math.ceil(len(problems) / ranks.world)))]
    tokens = serve(workers, waiting, judging, stopped, sampler, max_tokens=args.max_tokens,
                   temperature=args.temperature, top_p=args.top_p, logprobs=False)
    progress.show("\n")
    file.close()
    tokens_of = [None] * ranks.world
    dist.all_gather_object(tokens_of, tokens)
    seconds = time.perf_counter() - started  # until the last rank is done

    if stopped():
        run.say(f"stopped by a signal: what is judged is in {args.out}; the same command goes on there")
    elif ranks.rank == 0:
        rows, kept = merge(args.out, problems), None
        if keeps:
            kept = [row for row in tuples(rows) if row["y_revised_correct"]][: args.target or None]
            write_rows(os.path.join(args.out, "d_revision.jsonl"), kept)
        found = {**summarise(rows, kept, args.num_responses, phrases), "seconds": round(seconds, 1),
                 "tokens_per_second": round(sum(tokens_of) / seconds, 1), "tokens_per_rank": tokens_of}
        run.finish(args, ranks, {"engine": type(sampler).__name__, "phrases": phrases,
                                 "problems_dropped": dict(dropped), **found})
        for name, value in found.items():
            print(f"{name:28s} {round(value, 4) if isinstance(value, float) else value}")
        if keeps:
            print(enough(found, args.target))
    close(sampler)


def main():
    args = parse_args()
    ranks = run.launch()
    with verify.make_judge(args) as judge:
        collect(args, ranks, judge)


if __name__ == "__main__":
    main()
