"""distill.py: weights of rows, what is measured beside the loss, steps without rows, runs that get worse."""
import json
import shutil
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import torch
from conftest import REPO, read, run, write_problems
from test_kl import reference
from test_train import sampled_rows, step_of
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

import distill
import verify
from common import training
from common.metrics import worse
from common.sampler import Sample, Sampler
from kl import COPIED


@pytest.fixture(scope="module")
def qwen2(qwen, tmp_path_factory):
    """A tiny model of Qwen2's shape: its q, k and v have biases, here large ones."""
    folder, tokenizer = str(tmp_path_factory.mktemp("qwen2") / "model"), verify.load_tokenizer(qwen)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id))
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, std=1.0 if "bias" in name else 0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def plain_scores(folder, rows):
    """[(log p student [T, V], log p teacher [T, V])] of each row by plain transformers in float64."""
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").double()
    score = lambda before, y: plain(torch.tensor([before + y])).logits[0, len(before) - 1:-1].log_softmax(-1)
    return plain, [(score(row.x, row.y), score(row.seen, row.y).detach()) for row in rows]


def test_packed_path_of_qwen2_against_plain_transformers(ranks, qwen2, problems_file):
    """Loss, gradients, and each sum that is logged, of a model with biases."""
    rows = sampled_rows(verify.load_tokenizer(qwen2), "qwen", problems_file)[:6]
    assert {row.correct for row in rows} == {True, False}
    sums, grads = step_of(ranks, qwen2, rows, range(6), 150)
    plain, scores = plain_scores(qwen2, rows)
    kl = [(s.exp() * (s - t)).sum(-1) for s, t in scores]
    on = [torch.arange(len(row.y)) for row in rows]
    want = {"loss": sum(k.sum() for k in kl) / sum(len(row.y) for row in rows),
            "sync_gap": sum((s[i, row.y] + 1).abs().sum() for (s, _), row, i in zip(scores, rows, on)),
            "kl": sum(k.sum() for k in kl), "kl_right": sum(k.sum() for k, row in zip(kl, rows) if row.correct),
            "entropy": -sum((s.exp() * s).sum() for s, _ in scores),
            "copied": sum((t[i, row.y] > COPIED).sum() for (_, t), row, i in zip(scores, rows, on))}
    for got, (name, value) in zip(sums.tolist(), want.items(), strict=True):
        assert got == pytest.approx(value.item(), rel=1e-4), name
    want["loss"].backward()
    for name, p in plain.named_parameters():
        assert (grads[name] - p.grad).norm() < 1e-4 * p.grad.norm(), name


def test_weights_of_rows(ranks, qwen, problems_file):
    """Weight 0 is as if the row were not there; 1 / len(y) is the mean over responses of their means."""
    rows = sampled_rows(verify.load_tokenizer(qwen), "qwen", problems_file)[:4]
    left_out = [row._replace(weight=float(i != 2)) for i, row in enumerate(rows)]
    tokens = sum(len(row.y) for row in rows)
    weight = lambda rows: sum(row.weight * len(row.y) for row in rows)
    without, grads = step_of(ranks, qwen, rows[:2] + rows[3:], range(3), 10**6)
    sums, same = step_of(ranks, qwen, left_out, range(4), 10**6)  # step_of divides by all tokens
    assert sums[0] * tokens == pytest.approx((without[0] * weight(left_out)).item(), rel=1e-5)
    for name in grads:
        assert torch.allclose(same[name] * tokens, grads[name] * weight(left_out), rtol=1e-3, atol=1e-5), name
    _, scores = plain_scores(qwen, rows)
    want = sum((s.exp() * (s - t)).sum(-1).mean() for s, t in scores) / 4
    per_response = [row._replace(weight=1 / len(row.y)) for row in rows]
    got = step_of(ranks, qwen, per_response, range(4), 10**6)[0][0] * tokens / weight(per_response)
    assert got == pytest.approx(want.item(), rel=1e-4)


# reward, truncated, entropy of real runs, step by step: docs/real.md
COLLAPSE = [
    (.078, 0, .245), (.094, 0, .239), (.141, 0, .241), (.141, .016, .234), (.078, 0, .211), (.125, 0, .181),
    (.094, 0, .131), (.125, .008, .115), (.086, 0, .115), (.063, .016, .075), (.039, .047, .059), (.063, .039, .053),
    (.055, .031, .049), (.031, .055, .044), (0, .063, .041), (.031, .117, .033)]
