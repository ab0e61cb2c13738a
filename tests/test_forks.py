"""docs/forks/*.diff: each applies to a copy, trains alone and with two ranks, and does what its top lines say."""
import functools
import importlib.util
import json
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

import verify

DIFFS = {path.stem: path for path in sorted((REPO / "docs/forks").glob("*.diff"))}
NAMES = ["capped-kl", "ema-teacher", "gold-teacher", "neutral-phrase", "no-r1-branch", "per-response-mean",
         "sampled-token", "swapped-reward"]
FLAGS = {"ema-teacher": ["--ema", 0.75], "sampled-token": ["--kl", "sampled"],
         "neutral-phrase": ["--phrases", "neutral"]}
TRAIN = ["--steps", 2, "--batch", 12, "--lr", "1e-3", "--warmup", 0, "--temperature", 1.3, "--max_tokens", 10,
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
    shutil.copytree(REPO / "verifiers", folder / "verifiers")
    for path in REPO.glob("*.py"):
        shutil.copy(path, folder)
    if name != "plain":  # as a user would; not in a repository that may lie around the folder
        subprocess.run(["git", "apply", DIFFS[name]], cwd=folder, check=True,
                       env={**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)})
    return folder


def load(path):
    """A module from its file, under another name than the project's."""
    spec = importlib.util.spec_from_file_location(f"fork_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def fork(guesser, tmp_path_factory):
    """
    fork(name) -> its folder and, of two steps of its distill.py, the rows of metrics.jsonl alone and with two
    ranks, and the --out of both. Made once.
    """
    data = tmp_path_factory.mktemp("data")
    rows = [{"id": f"p{i}", "problem": f"{i % 11}+{i // 11}=?", "answer": str(3 + i % 3)} for i in range(18)]
    (data / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (data / "own.py").write_text(VERIFIER)

    @functools.cache
    def made(name):
        folder = apply(name, tmp_path_factory.mktemp(name))

        def distill():
            for module in ("distill", "kl", "sft", "srt", "verify"):
                sys.modules.pop(module, None)
            sys.path.insert(0, str(folder))
            import distill
            assert os.path.dirname(distill.__file__) == str(folder)
            distill.main()

        for nproc in (1, 2):
            args = ["--model", guesser, "--data", data / "problems.jsonl", "--mode", data / "own.py",
                    "--out", folder / f"out{nproc}", *TRAIN, *FLAGS.get(name, [])]
            run = Forked(distill, args, nproc, folder / "log")
            assert run.wait(120), (folder / "log.err").read_text()[-3000:]
        outs = [folder / "out1", folder / "out2"]
        return SimpleNamespace(folder=folder, outs=outs, alone=read(outs[0] / "metrics.jsonl"),
                               two=read(outs[1] / "metrics.jsonl"))

    return made


def test_names():
    assert list(DIFFS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_fork(name, fork):
    """Two lines on top, at most 20 changed; both steps are made, alone and with two ranks alike."""
    top, expect, first, *lines = DIFFS[name].read_text().splitlines()
    assert top.startswith("# Tests ") and expect.startswith("# Expect ") and first.startswith("diff --git")
    changed = [line for line in lines if line[0] in "+-" and not line.startswith(("+++ ", "--- "))]
    assert 1 <= len(changed) <= 20
    assert name in FLAGS or "new --out" in top  # flags.json does not tell it from a run without the fork
    found, plain = fork(name), fork("plain")
    for rows in (found.alone, found.two):
        assert [row["step"] for row in rows] == [0, 1] and all(row["updated"] for row in rows)
        assert [row["reward"] for row in rows[:1]] == [plain.alone[0]["reward"]]
    for step, tolerance in ((0, 1e-5), (1, 1e-3)):
        alone, two = found.alone[step], found.two[step]
        assert two["loss"] == pytest.approx(alone["loss"], rel=tolerance, abs=1e-6)
        assert two["tokens"] == alone["tokens"]
    changes = found.alone[1 if name == "ema-teacher" else 0], plain.alone[1 if name == "ema-teacher" else 0]
    assert abs(changes[0]["loss"] / changes[1]["loss"] - 1) > 1e-3


def test_plain_run_has_all_that_forks_change(fork):
    """Right and wrong y, of several lengths; a fork's step is compared with this one's."""
    row = fork("plain").alone[0]
    assert 0.2 < row["reward"] < 0.8 and row["kl_wrong"] > row["loss"] > row["kl_right"]
    assert 0 < row["truncated"] < 1


def test_ema_teacher(fork, guesser, tmp_path):
    """The saved teacher is a quarter of the way from the last one to the student, which no flag but --ema asks for."""
    found = fork("ema-teacher")
    assert found.alone[0]["loss"] == fork("plain").alone[0]["loss"]  # it moves after the step
    start = load_file(f"{guesser}/model.safetensors")
    for out in found.outs:
        before = start
        for step in (1, 2):
            dcp_to_torch_save(out / f"state/step-{step:06d}", tmp_path / "state.pt")
            state = torch.load(tmp_path / "state.pt")
            print(list(state)[:50])
            now = {name: state[f"teacher.{name}"] for name in before}
            for name in before:
                want = 0.75 * before[name] + 0.25 * state[name]
                assert torch.allclose(now[name], want, atol=1e-6) and not torch.equal(now[name], before[name])
            before = now
