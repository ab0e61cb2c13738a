"""
Math verdicts and problems. The labelled pairs of verdicts.jsonl must be judged without an error; this table compares the
judge on them with math-verify as it comes and with string match (the same numbers are in the README):

    python tests/test_verify.py        # prints the table
"""
import functools
import json
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DATA = Path(__file__).parents[2] / "shared" / "data"
sys.path.insert(0, str(ROOT))

import verify  # noqa: E402
from conftest import seconds_of_children  # noqa: E402

TYPES = {"integer", "decimal", "percent", "fraction", "mixed number", "radical", "pi", "scientific", "interval", "set", "tuple",
         "several answers", "equation", "expression", "matrix", "units", "text", "multiple choice", "degrees", "money"}


def labelled():
    """[(type, gold, response, whether it is right), ...]"""
    rows = [json.loads(line) for line in (ROOT / "tests" / "verdicts.jsonl").read_text().splitlines()]
    return [(r["type"], r["gold"], r.get("response", f"So the answer is $\\boxed{{{r.get('answer')}}}$."), r["right"]) for r in rows]


def math(gold):
    return verify.Problem("p", "?", gold)


@pytest.fixture(scope="module")
def judge():
    with verify.Judge(workers=2, limit=5.0) as judge:
        yield judge


def boxed(answer):
    return f"\\boxed{{{answer}}}"


# ------------------------------------------------------------------------------------------------------ labelled pairs


def test_the_labelled_set_covers_every_type():
    rights = defaultdict(set)
    for kind, _, _, right in labelled():
        rights[kind].add(right)
    assert len(labelled()) >= 450
    assert all(rights[kind] == {True, False} for kind in TYPES)
    assert len({(gold, response) for _, gold, response, _ in labelled()}) == len(labelled())


def test_no_error_on_the_labelled_set(judge):
    rows = labelled()
    assert not any(judge.parse_golds([math(gold) for _, gold, _, _ in rows]))
    verdicts = judge([math(gold) for _, gold, _, _ in rows], [response for _, _, response, _ in rows])
    assert [(row, v.reason) for row, v in zip(rows, verdicts) if v.correct != row[3]] == []
    assert {v.reason for v in verdicts} == {"right", "wrong", "no answer"}


def table(judge):
    """The README's table: per judge, its errors on the labelled pairs: wrong called right, right called wrong."""
    import math_verify
    rows = labelled()
    ours = judge([math(gold) for _, gold, _, _ in rows], [response for _, _, response, _ in rows])
    judges = {"this judge": [v.correct for v in ours], "math-verify, default extraction": [], "math-verify, gold in a box": [],
              "exact match of the last box": []}
    parse = functools.cache(math_verify.parse)
    for _, gold, response, _ in rows:
        judges["math-verify, default extraction"].append(bool(math_verify.verify(parse(gold), parse(response))))
        judges["math-verify, gold in a box"].append(bool(math_verify.verify(parse(boxed(gold)), parse(response))))
        judges["exact match of the last box"].append(verify.last_boxed(response) == gold)
    lines = [f"| on {len(rows)} pairs, {sum(r[3] for r in rows)} right | wrong called right | right called wrong | agreement |",
             "|---|---|---|---|"]
    for name, said in judges.items():
        lucky = sum(s and not row[3] for s, row in zip(said, rows))
        missed = sum(not s and row[3] for s, row in zip(said, rows))
        lines.append(f"| {name} | {lucky} | {missed} | {1 - (lucky + missed) / len(rows):.1%} |")
    return "\n".join(lines)


def test_the_table_shows_a_difference(judge):
    lines = table(judge).splitlines()
    assert lines[2].startswith("| this judge | 0 | 0 | 100.0% |")
    assert all(" 100.0% |" not in line for line in lines[3:])


# ------------------------------------------------------------------------------------------------ what broke for others


