"""srt.py and distill.py with --mode code, end to end on tests/code_problems.jsonl."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import toy  # noqa: E402
import verify  # noqa: E402

PROBLEMS = ROOT / "tests" / "code_problems.jsonl"
RIGHT = {
    "sum": ("cpp", "#include <iostream>\nint main() { long a, b; std::cin >> a >> b; std::cout << a + b << '\\n'; }"),
    "reverse": ("python", "print(input()[::-1])"),
    "mean": ("python", "n = int(input())\nprint(sum(map(float, input().split())) / n)"),
    "primes": ("cpp", "#include <cstdio>\nint main() { int n, c = 0; scanf(\"%d\", &n);\n"
                      "for (int p = 2; p <= n; p++) { int d = 2; while (p % d) d++; c += d == p; } printf(\"%d\\n\", c); }"),
    "two-sum": ("python", "class Solution:\n    def twoSum(self, nums, target):\n        return next([i, j] for j, b in enumerate(nums)\n"
                          "                    for i, a in enumerate(nums[:j]) if a + b == target)"),
}
# srt.py with a sampler that answers from a list: a first attempt that is right for half of the problems, and revisions
# that are right. The ids of a sample are one number, which the tokenizer turns into the text of the list.
STUB = """
import json, sys
sys.path.insert(0, {root!r})
import srt, verify
from common.sampler import Sample, Sampler
texts, prompts = json.load(open({texts!r}))
class Stub(Sampler):
    max_len, max_seqs = 1000, 4
    def stream(self, pull, **how):
        while (request := pull()) is not None:
            i, = [i for i, x in enumerate(prompts) if request.ids[: len(x)] == x]
            yield Sample(request, [2 * i + (request.ids != prompts[i])], [0.0], False)
    def close(self):
        pass
load = verify.load_tokenizer
def load_tokenizer(model):
    tokenizer = load(model)
    tokenizer.decode = lambda ids, **how: texts[ids[0]]
    return tokenizer
srt.make_sampler = lambda *args: Stub()
verify.load_tokenizer = load_tokenizer
srt.main()
"""

pytestmark = pytest.mark.usefixtures("only_sandbox")


def no_sandbox():
    """Why programs cannot be judged here, or None."""
    try:
        verify.load_verifier("code").check({"seconds": 5.0, "memory": 1.0, "sandbox": True})
    except SystemExit as error:
        return str(error)


NO_SANDBOX = no_sandbox()
sandboxed = pytest.mark.skipif(NO_SANDBOX is not None, reason=str(NO_SANDBOX))


def run(*command):
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, timeout=200, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return toy.tiny_qwen3(str(tmp_path_factory.mktemp("model")))


@sandboxed
def test_the_data_set_is_reported():
    out = run("verify.py", "--mode", "code", "--data", PROBLEMS)
    for line in ("5 kept, 2 dropped", "1  dropped  no tests", "1  dropped  several outputs are right"):
        assert line in out


@sandboxed
def test_srt_keeps_what_the_tests_pass(tmp_path, model):
    with verify.Judge("code", workers=1) as judge:
        problems, _ = verify.load_problems(str(PROBLEMS), judge)
    tokenizer = verify.load_tokenizer(model)
    asked = {problem.id: verify.chat_ids(tokenizer, problem) for problem in problems}
    texts = []
    for i, problem in enumerate(problems):
        right = "So:\n```{}\n{}\n```\n".format(*RIGHT[problem.id])
        texts += [right if i % 2 else "```python\nprint('no')\n```", right]
    (tmp_path / "texts.json").write_text(json.dumps([texts, list(asked.values())]))
    (tmp_path / "stub.py").write_text(STUB.format(root=str(ROOT), texts=str(tmp_path / "texts.json")))
    run(tmp_path / "stub.py", "--model", model, "--data", PROBLEMS, "--mode", "code", "--out", tmp_path / "out",
        "--num_revisions", "1", "--judge_seconds", "5", "--max_tokens", "100")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["init_verdicts"] == {"right": 2, "wrong": 3} and summary["revised_verdicts"] == {"right": 5}
    rows = [json.loads(line) for line in (tmp_path / "out" / "d_revision.jsonl").read_text().splitlines()]
    assert len(rows) == 5 and all(row["mode"] == "code" and row["answer"] is None for row in rows)
    # A row is enough to ask the same question again, in the later phases.
    assert all(verify.chat_ids(tokenizer, verify.Problem.of_row(row)) == asked[row["id"]] for row in rows)
    assert all("fenced code block" in verify.load_verifier(verify.Problem.of_row(row).mode).INSTRUCTION for row in rows)
    # Judged again, nothing changes, unless a row was tampered with.
    responses = next((tmp_path / "out").glob("responses*.jsonl"))
    out = run("verify.py", "--mode", "code", "--data", PROBLEMS, "--responses", responses)
    assert "10 judged" in out and "0 changed" in out


@sandboxed
def test_the_command_lines_with_a_random_model(tmp_path, model):
    flags = ["--engine", "hf", "--max_tokens", "8", "--mode", "code", "--data", PROBLEMS, "--model", model]
    run("srt.py", *flags, "--num_revisions", "1", "--out", tmp_path / "srt")
    summary = json.loads((tmp_path / "srt" / "summary.json").read_text())
    assert summary["init_total"] == 5 and summary["init_verdicts"] == {"no answer": 5} and summary["kept"] == 0
    run("distill.py", *flags, "--steps", "1", "--batch", "2", "--out", tmp_path / "distill")
    rows = [json.loads(line) for line in (tmp_path / "distill" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 1 and rows[0]["reward"] == 0 and rows[0]["tokens"] > 0
    assert os.path.isfile(tmp_path / "distill" / "final" / "config.json")
