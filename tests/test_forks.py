"""docs/forks/*.diff: each applies to a copy, trains alone and with two ranks, and does what its top says."""
import functools
import importlib
import json
import math
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from chaos import Forked
from conftest import REPO, read
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import sft
import verify

DIFFS = {path.stem: path for path in sorted((REPO / "docs/forks").glob("*.diff"))}
NAMES = ["capped-kl", "contrast", "ema-teacher", "gold-teacher", "neutral-phrase", "no-r1-branch",
         "per-response-mean", "sampled-token", "swapped-reward"]
OF_SFT = ["no-wrong-init"]
FLAGS = {"ema-teacher": ["--ema", 0.75], "sampled-token": ["--kl", "sampled"],
         "neutral-phrase": ["--phrases", "neutral"]}
TRAIN = ["--steps", 2, "--batch", 12, "--lr", "1e-3", "--warmup", 0, "--temperature", 1.6, "--max_tokens", 10,
         "--engine", "hf", "--save_every", 1]
VERIFIER = """
INSTRUCTION = ""
def gold(row):
    return row["answer"], None
def judge(gold, response, limits):
    return "right" if response.endswith(f" \\\\boxed{{{gold}}}") else "wrong"
"""  # its workers start ten times faster than those of --mode math


def apply(name, folder):
    """The project with one fork applied, or for "plain" as it is; returns the folder."""
    for package in ("common", "verifiers"):
        shutil.copytree(REPO / package, folder / package)
    for path in REPO.glob("*.py"):
        shutil.copy(path, folder)
    if name != "plain":  # as a user would; not in a repository that may lie around the folder
        subprocess.run(["git", "apply", DIFFS[name]], cwd=folder, check=True,
                       env={**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)})
    return folder


def modules_of(folder):
    """distill, kl, sft and verify of a copy, beside those of the project."""
    scripts = "distill", "kl", "sft", "srt", "verify"
    names = [name for name in sys.modules if name in scripts or name.split(".")[0] in ("common", "verifiers")]
    ours = {name: sys.modules.pop(name) for name in names}
    sys.path.insert(0, str(folder))
    try:
        distill, kl, sft, verify = map(importlib.import_module, ("distill", "kl", "sft", "verify"))
        assert distill.__file__ == str(folder / "distill.py")
        return SimpleNamespace(distill=distill, kl=kl, sft=sft, verify=verify)
    finally:
        sys.path.remove(str(folder))
        sys.modules.update(ours)


