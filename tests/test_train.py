"""The trainer: what each side reads, packed attention, and one loss however the batch is split."""
import functools
import json
import os
import shutil
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
import torch.nn.attention.varlen as varlen
from conftest import REPO, make_rows, read, run
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen2Config, Qwen2ForCausalLM

import distill
import sft
import verify
from common import checkpoint, training
from common.metrics import sum_over_ranks
from common.run import launch, leave
from common.sampler import Sample


@pytest.fixture(params=["qwen", "olmo"])
def family_model(request):
    return request.param, request.getfixturevalue(request.param)


def sampled_rows(tokenizer, family, problems_file, max_teacher_len=4096):
    """Rows of phase 2 as if y_init of make_rows had just been sampled, with made-up log-probabilities."""
    rows = []
    for row in make_rows(tokenizer, problems_file, family):
        problem, y = verify.Problem.of_row(row), row["y_init_tokens"]
        x, sample = verify.chat_ids(tokenizer, problem), Sample(None, y, [-1.0] * len(y), False)
        rows.append(distill.make_row(tokenizer, verify.PHRASES[family], problem, x, sample,
                                     row["y_init_correct"], max_teacher_len))
    return rows


# ---------------------------------------------------------------------------------------------- what is read


def test_rows_of_both_sides(family_model, problems_file):
    """x; x, y, P_r; and y, as text and as ids: the first copy of y has no end-of-turn, the second has."""
    family, folder = family_model
    tokenizer = verify.load_tokenizer(folder)
    end = tokenizer.end_ids[0]
    rows, tuples = sampled_rows(tokenizer, family, problems_file), make_rows(tokenizer, problems_file, family)
    for row, made in zip(rows, tuples, strict=True):
        assert row.y == made["y_init_tokens"] and row.y[-1] == end  # the sampler's own ids
        phrase = verify.PHRASES[family][made["y_init_correct"]]
        assert tokenizer.decode(row.seen) == tokenizer.decode(row.x) + made["y_init"] + f"\n\n{phrase}\n\n"
        assert row.seen[:len(row.x)] == row.x
        assert row.seen[len(row.x):len(row.x) + len(row.y) - 1] == row.y[:-1]
        assert row.seen[len(row.x):].count(end) == 0


def test_d_revision_reads_as_the_teacher_does(family_model, problems_file, tmp_path):
    """Phase 1 trains y_revised after exactly the ids after which phase 2's teacher scores y, cleaning on."""
    family, folder = family_model
    tokenizer = verify.load_tokenizer(folder)
    path = tmp_path / "d.jsonl"
    made = make_rows(tokenizer, problems_file, family)
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    stages, _ = sft.read_examples(str(path), "revision", 0, tokenizer, verify.PHRASES[family], 4096, seed=0)
    trained = sorted(tuple(e.ids) for e in stages[0][1])
    seen = [row.seen for row in sampled_rows(tokenizer, family, problems_file)]
    assert trained == sorted(tuple(s + row["y_revised_tokens"]) for s, row in zip(seen, made))


def test_phrases_follow_the_model_type_and_the_record(qwen, olmo, tmp_path):
    assert verify.phrases_of(qwen) == verify.PHRASES["qwen"]
    assert verify.phrases_of(olmo) == verify.PHRASES["olmo"]
    assert verify.phrases_of(olmo, verify.phrases_flag("paper")) == verify.PHRASES["paper"]
    config = json.load(open(os.path.join(qwen, "config.json")))
    older = "paper", verify.PHRASES["paper"]  # checkpoints that recorded a name
    for recorded, want in (older, (["No.", "Yes."], ("No.", "Yes."))):
        (tmp_path / "config.json").write_text(json.dumps({**config, "sdzero_phrases": recorded}))
        assert verify.phrases_of(str(tmp_path)) == want


