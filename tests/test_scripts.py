"""The real scripts by their command lines, with tiny numbers: alone, with two processes, resumed, with Olmo 3, with vLLM."""
import asyncio
import json
import os
import shutil
from collections import deque
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from conftest import REPO, SHARED, have_vllm, make_rows, read, run
from safetensors.torch import load_file

import srt
import verify
from common.run import Ranks
from common.sampler import Request, Sample, serve

SRT = ["--max_tokens", 40, "--engine", "hf", "--num_revisions", 2]
SFT = ["--batch", 3, "--lr", "1e-3", "--objective", "two-stage", "--stage2_size", 20, "--epochs", 1, "--save_every", 5]
DISTILL = ["--steps", 4, "--batch", 5, "--lr", "1e-3", "--warmup", 1, "--max_tokens", 40, "--engine", "hf", "--save_every", 2]


def collect(out, model, problems_file, *more, **how):
    return run("srt.py", "--model", model, "--data", problems_file, "--out", out, *SRT, *more, **how)


def weights(folder):
    return load_file(os.path.join(folder, "model.safetensors"))


def same_weights(a, b, tolerance=0.0):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all((a[k] - b[k]).abs().max() <= tolerance for k in a)


@pytest.fixture(scope="module")
def collected(qwen, problems_file, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("collect") / "out")
    collect(out, qwen, problems_file)
    return out


# -------------------------------------------------------------------------------------------------------- srt.py


def kinds(rows):
    """The init rows and the revision rows of a responses.jsonl."""
    assert {row["kind"] for row in rows} <= {"init", "revision"}
    return [row for row in rows if row["kind"] == "init"], [row for row in rows if row["kind"] == "revision"]


def test_collect(collected, qwen, problems_file):
    """Every (id, sample, revision) once; ids, text and verdicts agree; summary.json counts what the files hold."""
    rows = read(f"{collected}/responses.jsonl")
    assert sorted(srt.row_key(r) for r in rows) == sorted((f"p{i}", 0, *k) for i in range(40) for k in ((), (0,), (1,)))
    tokenizer = verify.load_tokenizer(qwen)
    inits, revised = kinds(rows)
    init_of = {r["id"]: r for r in inits}
    first, second = ([r["y_revised_tokens"] for r in revised if r["revision"] == k] for k in (0, 1))
    assert first != second  # each has a seed of its own
    for r in inits:
        assert tokenizer.decode(r["y_init_tokens"], skip_special_tokens=True) == r["y_init"]
        assert r["truncated"] == (r["y_init_tokens"][-1] not in tokenizer.end_ids) and r["mode"] == "math"
    for r in revised:
        assert tokenizer.decode(r["y_revised_tokens"], skip_special_tokens=True) == r["y_revised"]
        assert r["revised_truncated"] == (r["y_revised_tokens"][-1] not in tokenizer.end_ids)
        assert r["p_r"] == verify.PHRASES["qwen"][init_of[r["id"]]["y_init_correct"]]
    kept = read(f"{collected}/d_revision.jsonl")
    both = [{**init_of[r["id"]], **r} for r in revised if r["y_revised_correct"]]
    assert [{**r, "kind": "revision"} for r in kept] == both and not any("kind" in r for r in kept)
    s = json.load(open(f"{collected}/summary.json"))
    assert (s["init_total"], s["revised_total"], s["kept"]) == (40, 80, len(kept))
    assert s["init_correct"] == sum(r["y_init_correct"] for r in inits)
    assert s["revised_accuracy"] == pytest.approx(sum(r["y_revised_correct"] for r in revised) / 80)
    assert s["init_mean_tokens"] == pytest.approx(sum(len(r["y_init_tokens"]) for r in inits) / 40)
    assert s["init_truncated"] == pytest.approx(sum(r["truncated"] for r in inits) / 40)
    assert sum(s["dropped"].values()) + s["kept"] == 80
    assert s["net_correction"] == pytest.approx((s["revised_accuracy"] - s["init_accuracy"]) / (1 - s["init_accuracy"]))


def test_two_processes_collect_the_same(collected, qwen, problems_file, tmp_path):
    collect(tmp_path / "two", qwen, problems_file, nproc=2)
    assert read(tmp_path / "two/responses.jsonl") == read(f"{collected}/responses.jsonl")
    shares = json.load(open(tmp_path / "two/summary.json"))["tokens_per_rank"]
    assert len(shares) == 2 and min(shares) > 0.25 * sum(shares)