DIP = [.93, .85, .71, .59, .69, .84, .86, .88, .96, .89, .92, .93, .95, .95, .99, .96, .95, .97, .95, .98]  # the demo's


def first_warning(history):
    """The number of steps after which a run that goes like this is called worse, or None."""
    return next((n for n in range(len(history) + 1) if worse(history[:n])), None)


def test_worse():
    flat = [[.5, .1, .3]] * 40
    assert first_warning(flat) is None
    assert first_warning(COLLAPSE + COLLAPSE[-1:] * 4) <= 18  # that run was seen for 16 steps: its reward had all but halved
    assert first_warning([[r, 0, .3 * .9 ** i] for i, r in enumerate(DIP)]) is None  # entropy falls, reward has risen
    deep = [.86, .8, .6, .3, .15, .2, .5, .8] + [.95] * 12  # another world's
    assert first_warning([[r, 0, .1] for r in deep]) is None
    assert first_warning([[.5, min(1, i / 40), .3] for i in range(40)]) is not None  # ever more truncated
    assert first_warning([[.5, .9, .3]] * 40) is None  # a --max_tokens that was small from the start
    assert "entropy" in worse([[.5, 0, .3]] * 15 + [[.45, 0, .01]] * 10)
    assert "reward" in worse([[.5, 0, .3]] * 15 + [[.2, 0, .3]] * 10)


LOST = ["--steps", 40, "--batch", 8, "--lr", "3e-2", "--warmup", 0, "--max_tokens", 12, "--engine", "hf", "--max_sync_gap", 50,
        "--val_every", 10, "--val_samples", 1]


