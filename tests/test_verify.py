"""Loading problems, the pool that gives verdicts and its limits, a verifier of one's own, phrases, the run's folder."""
import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from test_math import HARD

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import verify  # noqa: E402
from common import run  # noqa: E402
from common.sampler import check_lengths  # noqa: E402
from conftest import seconds_of_children, two_cores  # noqa: E402
from verifiers.pool import descendants  # noqa: E402


def math(gold):
    return verify.Problem("p", "?", gold)


@pytest.fixture(scope="module")
def judge():
    with verify.Judge(workers=2, limit=5.0) as judge:
        yield judge


def boxed(answer):
    return f"\\boxed{{{answer}}}"


# ------------------------------------------------------------------------------------------------------------ hard inputs


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
        golds = [judge.gold({"answer": answer}) for answer in ("\\int_0^1 9^{9^{9^{9^{9}}}}", "5")]
        assert golds[0][0] is None and golds[0][1].startswith("gold") and golds[1][1] is None


def test_a_worker_out_of_memory_is_a_crash():
    with verify.Judge(workers=1, limit=30.0, memory=0.5) as judge:
        assert judge([math("5")], ["\\boxed{\\gcd(2^{2^{33}}, 3)}"]) == [verify.Verdict(False, "crash")]
        assert judge([math("5")], ["\\boxed{5}"])[0].correct


@pytest.mark.parametrize("gib", [3, 30])
def test_a_limit_of_memory_that_is_there_already(gib, tmp_path):
    """As batch systems set it (`ulimit -v`): a worker's own is no higher."""
    (tmp_path / "d.jsonl").write_text('{"problem": "?", "answer": "5"}\n')
    done = subprocess.run(["prlimit", f"--as={gib << 30}:{gib << 30}", sys.executable, ROOT / "verify.py", "--data", tmp_path / "d.jsonl"],
                          capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "") and "1 kept" in done.stdout


def test_closing_waits_for_no_queue():
    """After an error nobody asks for the verdicts that are still to come."""
    judge = verify.Judge(workers=1)
    asked = [judge.submit(math("5"), "\\boxed{5}") for _ in range(2000)]
    judge.close()
    assert sum(future.cancelled() for future in asked) > 1000 and all(future.done() for future in asked)


def test_an_error_stops_the_workers_that_are_asked(tmp_path, capfd):
    """They have started a process each; nothing of them stays, nothing is said of it, and nobody waits."""
    (tmp_path / "slow.py").write_text(
        "import subprocess\nINSTRUCTION = ''\ngold = lambda row: ('5', None)\n"
        "judge = lambda *_: subprocess.run(['sleep', '600']) and 'wrong'\n")
    with pytest.raises(ZeroDivisionError), verify.Judge(str(tmp_path / "slow.py"), workers=2, limit=1000.0) as judge:
        asked, pids = [judge.submit(math("5"), "") for _ in range(3)], []
        deadline = time.monotonic() + 60
        while len(pids) < 4 and time.monotonic() < deadline:
            pids = [pid for worker in judge.workers.all.copy() for pid in descendants(worker.pid)]
        1 / 0
    assert asked[2].cancelled() and [future.result(60) for future in asked[:2]] == [verify.Verdict(False, "crash")] * 2
    state = lambda pid: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    assert len(pids) == 4 and {state(pid) for pid in pids if os.path.exists(f"/proc/{pid}")} <= {"Z"} and not judge.workers.all
    assert capfd.readouterr().err == ""


def test_a_worker_that_is_stopped_does_not_outlive_its_parent(tmp_path):
    """A worker is stopped before it is killed, so that it starts no other process meanwhile: the parent may be killed in between."""
    done = subprocess.run([sys.executable, "-c", "import os, signal, verify\nworker, = verify.Judge().workers.idle\n"
                           "os.kill(worker.pid, signal.SIGSTOP)\nprint(worker.pid, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)"],
                          capture_output=True, text=True, cwd=ROOT)
    deadline = time.monotonic() + 20
    while (there := os.path.exists(f"/proc/{done.stdout.strip()}/exe")) and time.monotonic() < deadline:  # a zombie has none
        time.sleep(0.01)
    assert done.returncode == -9 and not there


