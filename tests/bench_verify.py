"""
Speed of verdicts, as ratios within one run, since machines differ.

    python tests/bench_verify.py [--workers 2] [--pairs 400] [--programs 60]

alone   microseconds a verdict of verifiers/math.py, of raw math-verify and of string match, in this process, on pairs as
        of GSM8K; and its agreement on the labelled pairs is printed by tests/test_math.py.
math    verdicts per second of the Judge / (those of raw math-verify in one process x workers), on distinct pairs; at
        least 0.9 is wanted. `mixed` is what data sets ask (mostly numbers); `expressions` are the slow ones alone.
pool    seconds until the first verdict; less than 2 is wanted.
code    seconds of one run in the sandbox / those of a bare subprocess; programs judged per second.
"""
import argparse
import logging
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import verify  # noqa: E402


def expressions(rng):
    """(gold, right or wrong answer) that only algebra can compare."""
    a, b, c, d = (rng.randint(2, 99) for _ in range(4))
    return rng.choice([
        (f"{a}\\sqrt{{{b}}}", f"\\sqrt{{{a * a * b}}}"), (f"\\frac{{{a}\\pi}}{{{b}}}", f"{a}\\pi/{b}"),
        (f"x^2+{a + b}x+{a * b}", f"(x+{a})(x+{b})"), (f"\\frac{{{a}+\\sqrt{{{b}}}}}{{{c}}}", f"\\frac{{{a}-\\sqrt{{{b}}}}}{{{c}}}"),
        (f"y={a}x+{b}", f"y - {b} = {a}x"), (f"\\log_{{{a}}} {b}", f"\\frac{{\\ln {b}}}{{\\ln {a}}}"),
        (f"{a}^{{n}}+{b}", f"{b}+{a}^n"), (f"(\\sqrt{{{a}}},{b},{c})", f"({d},{b},{c})")])


def mixed(rng):
    """(gold, right or wrong answer): two in three are numbers, as in the usual data sets."""
    a, b, c = (rng.randint(2, 10**5) for _ in range(3))
    return rng.choice([
        (str(a), str(a)), (str(a), f"{a:,}".replace(",", "{,}")), (str(a), f"x = {b}"), (f"\\frac{{{a}}}{{{b}}}", f"{a}/{b}"),
        (f"{a}.5", f"{a}\\frac{{1}}{{2}}"), (str(a), f"{a}\\text{{ cm}}"), (f"({a},{b})", f"({a}, {b})"), (f"{a}, {b}, {c}", f"{c}, {a}, {b}"),
        expressions(rng), expressions(rng)])


def numbers(rng):
    """(gold, right or wrong answer) as of GSM8K."""
    a, b = (rng.randint(2, 10**4) for _ in range(2))
    return rng.choice([(str(a), str(a)), (str(a), str(a)), (str(a), str(b)), (str(a), f"\\${a:,}"), (str(a), f"{a}.00"),
                       (str(a), f"{a}\\text{{ dollars}}"), (str(a), f"{a}\\%")])


def bench_alone(pairs):
    import math_verify
    judge, last_boxed = verify.load_verifier("math").judge, verify.load_verifier("math").last_boxed
    rng = random.Random(0)
    some = [(gold, f"So it is $\\boxed{{{answer}}}$.") for gold, answer in (numbers(rng) for _ in range(pairs))]
    judges = {
        "this judge": lambda gold, response: judge(gold, response, None),
        "math-verify": lambda gold, response: math_verify.verify(
            math_verify.parse(f"\\boxed{{{gold}}}", parsing_timeout=None), math_verify.parse(response, parsing_timeout=None),
            timeout_seconds=None),
        "exact match": lambda gold, response: last_boxed(response) == gold}
    for name, said in judges.items():
        said("2x", "\\boxed{x+x}")  # makes the parser's tables
        started = time.time()
        for gold, response in some:
            said(gold, response)
        print(f"alone, {name:12s} {1e6 * (time.time() - started) / len(some):7.0f} us a verdict", flush=True)