def test_a_run_that_gets_worse(guesser, tmp_path):
    """A learning rate that destroys the model: said once, and with the flag the run ends there, also when it is resumed."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"id": f"p{i}", "problem": f"{i}+1=?", "answer": str(3 + i % 3)}) + "\n" for i in range(12)))
    start = lambda out, *more: run("distill.py", "--model", guesser, "--data", data, "--val", data, "--out", tmp_path / out,
                                   *LOST, *more).stdout
    said = start("goes_on")
    assert said.count("warning: step") == 1 and (tmp_path / "goes_on/final").exists()
    stopped = start("ends", "--stop_when_worse")
    steps = len(read(tmp_path / "ends/metrics.jsonl"))
    assert stopped.count("warning: step") == 1 and "best/step-0000" in stopped and 15 <= steps < 40
    assert f"ended after {steps} of 40 steps" in stopped and not (tmp_path / "ends/final").exists()
    again = start("ends", "--stop_when_worse")
    assert f"ended after {steps} of 40 steps" in again and "warning" not in again
    assert len(read(tmp_path / "ends/metrics.jsonl")) == steps
    assert (tmp_path / "ends/final").exists() is False
    assert "saved" in start("ends", "--stop_when_worse", "--steps", steps)  # none is left to be saved from
    assert "saved" in start("ends")  # without the flag it goes on
    assert len(read(tmp_path / "ends/metrics.jsonl")) == 40


def test_a_finished_run_goes_on_with_more_steps(qwen, tmp_path):
    """Whatever --save_every: 3 steps and then 2 more end as 5 do."""
    data = write_problems(tmp_path / "data.jsonl", 8)
    start = lambda out, *more: run("distill.py", "--model", qwen, "--data", data, "--out", tmp_path / out, "--batch", 4, "--lr", "1e-3",
                                   "--max_tokens", 8, "--engine", "hf", "--save_every", 2, *more).stdout
    start("two", "--steps", 3)
    assert "from step 3" in start("two", "--steps", 5)
    start("one", "--steps", 5)
    a, b = (AutoModelForCausalLM.from_pretrained(tmp_path / out / "final").state_dict() for out in ("one", "two"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert [r["loss"] for r in read(tmp_path / "one/metrics.jsonl")] == [r["loss"] for r in read(tmp_path / "two/metrics.jsonl")]


def test_the_last_validation_is_kept_by_a_run_that_goes_on(qwen, tmp_path):
    """2 steps and then a third: all three validations are of weights before which no better were seen, so all stay."""
    data = write_problems(tmp_path / "data.jsonl", 6)
    start = lambda *more: run("distill.py", "--model", qwen, "--data", data, "--val", data, "--val_range", "0:2", "--out", tmp_path / "out",
                              "--batch", 4, "--max_tokens", 4, "--engine", "hf", "--val_every", 4, "--val_samples", 1, *more)
    start("--steps", 2)
    start("--steps", 3)
    assert sorted(path.name for path in (tmp_path / "out/best").iterdir()) == ["step-000000", "step-000002", "step-000003"]
    assert [step for _, step in json.load(open(tmp_path / "out/summary.json"))["best"]] == [0, 2, 3]


def test_a_state_of_an_earlier_version(qwen, tmp_path):
    """Its progress has no history; the run goes on."""
    data = write_problems(tmp_path / "data.jsonl", 6)
    start = lambda *more: run("distill.py", "--model", qwen, "--data", data, "--out", tmp_path / "out", "--batch", 4, "--max_tokens", 4,
                              "--engine", "hf", *more).stdout
    start("--steps", 1)
    for name in ("final/model.safetensors", "summary.json"):
        (tmp_path / "out" / name).unlink()
    progress, = (tmp_path / "out/state").glob("*/progress.json")
    progress.write_text(json.dumps({"step": 1, "best": []}))
    assert "from step 1" in start("--steps", 2)


def test_rank_0_looks_at_the_disk_for_all(qwen, tmp_path):
    """Rank 1, on a node whose view of a shared disk is old, sees no state and no best model: the run goes on all the same."""
    (tmp_path / "blind.py").write_text(
        "import os, distill\nfrom common import checkpoint\nisdir = os.path.isdir\nif os.environ['RANK'] == '1':\n"
        "    checkpoint.states = lambda folder: []\n    os.path.isdir = lambda path: 'step-' not in str(path) and isdir(path)\n"
        "distill.main()\n")
    data = write_problems(tmp_path / "data.jsonl", 6)
    start = lambda *more: run(tmp_path / "blind.py", "--model", qwen, "--data", data, "--val", data, "--val_every", 1, "--val_samples", 1,
                              "--out", tmp_path / "out", "--batch", 4, "--max_tokens", 4, "--engine", "hf", *more, nproc=2, seconds=120,
                              env={"PYTHONPATH": str(REPO)}).stdout
    assert "note: 6 of 6 problems of --val are in --data" in start("--steps", 2)
    assert "from step 2" in start("--steps", 3)
    assert [row["step"] for row in read(tmp_path / "out/metrics.jsonl")] == [0, 1, 2]
    best = json.load(open(tmp_path / "out/summary.json"))["best"]
    assert sorted(step for _, step in best) == [0, 1, 2]  # none validates better than another
    assert sorted(f.name for f in (tmp_path / "out/best").iterdir()) == ["step-000000", "step-000001", "step-000002"]


def test_a_step_without_rows_makes_no_update(qwen, tmp_path):
    """No prompt leaves room for two copies of y: such steps are counted, and the weights stay."""
    data = write_problems(tmp_path / "data.jsonl", 6)
    said = run("distill.py", "--model", qwen, "--data", data, "--out", tmp_path / "out", "--steps", 2, "--batch", 4,
               "--max_tokens", 8, "--max_teacher_len", 20, "--engine", "hf", nproc=2).stdout
    rows = read(tmp_path / "out/metrics.jsonl")
    assert [row["updated"] for row in rows] == [False, False] and "no update" in said
    assert [row["tokens"] for row in rows] == [0, 0] and rows[0]["kl_right"] is None and rows[0]["kl_wrong"] is None
    assert [row["cut"] for row in rows] == [1, 1] and "cut 100.0%" in said
    a, b = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (qwen, tmp_path / "out/final"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_context_bounds_what_the_teacher_reads(qwen, tmp_path):
    """A teacher of 70 tokens reads two copies of y that are cut to fit; a moving one is saved, in fp32 also where bf16 trains."""
    shutil.copytree(qwen, tmp_path / "short")
    config = json.loads((tmp_path / "short/config.json").read_text())
    (tmp_path / "short/config.json").write_text(json.dumps({**config, "max_position_embeddings": 70}))
    run("distill.py", "--model", tmp_path / "short", "--data", write_problems(tmp_path / "data.jsonl", 8), "--out", tmp_path / "out",
        "--steps", 1, "--batch", 8, "--lr", "1e-5", "--warmup", 0, "--max_tokens", 30, "--engine", "hf", "--dtype", "bfloat16",
        "--sync_every", 1, "--max_sync_gap", 1)
    row, = read(tmp_path / "out/metrics.jsonl")
    assert 0 < row["tokens"] < 8 * row["response_len"]
    dcp_to_torch_save(tmp_path / "out/state/step-000001", tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt")
    moved = [name for name in state if f"{name}.exp_avg" in state]
    assert moved and all(state[name].dtype == torch.float32 and torch.equal(state[name], state[f"teacher.{name}"]) for name in moved)


def test_crashes_of_the_judge_are_counted(qwen, tmp_path):
    (tmp_path / "own.py").write_text("INSTRUCTION = ''\ndef gold(row): return 1, None\ndef judge(*_): return 1 / 0\n")
    done = run("distill.py", "--model", qwen, "--data", write_problems(tmp_path / "data.jsonl", 6), "--out", tmp_path / "out", "--steps", 1,
               "--batch", 4, "--max_tokens", 4, "--engine", "hf", "--mode", tmp_path / "own.py")
    row, = read(tmp_path / "out/metrics.jsonl")
    assert row["reward"] == 0 and row["judge_failed"] == 1 and "judge failed 100.0%" in done.stdout


@pytest.mark.parametrize("kind, topk", [("forward", 0), ("mixed", 8)])
def test_kind_and_topk_reach_the_loss(kind, topk, ranks, qwen, problems_file):
    rows = sampled_rows(verify.load_tokenizer(qwen), "qwen", problems_file)[:4]
    student, teacher = (training.load_model(qwen, ranks, training.make_mesh(ranks), torch.float32, trainable=trainable)
                        for trainable in (True, False))
    args = SimpleNamespace(micro_tokens=300, kl=kind, topk=topk, compile=False)
    mine = [*rows, distill.DUMMY]
    states = distill.teacher_states(teacher, mine, 300, ranks.device)
    got = distill.student_pass(student, mine, states, distill.whole_head(teacher, torch.float32), 1.0, args, ranks)["loss"]
    want = sum(reference(s, t, kind, topk).sum() for s, t in plain_scores(qwen, rows)[1])
    assert got == pytest.approx(want.item(), rel=1e-4)


@pytest.mark.parametrize("mode", ["math", "code"])
def test_the_toy_reads_all_but_the_instruction(qwen, mode):
    """A change of the prompt must not vanish in the toy's chat template."""
    tokenizer = verify.load_tokenizer(qwen)
    read = lambda text: tokenizer.decode(verify.chat_ids(tokenizer, verify.Problem("p", text, "3", mode)))
    assert read("1+2=?") == "<|im_start|>user\n1+2=?<|im_end|>\n<|im_start|>assistant\n"
    assert read("1+2=?\n\n3") == "<|im_start|>user\n1+2=?\n\n3<|im_end|>\n<|im_start|>assistant\n"