@pytest.mark.parametrize("gold, answer", [
    ("\\text{Monday}", "Dynamo"), ("\\text{listen}", "silent"), ("cat", "act"),  # words are not products of letters
    ("3", "y = 4"), ("x = 3", "y = 3"), ("3", "x + 1 = 3"), ("5", "x > 5"),  # any equation is not any value
    ("4.5e33", "4.5e \\cdot 33"), ("0.000000001", "0.000000002"), ("6.62 \\times 10^{-34}", "0"),
    ("(1,2)", "(2,1)"), ("(1,2)", "[1,2]"), ("69", "69,84"), ("A", "A or B"), ("A", "A or B or C or D"),
    ("5", "\\text{not } 5"), ("2^{200}", "2^{200}+1"), ("100!", "100!+1"), ("A", "\\{\\}"),
    ("x^{200}+1", "x^{200}"), ("x", "\\sqrt{x^2}"), ("1", "\\text{all but } 1"), ("2", "2 \\text{ or } 3"),
])
def test_not_equal_in_either_direction(gold, answer):
    assert verify.right_answer(gold, answer) == verify.right_answer(answer, gold) == "wrong"


@pytest.mark.parametrize("gold", ["", "\\frac{}{", "nan", "???", "\\text{nan}", "a proof that " + "very " * 40 + "long", "{", "\\",
                                  "np.arcsin(10/13)", "\\text{}", "1 2 3 = ="])
def test_gold_that_cannot_be_parsed_is_dropped(judge, gold):
    assert judge.parse_golds([math(gold)]) == ["gold cannot be parsed"]
    assert verify.right_answer(gold, "5") == "wrong"


@pytest.mark.parametrize("gold, kind", [
    ("10{,}000", "number"), ("3\\frac12", "number"), ("\\sqrt 2", "expression"), ("(1,2)", "tuple"), ("[1,2)", "interval"),
    ("\\{1,2\\}", "set"), ("1, 2", "list"), ("x=3", "number"), ("x+y=3", "equation"), ("\\text{yes}", "text"), ("(B)", "choice"),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "matrix"), ("(0,1) \\cup [2,3]", "union")])
def test_kind_of_a_gold_answer(gold, kind):
    assert verify.gold_kind(gold) == kind


@pytest.fixture(scope="module")
def data_sets(judge):
    """{name: (problems, why others were dropped)} of real data sets."""
    files = sorted(DATA.glob("*.jsonl"))
    if not files:
        pytest.skip(f"no data sets in {DATA}")
    return {path.stem: verify.load_problems(str(path), judge, range_=":700") for path in files}


def test_every_kept_gold_answer_is_right_to_itself(judge, data_sets):
    """Also written as text around the box, in another order of spaces: real answers of five data sets."""
    for problems, dropped in data_sets.values():
        verdicts = judge(problems, [f"so\n\\[ \\boxed{{ {p.answer} }} \\]\n" for p in problems])
        assert [(p.answer, v.reason) for p, v in zip(problems, verdicts) if not v.correct] == []
        assert sum(dropped.values()) <= 0.02 * (len(problems) + sum(dropped.values()))


def test_real_gold_answers_with_one_thing_changed_are_wrong(judge, data_sets):
    """A digit, a sign or one of several answers of OlympiadBench and Minerva; and other problems' answers."""
    golds = [p.answer for name in ("olympiadbench", "minerva_math") for p in data_sets[name][0][:200]]
    rng, pairs = random.Random(0), []
    for gold in golds:
        if digits := list(re.finditer(r"\d", gold)):
            digit = rng.choice(digits)
            other = rng.choice([d for d in "123456789" if d != digit[0]])
            pairs.append((gold, gold[: digit.start()] + other + gold[digit.end():]))
        pairs += [(gold, gold[: gold.rindex(",")])] if "," in gold else []
        pairs += [(gold, gold.replace("+", "-", 1))] if "+" in gold else []
        pairs += [(gold, other) for other in [rng.choice(golds)] if other.strip("$") != gold.strip("$")]
    verdicts = judge([math(gold) for gold, _ in pairs], [boxed(answer) for _, answer in pairs])
    same_number = [p for p, v in zip(pairs, verdicts) if v.correct and p[1] in golds]  # two problems may share an answer
    assert [p for p, v in zip(pairs, verdicts) if v.correct and p not in same_number] == []
    assert len(pairs) > 800 and len(same_number) < 0.02 * len(pairs)


# ---------------------------------------------------------------------------------------------------------- the last box