def test_collection_goes_on(collected, qwen, problems_file, tmp_path):
    """Rows of a killed run, the last one torn, and by two ranks: the same command completes them, and nothing is asked twice."""
    lines = open(f"{collected}/responses.jsonl").readlines()
    out = tmp_path / "out[1]"
    os.makedirs(out)
    (out / "responses.rank0.jsonl").write_text("".join(lines[0:60:2]) + lines[80][:50])
    (out / "responses.rank5.jsonl").write_text("".join(lines[1:40:2]))
    before = {line for line in lines[0:60:2] + lines[1:40:2]}
    collect(out, qwen, problems_file)
    assert read(out / "responses.jsonl") == read(f"{collected}/responses.jsonl")
    assert before <= set(open(out / "responses.jsonl"))
    asked = [json.loads(line) for line in open(out / "responses.jsonl") if line not in before]
    tokens = sum(len(row.get("y_init_tokens") or row["y_revised_tokens"]) for row in asked)
    assert json.load(open(out / "summary.json"))["tokens_per_rank"] == [tokens]
    written = (out / "summary.json").read_text()
    assert "nothing to do" in collect(out, qwen, problems_file).stdout and (out / "summary.json").read_text() == written
    assert read(out / "responses.jsonl") == read(f"{collected}/responses.jsonl")
    collect(out, qwen, problems_file, "--fresh", "--max_problems", 3)
    assert len(read(out / "responses.jsonl")) == 9
    assert [name for name in os.listdir(tmp_path) if name.startswith("out[1].old-")]


@pytest.mark.parametrize("change, says", [
    ({"y_init_correct": None}, "field 'y_init_correct' should be bool"), ({"kind": "third"}, "kind 'third'"),
    ({"kind": "revision"}, "field 'revision' should be int, it is missing"), ({"y_init_tokens": "1"}, "field 'y_init_tokens' should be list")])
def test_rows_that_are_not_whole(change, says, collected, tmp_path):
    """What a run that goes on finds in its folder: each row has what its kind needs."""
    first = read(f"{collected}/responses.jsonl")[0]
    (tmp_path / "responses.rank0.jsonl").write_text(json.dumps({**first, **change}) + "\n")
    with pytest.raises(SystemExit, match=f"responses.rank0.jsonl:1: {says}"):
        srt.read_rows(str(tmp_path))


def test_a_problem_that_is_gone_loses_no_rows(collected, tmp_path):
    """--data no longer gives a problem that has been answered: the run ends before it writes anything."""
    shutil.copytree(collected, tmp_path / "out")
    written = (tmp_path / "out/responses.jsonl").read_text()
    with pytest.raises(SystemExit, match="responses to 1 problems, 'p7' is one, that --data does not give now"):
        srt.merge(str(tmp_path / "out"), [verify.Problem(f"p{i}", "", "", "math") for i in range(40) if i != 7])
    assert (tmp_path / "out/responses.jsonl").read_text() == written


def test_sampling_flags(qwen, problems_file, tmp_path):
    """Temperature 0 samples what next to no top_p does; a problem's y_init differ else."""
    found = {}
    for name, *how in (("free",), ("greedy", "--temperature", 0), ("narrow", "--top_p", "1e-6")):
        collect(tmp_path / name, qwen, problems_file, "--num_revisions", 0, "--max_problems", 4, "--num_responses", 2, *how)
        found[name] = [row["y_init_tokens"] for row in read(tmp_path / name / "responses.jsonl")]
    assert found["greedy"] == found["narrow"] and found["greedy"][::2] == found["greedy"][1::2]
    assert all(one != other for one, other in zip(found["free"][::2], found["free"][1::2]))


def test_no_room_to_revise(qwen, problems_file, tmp_path):
    """Where x, y_init, P_r fill the context nothing is revised; where they nearly do, the revision is cut."""
    shutil.copytree(qwen, tmp_path / "short")
    config = json.loads((tmp_path / "short/config.json").read_text())
    (tmp_path / "short/config.json").write_text(json.dumps({**config, "max_position_embeddings": 60}))
    collect(tmp_path / "out", tmp_path / "short", problems_file, "--max_problems", 8)
    inits, revised = kinds(read(tmp_path / "out/responses.jsonl"))
    full = {row["id"] for row in inits if row["no_room"]}
    assert 0 < len(full) < 8 and {row["id"] for row in revised} == {row["id"] for row in inits} - full
    assert any(row["revised_truncated"] and len(row["y_revised_tokens"]) < 40 for row in revised)


def test_rft_keeps_nothing(qwen, problems_file, tmp_path):
    """--num_revisions 0: no D_revision, and no word of one."""
    done = collect(tmp_path, qwen, problems_file, "--num_revisions", 0, "--max_problems", 4)
    assert not (tmp_path / "d_revision.jsonl").exists() and "kept" not in done.stdout + done.stderr
    assert json.load(open(tmp_path / "summary.json"))["target"] == 0 and len(read(tmp_path / "responses.jsonl")) == 4


def test_the_length_that_a_revision_may_have(qwen, problems_file, tmp_path, monkeypatch):
    """A prompt, two responses, and P_r however long it is."""
    def stop(engine, model, tokenizer, max_len, *how):
        prompts = [verify.chat_ids(tokenizer, verify.Problem.of_row(row)) for row in read(problems_file)]
        p_r = verify.control_ids(tokenizer, False, phrases)
        assert len(p_r) > 64 and max_len == max(map(len, prompts)) + 40 + len(p_r) + 40
        raise SystemExit("as wanted")

    phrases = ("Wait, this response is wrong. " * 20, "Fine.")
    monkeypatch.setattr(srt, "make_sampler", stop)
    monkeypatch.setattr("sys.argv", ["srt.py", "--model", qwen, "--data", str(problems_file), "--out", str(tmp_path), "--phrases",
                                     "|".join(phrases), *map(str, SRT)])
    with pytest.raises(SystemExit, match="as wanted"):
        srt.main()
    dist.destroy_process_group()