def test_rows_of_val_need_val(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", "distill.py --model m --data d --out o --val_range 0:2".split())
    with pytest.raises(SystemExit):
        distill.parse_args()
    assert "--val_range is for the problems of --val; give that too" in capsys.readouterr().err


def test_a_moving_teacher_is_held_in_fp32(qwen, ranks):
    """A step that bf16 would round away moves it."""
    student, teacher = (training.load_model(qwen, ranks, training.make_mesh(ranks), torch.bfloat16, trainable=trainable, held=torch.float32)
                        for trainable in (True, False))
    with torch.no_grad():
        for p in student.parameters():
            p.mul_(1 + 1e-5)
    distill.move_teacher(teacher, student)
    for mine, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
        assert mine.dtype == torch.float32 and torch.equal(mine.full_tensor(), theirs.full_tensor())
    assert distill.whole_head(teacher, torch.bfloat16).dtype == torch.bfloat16


class Reversed(Sampler):
    """One token for each prompt, its first; the last prompt is done first."""

    def stream(self, pull, **how):
        yield from (Sample(r, r.ids[:1], [-1.0], False) for r in reversed(list(iter(pull, None))))


def test_samples_and_verdicts_in_any_order():
    """Of the problems 2 and 0, whichever is done first."""
    def submit(problem, text):
        verdict = Future()
        verdict.set_result((problem, text))
        return verdict
    args = SimpleNamespace(max_tokens=1, top_p=1.0)
    judge, tokenizer = SimpleNamespace(submit=submit), SimpleNamespace(decode=lambda ids, **_: ids[0])
    samples, verdicts = distill.sample_and_judge(Reversed(), judge, tokenizer, "abc", [[7], [8], [9]], [2, 0], [5, 6], args, 1.0)
    assert [sample.ids for sample in samples] == [[9], [7]]
    assert [verdict.result() for verdict in verdicts] == [("c", 9), ("a", 7)]