@pytest.mark.parametrize("text, inside", [
    ("\\boxed{5}", "5"), ("\\boxed{1} \\boxed{2}", "2"), ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"), ("\\fbox{7}", "7"),
    ("\\boxed{1} \\boxed{2", "1"), ("\\boxed{\\{1\\}}", "\\{1\\}"), ("\\boxed{\\boxed{3}}", "3"), ("\\boxed {4}", "4"),
    ("}}} \\boxed{6}", "6"), ("{ \\boxed{8}", "8"), ("\\boxed{}", ""), ("no box 5", None), ("\\boxed 5", None), ("", None),
    ("\\boxed{a\\}", None), ("\\boxed{9\\\\}", "9\\\\")])
def test_last_boxed(text, inside):
    assert verify.last_boxed(text) == inside


def test_last_boxed_is_linear():
    started = time.time()
    assert verify.last_boxed("\\boxed{" * 200_000) is None
    assert verify.last_boxed("\\boxed{5}" * 200_000) == "5"
    assert time.time() - started < 5


# ------------------------------------------------------------------------------------------------------------ hard inputs

HARD = {
    "tower": "9^{9^{9^{9}}}", "million digits": "10^{1000000}", "a million digits and one": "10^{1000000}+1",
    "exponent of many digits": "7^{" + "9" * 900 + "}", "nested fractions": "\\frac{1}{1+" * 1000 + "1" + "}" * 1000,
    "plain nested fractions": "\\frac{1}{" * 1000 + "2" + "}" * 1000, "100 kB": "9" * 100_000, "nan": "nan", "inf": "inf",
    "infinity minus infinity": "\\infty - \\infty", "parentheses": "(" * 3000 + ")" * 3000, "commas": "1," * 4000 + "1",
    "factorial": "100000000!", "power of a sum": "(x+1)^{1000000}", "binomial": "\\binom{1000000}{500000}",
    "sum": "\\sum_{n=1}^{10^{9}} \\frac{1}{n}", "roots": "\\sqrt{" * 300 + "2" + "}" * 300, "open": "\\boxed{" * 3000,
    "exponentials": "e^{e^{e^{e^{5}}}}", "factorials": "5" + "!" * 9, "text in text": "\\text{" * 800 + "a" + "}" * 800,
    "zero divided": "\\frac{0}{0}", "null byte": "5\0", "surrogate": "5\ud800",
}


@pytest.mark.parametrize("gold", ["5", "\\frac{x+1}{2}"])
def test_hard_answers_are_wrong_within_the_limit_and_the_pool_goes_on(gold):
    with verify.Judge(workers=2, limit=0.5) as judge:
        judge([math("1")] * 2, ["\\boxed{2}", "\\boxed{3}"])
        started = time.time()
        verdicts = dict(zip(HARD, judge([math(gold)] * len(HARD), [boxed(h) for h in HARD.values()])))
        took = time.time() - started
        assert {name: v for name, v in verdicts.items() if v.correct} == {}
        assert {v.reason for v in verdicts.values()} <= {"wrong", "timeout", "crash", "no answer"}
        assert verdicts["100 kB"].reason == "wrong" and (gold != "5" or verdicts["tower"].reason in ("timeout", "crash"))
        killed = sum(v.reason in ("timeout", "crash") for v in verdicts.values())
        assert took < killed * 4.0 + 10  # a limit and the start of a new worker each, on two workers
        assert judge([math("5")], ["\\boxed{5}"]) == [verify.Verdict(True, "right")]


def test_hard_gold_answers_are_dropped():
    with verify.Judge(workers=2, limit=1.0) as judge:
        assert judge.parse_golds([math("\\int_0^1 9^{9^{9^{9^{9}}}}"), math("5")])[1] is None


def test_a_worker_out_of_memory_is_a_crash():
    with verify.Judge(workers=1, limit=30.0, memory=0.5) as judge:
        assert judge([math("5")], ["\\boxed{\\gcd(2^{2^{33}}, 3)}"]) == [verify.Verdict(False, "crash")]
        assert judge([math("5")], ["\\boxed{5}"])[0].correct


def test_a_killed_worker_is_a_crash_and_is_replaced():
    with verify.Judge(workers=1) as judge:
        judge([math("5")], ["\\boxed{5}"])
        for process in list(judge.idle):
            process.kill()
        assert judge([math("5")], ["\\boxed{6}"]) == [verify.Verdict(False, "crash")]
        assert judge([math("5")], ["\\boxed{7}"]) == [verify.Verdict(False, "wrong")]