def test_truncation_for_the_teacher(qwen, problems_file):
    tokenizer = verify.load_tokenizer(qwen)
    whole = sampled_rows(tokenizer, "qwen", problems_file)[0]
    control = len(whole.seen) - len(whole.x) - len(whole.y) + 1
    for limit in (len(whole.x) + control, len(whole.x) + control + 1, len(whole.x) + control + 11, 10):
        row = sampled_rows(tokenizer, "qwen", problems_file, limit)[0]
        room = max(0, (limit - len(whole.x) - control) // 2)
        assert row.y == whole.y[:room] and len(row.logprobs) == len(row.y)
        assert not row.y or len(row.seen) + len(row.y) <= limit
    exact = len(whole.x) + control + 2 * len(whole.y)
    assert sampled_rows(tokenizer, "qwen", problems_file, exact)[0] == whole


def test_teacher_scores_after_x_y_phrase(family_model, ranks, problems_file):
    """Packed hidden states of the second copy of y against plain transformers, one token at a time."""
    family, folder = family_model
    tokenizer = verify.load_tokenizer(folder)
    rows = sampled_rows(tokenizer, family, problems_file)[:5]
    teacher = training.load_model(folder, ranks, training.make_mesh(ranks), torch.float32, trainable=False)
    states = distill.teacher_states(teacher, [*rows, distill.DUMMY], 200, ranks.device)
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    head = plain.get_output_embeddings().weight
    for row, state in zip(rows, states):
        got = (state @ head.T).log_softmax(-1)
        for t in range(len(row.y)):
            with torch.no_grad():
                want = plain(torch.tensor([row.seen + row.y[:t]])).logits[0, -1].log_softmax(-1)
            assert torch.allclose(got[t], want, atol=1e-4)


# ------------------------------------------------------------------------------------------------- attention


def test_packed_attention_equals_eager(family_model, ranks, problems_file):
    """Hidden states of packed rows against transformers' eager attention; rows are longer than the window."""
    family, folder = family_model
    tokenizer = verify.load_tokenizer(folder)
    rows = [row.seen + row.y for row in sampled_rows(tokenizer, family, problems_file)[:6]] + [[5]]
    assert max(map(len, rows)) > 3 * 16
    model = training.load_model(folder, ranks, training.make_mesh(ranks), torch.float32, trainable=False)
    batch = training.make_batch(rows, ranks.device)
    with torch.no_grad():
        packed = model(batch, torch.arange(len(batch.ids)), lambda hidden, head: hidden @ head.T)
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    for row, got in zip(rows, packed.split(list(map(len, rows)))):
        with torch.no_grad():
            want = plain(torch.tensor([row])).logits[0]
        assert torch.allclose(got, want, atol=2e-4), (got - want).abs().max()


def test_pack(ranks):
    lengths = [5, 9, 3, 8, 1, 20, 2]
    bins = training.pack(lengths, 10, ranks.device)
    assert sorted(i for b in bins for i in b) == list(range(7))
    assert all(sum(lengths[i] for i in b) <= 10 or len(b) == 1 for b in bins)
    assert len(bins) == 4 and training.pack([], 10, ranks.device) == []


# ----------------------------------------------------------------------------- one loss, however it is split


def step_of(ranks, folder, rows, mine, budget, kind="reverse", **how):
    """Loss, gap and whole gradients of a step in which this rank has the rows `mine`; how: of load_model."""
    mesh = training.make_mesh(ranks)
    student = training.load_model(folder, ranks, mesh, torch.float32, **how)
    teacher = training.load_model(folder, ranks, mesh, torch.float32, trainable=False)
    args = type("Args", (), {"micro_tokens": budget, "kl": kind, "topk": 0, "compile": False})
    mine = [*(rows[i] for i in mine), distill.DUMMY]
    states = distill.teacher_states(teacher, mine, budget, ranks.device)
    tokens = sum(len(row.y) for row in rows)
    head = teacher.get_output_embeddings().weight.full_tensor()
    sums = distill.student_pass(student, mine, states, head, tokens, args, ranks)
    sums = torch.tensor(list(sum_over_ranks(ranks, **sums).values()))
    return sums, {name: p.grad.full_tensor() for name, p in student.named_parameters()}


def assert_same(a, b):
    assert torch.allclose(a[0], b[0], rtol=1e-5), (a[0], b[0])
    for name in a[1]:
        error = (a[1][name] - b[1][name]).norm() / a[1][name].norm()
        assert error < 1e-5, (name, error)


SPLITS = {"even": [[0, 1, 2, 3], [4, 5, 6, 7]], "unequal": [[0], [1, 2, 3, 4, 5, 6, 7]],
          "none": [[], list(range(8))]}


def test_micro_batches_do_not_change_the_step(ranks, qwen, problems_file):
    rows = sampled_rows(verify.load_tokenizer(qwen), "qwen", problems_file)[:8]
    whole = step_of(ranks, qwen, rows, range(8), 10**6)
    for budget in (1, 150, 300):  # one row at a time, and packed
        assert_same(whole, step_of(ranks, qwen, rows, range(8), budget))
    order = [3, 1, 7, 0, 5, 2, 6, 4]
    assert_same(whole, step_of(ranks, qwen, rows, order, 300))


@pytest.fixture
def compiler(monkeypatch):
    """torch.compile up to the choice of what to recompute: the rest takes a compiler for this machine."""
    torch._dynamo.reset()
    until_then = functools.partial(torch.compile, backend="aot_eager_decomp_partition")
    monkeypatch.setattr(torch, "compile", until_then)


@pytest.mark.parametrize("compile", [False, True])
def test_checkpointing_does_not_change_the_step(ranks, qwen, problems_file, compile, compiler):
    rows = sampled_rows(verify.load_tokenizer(qwen), "qwen", problems_file)[:2]
    plain = step_of(ranks, qwen, rows, range(2), 10**6)
    assert_same(plain, step_of(ranks, qwen, rows, range(2), 10**6, checkpointing=True, compile=compile))


def test_checkpointing_keeps_attention(ranks, qwen, compiler):
    """What a GPU does, with a stand-in for its kernel: compiled, attention is not computed again."""
    calls = []

    def attend(q, k, v, *_):
        calls.append("forward")
        return q.clone(), torch.zeros(q.shape[1], q.shape[0]), torch.zeros(2, dtype=torch.uint64)

    def attend_backward(grad, q, k, v, *_):
        calls.append("backward")
        return q.clone(), k.clone(), v.clone()

    varlen._varlen_attn.register_kernel("cpu", attend)
    varlen._varlen_attn_backward.register_kernel("cpu", attend_backward)
    model = training.load_model(qwen, ranks, training.make_mesh(ranks), torch.float32, checkpointing=True,
                                compile=True)
    batch = training.make_batch([[5] * 64] * 4, ranks.device)._replace(segments=None)
    model(batch, torch.arange(256), lambda hidden, head: hidden.sum()).backward()
    layers = model.config.num_hidden_layers
    assert calls == ["forward"] * layers + ["backward"] * layers


def test_micro_batches_are_whole(ranks, qwen, problems_file):
    """Every row is in one of them, no slot is padding, and what is selected predicts y."""
    rows = sampled_rows(verify.load_tokenizer(qwen), "qwen", problems_file)[:8]
    for side in ("x", "seen"):
        packed = distill.micro_batches([*rows, distill.DUMMY], side, 300, ranks.device)
        assert sorted(i for members, _, _ in packed for i in members) == list(range(8))
        for members, batch, select in packed:
            assert batch.ids.tolist() == [t for i in members for t in getattr(rows[i], side) + rows[i].y]
            assert batch.ids[select + 1].tolist() == [t for i in members for t in rows[i].y]


def test_step_against_autograd(ranks, qwen, problems_file):
    """The whole step against plain transformers, full logits and autograd in float64."""
    rows = sampled_rows(verify.load_tokenizer(qwen), "qwen", problems_file)[:4]
    sums, grads = step_of(ranks, qwen, rows, range(4), 10**6)
    plain = AutoModelForCausalLM.from_pretrained(qwen, attn_implementation="eager").double()
    total = 0
    for row in rows:
        logits = lambda before: plain(torch.tensor([before + row.y])).logits[0, len(before) - 1:-1]
        score = lambda before: logits(before).log_softmax(-1)
        s = score(row.x)
        with torch.no_grad():
            t = score(row.seen)
        total = total + (s.exp() * (s - t)).sum()
    total = total / sum(len(row.y) for row in rows)
    total.backward()
    assert sums[0].item() == pytest.approx(total.item(), rel=1e-5)
    for name, p in plain.named_parameters():
        assert (grads[name] - p.grad).norm() < 1e-4 * p.grad.norm(), name


def two_process_worker(qwen, problems_file, out):
    """Runs under torchrun with 2 processes (see the test below); each split on the same two ranks."""
    ranks = launch()
    rows = sampled_rows(verify.load_tokenizer(qwen), "qwen", problems_file)[:8]
    result = {name: step_of(ranks, qwen, rows, split[ranks.rank], budget)
              for name, split in SPLITS.items() for budget in (150,)}
    if ranks.rank == 0:
        torch.save(result, out)
    leave()


def test_processes_do_not_change_the_step(ranks, qwen, problems_file, tmp_path):
    """1 process, 2 with equal shares, 2 with unequal ones, and one of 2 with nothing at all."""
    out = tmp_path / "steps.pt"
    code = f"import sys; sys.path[:0] = [{str(REPO)!r}, {str(REPO / 'tests')!r}]; import test_train as t; " \
           f"t.two_process_worker({qwen!r}, {str(problems_file)!r}, {str(out)!r})"
    script = tmp_path / "worker.py"
    script.write_text(code)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*torchrun, str(script)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = sampled_rows(verify.load_tokenizer(qwen), "qwen", problems_file)[:8]
    alone = step_of(ranks, qwen, rows, range(8), 10**6)
    for name, result in torch.load(out).items():
        assert_same(alone, result)


# ----------------------------------------------------------------------------------------------- checkpoints


def test_weights_that_are_not_the_configs(qwen, olmo, tmp_path):
    """Missing or of another shape they end the program; a tied head is not missing."""
    import toy
    small = dict(vocab_size=99, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                 num_key_value_heads=1, intermediate_size=16)
    for tie in (True, False):
        folder = str(tmp_path / f"qwen2-{tie}")
        Qwen2ForCausalLM(Qwen2Config(**small, tie_word_embeddings=tie)).save_pretrained(folder)
        training.load_weights(folder)
    for folder in (qwen, olmo, toy.tiny_qwen3(str(tmp_path / "untied"), tie=False)):
        training.load_weights(folder)
    for change, named in (({"num_hidden_layers": 3}, "11 weights .*: model.layers.2.input_layernorm"),
                          ({"intermediate_size": 300}, "6 weights .*: model.layers.0.mlp.down_proj.weight, "),
                          ({"tie_word_embeddings": False}, "1 weights .*: lm_head.weight;")):
        shutil.copytree(qwen, folder := tmp_path / "-".join(change))
        config = json.loads((folder / "config.json").read_text()) | change
        config["layer_types"] = ["full_attention"] * config["num_hidden_layers"]
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(SystemExit, match=f"{folder}: {named}"):
            training.load_weights(str(folder))


SMALL = dict(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
             intermediate_size=16, head_dim=16, pad_token_id=0, dtype="float32")
MORE = {"GptOss": {"num_local_experts": 2}, "Granite": {"logits_scaling": 8.0},
        "Lfm2": {"layer_types": ["conv", "full_attention"]},
        "Qwen3Next": {"layer_types": ["linear_attention", "full_attention"], "num_experts": 2,
                      "num_experts_per_tok": 1}}


@pytest.mark.parametrize("kind, odd", [
    ("Llama", None), ("Mistral", None), ("Gemma3Text", None), ("Granite", "logits_scaling"), ("Lfm2", "conv"),
    ("Gemma2", "attn_logit_softcapping, final_logit_softcapping"), ("Cohere", "logit_scale"),
    ("Phi", "lm_head.bias"), ("Qwen3Next", "linear_attention"), ("GptOss", "model.layers.0.self_attn.sinks"),
])
def test_models_of_which_packed_rows_would_make_others(kind, odd, ranks, tmp_path):
    """Layers with a state, softcaps, scales, sinks, a head's bias: refused; others are transformers' own."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SMALL, **MORE.get(kind, {}))
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path)
    load = lambda: training.load_model(str(tmp_path), ranks, training.make_mesh(ranks), torch.float32)
    if odd:
        with pytest.raises(SystemExit, match=f"{tmp_path} has {odd}.*, which packed rows or the loss would"):
            load()
        return
    a, b = torch.randint(4, 99, (2, 12)).tolist()
    with torch.no_grad():
        packed = load()(training.make_batch([a, b], ranks.device), torch.arange(12, 24),
                        lambda hidden, head: hidden @ head.T)
        torch.testing.assert_close(packed, model(torch.tensor([b])).logits[0], atol=1e-4, rtol=1e-4)


def test_a_generation_config_that_transformers_would_not_save(qwen, ranks, tmp_path):
    """It loads one with a temperature and no do_sample, as Vicuna's: it trains, so it must be saved."""
    shutil.copytree(qwen, tmp_path / "model")
    path = tmp_path / "model/generation_config.json"
    eos = json.loads(path.read_text())["eos_token_id"]
    path.write_text(json.dumps({"temperature": 0.6, "top_p": 0.9, "eos_token_id": eos}))
    model = training.load_model(str(path.parent), ranks, training.make_mesh(ranks), torch.float32)
    checkpoint.save_model(str(tmp_path / "final"), model, verify.load_tokenizer(qwen), QWEN, torch.float32)
    again = GenerationConfig.from_pretrained(tmp_path / "final")
    assert again.temperature == 0.6 and again.eos_token_id == eos


@pytest.mark.parametrize("tie", [True, False])
def test_checkpoint_gives_the_trainers_logits(ranks, tmp_path, problems_file, tie):
    """A saved folder loads in plain transformers and gives what the trainer has after a step, phrases too."""
    import toy
    folder = toy.tiny_qwen3(str(tmp_path / "base"), tie=tie)
    tokenizer = verify.load_tokenizer(folder)
    model = training.load_model(folder, ranks, training.make_mesh(ranks), torch.float32)
    optimizer = training.make_optimizer(model, 0.0, (0.9, 0.95))
    rows = [row.x + row.y for row in sampled_rows(tokenizer, "qwen", problems_file)[:3]]
    batch = training.make_batch(rows, ranks.device)
    everything = torch.arange(len(batch.ids))
    model(batch, everything, lambda hidden, head: (hidden @ head.T).square().mean()).backward()
    training.optimizer_step(model, optimizer, 1e-2, 1.0)
    with torch.no_grad():
        ours = model(batch, everything, lambda hidden, head: hidden @ head.T)
    checkpoint.save_model(str(tmp_path / "saved"), model, tokenizer, verify.PHRASES["paper"], torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", attn_implementation="eager").eval()
    for row, got in zip(rows, ours.split(list(map(len, rows)))):
        with torch.no_grad():
            assert torch.allclose(got, plain(torch.tensor([row])).logits[0], atol=2e-4)
    assert verify.phrases_of(str(tmp_path / "saved")) == verify.PHRASES["paper"]
    assert verify.load_tokenizer(str(tmp_path / "saved")).end_ids == tokenizer.end_ids
    before = AutoModelForCausalLM.from_pretrained(folder)
    assert not torch.equal(before.get_output_embeddings().weight, plain.get_output_embeddings().weight)


def test_state_goes_on_bitwise(ranks, qwen, tmp_path, problems_file, monkeypatch):
    """Two steps, against one step, a saved state, a fresh model and optimizer, and one step more."""
    rows = [row.x + row.y for row in sampled_rows(verify.load_tokenizer(qwen), "qwen", problems_file)[:3]]

    def fresh():
        model = training.load_model(qwen, ranks, training.make_mesh(ranks), torch.float32)
        return model, training.make_optimizer(model, 0.01, (0.9, 0.95))

    def step(model, optimizer):
        batch = training.make_batch(rows, ranks.device)
        everything = torch.arange(len(batch.ids))
        model(batch, everything, lambda hidden, head: (hidden @ head.T).square().mean()).backward()
        training.optimizer_step(model, optimizer, 1e-2, 1.0)

    one = fresh()
    step(*one)
    monkeypatch.setattr("common.run.catch_signals", list)  # pytest keeps its own
    saver = checkpoint.Saver(str(tmp_path), 1, ranks.device)
    saver.save(1, checkpoint.training_state(*one), {"step": 1})
    step(*one)  # while the state is being written
    saver.wait()
    two = fresh()
    progress = checkpoint.load_state(str(tmp_path), lambda: checkpoint.training_state(*two))
    step(*two)
    assert progress == {"step": 1}
    for a, b in zip(one[0].parameters(), two[0].parameters()):
        assert torch.equal(a.full_tensor(), b.full_tensor())


def test_a_state_is_a_copy_and_renamed_when_whole(ranks, tmp_path, monkeypatch):
    """What is trained on meanwhile does not reach the disk; progress.json is there before the rename."""
    monkeypatch.setattr("common.run.catch_signals", list)
    moved, there, live, loaded = threading.Event(), [], torch.ones(4), torch.zeros(4)
    write, rename = checkpoint.StateWriter.write_data, checkpoint.replace_folder

    def replace(half, place):
        there.extend(os.listdir(half))
        rename(half, place)

    monkeypatch.setattr(checkpoint.StateWriter, "write_data", lambda *args: moved.wait(20) and write(*args))
    monkeypatch.setattr(checkpoint, "replace_folder", replace)
    saver = checkpoint.Saver(str(tmp_path), 1, ranks.device)
    saver.save(1, {"a": live}, {"step": 1})
    live.zero_()
    moved.set()
    saver.wait()
    checkpoint.load_state(str(tmp_path), lambda: {"a": loaded})
    assert "progress.json" in there and loaded.tolist() == [1.0] * 4


def test_a_model_is_renamed_when_whole(ranks, qwen, tmp_path):
    model = training.load_model(qwen, ranks, training.make_mesh(ranks), torch.float32)
    broken = SimpleNamespace(save_pretrained=lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        checkpoint.save_model(str(tmp_path / "final"), model, broken, QWEN, torch.float32)
    assert not (tmp_path / "final").exists()


# --------------------------------------------------------------------------------------- sft's plan of steps

# 6 steps and 3
PLAN = ["--objective", "two-stage", "--stage2_size", 11, "--batch", 5, "--lr", "1e-3", "--epochs", 1,
        "--micro_tokens", 300]


def train(model, data, out, *more):
    return run("sft.py", "--model", model, "--data", data, "--out", out, *PLAN, *more).stdout


def test_going_on_at_the_border_of_two_stages(qwen, d_revision, tmp_path):
    """From the end of stage 1: stage 2 begins without moments and ends with the same bits."""
    train(qwen, d_revision, tmp_path / "whole", "--save_every", 6)
    assert sorted(os.listdir(tmp_path / "whole/state")) == ["step-000006", "step-000009"]
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    shutil.rmtree(tmp_path / "part/final")
    shutil.rmtree(tmp_path / "part/state/step-000009")
    said = train(qwen, d_revision, tmp_path / "part", "--save_every", 6)
    assert "stage 1 step" not in said and "stage 2 step 1/3" in said
    rows = [[(row["step"], row["stage"], row["loss"]) for row in read(tmp_path / out / "metrics.jsonl")]
            for out in ("whole", "part")]
    assert rows[0] == rows[1] and [stage for _, stage, _ in rows[0]] == [1] * 6 + [2] * 3
    weights = [(tmp_path / out / "final/model.safetensors").read_bytes() for out in ("whole", "part")]
    assert weights[0] == weights[1]


def test_the_last_step_is_saved(qwen, d_revision, tmp_path):
    """Whatever --save_every is: a run that was killed while it wrote final/ makes no step again."""
    train(qwen, d_revision, tmp_path, "--save_every", 4)
    assert sorted(os.listdir(tmp_path / "state")) == ["step-000008", "step-000009"]
    before = (tmp_path / "final/model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "final")
    said = train(qwen, d_revision, tmp_path, "--save_every", 4)
    assert "  loss " not in said and (tmp_path / "final/model.safetensors").read_bytes() == before


# ------------------------------------------------------------------------------------------------ sft's data

QWEN = verify.PHRASES["qwen"]


def test_objectives_and_stages(qwen, d_revision):
    tokenizer = verify.load_tokenizer(qwen)
    made = read(d_revision)
    right = [row for row in made if row["y_init_correct"]]

    def stages(objective, stage2=20):
        return sft.read_examples(str(d_revision), objective, stage2, tokenizer, QWEN, 4096, seed=0)[0]

    (one, first), (two, second) = stages("two-stage")
    assert (one, two) == ("generation", "revision") and len(second) == 20 and len(first) == len(made) - 20
    whole = {tuple(sft.make_example(tokenizer, QWEN, row, "revision").ids): row for row in made}
    assert not any(whole[tuple(e.ids)]["y_init_correct"] for e in first)  # stage 1: wrong y_init only
    # stage 2: right ones first
    assert sum(whole[tuple(e.ids)]["y_init_correct"] for e in second) == min(20, len(right))
    assert not {tuple(e.ids) for e in first} & {tuple(e.ids) for e in second}
    for e in first:
        row = whole[tuple(e.ids)]
        x = len(verify.chat_ids(tokenizer, verify.Problem.of_row(row)))
        assert e.weights == [0] * x + [1] * (len(e.ids) - x) and e.ids[-1] == tokenizer.end_ids[0]
    for e in second:
        n = len(whole[tuple(e.ids)]["y_revised_tokens"])
        assert e.weights == [0] * (len(e.ids) - n) + [1] * n
    both = stages("sum")[0][1][0]
    n = len(whole[tuple(both.ids)]["y_revised_tokens"])
    assert both.weights[-n:] == [2] * n and set(both.weights[:-n]) == {0, 1}
    rft = stages("rft")[0][1]
    assert len(rft) == len({(r["problem"], tuple(r["y_init_tokens"])) for r in right})
    with pytest.raises(SystemExit, match="stage 1"):
        stages("two-stage", 1000)


def test_rft_reads_responses(qwen, d_revision, tmp_path):
    """Rows of today's responses.jsonl, init and revision, and those of older ones, which have both in one."""
    tokenizer, made = verify.load_tokenizer(qwen), read(d_revision)
    path = tmp_path / "responses.jsonl"
    names = {"init": ("id", "problem", "answer"), "revision": ("id", "p_r")}
    with open(path, "w") as f:
        for row in made:
            for kind, y in (("init", "y_init"), ("revision", "y_revised")):
                kept = (*names[kind], y, f"{y}_correct", f"{y}_tokens")
                f.write(json.dumps({"kind": kind, **{name: row[name] for name in kept}}) + "\n")
    new, old = (sft.read_examples(str(file), "rft", 0, tokenizer, QWEN, 4096, seed=0)
                for file in (path, d_revision))
    assert new == old and new[1]["rows read"] == len(made)
    x = verify.chat_ids(tokenizer, verify.Problem.of_row(made[0]))
    example = sft.make_example(tokenizer, QWEN, made[0], "rft")
    assert example.ids == x + made[0]["y_init_tokens"]
    assert example.weights == [0] * len(x) + [1] * len(made[0]["y_init_tokens"])
    with pytest.raises(SystemExit, match="d_revision"):
        sft.read_examples(str(path), "two-stage", 10, tokenizer, QWEN, 4096, seed=0)


def test_wrong_to_right_is_counted(qwen, d_revision):
    """After cleaning and without duplicates, whatever the stages."""
    tokenizer, made = verify.load_tokenizer(qwen), read(d_revision)
    wrong = len({(row["problem"], row["y_init"]) for row in made if not row["y_init_correct"]})
    for objective in ("two-stage", "sum"):
        counts = sft.read_examples(str(d_revision), objective, 20, tokenizer, QWEN, 4096, seed=0)[1]
        assert counts["wrong -> right"] == wrong > 0


def test_cleaning(qwen, tmp_path, d_revision):
    tokenizer = verify.load_tokenizer(qwen)
    end = tokenizer.end_ids[0]
    body, loop = [20, 21, 22, 23, 24], [9, 10, 11, 12]
    assert sft.trim_repeats(body + loop * 9) == body + loop
    assert sft.trim_repeats(body + loop * 2) == body + loop * 2  # twice is not a loop
    assert sft.trim_repeats(body + loop * 5 + [9, 10]) == body + [9, 10, 11, 12]  # one copy, from anywhere
    rows = [{**row, "y_revised": None} for row in read(d_revision)[:2]]  # else its tokens must spell it
    rows[0]["y_revised_tokens"] = body + loop * 9  # truncated in a loop: trimmed, and then it ends
    rows[1]["y_revised_tokens"] = body + [end]
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[1]]))
    stages, counts = sft.read_examples(str(path), "revision", 0, tokenizer, QWEN, 4096, seed=0)
    assert {tuple(e.ids[-6:]) for e in stages[0][1]} >= {tuple([24] + loop + [end])}
    assert counts["y_revised: repeating tail trimmed"] == 1 and counts["dropped: duplicate"] == 1
    path.write_text(json.dumps(rows[1]) + "\n" + json.dumps({**rows[0], "y_revised_tokens": []}))
    stages, counts = sft.read_examples(str(path), "revision", 0, tokenizer, QWEN, 4096, seed=0)
    assert len(stages[0][1]) == 1 and counts["dropped: empty y_revised"] == 1
    path.write_text(json.dumps({**rows[0], "y_revised_tokens": []}))
    with pytest.raises(SystemExit, match="empty y_revised': 1}; get more with srt.py$"):
        sft.read_examples(str(path), "sum", 2000, tokenizer, QWEN, 4096, seed=0)


class Characters:
    """A tokenizer of two characters per token, to see where text is cut."""
    def decode(self, ids): return "".join(ids)
    def encode(self, text, add_special_tokens): return [text[i:i + 2] for i in range(0, len(text), 2)]


class Bytes:
    """A tokenizer that splits characters."""
    def decode(self, ids): return bytes(ids).decode(errors="replace")
    def encode(self, text, add_special_tokens): return [*text.encode()]


@pytest.mark.parametrize("text, want", [
    ("You're absolutely right to question this. the sum is 4.", "The sum is 4."),
    ("You are right — the sum is 4.", "The sum is 4."),
    ("Yes, you're right, let me see. It is 4.", "Let me see. It is 4."),
    ("Thank you for catching that! Great question. so it is 4.", "So it is 4."),
    ("Good catch, I slipped. It is 4.", "It is 4."),
    ("The right answer is 4. Thank you for asking.", "The right answer is 4. Thank you for asking."),
    ("You are given a triangle.", "You are given a triangle."),
    ("You are right-angled at B.", "You are right-angled at B."),
    ("You are right - the sum is 4.", "The sum is 4."),
    ("You are right--the sum is 4.", "The sum is 4."),
    ("You're right, -4 is it.", "-4 is it."),
    ("You are right -4 is it.", "You are right -4 is it."),
    ("Good point A lies on the line y=2. So x=1.", "Good point A lies on the line y=2. So x=1."),
    ("Good points on the circle are those with x > 0 and y",
     "Good points on the circle are those with x > 0 and y"),
    ("Thank you for pointing out that 12.5 is wrong. it is 4.", "It is 4."),
    ("You're right to use 3.5 as the ratio. it is 4.", "It is 4."),
    ("Thanks for the correction: it is $2.50, not $2.05. so 5.", "So 5."),
    ("You're right! ✅ It is 4.", "✅ It is 4."),
    ("You're absolutely right—12 is the answer.", "12 is the answer."),
    ("Thank you for catching that—4 is right. So 5.", "4 is right. So 5."),
    ("Great question! ∠ABC = 30.", "∠ABC = 30."),
    ("Good catch. ≥ 4, Ünd 5.", "≥ 4, Ünd 5."),
])
@pytest.mark.parametrize("tokenizer", [Characters(), Bytes()], ids=["characters", "bytes"])
def test_flattery(text, want, tokenizer):
    ids = sft.strip_flattery(tokenizer, tokenizer.encode(text, False))
    assert tokenizer.decode(ids) == want


def test_flops_by_hand():
    """One layer, head dim 4, 2 heads, 1 kv head, hidden 8, intermediate 16, vocabulary 10; rows of 3, 1."""
    config = type("C", (), dict(hidden_size=8, head_dim=4, num_attention_heads=2, num_key_value_heads=1,
                                intermediate_size=16, vocab_size=10, num_hidden_layers=1, layer_types=None,
                                sliding_window=None))
    weights = 8 * 8 + 8 * 8 + 2 * 8 * 4 + 3 * 8 * 16
    pairs = 6 + 1
    assert training.forward_flops(config, [3, 1], 2) == 2 * weights * 4 + 4 * 4 * 2 * pairs + 2 * 2 * 8 * 10
    config.layer_types, config.sliding_window = ["sliding_attention"], 2
    assert training.forward_flops(config, [3, 1], 0) == 2 * weights * 4 + 4 * 4 * 2 * (5 + 1)


def test_step_problems_cover_each_epoch():
    seen = [i for step in range(5) for i in distill.step_problems(step, 4, 10, seed=3)]
    assert sorted(seen[:10]) == list(range(10)) and sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]