def test_ctrl_c_before_a_run_begins_is_one_line(tmp_path):
    """While golds are asked for."""
    (tmp_path / "slow.py").write_text("import time\nINSTRUCTION = ''\njudge = lambda *_: 'wrong'\n"
                                      f"def gold(row):\n    open({str(tmp_path / 'asked')!r}, 'w')\n    time.sleep(600)\n")
    (tmp_path / "d.jsonl").write_text('{"problem": "?"}\n')
    script = subprocess.Popen([sys.executable, ROOT / "verify.py", "--data", tmp_path / "d.jsonl", "--mode", tmp_path / "slow.py",
                               "--judge_seconds", "1000"], stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "asked").exists() and script.poll() is None:
        time.sleep(0.01)
    script.send_signal(signal.SIGINT)
    assert script.communicate(timeout=60)[1] == "error: stopped by Ctrl-C; the same command starts again\n" and script.returncode


def test_a_file_that_cannot_be_read_is_one_line(tmp_path):
    (tmp_path / "d.jsonl").symlink_to("/proc/self/mem")
    done = subprocess.run([sys.executable, ROOT / "verify.py", "--data", tmp_path / "d.jsonl"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: [Errno 5]") and done.stderr.count("\n") == 1


def test_a_killed_worker_is_a_crash_and_is_replaced():
    with verify.Judge(workers=1) as judge:
        judge([math("5")], ["\\boxed{5}"])
        for process in list(judge.workers.idle):
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


def test_descriptors_over_1023():
    """A process that holds many: select() would refuse the pipe of a worker."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limits[1] < 2048:
        pytest.skip("no more than 2,048 descriptors are allowed here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (2048, limits[1]))
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        with verify.Judge("math", workers=1) as judge:
            assert judge([math("3")], ["\\boxed{3}"])[0].correct
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_run_that_goes_on_has_not_ended(tmp_path):
    """What it writes at its end goes: tuples of an earlier, smaller --target would look like its own."""
    for name in ("summary.json", "d_revision.jsonl", "responses.jsonl"):
        (tmp_path / name).write_text("{}\n")
    run.begin(argparse.Namespace(out=str(tmp_path)), run.Ranks(1, 2, "cpu", None))
    assert len(list(tmp_path.iterdir())) == 3  # that is rank 0's to do
    run.begin(argparse.Namespace(out=str(tmp_path)), run.Ranks(0, 2, "cpu", None))
    assert [path.name for path in tmp_path.iterdir()] == ["responses.jsonl"]


def test_closing_leaves_no_worker():
    with verify.Judge(workers=2) as judge:
        first = judge.workers.idle.pop()  # where none is idle, another starts
        judge([math("5")], ["\\boxed{5}"])
        workers = [first, *judge.workers.idle]
        judge.workers.idle.append(first)
        assert len(workers) == 2
    assert all(worker.poll() is not None for worker in workers)


def test_start_up_of_the_pool():
    """A worker takes little more than the import of math-verify; tests/bench_verify.py looks at the clock."""
    before = seconds_of_children()
    subprocess.run([sys.executable, "-c", "import math_verify"], check=True)
    alone = seconds_of_children() - before
    with verify.Judge(workers=2) as judge:
        judge([math("5")], ["\\boxed{5}"])
        assert len(judge.workers.idle) == 1
    assert 0 < seconds_of_children() - before - alone < max(2, 2 * alone)  # s


# ------------------------------------------------------------------------------------------------ a verifier of one's own

OWN = """
import os, time
INSTRUCTION = "Answer with one word."

def gold(row):
    print("what a verifier prints is no reply")
    return (row["word"], None) if "word" in row else (None, "no word")

def judge(gold, response, limits):
    if response == "input":
        return "right" if input() == gold else "wrong"
    if response == "slow":
        time.sleep(60)
    if response == "end":
        os._exit(3)
    if response == "memory":
        return "x" * 10**13
    if response == "no word":
        return True
    return "right" if gold in response.split() else f"wrong after {limits['seconds']} s"
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "one_word.py"
    path.write_text(OWN)
    return str(path)


def test_an_own_verifier(own, tmp_path, capfd):
    """Its words, its gold answers, its instruction; its crashes count, and the first is shown; time and memory have limits."""
    words = [{"id": i, "problem": f"{i}?", **({"word": word} if word else {})} for i, word in enumerate(["yes", "no", ""])]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in words))
    with verify.Judge(own, workers=2, limit=1.5) as judge:
        problems, dropped = verify.load_problems(str(tmp_path / "d.jsonl"), judge)
        assert [(p.id, p.problem, p.answer, p.mode) for p in problems] == [("0", "0?", "yes", own), ("1", "1?", "no", own)]
        assert dropped == {"no word": 1}
        want = {"yes it is": "right", "it is no": "wrong after 1.5 s", "slow": "timeout", "end": "crash", "memory": "crash",
                "input": "crash", "no word": "crash", "yes": "right"}
        verdicts = judge(problems[:1] * len(want), list(want))
        assert [v.reason for v in verdicts] == list(want.values())
        assert [v.correct for v in verdicts] == [reason == "right" for reason in want.values()]
    said = capfd.readouterr().err
    assert said.count("`judge` crashed") == 2 and said.count("Traceback") == 1 and said.count("ended without a word") == 1


