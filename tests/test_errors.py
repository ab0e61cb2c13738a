"""errors.py: which equations are false, which tokens are labelled, and ranks by whole logits in float64."""
import json
from statistics import mean, median

import errors
import pytest
import toy
import torch
from conftest import run
from test_page import Words
from transformers import AutoModelForCausalLM

import verify

# the first false equation up to its d, or None
LINES = {
    "She sold 48 + 24 = 72 clips": None,
    "So 3 + 4 = 8 apples, and 2 + 2 = 5": "3 + 4 = 8",
    "so 5 apples + 3 apples = 9 apples, 12/hour x 3 hours = 35, 20% * 50 = 12": None,  # not read
    r"\( 5 \times 3 = 15 \), \(20 \div 4 = 6\)": r"20 \div 4 = 6",
    "2 × 3 = 6, 12 ÷ 4 = 3, 7 − 9 = −2": None,
    "7 - 9 = 2": "7 - 9 = 2",
    "10 / 3 = 3.33, 10/3 = 3, 17 / 4 = 5, 20 / 3 = 6.66": None,  # rounded, cut, up
    "10 / 3 = 3.35": "10 / 3 = 3.35",
    "1.5 * 1.5 = 2.3, 2.04 * 2 = 4.1": None,
    "1.5 * 1.5 = 2.2 or 3 * 2.5 = 9": "3 * 2.5 = 9",
    "2 + 3 = 5 + 4 = 9 = 9": None,  # each = of a chain with its own left-hand side
    "2 + 3 = 5 + 4 = 8": "5 + 4 = 8",
    "1,200 + 300 = 1,500, 2 * 1{,}500 = 3000": None,
    "1,200 + 300 = 1,600": "1,200 + 300 = 1,600",
    "$5 x 3 = $16 in all": "5 x 3 = $16",
    "- 3 + 5 = 8\n* 3 + 4 = 7\n2. 3 + 4 = 7\n**5 * 2 = 10**": None,  # bullets, bold
    "- **Total:** 5 * 2 = **12**": "5 * 2 = **12",
    "x + 3 = 5, 2x + 3 = 9, half of 6 + 2 = 5, 2 * 3^2 = 18, 6 / 1/2 = 12, 3 x 1 and 1/4 = 9": None,
    "2 dozen + 1 = 25, 1 + 2 + ... + 10 = 55, 10:30 + 15 = 10:45, 3 + 4 = 7x, 3 + 4 = 2 * 3.5": None,
    "60 pets x 2/3 = 40, 8 x 1 1/2 = 12, 1 1/2 * 60 = 90, 14, 400 / 80 = 180, 250 * 12 = 3 000": None,
    "n += 3 + 4 == 8, 5 / 0 = 0, ((1 + 2 = 3, (2 + 3) * 2 = 10": None,
}


@pytest.mark.parametrize("text", LINES)
def test_false_equations(text):
    found = errors.false_equation(text + "\n")
    assert (found and found[0]) == LINES[text]
    assert not found or found[0].endswith(text[found[1]:found[2]]) and text[found[1]].isdigit()


def test_whatever_a_model_writes():
    """Loops end soon, and nothing is raised."""
    for piece in ("1 + ", "(", "(1 + ", r"\times", "7", "7,", "7 apples ", "= 7 ", " ", "1 x ", "(1 + 2 = "):
        errors.false_equation(piece * 5000 + "1 = 5.")


def test_labelled_tokens():
    """Tokens that hold a part of d, also after characters that two tokens share."""
    words = [b"\xe2\x82", b"\xac 3 ", b"\xc3", b"\x97 4 =", b" 1", b",0", b"13", b".5 so", b"\xff"]
    tokenizer = Words(words)
    y = [*range(9), 9, 1]  # 9: a special token
    assert errors.label(tokenizer, y) == ("3 × 4 = 1,013.5", [4, 5, 6, 7])
    assert errors.label(tokenizer, [0, 1, 2, 3, 9, 6, 9]) is None  # it does not go on after the end of a turn
    assert errors.label(tokenizer, [*y[:7], 9]) and errors.label(tokenizer, y[:7]) is None  # it may be cut


def test_ranks_of_equals():
    assert errors.rank(torch.tensor([3.0, 1.0, 2.0]), [1, 2]) == 0.5
    assert errors.rank(torch.zeros(5), [1, 2]) == (5 - 2) / (2 + 1) / 4


def test_against_whole_logits(qwen, tmp_path):
    """The command line, with another teacher; places in sorted lists of float64."""
    tokenizer, teacher = verify.load_tokenizer(qwen), toy.tiny_qwen3(str(tmp_path / "teacher"), seed=1)
    rows = [{"kind": "init", "id": str(i), "sample": 0, "problem": "4*3=?+5=?", "answer": "6", "mode": "math",
             "y_init_tokens": tokenizer.encode(y, add_special_tokens=False) + tokenizer.end_ids[:1],
             "y_init_correct": right} for i, (y, right) in enumerate([
                 ("4*3=38\n1+5=6 \\boxed{6}", False), ("4+3=7\n7-5=3 \\boxed{3}", False),
                 ("4+3=8 \\boxed{8}", True), ("4+3=7 \\boxed{7}", False)])]
    path, out = tmp_path / "responses.jsonl", tmp_path / "out"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = "tests/errors.py", "--model", qwen, "--responses", path, "--out", out
    said = run(*flags, "--teacher", teacher).stdout
    summary = json.loads((out / "summary.json").read_text())
    assert "2 of 3 wrong y_init" in said and (summary["wrong"], summary["responses"]) == (3, 2)
    assert [error["equation"] for error in summary["errors"]] == ["4*3=38", "7-5=3"]
    assert [error["tokens"] for error in summary["errors"]] == [[4, 5], [10]]

    def log_probabilities(model, before, y):  # [T, V]
        logits = AutoModelForCausalLM.from_pretrained(model).double()(torch.tensor([before + y])).logits[0]
        return logits.log_softmax(-1)[len(before) - 1:-1].detach()

    P_r, neutral = verify.PHRASES["qwen"], "Here is the response once more."
    for row, error in zip(rows, summary["errors"]):
        y, n, k = row["y_init_tokens"], len(row["y_init_tokens"]), len(error["tokens"])
        x = verify.chat_ids(tokenizer, verify.Problem.of_row(row))
        p = log_probabilities(qwen, x, y)
        wrong, right, other = (log_probabilities(teacher, x + y[:-1] + tokenizer.encode(
            f"\n\n{phrase}\n\n", add_special_tokens=False), y) for phrase in (*P_r, neutral))
        of_y = lambda log: log[torch.arange(n), y]
        columns = [(p.exp() * (p - q)).sum(-1) for q in (wrong, right, other)]
        columns += [-of_y(p), of_y(right) - of_y(wrong)]
        for name, values in zip(errors.COLUMNS, columns):
            place = min(sorted(values.tolist(), reverse=True).index(values[t]) for t in error["tokens"])
            assert error[name] == place / (n - 1)
        assert error["chance"] == (n - k) / (k + 1) / (n - 1)
    for name in errors.COLUMNS:
        each = [error[name] for error in summary["errors"]]
        assert summary[name] == {"mean": mean(each), "median": median(each)}
        assert f"{name:34s}{mean(each):8.3f}{median(each):8.3f}\n" in said

    path.write_text(json.dumps(rows[2]) + "\n" + json.dumps(rows[3]) + "\n")
    failed = run(*flags, ok=False).stderr
    assert f"error: --responses {path}: 1 wrong y_init, no false equation; add more" in failed