def test_eval(qwen, problems_file, tmp_path):
    """avg@k, pass@k and the generate-then-revise table; nothing is kept."""
    run("srt.py", "--eval", "--model", qwen, "--data", problems_file, "--out", tmp_path, "--max_tokens", 40, "--engine", "hf",
        "--num_responses", 2, "--num_revisions", 1, "--range", "5:20", "--temperature", 0.7)
    s = json.load(open(tmp_path / "summary.json"))
    assert (s["problems"], s["init_total"], s["revised_total"]) == (15, 30, 30)
    assert not {"kept", "dropped"} & s.keys() and s["init_accuracy_95"][0] <= s["init_accuracy"] <= s["init_accuracy_95"][1]
    assert not os.path.exists(tmp_path / "d_revision.jsonl")


def test_a_copy_of_the_rows_is_not_read(tmp_path):
    """What a user keeps beside them before a line is removed."""
    row = {"kind": "revision", "id": "a", "sample": 0, "revision": 1, "y_revised": "1", "y_revised_correct": True,
           "y_revised_verdict": "right", "y_revised_tokens": [1], "revised_truncated": False}
    for name, sample in (("responses.jsonl", 0), ("responses.rank1.jsonl", 1), ("responses_old.jsonl", 2), ("responses.old.jsonl", 3)):
        (tmp_path / name).write_text(json.dumps({**row, "sample": sample}) + "\n")
    assert {*srt.read_rows(str(tmp_path))} == {("a", 0, 1), ("a", 1, 1)}


def test_the_first_answer_is_what_stands_before_p_r(tmp_path, guesser):
    assert srt.first_answer("3. No! 4. Yes! 4. No!", ("No!", "Yes!")) == ("3. ", 0)
    assert srt.first_answer("3. Yes! 4. No!", ("No!", "Yes!")) == ("3. ", 1)
    assert srt.first_answer("3.", ("No!", "Yes!")) == ("3.", None)
    data = tmp_path / "p.jsonl"
    data.write_text("".join(json.dumps({"id": f"q{i}", "problem": f"{i}+1=?", "answer": "3"}) + "\n" for i in range(12)))
    run("srt.py", "--eval", "--model", guesser, "--data", data, "--out", tmp_path / "out", *SRT, "--phrases", "boxed{|Zzz")
    s = json.load(open(tmp_path / "out/summary.json"))  # it says boxed{ before any answer
    assert s["init_first_accuracy"] == 0 < s["init_accuracy"] and s["init_doubted_wrong"] == s["init_self_revised"] > 0.5


def test_summary_of_rows_by_hand():
    """Three problems, two samples of each: (right, right), (right, wrong), (wrong, wrong); the wrong ones are revised."""
    row = lambda id_, sample, ok, first: {"kind": "init", "id": id_, "sample": sample, "y_init_correct": ok, "no_room": False,
                                           "y_init_verdict": "right" if ok else "wrong", "y_init_tokens": [1] * (sample + 1),
                                           "y_init": "Wait. Yes." if sample else "Yes.", "truncated": not ok,
                                           "first_correct": first}
    inits = [row("a", 0, True, True), row("a", 1, True, False), row("b", 0, True, True),  # (a, 1) has mended itself,
             row("b", 1, False, True), row("c", 0, False, False), row("c", 1, False, False)]  # (b, 1) has spoilt it
    revised = [{"kind": "revision", "id": r["id"], "sample": r["sample"], "revision": 0, "y_revised_correct": ok,
                "y_revised_verdict": "right" if ok else "no answer", "y_revised_tokens": [1] * 4,
                "revised_truncated": False} for r, ok in zip(inits[3:], (True, True, False))]
    s = srt.summarise(inits + revised, srt.tuples(inits + revised)[:1], 2, ("Wait.", "Fine."))
    assert (s["avg@2"], s["pass@2"], s["init_accuracy"]) == (pytest.approx(1 / 2), pytest.approx(2 / 3), 1 / 2)
    assert (s["problems"], s["init_total"], s["init_correct"], s["init_mean_tokens"], s["init_truncated"]) == (3, 6, 3, 1.5, 0.5)
    assert (s["revised_total"], s["revised_correct"], s["revised_mean_tokens"]) == (3, 2, 4)
    assert s["init_accuracy_95"] == pytest.approx([0.1253, 0.8747], abs=2e-4)  # Wilson of 1/2 over the 3 problems, not over 6
    assert s["init_self_revised"] == 1 / 2
    after = srt.summarise(inits + revised, [], 2, ("Wait.", "Yes."))
    assert (after["init_first_accuracy"], after["init_doubted_right"], after["init_doubted_wrong"]) == (1 / 2, 1 / 3, 2 / 3)
    each = [{**revised[0], "id": r["id"], "sample": r["sample"], "y_revised_correct": True} for r in inits]
    assert srt.summarise(inits + each, [], 2, ("Wait.",))["net_correction"] == 1
    assert srt.summarise(inits + each + [{**each[0], "revision": 1}], [], 2, ("Wait.",))["net_correction"] is None
    assert s["revised_accuracy_of_wrong"] == pytest.approx(2 / 3) and s["revised_accuracy_of_right"] is None
    assert s["net_correction"] is None and (s["kept"], s["wrong_to_right"]) == (1, 1)  # not every y_init was revised
    assert s["dropped"] == {"y_revised no answer": 1, "over the target": 1, "no room to revise": 0}