CARELESS = """
import os, sys
INSTRUCTION = ""
def gold(row):
    return {"pair": ("5", None), "dict": {"answer": 5, "more": 1}, "two": "60", "none": (None, None)}[row["answer"]]
def judge(gold, response, limits):
    if response == "fork" and os.fork() == 0:
        return "wrong"
    if response == "exit":
        sys.exit("no key given")
    return "right"
"""


def test_a_careless_verifier(tmp_path, capfd):
    """A gold that is no pair is dropped and said; an exit is a crash that is shown; a fork left behind gives no verdict."""
    (tmp_path / "careless.py").write_text(CARELESS)
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"problem": a, "answer": a}) + "\n" for a in ("pair", "dict", "two", "none")))
    with verify.Judge(str(tmp_path / "careless.py"), workers=1) as judge:
        (problem,), dropped = verify.load_problems(str(tmp_path / "d.jsonl"), judge)
        assert problem.answer == "5" and dropped == {"gold: crash": 3}
        assert "(gold, None) or (None, why) is wanted" in capfd.readouterr().err
        verdicts = judge([problem] * 6, ["fork", "exit", "fork", "y", "exit", "y"])
        assert [v.reason for v in verdicts] == ["right", "crash", "right", "right", "crash", "right"]
    assert "no key given" in capfd.readouterr().err


@pytest.mark.parametrize("value, says", [("{'5': 1.0}[gold + '0']", "KeyError: '50'"), ("float('inf')", "inf is no number of seconds"),
                                         ("-1", "-1.0 is no number"), ("None", "TypeError")])
def test_a_limit_that_cannot_be_told(value, says, tmp_path, capfd):
    """`longest` raises, or gives no number: the verdict is a crash, shown once, and the run goes on."""
    (tmp_path / "unsure.py").write_text("INSTRUCTION = ''\ndef gold(row):\n    return '5', None\ndef judge(*_):\n    return 'right'\n"
                                        f"def longest(gold, limits):\n    return {value}\n")
    with verify.Judge(str(tmp_path / "unsure.py"), workers=1) as judge:
        assert judge([math("5")] * 3, ["y"] * 3) == [verify.Verdict(False, "crash")] * 3
    said = capfd.readouterr().err
    assert said.count("`longest` crashed, which counts as wrong") == 1 and said.count(says) == 1


def test_what_a_verifier_raises_is_shown(tmp_path, capfd):
    """The first traceback of `judge`, and of `gold`, which drops its row, with how many there were."""
    (tmp_path / "broken.py").write_text("INSTRUCTION = ''\ndef gold(row):\n    return row['key'], None\n"
                                        "def judge(gold, response, limits):\n    return 1 / 0\n")
    (tmp_path / "d.jsonl").write_text('{"problem": "a"}\n{"problem": "b", "key": [1, {"x": null}]}\n{"problem": "c"}\n')
    with verify.Judge(str(tmp_path / "broken.py"), workers=1) as judge:
        (problem,), dropped = verify.load_problems(str(tmp_path / "d.jsonl"), judge)
        assert problem.answer == [1, {"x": None}] and dropped == {"gold: crash": 2}
        said = capfd.readouterr().err
        assert "`gold` crashed, which drops the row" in said and "KeyError: 'key'" in said and said.count("Traceback") == 1
        assert judge([problem] * 5, ["y"] * 5) == [verify.Verdict(False, "crash")] * 5
        said = capfd.readouterr().err
        assert said.count("Traceback") == 1 and "ZeroDivisionError" in said and "broken.py" in said and "return 1 / 0" in said