def test_learning_rate_factor():
    """Up over the first 5 % of the steps, then half a cosine to 0."""
    factors = [sft.cosine(step, 100) for step in range(100)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0]) and factors[5] == 1.0
    assert sft.cosine(5 + 95 // 2, 100) == pytest.approx(0.5, abs=0.02) and 0 < factors[99] < 0.001
    assert factors[5:] == sorted(factors[5:], reverse=True) and sft.cosine(0, 1) == 1.0


def test_the_best_checkpoints_stay(ranks, tmp_path):
    """Three of them; of two as good ones the earlier; what a killed run left goes."""
    best = []
    (tmp_path / "best/step-000099.tmp").mkdir(parents=True)
    (tmp_path / "best/mine").mkdir()
    for step, accuracy in enumerate((0.1, 0.5, 0.3, 0.2, 0.5, 0.3)):
        best = checkpoint.keep_best(str(tmp_path), best, step, accuracy, lambda path: os.makedirs(path))
    assert best == [[0.5, 1], [0.5, 4], [0.3, 2]]
    assert sorted(os.listdir(tmp_path / "best")) == ["mine", "step-000001", "step-000002", "step-000004"]
    # a run went on to 7 and was killed; its state is older
    os.rename(tmp_path / "best/step-000002", tmp_path / "best/step-000007")
    best = checkpoint.keep_best(str(tmp_path), best, 5, 0.1, lambda path: os.makedirs(path))
    assert best == [[0.5, 1], [0.5, 4], [0.1, 5]]
    assert sorted(os.listdir(tmp_path / "best")) == ["mine", "step-000001", "step-000004", "step-000005"]
    best = checkpoint.keep_best(str(tmp_path), best, 4, 0.6, lambda path: os.makedirs(path, exist_ok=True))
    assert best == [[0.6, 4], [0.5, 1], [0.1, 5]]  # it went on, and validated the same step again


def test_the_teacher_does_not_train(qwen, ranks):
    """No dropout, no gradients (in a fresh model and a copy of the student); the copy's head is returned."""
    student = training.load_model(qwen, ranks, training.make_mesh(ranks), torch.float32)
    teacher = training.load_model(qwen, ranks, training.make_mesh(ranks), torch.float32, trainable=False)
    with torch.no_grad():
        for p in student.parameters():
            p.mul_(1.5)
    distill.move_teacher(teacher, student)
    head = distill.whole_head(teacher, torch.float32)
    assert student.training and not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    assert torch.equal(head, student.get_output_embeddings().weight.full_tensor())
    for a, b in zip(student.parameters(), teacher.parameters(), strict=True):
        assert torch.equal(a.full_tensor(), b.full_tensor())


def test_one_vocabulary(qwen, tmp_path):
    """Another tokenizer is an error, and so is a head of another size under the same tokenizer."""
    shutil.copytree(qwen, tmp_path / "wider")
    config = json.loads((tmp_path / "wider/config.json").read_text())
    size = config["vocab_size"]
    config["vocab_size"] += 1
    (tmp_path / "wider/config.json").write_text(json.dumps(config))
    tokenizer, other, wider = map(verify.load_tokenizer, (qwen, qwen, str(tmp_path / "wider")))
    verify.same_vocabulary(qwen, tokenizer, qwen, other)
    with pytest.raises(SystemExit, match=f"wider has {size + 1} vocabulary entries, .* has {size}:"):
        verify.same_vocabulary(qwen, tokenizer, str(tmp_path / "wider"), wider)
    training.check_ids([size], wider.vocabulary, "rows.jsonl:1")  # of the model, if of no text
    with pytest.raises(SystemExit, match=f"rows.jsonl:1: a token id is {size}, .* 0 to {size - 1};"):
        training.check_ids([size], tokenizer.vocabulary, "rows.jsonl:1")
    other.add_tokens(["another"])
    with pytest.raises(SystemExit, match="different tokenizers"):
        verify.same_vocabulary(qwen, tokenizer, qwen, other)


def test_step_examples():
    """Each epoch has every example once, in another order; its last step has what is left."""
    batches = [list(sft.step_examples(range(10), step, 4, "s")) for step in range(6)]
    assert [len(batch) for batch in batches] == [4, 4, 2] * 2
    first, second = sum(batches[:3], []), sum(batches[3:], [])
    assert sorted(first) == sorted(second) == list(range(10)) and first != second


def test_positions_begin_anew_in_each_row(ranks):
    batch = training.make_batch([[5, 6, 7], [8], [9, 9]], ranks.device)
    assert batch.positions.tolist() == [0, 1, 2, 0, 0, 1]