def test_from_any_thread_and_in_order(judge):
    golds = [str(i) for i in range(60)]
    found = {}

    def ask(name):
        found[name] = [v.correct for v in judge(list(map(math, golds)), [boxed(i if i % 3 else i + 1) for i in range(60)])]

    threads = [threading.Thread(target=ask, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {name: [bool(i % 3) for i in range(60)] for name in "abc"}


def test_closing_leaves_no_worker():
    with verify.Judge(workers=2) as judge:
        judge([math("5")], ["\\boxed{5}"])
        workers = list(judge.idle)
        assert len(workers) == 2
    assert all(worker.poll() is not None for worker in workers)


# -------------------------------------------------------------------------------------------------------- problems, files


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def script(*args):
    done = subprocess.run([sys.executable, str(ROOT / "verify.py"), *map(str, args)], capture_output=True, text=True, timeout=100)
    return done.returncode, done.stdout, done.stderr


GOOD = '{"id": "a", "problem": "1+1?", "answer": "2"}\n'


@pytest.mark.parametrize("name, content, says", [
    ("d.jsonl", "nonsense\n", "d.jsonl:1: not JSON"), ("d.jsonl", GOOD + '{"id": "b", "prob', "d.jsonl:2: not JSON"),
    ("d.jsonl", GOOD + '{"id": "b", "prob', "torn"), ("d.jsonl", "", "it is empty"), ("d.jsonl", "\n\n", "it is empty"),
    ("d.jsonl", GOOD.encode() + '{"problem": "é"}\n'.encode("latin-1"), "d.jsonl:2: not UTF-8"),
    ("d.jsonl", '{"id": "a", "answer": "2"}\n', "d.jsonl:1: no problem text; one of the fields problem, question, prompt"),
    ("d.jsonl", '{"problem": 5, "answer": "2"}\n', "d.jsonl:1: field 'problem' should be text, found int"),
    ("d.jsonl", "[1]\n", "d.jsonl:1: a JSON object is wanted, found list"), ("d.jsonl", "[" * 100_000, "d.jsonl:1: nested too deeply"),
    ("d.jsonl", GOOD + GOOD.replace("+1", "+2"), "d.jsonl:2: id 'a' stands already at"), ("d.json", "{}", "a list of rows is wanted, found dict"),
    ("d.json", "[1]", "row 0: an object is wanted, found int"), ("d.json", "[", "not a JSON file"), ("d.txt", "x", "is not a .jsonl"),
    ("d.parquet", "PAR?", "d.parquet: not a parquet file"),
    ("d.jsonl", '{"problem": "?"}\n', "dropped: {'no answer': 1}"),
    ("d.jsonl", '{"problem": "?", "answer": {"x": 1}}\n', "field 'answer' is dict"),
    ("d.jsonl", '{"problem": "?", "answer": "((("}\n', "gold cannot be parsed"),
])
def test_a_bad_file_gives_one_clear_line(judge, tmp_path, name, content, says):
    with pytest.raises(SystemExit) as e:
        verify.load_problems(write(tmp_path / name, content), judge)
    assert says in str(e.value) and name in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.parquet"])
def test_ranges_share_no_problem(judge, tmp_path, name):
    """A row for each of several solutions, under the same id or another: a problem counts where it first stands, whatever the range."""
    rows = [{"id": f"p{i // 3}" if i % 3 < 2 else f"q{i}", "problem": f"{i // 3}+1", "answer": "2", "solution": str(i)} for i in range(12)]
    path = str(tmp_path / name)
    if name == "d.parquet":
        import pyarrow
        import pyarrow.parquet
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        write(tmp_path / name, json.dumps(rows) if name == "d.json" else "".join(json.dumps(r) + "\n" for r in rows))
    ids = lambda range_: ([p.id for p in verify.load_problems(path, judge, range_=range_)[0]],
                          dict(verify.load_problems(path, judge, range_=range_)[1]))
    assert ids(None) == (["p0", "p1", "p2", "p3"], {"same problem as in an earlier row": 8})
    assert ids("0:5") == (["p0", "p1"], {"same problem as in an earlier row": 3})
    assert ids("5:12") == (["p2", "p3"], {"same problem as in an earlier row": 5})
    for range_ in ("12:", "20:30"):
        with pytest.raises(SystemExit, match="empty: the data has 12 rows"):
            verify.load_problems(path, judge, range_=range_)


def test_a_folder_is_no_file(judge, tmp_path):
    (tmp_path / "d.jsonl").mkdir()
    with pytest.raises(SystemExit, match="d.jsonl is a folder"):
        verify.load_problems(str(tmp_path / "d.jsonl"), judge)
    with pytest.raises(SystemExit, match="not there"):
        verify.load_problems(str(tmp_path / "e.jsonl"), judge)


def row(**fields):
    return json.dumps({"id": "a", "y_init": "\\boxed{2}", "y_init_correct": True, "revision": None, **fields}) + "\n"


@pytest.mark.parametrize("content, says", [
    ("", "no response to a problem of --data"), (row(id="zzz"), "1 ids that are not in the data"),
    (row() + row()[:30], "r.jsonl:2: not JSON"), (row(y_init=5), "r.jsonl:1: field 'y_init' should be str, found int"),
    (row(y_init_correct="yes"), "r.jsonl:1: field 'y_init_correct' should be bool, found str"),
    (row(revision=0), "r.jsonl:1: field 'y_revised' should be str, it is missing"),
    ('{"y_init": "", "y_init_correct": true}\n', "r.jsonl:1: field 'id' should be str, it is missing"),
    ('"x"\n', "r.jsonl:1: a JSON object is wanted"), ("é".encode("latin-1"), "r.jsonl:1: not UTF-8"),
])
def test_bad_responses_give_one_clear_line(judge, tmp_path, content, says):
    with pytest.raises(SystemExit) as e:
        verify.judge_again(write(tmp_path / "r.jsonl", content), {"a": math("2")}, judge)
    assert says in str(e.value) and "\n" not in str(e.value)


def test_the_script_reports_and_judges_again(tmp_path):
    data = write(tmp_path / "d.jsonl", GOOD + '{"id": "b", "problem": "?", "answer": "(1,2)"}\n{"id": "c", "problem": "??"}\n'
                 '{"id": "d", "problem": "???", "answer": "((("}\n')
    responses = write(tmp_path / "r.jsonl", row() + row(y_init="\\boxed{3}") + row(id="zzz")
                      + row(id="b", revision=0, y_revised="\\boxed{(1, 2)}", y_revised_correct=False))
    code, out, err = script("--data", data, "--responses", responses)
    assert code == 0, err
    for line in ("2 kept, 2 dropped", "1  kept     number", "1  kept     tuple", "1  dropped  no answer",
                 "1  dropped  gold cannot be parsed", "r.jsonl:2: y_init of a: right -> wrong",
                 "r.jsonl:4: y_revised of b: wrong -> right", "3 judged (2 right, 1 wrong), 2 changed, 1 ids not in the data"):
        assert line in out
    code, out, err = script("--data", tmp_path / "nothing.jsonl")
    assert code == 1 and err.count("\n") == 1 and err.startswith("error: ")


@pytest.mark.parametrize("fields, answer", [
    ({"answer": "7"}, "7"), ({"answer": "so 3+4=7\n#### 7"}, "7"), ({"solution": "thus \\boxed{7} and \\boxed{8}"}, "8"),
    ({"final_answer": ["1", "2"]}, "1, 2"), ({"answer": 7}, "7"), ({"answer": 0.5}, "0.5"), ({"answer": None, "output": "7"}, "7"),
    ({"answer": "", "solution": "\\boxed{7}"}, "7")])
def test_gold_answers_of_several_data_sets(fields, answer):
    assert verify.gold_answer(fields) == (answer, None)


def test_start_up_of_the_pool():
    """Under 2 s of each worker's own time, for other tests run meanwhile; tests/bench_verify.py looks at the clock."""
    before = seconds_of_children()
    with verify.Judge(workers=2) as judge:
        judge([math("5")], ["\\boxed{5}"])
    assert 0 < seconds_of_children() - before < 2 * 2


def test_counts_of_the_labelled_set():
    """The README names these numbers."""
    assert len(labelled()) == 905 and Counter(r[3] for r in labelled())[True] == 436


if __name__ == "__main__":
    with verify.Judge() as the_judge:
        print(table(the_judge))