@pytest.mark.parametrize("source, says", [
    (None, "No such file"), ("INSTRUCTION = 'x'\ndef gold(row): pass\n", "no attribute 'judge'"), ("x = 1\n", "no attribute 'INSTRUCTION'"),
    ("import nothing_of_that_name\n", "cannot be used: ModuleNotFoundError: No module named 'nothing_of_that_name'"),
    ("def gold(row:\n", "cannot be used: SyntaxError"), ("INSTRUCTION = 5\n", "INSTRUCTION is no text"),
    ("INSTRUCTION = ''\njudge = print\ngold = 5\n", "gold is no function"), ("INSTRUCTION = ''\ngold = judge = print\ncheck = 5\n", "check is no function")])
def test_a_verifier_that_cannot_be_used_gives_one_clear_line(tmp_path, source, says):
    if source is not None:
        (tmp_path / "mine.py").write_text(source)
    with pytest.raises(SystemExit) as e:
        verify.load_verifier(str(tmp_path / "mine.py"))
    assert says in str(e.value) and "mine.py" in str(e.value) and str(e.value).startswith("error: --mode ")
    assert "\n" not in str(e.value)


def test_a_judge_that_gives_no_word_is_seen_at_once(tmp_path, monkeypatch, capfd):
    (tmp_path / "bool.py").write_text("INSTRUCTION = ''\ngold = lambda row: (1, None)\njudge = lambda *_: False\n")
    (tmp_path / "d.jsonl").write_text('{"problem": "a"}\n')
    monkeypatch.setattr(sys, "argv", ["verify.py", "--mode", str(tmp_path / "bool.py"), "--data", str(tmp_path / "d.jsonl")])
    verify.main()
    said = capfd.readouterr()
    assert "`judge` returned False, a word is wanted" in said.err and "an empty response is judged: crash\n" in said.out


def test_a_verifier_that_needs_more_memory_than_it_has(tmp_path):
    (tmp_path / "large.py").write_text("table = bytearray(2**31)\nINSTRUCTION = ''\njudge = gold = print\n")
    with pytest.raises(SystemExit, match=r"error: --mode .*large.py: a worker of the judge does not start, in 1.0 GiB"):
        verify.Judge(str(tmp_path / "large.py"), memory=1.0)


def test_what_fits_the_teacher(qwen, monkeypatch):
    """The longest y, whatever the teacher reads: y once, three times, or not at all; one with an end of turn is read without."""
    tokenizer, problem, phrases = verify.load_tokenizer(qwen), verify.Problem("a", "1+2=?", "3"), verify.PHRASES["qwen"]
    x, y = verify.chat_ids(tokenizer, problem), [*range(20), tokenizer.end_ids[0]]
    plain = verify.teacher_reads
    for reads in (plain, lambda t, p, x, y, *told: x + 3 * y, lambda t, p, x, y, *told: x):
        monkeypatch.setattr(verify, "teacher_reads", reads)
        length = lambda n: len(reads(tokenizer, problem, x, y[:n], True, phrases)) + n
        for most in range(length(len(y)) + 3):
            want = max((n for n in range(1, len(y) + 1) if length(n) <= most), default=0)
            assert verify.fitting(tokenizer, problem, x, y, True, phrases, most) == y[:want]


@pytest.mark.parametrize("mode", [5, "poem", ["math"]])
def test_the_mode_of_a_row_that_cannot_be_used(mode):
    with pytest.raises(SystemExit, match=r"\(or the mode of a row\): .* cannot be used"):
        verify.chat_ids(None, verify.Problem.of_row({"id": "a", "problem": "?", "mode": mode}))


def test_as_many_workers_as_cores_that_it_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3, 5})
    with verify.Judge() as judge:
        assert judge.pool._max_workers == 3


def test_processes_of_tests_share_the_cores():
    """Two cores each, however many there are, so that scripts start few workers; all are used."""
    assert [two_cores(i, range(16)) for i in (0, 1, 7, 8)] == [{0, 1}, {2, 3}, {14, 15}, {0, 1}]
    assert two_cores(1, [4, 6]) == {4, 6} and two_cores(3, [5]) == {5}
    if "PYTEST_XDIST_WORKER" in os.environ:
        assert len(os.sched_getaffinity(0)) <= 2


def test_a_changed_verifier_is_not_its_old_self(tmp_path):
    """A file of the same length, changed in the same second: what Python has cached of it is not used."""
    path = tmp_path / "mine.py"
    for word in ("right", "wrong"):
        path.write_text(f"INSTRUCTION = ''\ndef gold(row): return 1, None\ndef judge(*_): return '{word}'\n")
        os.utime(path, (1e9, 1e9))
        with verify.Judge(str(path), workers=1) as judge:
            assert judge([verify.Problem("p", "?", 1, str(path))], [""])[0].reason == word


