"""Whole steps of sft.py and distill.py against plain transformers, torch.optim and the formulas of the paper."""
import json

import pytest
import torch
from conftest import read, run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import distill
import sft
import verify
from common.sampler import HFSampler, request_seed

WRONG, RIGHT = "\n\nWait, this response is wrong. Let me correct it.\n\n", "\n\nLet me rephrase the above solution.\n\n"


def log_probs(model, before, y):
    """[len(y), V]: what each token of y is predicted with."""
    return model(torch.tensor([before + y])).logits[0, len(before) - 1:-1].log_softmax(-1)


def step(model, optimizer, loss, lr):
    """One clipped step; returns the norm before."""
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return norm.item()


def nearly_all_close(model, path):
    """AdamW turns a gradient that is rounding error into a full step, so a few weights may be off."""
    saved = load_file(f"{path}/model.safetensors")
    off = [(saved[name] - p.detach()).abs().flatten() for name, p in model.named_parameters()]
    return (torch.cat(off) < 1e-5).float().mean() > 0.99


@pytest.mark.parametrize("objective", ["generation", "revision", "sum"])
def test_sft(objective, qwen, d_revision, tmp_path):
    """All rows in one step: loss, gradient norm and weights; the probability that y_init goes on with P_r, and a word on it."""
    out = run("sft.py", "--model", qwen, "--data", d_revision, "--out", tmp_path, "--objective", objective, "--batch", 100,
              "--epochs", 1, "--lr", "1e-3", "--weight_decay", 0.1).stdout
    assert ("it will seldom revise by itself" in out) == (objective != "revision")
    tokenizer, model = verify.load_tokenizer(qwen), AutoModelForCausalLM.from_pretrained(qwen)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1, betas=(0.9, 0.95))
    total, tokens, p_r = 0, 0, []
    for row in read(d_revision):
        x = verify.chat_ids(tokenizer, verify.Problem.of_row(row))
        y = row["y_init_tokens"][:-1] + tokenizer.encode(RIGHT if row["y_init_correct"] else WRONG, add_special_tokens=False)
        first, second = {"generation": (1, 1), "revision": (0, 1), "sum": (1, 2)}[objective]
        weights = torch.tensor([first] * len(y) + [second] * len(row["y_revised_tokens"]))
        y = y + row["y_revised_tokens"]
        log_p = log_probs(model, x, y)[torch.arange(len(y)), y]
        p_r.append(log_p[len(row["y_init_tokens"]) - 1].exp().item())
        total = total - (log_p * weights).sum()
        tokens += int((weights > 0).sum())
    norm = step(model, optimizer, total / tokens, 1e-3)
    metrics, = read(tmp_path / "metrics.jsonl")
    assert metrics["loss"] == pytest.approx((total / tokens).item(), rel=1e-5) and metrics["loss_tokens"] == tokens
    assert metrics["p_r"] == pytest.approx(sum(p_r) / len(p_r), rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4) and nearly_all_close(model, tmp_path / "final")