def bench_math(kind, pairs, workers):
    import math_verify
    rng = random.Random(0)
    distinct = list(dict.fromkeys(kind(rng) for _ in range(20 * pairs)))
    # The parser's tables grow with what it has seen, in each process: both sides are warmed up on other pairs first.
    warm, distinct = distinct[: 100 * workers], distinct[100 * workers:][:pairs]

    def raw(some):
        started = time.time()
        for gold, answer in some:
            math_verify.verify(math_verify.parse(f"\\boxed{{{gold}}}", parsing_timeout=None),
                               math_verify.parse(f"So it is $\\boxed{{{answer}}}$.", parsing_timeout=None), timeout_seconds=None)
        return time.time() - started

    def ours(judge, some):
        started = time.time()
        judge([verify.Problem("", "", gold) for gold, _ in some], [f"So it is $\\boxed{{{a}}}$." for _, a in some])
        return time.time() - started

    seconds = [0.0, 0.0]
    with verify.Judge("math", workers=workers) as judge:
        raw(warm[:100])
        ours(judge, warm)
        for i in range(4):  # in turns, since the machine may have other things to do
            seconds[0] += raw(distinct[i::4])
            seconds[1] += ours(judge, distinct[i::4])
    a, b = (len(distinct) / s for s in seconds)
    print(f"math, {kind.__name__:11s}  {len(distinct)} pairs  raw math-verify {a:7.1f}/s in one process   judge {b:7.1f}/s with "
          f"{workers} workers   ratio {b / (a * workers):.2f}", flush=True)


def bench_start(workers):
    started = time.time()
    with verify.Judge("math", workers=workers) as judge:
        judge([verify.Problem("", "", "x")] * workers, ["\\boxed{y}"] * workers)
        print(f"pool of {workers} workers: first verdicts after {time.time() - started:.2f} s", flush=True)


def bench_code(programs, workers):
    source = "print(sum(map(int, input().split())))\n"
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "main.py")
        Path(path).write_text(source)
        started = time.time()
        for _ in range(programs):
            subprocess.run(["/usr/bin/python3", "-I", path], input=b"1 2\n", stdout=subprocess.PIPE, check=True)
        bare = (time.time() - started) / programs
    started, limits = time.time(), {"seconds": 5.0, "memory": 1.0, "sandbox": True}
    for _ in range(programs):
        ended = verify.load_verifier("code").run_program("python3 -I main.py", {"main.py": source.encode()}, "1 2\n", limits, 5.0)
        assert ended == ("ok", b"3\n")
    inside = (time.time() - started) / programs
    print(f"sandbox: {1000 * inside:.1f} ms a run, bare subprocess {1000 * bare:.1f} ms   ratio {inside / bare:.2f}", flush=True)
    tests = {"cases": [["1 2\n", "3\n"], ["4 5\n", "9\n"]], "entry_point": None, "seconds": None, "tolerance": None}
    problem = verify.Problem("", "", tests, "code")
    cpp = "#include <iostream>\nint main() { int a, b; std::cin >> a >> b; std::cout << a + b; }\n"
    with verify.Judge("code", workers=workers) as judge:
        judge([problem] * workers, ["no program"] * workers)
        for name, text, count in (("python", source, programs), ("cpp", cpp, programs // 4)):
            started = time.time()
            verdicts = judge([problem] * count, [f"```{name}\n{text}```"] * count)
            assert all(v.correct for v in verdicts)
            print(f"programs judged, {name}, 2 tests each, {workers} workers: {count / (time.time() - started):.1f}/s", flush=True)


def main():
    parser = argparse.ArgumentParser(description="Speed of verdicts.")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=400)
    parser.add_argument("--programs", type=int, default=60)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    bench_alone(args.pairs)
    bench_start(args.workers)
    bench_math(mixed, args.pairs, args.workers)
    bench_math(expressions, args.pairs, args.workers)
    verify.load_verifier("code").check({"seconds": 5.0, "memory": 1.0, "sandbox": True})
    bench_code(args.programs, args.workers)


if __name__ == "__main__":
    main()