def test_the_instruction_of_a_row_is_that_of_its_mode(own, qwen):
    """x of a row of any mode, as sft.py and kl.py build it, is what srt.py sampled from."""
    tokenizer, seen = verify.load_tokenizer(qwen), []
    tokenizer.apply_chat_template = lambda messages, **how: seen.append(messages[0]["content"])
    for mode in ("math", "code", own):
        verify.chat_ids(tokenizer, verify.Problem.of_row({"id": "a", "problem": "1+1?", "answer": None, "mode": mode}))
    verify.chat_ids(tokenizer, verify.Problem.of_row({"id": "a", "problem": "1+1?"}))
    told = verify.Problem.of_row({"id": "a", "problem": "1+1?", "mode": "gone.py", "instruction": "As it was."})
    verify.chat_ids(tokenizer, told)  # whatever has become of the verifier
    assert seen.pop() == "1+1?\n\nAs it was."
    verify.chat_ids(tokenizer, verify.Problem.of_row({"id": "a", "problem": "1+1?", "mode": "gone.py", "instruction": ""}))
    assert seen.pop() == "1+1?\n\n"
    math_, code, mine, without = seen
    assert mine == "1+1?\n\nAnswer with one word." and "\\boxed{}" in math_ and "fenced code block" in code and without == math_


# -------------------------------------------------------------------------------------------------- phrases, the run's folder


def test_phrases(qwen, olmo, tmp_path, capsys):
    """By the model's type, by what its config records (two texts, or a name of old), or by --phrases, which says so."""
    assert verify.phrases_of(qwen) == verify.PHRASES["qwen"] and verify.phrases_of(olmo) == verify.PHRASES["olmo"]
    assert verify.phrases_of(olmo, "paper") == verify.PHRASES["paper"] and verify.phrases_of(olmo, "No.|Yes.") == ("No.", "Yes.")
    config = json.loads((Path(qwen) / "config.json").read_text())
    for recorded, want in ((["Not so.", "Just so."], ("Not so.", "Just so.")), ("paper", verify.PHRASES["paper"])):
        (tmp_path / "config.json").write_text(json.dumps({**config, "sdzero_phrases": recorded}))
        assert verify.phrases_of(str(tmp_path)) == want and verify.phrases_of(str(tmp_path), "olmo") == verify.PHRASES["olmo"]
        said = f"note: model {tmp_path} was trained with other phrases than --phrases: Not so. | Just so.\n"
        assert capsys.readouterr().out == (said if recorded != "paper" else "")
    for recorded in ("gone", 5, [5, 6], ["a", "b", "c"], None):
        (tmp_path / "config.json").write_text(json.dumps({**config, "sdzero_phrases": recorded}))
        with pytest.raises(SystemExit, match="records phrases that are not in verify.PHRASES"):
            verify.phrases_of(str(tmp_path))


def test_the_flag_of_phrases():
    assert [verify.phrases_flag(text) for text in ("qwen", "Not so.|Just so.")] == ["qwen", "Not so.|Just so."]
    for text in ("polite", "", "a|b|c", "a|", "| b", "|"):
        with pytest.raises(argparse.ArgumentTypeError, match="invalid choice"):
            verify.phrases_flag(text)


def test_p_r_is_what_the_texts_say(qwen):
    tokenizer = verify.load_tokenizer(qwen)
    for correct, text in ((False, "Wrong. I need to redo all."), (True, "Let me rephrase the above solution.")):
        ids = verify.control_ids(tokenizer, correct, verify.PHRASES["olmo"])
        assert ids == tokenizer.encode(f"\n\n{text}\n\n", add_special_tokens=False)
        y = [7, 8, tokenizer.end_ids[0]]
        assert verify.revision_ids(tokenizer, [1, 2], y, correct, verify.PHRASES["olmo"]) == [1, 2, 7, 8, *ids]