@pytest.mark.parametrize("turns", range(8))
def test_a_verdict_that_comes_at_any_turn_of_the_loop(turns):
    """Also between the look at `judging` and the wait for it, when what ends the verdict's wait is under way."""
    waiting, judging, written = deque(), set(), []

    async def respond():
        sampled = asyncio.get_running_loop().create_future()
        waiting.append(Request(sampled, [1], 0))
        await sampled
        loop = asyncio.get_running_loop()
        judged = loop.create_future()
        judging.add(judged)
        judged.add_done_callback(judging.discard)
        come = lambda turns: loop.call_soon(come, turns - 1) if turns else judged.set_result(True)
        come(turns)
        written.append(await judged)

    class Sampler:
        def stream(self, pull):
            while (request := pull()) is not None:
                yield Sample(request, [5, 6], [], False)

    assert serve([respond()], waiting, judging, lambda: False, Sampler()) == 2
    assert written == [True] and not judging


def test_what_is_sampled_is_judged_before_a_stop():
    waiting, judging, written, stop = deque(), set(), [], []

    async def respond():
        sampled = asyncio.get_running_loop().create_future()
        waiting.append(Request(sampled, [1], 0))
        await sampled
        stop.append(True)  # when both are sampled
        judged = asyncio.ensure_future(asyncio.sleep(0.1 * len(stop), "right"))
        judging.add(judged)
        judged.add_done_callback(judging.discard)
        written.append(await judged)

    class Sampler:
        def stream(self, pull):
            while (request := pull()) is not None:
                yield Sample(request, [5, 6], [], False)

    serve([respond(), respond()], waiting, judging, lambda: len(stop) == 2, Sampler())
    assert written == ["right", "right"] and not judging