def test_sft_in_two_stages(qwen, d_revision, tmp_path):
    """Each step of two stages of two epochs: a cosine, a learning rate and an optimizer of their own."""
    run("sft.py", "--model", qwen, "--data", d_revision, "--out", tmp_path, "--objective", "two-stage", "--stage2_size", 11,
        "--batch", 7, "--epochs", 2, "--lr", "1e-3", "--stage2_lr", "5e-4", "--weight_decay", 0.1, "--seed", 3)
    tokenizer, model = verify.load_tokenizer(qwen), AutoModelForCausalLM.from_pretrained(qwen)
    stages = sft.read_examples(str(d_revision), "two-stage", 11, tokenizer, verify.PHRASES["qwen"], 1024, seed=3)[0]
    rows = iter(read(tmp_path / "metrics.jsonl"))
    for stage, (lr, (_, examples)) in enumerate(zip((1e-3, 5e-4), stages), 1):
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1, betas=(0.9, 0.95))
        steps = 2 * -(-len(examples) // 7)
        for number in range(steps):
            total, tokens, row = 0, 0, next(rows)
            for example in sft.step_examples(examples, number, 7, f"3/{stage}"):
                weights, targets = torch.tensor(example.weights[1:]), example.ids[1:]
                log_p = log_probs(model, example.ids[:1], targets)[torch.arange(len(targets)), targets]
                total, tokens = total - (log_p * weights).sum(), tokens + int((weights > 0).sum())
            norm = step(model, optimizer, total / tokens, lr * sft.cosine(number, steps))
            assert row["stage"] == stage and row["lr"] == pytest.approx(lr * sft.cosine(number, steps))
            assert row["loss"] == pytest.approx((total / tokens).item(), rel=1e-3)
            assert row["grad_norm"] == pytest.approx(norm, rel=1e-2)
    assert next(rows, None) is None


@pytest.mark.parametrize("sync_every, nproc", [(2, 2), (0, 0)])
def test_distill(sync_every, nproc, guesser, qwen, ranks, tmp_path):
    """
    Three steps: warm-up, a teacher of its own, which stays or after the second step is set to the student, validation before each
    step and at the end, at a temperature of its own.
    """
    for name, n in (("train", 10), ("val", 4)):
        (tmp_path / f"{name}.jsonl").write_text("".join(
            json.dumps({"id": f"{name}{i}", "problem": f"{i}+{n}=?", "answer": "3"}) + "\n" for i in range(n)))
    done = run("distill.py", "--model", guesser, "--teacher", qwen, "--data", tmp_path / "train.jsonl", "--out", tmp_path / "out",
        "--batch", 8, "--steps", 3, "--warmup", 2, "--lr", "2e-3", "--weight_decay", 0.1, "--sync_every", sync_every, "--max_tokens", 24,
        "--engine", "hf", "--val", tmp_path / "val.jsonl", "--val_every", 1, "--val_samples", 5, "--seed", 3, "--max_sync_gap", 0.01,
        "--val_temperature", 0.5, nproc=nproc)
    assert "of --val" not in done.stdout
    tokenizer = verify.load_tokenizer(guesser)
    student, teacher = (AutoModelForCausalLM.from_pretrained(folder) for folder in (guesser, qwen))
    sampler = HFSampler(guesser, tokenizer, 1024, ranks.device, torch.float32)
    optimizer = torch.optim.AdamW(student.parameters(), weight_decay=0.1, betas=(0.9, 0.999))
    with verify.Judge(workers=1) as judge:
        train, val = (verify.load_problems(str(tmp_path / f"{name}.jsonl"), judge)[0] for name in ("train", "val"))

    def sample(problems, seeds, **how):
        """[(x, y, right)] from the student as it is now."""
        sampler.load(student.named_parameters())
        prompts = [verify.chat_ids(tokenizer, p) for p in problems]
        ys = [s.ids for s in sampler.generate(prompts, seeds, max_tokens=24, **how)]
        return [(x, y, verify.load_verifier("math").last_boxed(tokenizer.decode(y)) == "3") for x, y in zip(prompts, ys)]

    def val_accuracy():
        tries = [(p, k) for p in val for k in range(5)]
        tried = sample([p for p, _ in tries], [request_seed(3, "val", p.id, k) for p, k in tries], temperature=0.5)
        return pytest.approx(sum(ok for *_, ok in tried) / 20)

    rows, seen = read(tmp_path / "out/metrics.jsonl"), set()
    assert len(rows) == 3
    for number, row in enumerate(rows):
        assert row["val_accuracy"] == val_accuracy()
        chosen = [train[i] for i in distill.step_problems(number, 8, 10, 3)]
        sampled = sample(chosen, [request_seed(3, number, place, p.id) for place, p in enumerate(chosen)])
        total, tokens = 0, sum(len(y) for _, y, _ in sampled)
        for x, y, ok in sampled:
            body = y[:-1] if y[-1] in tokenizer.end_ids else y
            told = tokenizer.encode(RIGHT if ok else WRONG, add_special_tokens=False)
            s, t = log_probs(student, x, y), log_probs(teacher, x + body + told, y).detach()
            total = total + (s.exp() * (s - t)).sum()
        lr = 2e-3 * min(1, (number + 1) / 2)
        norm = step(student, optimizer, total / tokens, lr)
        if sync_every and number == 1:
            teacher.load_state_dict(student.state_dict())
        assert row["loss"] == pytest.approx((total / tokens).item(), rel=1e-3) and row["loss"] > 1e-3
        assert row["grad_norm"] == pytest.approx(norm, rel=1e-2) and row["lr"] == pytest.approx(lr)
        assert row["truncated"] == sum(y[-1] not in tokenizer.end_ids for _, y, _ in sampled) / 8
        assert row["tokens"] == tokens and row["reward"] == pytest.approx(sum(ok for *_, ok in sampled) / 8)
        seen |= {ok for *_, ok in sampled}
    assert seen == {True, False} and nearly_all_close(student, tmp_path / "out/final")
    assert json.loads((tmp_path / "out/summary.json").read_text())["val_accuracy"] == val_accuracy()