def open_out(out, ranks, monkeypatch, *given, flags={"--lr": 0.5, "--kl": "reverse"}, mode=None):
    """run.open_out after a command line of these flags with their defaults; returns what is then in flags.json."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default=str(out))
    parser.add_argument("--fresh", action="store_true")
    for flag, default in flags.items():
        parser.add_argument(flag, type=type(default), default=default)
    if mode:
        parser.add_argument("--mode", default=mode)
    monkeypatch.setattr(sys, "argv", ["x.py", *given])
    monkeypatch.setattr(run, "hold", lambda folder: None)
    args = run.parse(parser)
    run.open_out(args, ranks, "lr", "final", [verify.Problem("p", "?", "5")])
    (out / "rows").touch()
    assert "defaults" not in vars(args)
    return json.loads((out / "flags.json").read_text())


def test_a_flag_that_an_older_run_did_not_know_had_its_default(ranks, tmp_path, monkeypatch, capsys):
    """A run is begun by a version without --kl and --range; later ones may give their defaults only, or a free flag."""
    out = tmp_path / "out"
    first = open_out(out, ranks, monkeypatch, flags={"--lr": 0.5})
    code = {name: first[name] for name in ("code", "rows")}
    assert first == {"lr": 0.5, **code} and [*map(len, code.values())] == [12, 12]
    with pytest.raises(SystemExit, match="--kl reverse -> forward"):
        open_out(out, ranks, monkeypatch, "--kl", "forward")
    with pytest.raises(SystemExit, match="other flags: --kl reverse -> forward; give"):  # --lr may change
        open_out(out, ranks, monkeypatch, "--kl", "forward", "--lr", "0.25")
    assert json.loads((out / "flags.json").read_text()) == {"lr": 0.5, **code}
    assert open_out(out, ranks, monkeypatch, "--kl", "reverse") == {"lr": 0.5, "kl": "reverse", **code}
    assert "changed" not in capsys.readouterr().out
    (out / "flags.json").write_text('{"kl": "reverse"}')
    assert open_out(out, ranks, monkeypatch, "--lr", "0.25") == {"lr": 0.25, "kl": "reverse", **code}
    assert capsys.readouterr().out == "flags changed since this run began: --lr 0.5 -> 0.25\n"
    (out / "flags.json").write_text('{"lr": 0.25, "code": "another"}')  # a fork, or an update: said, no other run
    assert open_out(out, ranks, monkeypatch, "--lr", "0.25") == {"lr": 0.25, "kl": "reverse", **code}
    assert f"the code of the scripts (its hash) another -> {code['code']}" in capsys.readouterr().out
    (out / "rows").rename(out / "flags.json.tmp")  # as if two starts had been killed before they did anything
    assert open_out(out, ranks, monkeypatch, "--kl", "forward")["kl"] == "forward"


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 100_000])
def test_a_damaged_summary_is_named(text, tmp_path):
    (tmp_path / "final").mkdir()
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(SystemExit, match="summary.json holds no JSON object; give another --out"):
        run.finished(str(tmp_path), "final")


def test_a_changed_verifier_is_another_run(ranks, tmp_path, monkeypatch):
    out, mine = tmp_path / "out", tmp_path / "mine.py"
    source = "INSTRUCTION = ''\ndef gold(row): return 1, None\ndef judge(*_): return 'wrong'\n"
    mine.write_text(source)
    flags = open_out(out, ranks, monkeypatch, mode=str(mine))
    assert flags["mode"] == str(mine) and len(flags["verifier"]) == 12
    assert open_out(out, ranks, monkeypatch, mode=str(mine)) == flags
    mine.write_text(source.replace("wrong", "right"))
    with pytest.raises(SystemExit, match="the verifier's source"):
        open_out(out, ranks, monkeypatch, mode=str(mine))
    assert "--fresh" not in flags and open_out(out, ranks, monkeypatch, "--fresh", mode=str(mine)) != flags


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
    ("d.jsonl", GOOD + '{"id": "b", "prob', "mend or remove this line"), ("d.jsonl", "", "it is empty"), ("d.jsonl", "\n\n", "it is empty"),
    ("d.jsonl", GOOD.encode() + '{"problem": "é"}\n'.encode("latin-1"), "d.jsonl:2: not JSON in UTF-8 ('utf-8' codec"),
    ("d.jsonl", '{"id": "a", "answer": "2"}\n', "d.jsonl:1: no problem text; one of the fields problem, question, prompt"),
    ("d.jsonl", '{"problem": 5, "answer": "2"}\n', "d.jsonl:1: no problem text"),
    ("d.jsonl", "[1]\n", "d.jsonl:1: a JSON object is wanted, found list"), ("d.jsonl", "[" * 100_000, "d.jsonl:1: not JSON in UTF-8 (maximum recursion depth"),
    ("d.jsonl", GOOD + GOOD.replace("+1", "+2"), "d.jsonl:2: an earlier row with other text has the id 'a'"), ("d.json", "{}", "a list of objects is wanted"),
    ("d.json", "[1]", "a list of objects is wanted"), ("d.json", "[", "d.json cannot be read: Expecting value"), ("d.txt", "x", "is not a .jsonl"),
    ("d.parquet", "PAR?", "d.parquet cannot be read: Parquet"), ("d.json", "[" * 100_000, "d.json cannot be read: maximum recursion"),
    ("d.jsonl", '{"prompt": [{"role": "user", "content": "1+1?"}]}', "d.jsonl:1: no problem text: field 'prompt' is list; text is wanted"),
    ("d.jsonl", '{"problem": "?", "starter_code": ["def f"]}', "d.jsonl:1: no problem text: field 'starter_code' is list"),
    ("d.jsonl", '{"problem": "1 \\ud800 2"}', r"d.jsonl:1: '\ud800' in the problem or its id"),
    ("d.jsonl", GOOD.replace('"a"', r'"\udfff"'), r"d.jsonl:1: '\udfff' in the problem or its id"),
    ("d.jsonl", '{"problem": "?"}\n', "dropped: {'no answer': 1}"),
    ("d.jsonl", '{"problem": "?", "answer": {"x": 1}}\n', "field 'answer' is dict"),
    ("d.jsonl", '{"problem": "?", "answer": "((("}\n', "gold cannot be parsed"),
    ("d.jsonl", '{"problem": "?", "answer": "\\\\text{A\\udc00}"}\n', "half of a surrogate pair in the answer"),
])
def test_a_bad_file_gives_one_clear_line(judge, tmp_path, name, content, says):
    with pytest.raises(SystemExit) as e:
        verify.load_problems(write(tmp_path / name, content), judge)
    assert says in str(e.value) and name in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("data", ["", "@train", ":main"])
def test_a_hub_name_without_a_name(judge, data):
    with pytest.raises(SystemExit, match=f"--data {data} is not a .jsonl, .json or .parquet file, nor a hub name"):
        verify.load_problems(data, judge)


def test_a_damaged_page_of_parquet_gives_one_clear_line(judge, tmp_path):
    """What is read only as the rows are."""
    import pyarrow.parquet
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"problem": f"{i} {i * i}"} for i in range(5000)]), tmp_path / "d.parquet")
    whole = (tmp_path / "d.parquet").read_bytes()
    path = write(tmp_path / "d.parquet", whole[:500] + bytes(40) + whole[540:])
    with pytest.raises(SystemExit, match="--data .*d.parquet cannot be read: Corrupt"):
        verify.load_problems(path, judge)


def test_the_flag_that_named_the_problems(judge, tmp_path, qwen):
    """The errors about --val speak of it and of --val_range."""
    write(tmp_path / "d.json", "{}")
    path = write(tmp_path / "d.jsonl", '{"problem": "?"}\n')
    for data, range_, says in (("", None, "--val  is not"), (tmp_path / "d.json", None, "--val .*a list"), (path, None, "--val .*no problem is left"),
                               (path, "5", "--val_range 5: A:B"), (path, "5:", "--val_range 5: is empty")):
        with pytest.raises(SystemExit, match=says):
            verify.load_problems(str(data), judge, range_, flag="--val")
    with pytest.raises(SystemExit, match="--val: the prompt of problem 'b' has 1024 tokens .* drop it with --val_range"):
        check_lengths(qwen, [verify.Problem(name, "?", "1") for name in "ab"], [[1], [1] * 1024], 5, "--val")


def test_max_problems_reads_no_further_than_it_needs(judge, tmp_path, monkeypatch):
    """The first that have a gold, as without it; nothing is asked of the rows far behind, nor are they looked at."""
    rows = [{"problem": f"{i}+1", "answer": str(i + 1) if i % 3 else ""} for i in range(600)]
    path = write(tmp_path / "d.jsonl", "".join(json.dumps(row) + "\n" for row in rows) + "no JSON\n")
    asked, submit = [], judge.pool.submit
    monkeypatch.setattr(judge.pool, "submit", lambda *question: asked.append(question) or submit(*question))
    for most, last in ((1, 0), (134, 199), (135, 201), (300, 448), (10_000, 589)):  # last: the row of the last that counts
        problems, dropped = verify.load_problems(path, judge, "10:600", most)
        assert [p.problem for p in problems] == [row["problem"] for row in rows[10:] if row["answer"]][:most]
        assert dropped.total() == sum(not row["answer"] for row in rows[10:11 + last]) and len(asked) == min(590, last + 201)
        asked.clear()
    with pytest.raises(SystemExit, match=":601: not JSON"):
        verify.load_problems(path, judge, "10:", 500)


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
    assert ids(f"5:{10 ** 30}") == ids("5:12")
    for range_ in ("12:", "20:30"):
        with pytest.raises(SystemExit, match=f"{range_} is empty: none of the 12 rows"):
            verify.load_problems(path, judge, range_=range_)


def test_a_folder_is_no_file(judge, tmp_path):
    (tmp_path / "d.jsonl").mkdir()
    with pytest.raises(SystemExit, match="d.jsonl is not there, or no file"):
        verify.load_problems(str(tmp_path / "d.jsonl"), judge)
    with pytest.raises(SystemExit, match="not there"):
        verify.load_problems(str(tmp_path / "e.jsonl"), judge)


def row(**fields):
    return json.dumps({"kind": "init", "id": "a", "y_init": "\\boxed{2}", "y_init_correct": True, **fields}) + "\n"


@pytest.mark.parametrize("content, says", [
    ("", "0 responses, none of them to a problem of --data"), (row(id="zzz"), "1 responses, none of them"),
    (row() + row()[:30], "r.jsonl:2: not JSON"), (row(y_init=5), "r.jsonl:1: field 'y_init' should be str, found int"),
    (row(y_init_correct="yes"), "r.jsonl:1: field 'y_init_correct' should be bool, found str"),
    (row(kind="revision"), "r.jsonl:1: field 'y_revised' should be str, it is missing"),
    ('{"kind": "init", "y_init": "", "y_init_correct": true}\n', "r.jsonl:1: field 'id' should be str, it is missing"),
    (row(kind="first"), "r.jsonl:1: kind 'first', not init or revision"), ('"x"\n', "r.jsonl:1: a JSON object is wanted"), ("é".encode("latin-1"), "r.jsonl:1: not JSON in UTF-8"),
])
def test_bad_responses_give_one_clear_line(judge, tmp_path, content, says):
    with pytest.raises(SystemExit) as e:
        verify.judge_again(write(tmp_path / "r.jsonl", content), {"a": math("2")}, judge)
    assert says in str(e.value) and "\n" not in str(e.value)


def test_a_byte_order_mark(judge, tmp_path):
    """Some editors write one before the first line."""
    for name, text in (("d.jsonl", GOOD), ("d.json", f"[{GOOD}]")):
        (problem,), _ = verify.load_problems(write(tmp_path / name, text.encode("utf-8-sig")), judge)
        assert problem.id == "a" and problem.problem == "1+1?"


def test_the_script_reports_and_judges_again(tmp_path):
    data = write(tmp_path / "d.jsonl", GOOD + '{"id": "b", "problem": "?", "answer": "(1,2)"}\n{"id": "c", "problem": "??"}\n'
                 '{"id": "d", "problem": "???", "answer": "((("}\n')
    responses = write(tmp_path / "r.jsonl", row() + row(y_init="\\boxed{3}") + row(id="zzz")
                      + json.dumps({"kind": "revision", "id": "b", "y_revised": "\\boxed{(1, 2)}", "y_revised_correct": False}) + "\n")
    code, out, err = script("--data", data, "--responses", responses)
    assert code == 0, err
    for line in ("2 kept, 2 dropped", "1  dropped  no answer: c",
                 "1  dropped  gold cannot be parsed: d", "r.jsonl:2: y_init of a: right -> wrong",
                 "r.jsonl:4: y_revised of b: wrong -> right", "3 judged (2 right, 1 wrong), 2 changed, 1 to problems not in the data"):
        assert line in out
    code, out, err = script("--data", tmp_path / "nothing.jsonl")
    assert code == 1 and err.count("\n") == 1 and err.startswith("error: ")


def test_y_init_is_not_tokenised_again(qwen):
    tokenizer, phrases = verify.load_tokenizer(qwen), verify.PHRASES["qwen"]
    y = tokenizer.convert_tokens_to_ids(["1", "0"])  # its text would come back as one token, "10"
    assert tokenizer.encode("10", add_special_tokens=False) != y
    assert verify.revision_ids(tokenizer, [5], y, False, phrases) == [5, *y, *verify.control_ids(tokenizer, False, phrases)]