@pytest.fixture(scope="module")
def fork(guesser, tmp_path_factory):
    """
    fork(name) -> its modules distill, kl and verify and, of two steps of its distill.py, the rows of
    metrics.jsonl alone and with two ranks (`alone`, `two`) and the --out of both. Made once.
    """
    data = tmp_path_factory.mktemp("data")
    rows = [{"id": f"p{i}", "problem": f"{i % 11}+{i // 11}=?", "answer": str(3 + i % 3)} for i in range(18)]
    (data / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (data / "own.py").write_text(VERIFIER)

    @functools.cache
    def made(name):
        folder = apply(name, tmp_path_factory.mktemp(name))
        forked = modules_of(folder)
        for nproc in (1, 2):
            args = ["--model", guesser, "--data", data / "problems.jsonl", "--mode", data / "own.py",
                    "--out", folder / f"out{nproc}", *TRAIN, *FLAGS.get(name, [])]
            run = Forked(forked.distill.main, args, nproc, folder / "log",
                         patch=lambda rank: sys.modules.update(verify=forked.verify))  # for pickle
            assert run.wait(120), (folder / "log.err").read_text()[-3000:]
        outs = [folder / "out1", folder / "out2"]
        return SimpleNamespace(**vars(forked), outs=outs, alone=read(outs[0] / "metrics.jsonl"),
                               two=read(outs[1] / "metrics.jsonl"))

    return made


def test_names():
    assert list(DIFFS) == sorted(NAMES + OF_SFT)


@pytest.mark.parametrize("name", NAMES + OF_SFT)
def test_two_lines_on_top_and_at_most_20_changed(name):
    top, expect, first, *lines = DIFFS[name].read_text().splitlines()
    assert top.startswith("# Tests ") and expect.startswith("# Expect ") and first.startswith("diff --git")
    changed = [line for line in lines if line[0] in "+-" and not line.startswith(("+++ ", "--- "))]
    assert 1 <= len(changed) <= 20
    assert name in FLAGS or "new --out" in top  # flags.json does not tell it from a run without the fork


@pytest.mark.parametrize("name", NAMES)
def test_fork(name, fork):
    """Both steps are made, alone and with two ranks alike."""
    found, plain = fork(name), fork("plain")
    for rows in (found.alone, found.two):
        assert [row["step"] for row in rows] == [0, 1] and all(row["updated"] for row in rows)
        assert rows[0]["reward"] == plain.alone[0]["reward"]
    for step, tolerance in ((0, 1e-5), (1, 1e-3)):
        alone, two = found.alone[step], found.two[step]
        assert two["loss"] == pytest.approx(alone["loss"], rel=tolerance, abs=1e-6)
        assert two["tokens"] == alone["tokens"]
    step = 1 if name == "ema-teacher" else 0  # that one moves after the first
    assert found.alone[step]["loss"] != pytest.approx(plain.alone[step]["loss"], rel=1e-3)


def test_plain_run_has_all_that_forks_change(fork):
    """Right and wrong y, of several lengths, to which the teacher says other things than the student."""
    row = fork("plain").alone[0]
    assert 0.2 < row["reward"] < 0.8 and row["kl_wrong"] > row["loss"] > row["kl_right"] > 0.1
    assert row["tokens"] % 12  # of 12 responses


def test_ema_teacher(fork, guesser, tmp_path):
    """--ema alone makes it move: by a quarter of the way to the student, after each step, and saved."""
    found = fork("ema-teacher")
    assert found.alone[0]["loss"] == fork("plain").alone[0]["loss"]
    for out in found.outs:
        before = load_file(f"{guesser}/model.safetensors")
        for step in (1, 2):
            dcp_to_torch_save(out / f"state/step-{step:06d}", tmp_path / "state.pt")
            state = torch.load(tmp_path / "state.pt")
            for name, old in before.items():
                now = state[f"teacher.{name}"]
                assert torch.allclose(now, 0.75 * old + 0.25 * state[name], atol=1e-6), name
                assert not torch.equal(now, old), name
            before = {name: state[f"teacher.{name}"] for name in before}


X, Y, OTHER_Y = [5, 6, 7], [8, 9, 10], [11, 12]


def read_by_teacher(found, guesser, answer="3", y=Y, phrases=None):
    """What the fork's teacher reads where it is told that y is wrong, and that it is right."""
    tokenizer, problem = verify.load_tokenizer(guesser), found.verify.Problem("a", "1+2=?", answer)
    phrases = found.verify.phrases_of(guesser, phrases)
    return [found.verify.teacher_reads(tokenizer, problem, X, y, told, phrases) for told in (False, True)]


def rows_of(found, guesser, max_teacher_len=1000):
    """The Row of a wrong y, and of a right one."""
    tokenizer, problem = verify.load_tokenizer(guesser), found.verify.Problem("a", "1+2=?", "3")
    sample = SimpleNamespace(ids=Y, logprobs=[-1.0] * len(Y))
    make = functools.partial(found.distill.make_row, tokenizer, verify.PHRASES["qwen"], problem, X, sample)
    return [make(correct, max_teacher_len) for correct in (False, True)]


def test_gold_teacher(fork, guesser):
    """The answer, neither y nor the verdict; and one y, not two, has to fit into --max_teacher_len."""
    found, tokenizer = fork("gold-teacher"), verify.load_tokenizer(guesser)
    wrong, right = read_by_teacher(found, guesser)
    assert wrong == right == read_by_teacher(found, guesser, y=OTHER_Y)[0]
    other = read_by_teacher(found, guesser, answer="4")[0]
    changed = [pair for pair in zip(wrong, other, strict=True) if pair[0] != pair[1]]
    assert changed == [tuple(tokenizer.convert_tokens_to_ids(["3", "4"]))]
    assert all(row.y == Y[:2] and row.seen == wrong for row in rows_of(found, guesser, len(wrong) + 2))


def test_per_response_mean(fork, guesser):
    found = fork("per-response-mean")
    assert [row.weight * len(row.y) for row in rows_of(found, guesser)] == [1.0, 1.0]
    assert [row.y for row in rows_of(found, guesser, 4)] == [[], []]  # no division by 0


def test_no_r1_branch(fork, guesser):
    """What is left is the KL of the wrong y alone."""
    found, plain = fork("no-r1-branch"), fork("plain").alone[0]
    assert [row.weight for row in rows_of(found, guesser)] == [1.0, 0.0]
    assert found.alone[0]["loss"] == pytest.approx(plain["kl_wrong"], rel=1e-5)


def test_swapped_reward(fork, guesser):
    swapped = read_by_teacher(fork("swapped-reward"), guesser)
    assert swapped == read_by_teacher(fork("plain"), guesser)[::-1] and swapped[0] != swapped[1]


def test_neutral_phrase(fork, guesser):
    found = fork("neutral-phrase")
    wrong, right = read_by_teacher(found, guesser, phrases="neutral")
    assert wrong == right != read_by_teacher(found, guesser)[0] and wrong[:6] == X + Y
    config = json.loads((found.outs[0] / "final/config.json").read_text())
    assert config["sdzero_phrases"] == ["Here is the response once more."] * 2


def test_contrast_row(fork, guesser):
    """What the teacher reads after the one phrase and after the other."""
    wrong, right = rows_of(fork("contrast"), guesser)
    assert wrong.seen == right.other != right.seen == wrong.other


def test_no_wrong_init(qwen, d_revision, tmp_path):
    """No loss on a wrong y_init; all else as it was, P_r after it too; alone and with two ranks alike."""
    found = modules_of(apply("no-wrong-init", tmp_path / "fork"))
    rows, tokenizer = read(d_revision), verify.load_tokenizer(qwen)
    assert {row["y_init_correct"] for row in rows} == {True, False}
    for row in rows:
        now, before = (module.make_example(tokenizer, verify.PHRASES["qwen"], row, "sum")
                       for module in (found.sft, sft))
        x = now.p_r - len(verify.without_end(tokenizer, row["y_init_tokens"]))
        left_out = range(0 if row["y_init_correct"] else x, 0 if row["y_init_correct"] else now.p_r)
        assert now.ids == before.ids and now.p_r == before.p_r and x > 0
        assert now.weights == [0 if t in left_out else w for t, w in enumerate(before.weights)]
    losses = []
    for nproc in (1, 2):
        args = ["--model", qwen, "--data", d_revision, "--out", tmp_path / f"out{nproc}",
                "--batch", 4, "--epochs", 1]
        run = Forked(found.sft.main, args, nproc, tmp_path / "log")
        assert run.wait(120), (tmp_path / "log.err").read_text()[-3000:]
        losses.append([row["loss"] for row in read(tmp_path / f"out{nproc}/metrics.jsonl")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# ---------------------------------------------------------------------------------- losses against autograd


def logits():
    """Two [23, 57] of float64, the student's with a gradient, and a target for each row."""
    g = torch.Generator().manual_seed(0)
    s, t = (torch.randn(23, 57, generator=g, dtype=torch.float64) * 2 for _ in range(2))
    return s.requires_grad_(), t, torch.randint(57, (23,), generator=g)


def gradient(loss, s):
    return torch.autograd.grad(loss, s, retain_graph=True)[0]


def test_capped_kl_against_autograd(fork):
    """A capped entry is a constant; the sum of the terms is no divergence any more, and can be negative."""
    kl, (s, t, _) = fork("capped-kl").kl, logits()
    log_p, log_q = s.log_softmax(-1), t.log_softmax(-1)
    terms = log_p.exp() * (log_p - log_q)
    assert (terms > 0.05).any(-1).all()
    value, grad = kl.divergence(log_p.detach(), log_q, "reverse")
    assert torch.allclose(value, terms.clamp(max=0.05).sum(-1), rtol=1e-12)
    assert torch.allclose(grad, gradient(terms.clamp(max=0.05).sum(), s), rtol=1e-9, atol=1e-15)
    p, q = torch.tensor([[0.9, 0.1]]), torch.tensor([[0.1, 0.9]])
    assert kl.divergence(p.log(), q.log(), "reverse")[0].item() < -0.15
    value, grad = kl.divergence(log_p.detach(), log_p.detach() + 1e-4, "reverse")  # nothing to cap
    assert grad.abs().max() < 1e-12
    assert fork("capped-kl").alone[0]["loss"] < fork("plain").alone[0]["loss"]


@pytest.mark.parametrize("bound", [math.inf, 0.5])
def test_contrast_against_autograd(bound, fork, monkeypatch):
    """A policy gradient whose advantage is the contrast c, for each entry: -p (c - mean of c under p)."""
    kl, (s, told, y) = fork("contrast").kl, logits()
    assert kl.BOUND == 0.5
    monkeypatch.setattr(kl, "BOUND", bound)
    other, eye, ones = told.flip(0), torch.eye(57), torch.ones(23)
    log_p, c = s.log_softmax(-1), told - other
    if bound < math.inf:  # from its mean, so that a constant of the logits changes nothing
        c = (c - (log_p.detach().exp() * c).sum(-1, keepdim=True)).clamp(-bound, bound)
        told = told + torch.arange(23)[:, None]
    target = (log_p.detach() + c).log_softmax(-1)
    found = kl.chunked_kl(s.float(), eye, (told - other).float(), eye, ones, y)
    assert torch.allclose(found.loss.double(), (log_p.exp() * (log_p - target)).sum(), rtol=1e-5)
    p = log_p.detach().exp()
    assert torch.allclose(gradient(found.loss, s), -p * (c - (p * c).sum(-1, keepdim=True)), atol=1e-5)
    same = kl.chunked_kl(s.float(), eye, torch.zeros(23, 57), eye, ones, y)  # whatever it copies
    assert same.loss.item() == 0 and not gradient(same.loss, s).any()


def test_sampled_token_against_autograd(fork):
    """The policy gradient; its mean over y_t, and that of the loss, are the reverse KL's."""
    kl, (s, t, y) = fork("sampled-token").kl, logits()
    log_p, log_q = s.log_softmax(-1), t.log_softmax(-1)
    at = torch.arange(len(y))
    value, grad = kl.divergence(log_p.detach(), log_q, "sampled", y)
    cost = (log_p - log_q).detach()[at, y]
    assert torch.equal(value, cost)
    assert torch.allclose(grad, gradient((cost * log_p[at, y]).sum(), s), rtol=1e-9, atol=1e-15)
    mean_value, mean_grad = torch.zeros_like(value), torch.zeros_like(grad)
    for v in range(57):
        value, grad = kl.divergence(log_p.detach(), log_q, "sampled", torch.full_like(y, v))
        p = log_p.detach().exp()[:, v]
        mean_value, mean_grad = mean_value + p * value, mean_grad + p[:, None] * grad
    reverse = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert torch.allclose(mean_value, reverse, rtol=1e-9)
    assert torch.allclose(mean_grad, gradient(reverse.sum(), s), rtol=1e-9, atol=1e-12)
    eye, ones = torch.eye(57), torch.ones(23)
    with pytest.raises(ValueError, match="topk"):
        kl.chunked_kl(s.float(), eye, t.float(), eye, ones, y, "sampled", topk=3)