def test_a_merge_that_breaks_loses_nothing(tmp_path, monkeypatch):
    row = {"kind": "revision", "id": "a", "sample": 0, "revision": 1, "y_revised": "1", "y_revised_correct": True,
           "y_revised_verdict": "right", "y_revised_tokens": [1], "revised_truncated": False}
    (tmp_path / "responses.rank0.jsonl").write_text(json.dumps(row) + "\n")
    with monkeypatch.context() as broken:
        broken.setattr(srt, "write_rows", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            srt.merge(str(tmp_path), [verify.Problem("a", "", "")])
    assert srt.read_rows(str(tmp_path)) == {("a", 0, 1): row} and srt.merge(str(tmp_path), [verify.Problem("a", "", "")]) == [row]
    assert [path.name for path in tmp_path.iterdir()] == ["responses.jsonl"]


@pytest.mark.parametrize("terminal", [True, False])
def test_the_line_of_progress(terminal, monkeypatch, capsys):
    """Problems, kept, accuracies, speed: one line of at most 100 columns, in its place or one a minute."""
    counts, now = {"ended": 9_000, "kept": 5_432}, [1_000_000.0]
    monkeypatch.setattr(srt.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(srt.sys.stderr, "isatty", lambda: terminal)
    ranks = Ranks(0, 8, "cpu", SimpleNamespace(add=lambda name, n: counts[name]))
    progress = srt.Progress(ranks, 10_000, 6_000)
    for second in range(7_200):
        now[0] += 1
        progress.judged("y_init", {"y_init_correct": second % 4 > 0}, 22_000)
        progress.judged("y_revised", {"y_revised_correct": second % 2 > 0}, 1_456)
    progress.show("\n")
    err = capsys.readouterr().err
    lines = err.split("\r\033[K")[1:] if terminal else err.splitlines()
    assert len(lines) == (7_201 if terminal else 119) and err.count("\n") == (1 if terminal else 119)
    assert max(map(len, lines)) <= 100
    assert lines[-1].strip() == ("problems 9000/10000 [2:00:00<13:20]  kept 5432/6000  init 0.750  revised 0.500  "
                                 "23456 tok/s/rank")
    srt.Progress(ranks._replace(rank=1), 10, None).show("\n")
    srt.Progress(ranks, 10_000, None).show("\n")  # --eval, before any verdict
    assert capsys.readouterr().err.count("problems") == 1


def test_the_summary_says_whether_d_revision_is_enough(qwen, problems_file, tmp_path):
    """wrong -> right tuples, wrong ones mended, no answer: one line and three numbers; too few of the first are said to be few."""
    row = lambda id_, y_init, verdicts: [
        {"kind": "init", "id": id_, "sample": 0, "y_init_correct": y_init == "right", "y_init_verdict": y_init,
         "y_init": "1", "y_init_tokens": [1], "truncated": False, "first_correct": y_init == "right", "no_room": False},
        *({"kind": "revision", "id": id_, "sample": 0, "revision": n, "y_revised_correct": verdict == "right",
           "y_revised_verdict": verdict, "y_revised_tokens": [1], "revised_truncated": False} for n, verdict in enumerate(verdicts))]
    for n, few in ((1, " (few: the teacher may only copy; see docs/real.md)"), (250, "")):
        rows = [r for i in range(n) for r in row(f"w{i}", "wrong", ["right", "right", "wrong", "no answer", "no answer"])]
        rows += row("r", "right", ["right"] * 5)
        s = srt.summarise(rows, [r for r in srt.tuples(rows) if r["y_revised_correct"]], 1, ("Wait", "Fine"))
        assert (s["kept"], s["wrong_to_right"]) == (2 * n + 5, 2 * n)
        assert s["revised_accuracy_of_wrong"] == pytest.approx(0.4) and s["no_answer_revised"] == pytest.approx(2 * n / (5 * n + 5))
        silent = 100 * 2 * n / (5 * n + 5)
        assert srt.enough(s, 0) == (f"D_revision: {2 * n} wrong -> right tuples{few}; 40.0 % of the revisions of wrong answers are "
                                    f"right; {silent:.1f} % of all revisions have no answer")
        assert f"--target {2 * n + 6} was not reached" in srt.enough(s, 2 * n + 6)
    said = collect(tmp_path / "out", qwen, problems_file, "--max_problems", 3).stdout
    assert "D_revision: 0 wrong -> right tuples (few: the teacher may only copy" in said and "of all revisions have no answer" in said
    s = json.load(open(tmp_path / "out/summary.json"))
    assert s["wrong_to_right"] == 0 and 0 <= s["no_answer_revised"] <= 1
    said = collect(tmp_path / "eval", qwen, problems_file, "--max_problems", 3, "--eval").stdout
    assert "revised_accuracy" in said and "D_revision" not in said and not {"kept", "dropped"} & {*said.split()}
    assert not {"wrong_to_right", "no_answer_revised"} & json.load(open(tmp_path / "eval/summary.json")).keys()


def test_target_and_revisions_of_right(tmp_path, guesser):
    """The target cuts in the order of the problems, whatever the number of ranks; --revisions_of_right 0 leaves right ones."""
    data = tmp_path / "p.jsonl"
    data.write_text("".join(json.dumps({"id": f"q{i}", "problem": f"{i % 11}+{i // 11}=?", "answer": "3"}) + "\n" for i in range(24)))

    def collect(out, *more, **how):
        run("srt.py", "--model", guesser, "--data", data, "--out", tmp_path / out, *SRT, "--num_responses", 2, *more, **how)
        return read(tmp_path / out / "responses.jsonl"), read(tmp_path / out / "d_revision.jsonl")

    rows, kept = collect("free", "--target", 0)
    right = [row for row in kinds(rows)[0] if row["y_init_correct"]]
    assert 4 <= len(right) <= 40 and 12 <= len(kept) and all(row["y_revised_correct"] for row in kept)
    assert {row["y_init_correct"] for row in kept} == {True, False}
    s = json.load(open(tmp_path / "free/summary.json"))  # the model was told the outcome, not its opposite
    assert s["revised_accuracy_of_wrong"] > 0.9 and s["revised_accuracy_of_right"] < 0.7
    fewer, cut = collect("cut", "--target", 10, nproc=2)
    assert len(cut) == 10 and cut == [row for row in srt.tuples(fewer) if row["y_revised_correct"]][:10]
    assert [(row["id"], row["sample"], row["revision"]) for row in cut] == sorted(
        ((row["id"], row["sample"], row["revision"]) for row in cut), key=lambda key: (int(key[0][1:]), *key[1:]))
    rows, _ = collect("wrong only", "--target", 0, "--revisions_of_right", 0)
    assert {row["y_init_correct"] for row in srt.tuples(rows)} == {False} and any(row["y_init_correct"] for row in kinds(rows)[0])


OWN_REWARD = """
import re, time
INSTRUCTION = "Say an odd number."
def gold(row):
    return row["id"], None
def judge(gold, response, limits):
    number = int(re.findall(r"[345]", response)[-1])  # IndexError where there is none
    if number == 4:
        time.sleep(100)
    return "right" if number == 3 else "too large"
"""


def test_own_reward(guesser, problems_file, tmp_path):
    """
    srt.py with a verifier of ten lines that crashes on some answers and takes too long on others: its words are
    counted, its first traceback is shown, its rows say their mode, and a run does not go on with a changed one.
    """
    (tmp_path / "odd.py").write_text(OWN_REWARD)
    args = ["--model", guesser, "--data", problems_file, "--mode", tmp_path / "odd.py", "--out", tmp_path / "out",
            "--max_problems", 12, "--judge_seconds", 0.4, "--phrases", "Not odd enough.|Odd indeed.", *SRT]
    done = run("srt.py", *args)
    rows, _ = kinds(read(tmp_path / "out/responses.jsonl"))
    s = json.load(open(tmp_path / "out/summary.json"))
    verdicts = {**s["init_verdicts"], **s["revised_verdicts"]}
    assert verdicts.keys() <= {"right", "too large", "timeout", "crash"} and {"right", "too large", "timeout"} <= verdicts.keys()
    assert done.stderr.count("IndexError: list index out of range") == ("crash" in verdicts)
    assert s["phrases"] == ["Not odd enough.", "Odd indeed."]
    kept = read(tmp_path / "out/d_revision.jsonl")
    assert {row["mode"] for row in rows + kept} == {str(tmp_path / "odd.py")} and len(kept) == verdicts["right"] > 0
    assert {row["p_r"] for row in kept} <= {"Not odd enough.", "Odd indeed."}
    tokenizer = verify.load_tokenizer(guesser)  # what a later phase asks is what was asked here
    problem = verify.Problem.of_row(kept[0])
    x = tokenizer.apply_chat_template([{"role": "user", "content": f"{problem.problem}\n\nSay an odd number."}],
                                      add_generation_prompt=True, return_dict=False)
    assert verify.chat_ids(tokenizer, problem) == x and "nothing to do" in run("srt.py", *args).stdout
    (tmp_path / "odd.py").write_text(OWN_REWARD.replace("number == 3", "number == 5"))
    assert "the verifier's source" in run("srt.py", *args, ok=False).stderr
    (tmp_path / "odd.py").unlink()  # nor does it need the file
    assert verify.chat_ids(tokenizer, problem) == x and problem.answer == rows[0]["answer"] is not None


def test_every_rank_checks_its_machine(qwen, problems_file, tmp_path):
    """What is missing on the machine of rank 1 alone ends the run."""
    (tmp_path / "own.py").write_text("import os\nINSTRUCTION = ''\ndef gold(row):\n    return '5', None\ndef judge(*_):\n    return 'right'\n"
                                     "def check(limits):\n    if os.environ.get('RANK') == '1':\n        raise SystemExit('error: no tool')\n")
    done = collect(tmp_path / "out", qwen, problems_file, "--mode", tmp_path / "own.py", nproc=2, ok=False)
    assert "error: no tool" in done.stderr


# -------------------------------------------------------------------------------------------------------- sft.py


def test_sft_splits_and_ranks(qwen, d_revision, tmp_path):
    """Loss and gradient norm of every step, and the weights, for micro-batches large and small, 1 and 2 processes (of 3 rows)."""
    train = lambda out, *more, **how: run("sft.py", "--model", qwen, "--data", d_revision, "--out", tmp_path / out, *SFT, *more, **how)
    train("one")
    train("small", "--micro_tokens", 60)
    train("two", "--micro_tokens", 100, nproc=2)
    want = read(tmp_path / "one/metrics.jsonl")
    assert len(want) == 14 and [row["stage"] for row in want] == [1] * 7 + [2] * 7
    for out in ("small", "two"):
        for a, b in zip(want, read(tmp_path / out / "metrics.jsonl"), strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-4) and b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)
            assert (a["tokens"], a["loss_tokens"]) == (b["tokens"], b["loss_tokens"])
        first, other = want[0], read(tmp_path / out / "metrics.jsonl")[0]
        assert other["loss"] == pytest.approx(first["loss"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-5)


def test_sft_goes_on_bitwise(qwen, d_revision, tmp_path):
    """A run whose files say that it was killed after step 5, and one after the step at which stage 2 begins."""
    whole = tmp_path / "whole"
    run("sft.py", "--model", qwen, "--data", d_revision, "--out", whole, *SFT, "--save_every", 7)  # states at 7 and 14
    part = tmp_path / "part"
    shutil.copytree(whole, part)
    shutil.rmtree(part / "final")
    shutil.rmtree(part / "state/step-000014")
    os.makedirs(part / "state/step-000009.tmp")  # half-written
    again = run("sft.py", "--model", qwen, "--data", d_revision, "--out", part, *SFT, "--save_every", 7)
    assert "stage 1 step" not in again.stdout and "stage 2 step 1/7" in again.stdout
    assert same_weights(whole / "final", part / "final")
    steps = [(r["step"], r["loss"]) for r in read(part / "metrics.jsonl")]
    assert steps == [(r["step"], r["loss"]) for r in read(whole / "metrics.jsonl")]
    assert "nothing to do" in run("sft.py", "--model", qwen, "--data", d_revision, "--out", part, *SFT).stdout


@pytest.mark.parametrize("objective", ["sum", "rft"])
def test_other_objectives(objective, qwen, d_revision, tmp_path):
    said = run("sft.py", "--model", qwen, "--data", d_revision, "--out", tmp_path / "out", *SFT, "--objective", objective, "--stage2_size", 2000).stdout
    assert ("tuples have a wrong y_init" in said) == (objective != "rft")  # few, as always in a test
    assert {row["objective"] for row in read(tmp_path / "out/metrics.jsonl")} == {objective}


# ---------------------------------------------------------------------------------------------------- distill.py

METRICS = {"step", "loss", "reward", "response_len", "truncated", "sync_gap", "grad_norm", "lr", "tokens", "seconds_generate",
           "seconds_judge", "seconds_teacher", "seconds_student", "seconds_sync", "tokens_per_s", "mfu", "peak_gb", "held_gb"}


def test_distill(qwen, problems_file, tmp_path):
    """Metrics, healthy sync, validation, best checkpoints, states; resumed bitwise; two ranks the same up to rounding."""
    start = lambda out, *more, **how: run("distill.py", "--model", qwen, "--data", problems_file, "--out", tmp_path / out,
                                          *DISTILL, *more, **how)
    val = ["--val", problems_file, "--val_every", 1, "--val_samples", 1]
    said = start("one", *val).stdout
    rows = read(tmp_path / "one/metrics.jsonl")
    assert len(rows) == 4 and all(METRICS <= row.keys() for row in rows)
    assert ["seconds_save" in row for row in rows] == [False, True, True, True] and "  (save 0." in said
    assert all(row["sync_gap"] < 1e-4 for row in rows) and rows[0]["loss"] > 0 and "val_accuracy" in rows[0]
    right, low, high = (rows[0][f"val_{name}"] for name in ("accuracy", "low", "high"))
    assert 0 <= low <= right <= high <= 1 and high - low > 0.05 and f"  val {right:.3f} [{low:.3f}, {high:.3f}]" in said
    assert len(os.listdir(tmp_path / "one/best")) == 3
    assert sorted(os.listdir(tmp_path / "one/state")) == ["step-000002", "step-000004"]
    assert not same_weights(tmp_path / "one/final", qwen, 1e-4)

    shutil.copytree(tmp_path / "one", tmp_path / "part")
    shutil.rmtree(tmp_path / "part/final")
    shutil.rmtree(tmp_path / "part/state/step-000004")
    assert "from step 2" in start("part", *val).stdout
    assert same_weights(tmp_path / "one/final", tmp_path / "part/final")
    assert [r["loss"] for r in read(tmp_path / "part/metrics.jsonl")] == [r["loss"] for r in rows]

    start("two", "--micro_tokens", 200, nproc=2)
    two = read(tmp_path / "two/metrics.jsonl")
    assert len(two) == 4 and two[0]["loss"] == pytest.approx(rows[0]["loss"], rel=1e-5) and two[0]["tokens"] == rows[0]["tokens"]
    assert two[1]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-3)  # later, a rounding error may change a sampled token


@pytest.mark.parametrize("more", [["--kl", "jsd", "--topk", 8], ["--kl", "mixed"], ["--sync_every", 2], ["--temperature", 0.5]],
                         ids=lambda m: m[-1])
def test_distill_variants(more, qwen, problems_file, tmp_path):
    """The sampler's log-probabilities are the model's whatever the temperature."""
    run("distill.py", "--model", qwen, "--data", problems_file, "--out", tmp_path / "out", *DISTILL, *more)
    rows = read(tmp_path / "out/metrics.jsonl")
    assert len(rows) == 4 and all(row["loss"] >= 0 and row["sync_gap"] < 1e-4 for row in rows)


def test_sabotaged_sync_stops_the_run(qwen, problems_file, tmp_path):
    """Weights that never reach the sampler: the gap grows and the run ends with an error that says so."""
    script = tmp_path / "sabotage.py"
    script.write_text("import distill\nfrom common.sampler import HFSampler\n"
                      "HFSampler.load = lambda self, named: [None for _ in named]\n"
                      "distill.main()\n")
    done = run(script, "--model", qwen, "--data", problems_file, "--out", tmp_path / "out", *DISTILL, "--steps", 30,
               "--lr", "2e-3", "--batch", 20, ok=False, env={"PYTHONPATH": str(REPO)})
    assert "its weights are stale" in done.stderr and done.stderr.count("\n") == 1  # also after keep_compiled
    gaps = [row["sync_gap"] for row in read(tmp_path / "out/metrics.jsonl")]
    assert gaps[0] < 1e-4 and gaps[-1] > 0.1 and len(gaps) < 30
    assert not os.path.exists(tmp_path / "out/final")


@pytest.mark.parametrize("script, how", [("srt.py", SRT), ("distill.py", [*DISTILL, "--batch", 30])], ids=["srt", "distill"])
def test_an_error_waits_for_no_verdict(script, how, qwen, problems_file, tmp_path):
    """The sampler breaks when all is sampled, and one verdict begun, which would take 10 minutes: the run ends."""
    (tmp_path / "slow.py").write_text(
        "import time\nINSTRUCTION = ''\ngold = lambda row: (str(row['answer']), None)\n"
        "def judge(gold, response, limits):\n"
        f"    open({str(tmp_path / 'judged')!r}, 'a').write('.')\n    time.sleep(600)\n    return 'wrong'\n")
    (tmp_path / "breaks.py").write_text(
        f"import os, time, {script[:-3]}\nfrom common.sampler import HFSampler\nwhole = HFSampler.sample\n"
        f"def sample(*args):\n    yield from whole(*args)\n    while not os.path.exists({str(tmp_path / 'judged')!r}):\n"
        "        time.sleep(.01)\n    raise OSError(28, 'No space left on device')\n"
        "HFSampler.sample = sample\nos.sched_setaffinity(0, [*os.sched_getaffinity(0)][:1])  # one verdict at a time\n"
        f"{script[:-3]}.main()\n")
    done = run(tmp_path / "breaks.py", "--model", qwen, "--data", problems_file, "--out", tmp_path / "out", *how,
               "--mode", tmp_path / "slow.py", "--judge_seconds", 1000, ok=False,
               env={"PYTHONPATH": str(REPO)})
    assert done.stderr.startswith("error: [Errno 28] No space left on device; mend this") and done.stderr.count("\n") == 1
    assert (tmp_path / "judged").read_text() == "."


def test_tuples_of_another_tokenizer(qwen, problems_file, tmp_path):
    """It has as many tokens, but calls them differently: their ids would train noise."""
    rows = make_rows(verify.load_tokenizer(qwen), problems_file)
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(qwen, tmp_path / "model")
    table = json.loads((tmp_path / "model/tokenizer.json").read_text())
    vocabulary = table["model"]["vocab"]
    letters = [token for token in vocabulary if len(token) == 1]
    vocabulary.update(zip(letters, [vocabulary[token] for token in letters[1:] + letters[:1]]))
    (tmp_path / "model/tokenizer.json").write_text(json.dumps(table))
    done = run("sft.py", "--model", tmp_path / "model", "--data", tmp_path / "d.jsonl", "--out", tmp_path / "out", ok=False)
    assert "d.jsonl:1: the tokens of y_init are not its text with this model's tokenizer" in done.stderr


# ---------------------------------------------------------------------------------------------------- all phases


def test_olmo_goes_through_all_phases(olmo, problems_file, tmp_path):
    """Sliding window, its own chat template, its own phrases, which the checkpoints carry on."""
    collect(tmp_path / "collect", olmo, problems_file, "--max_problems", 8)
    assert json.load(open(tmp_path / "collect/summary.json"))["phrases"] == list(verify.PHRASES["olmo"])
    rows = make_rows(verify.load_tokenizer(olmo), problems_file, "olmo")
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run("sft.py", "--model", olmo, "--data", tmp_path / "d.jsonl", "--out", tmp_path / "srt", *SFT)
    assert json.load(open(tmp_path / "srt/final/config.json"))["sdzero_phrases"] == list(verify.PHRASES["olmo"])
    done = run("distill.py", "--model", tmp_path / "srt/final", "--data", problems_file, "--out", tmp_path / "sdzero", *DISTILL,
               "--steps", 2)
    assert verify.PHRASES["olmo"][0] in done.stdout and os.path.exists(tmp_path / "sdzero/final/model.safetensors")


def test_kl_draws(qwen, collected, tmp_path):
    run("kl.py", "--student", qwen, "--teacher", qwen, "--responses", f"{collected}/responses.jsonl", "--out", tmp_path,
        "--max_responses", 6)
    s = json.load(open(tmp_path / "summary.json"))
    assert s["right"]["responses"] + s["wrong"]["responses"] == 6
    assert sum(s["wrong"]["kl_by_bucket"]) == pytest.approx(1.0, abs=1e-4)
    assert (tmp_path / "heatmap.html").read_text().count('"tokens":[') == 6 and os.path.getsize(tmp_path / "buckets.png") > 5000


def test_judging_again(collected, problems_file, tmp_path):
    """verify.py --responses finds a verdict that was turned round, and only that."""
    rows = read(f"{collected}/responses.jsonl")
    rows[4]["y_init_correct" if rows[4]["kind"] == "init" else "y_revised_correct"] ^= True
    path = tmp_path / "responses.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = run("verify.py", "--data", problems_file, "--responses", path).stdout
    assert f"{path}:5:" in out and "1 changed" in out and "120 judged" in out


@pytest.mark.skipif(not have_vllm(), reason="vLLM's CPU build is not installed")
def test_vllm_under_torchrun(qwen, problems_file, tmp_path):
    """One engine per rank, different numbers of requests, weights synchronised: the whole of phase 2, and srt.py."""
    how = ["--engine", "vllm", "--max_tokens", 24]
    run("srt.py", "--model", qwen, "--data", problems_file, "--out", tmp_path / "collect", *how, "--num_responses", 2,
        "--num_revisions", 1, "--target", 0, nproc=2)
    assert len(read(tmp_path / "collect/responses.jsonl")) == 160
    shares = json.load(open(tmp_path / "collect/summary.json"))["tokens_per_rank"]
    assert len(shares) == 2 and min(shares) > 0.25 * sum(shares)  # no rank has taken what the other could do
    run("distill.py", "--model", qwen, "--data", problems_file, "--out", tmp_path / "out", *DISTILL, *how, "--steps", 3, nproc=2)
    rows = read(tmp_path / "out/metrics.jsonl")
    assert len(rows) == 3 and all(row["sync_gap"] < 0.02 for row in rows)


@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data beside the project")
def test_real_problems(qwen, tmp_path):
    """GSM8K and AIME as they come: loading, sampling, verdicts and the report; prompts are longer than the toy's."""
    for name, n in (("gsm8k_test", 5), ("aime24", 3)):
        run("srt.py", "--eval", "--model", qwen, "--data", SHARED / f"data/{name}.jsonl", "--max_problems", n, "--engine", "hf",
            "--max_tokens", 30, "--out", tmp_path / name)
        assert json.load(open(tmp_path / name / "summary.json"))["init_total"] == n
