"""
What only a GPU has: bf16 through varlen_attn, compiled kernels, checkpointing, vLLM with CUDA graphs. Skipped
where there is no GPU; conftest.py hides it from all other tests and from any command that asks for more than
this file:

    python -m pytest -q --disable-warnings -rs tests/test_gpu.py

Models are small and random, their weights representable in bf16, so that a float32 or float64 run on the CPU
has the same ones. Each check is also shown a planted fault, and must see it. -rP prints how far what was
measured lies from its bounds.
"""
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import toy
import transformers
from conftest import REPO, make_rows, read, run
from safetensors.torch import load_file, save_file
from test_kl import reference
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.nn.attention import restore_flash_attention_impl
from transformers import AttentionInterface, AutoModelForCausalLM

import kl
from common.checkpoint import save_model, states
from common.run import launch
from common.sampler import VLLMSampler
from common.training import (FLASH_4, full_tensors, installed_flash_4, load_model, make_batch, make_mesh,
                             packed_attention, use_flash_4)
from verify import PHRASES, load_tokenizer

GPUS = torch.cuda.device_count()
NO_GPU = "no GPU, or it is hidden: `pytest tests/test_gpu.py` alone sees it"
on_gpu = pytest.mark.skipif(not GPUS, reason=NO_GPU)
two_gpus = pytest.mark.skipif(GPUS < 2, reason="fewer than two GPUs")
HIDDEN = {"CUDA_VISIBLE_DEVICES": ""}  # for a reference on the CPU

# ----------------------------------------------------------------------------------------------------- models
# 256 wide, 4 heads of 64 (2 of k and v), which FlashAttention takes; 512 tokens: the toy's and then <0>, <1>
# and so on

LAYERS = {"qwen2": 2, "qwen3": 2, "olmo3": 4}
WINDOW = 8  # of Olmo 3, in three of its four layers
CHAINS, LINKS = 4, 20  # see `recital`
STALE = "model.layers.1.mlp.down_proj.weight"  # not brought where a fault is planted


def make_tokenizer():
    """
    The toy's tokenizer with more words; a prompt ends with the problem's last token, and the answer follows
    at once.
    """
    template = ("{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] + '<|im_end|>' }}"
                "{% else %}{{ '<|im_start|>' + m['content']" + toy.WITHOUT + " }}{% endif %}{% endfor %}")
    tokenizer = toy.make_tokenizer(template)
    tokenizer.add_tokens([f"<{i}>" for i in range(512 - len(tokenizer))])
    return tokenizer


def make_model(folder, family, seed=0, tie=False, follows=None, lead=8, **settings):
    """
    Writes a random model, none of whose tensors is the same with another seed; returns the folder. With
    `follows`, a token for each token, the likeliest token after i is follows[i], by 3 nats or more whatever
    was read before (see `recite`): bf16 cannot change a greedy sample.
    """
    tokenizer, name = make_tokenizer(), family.capitalize()
    more = {"olmo3": dict(sliding_window=WINDOW, layer_types=["sliding_attention"] * 3 + ["full_attention"]),
            "qwen3": dict(head_dim=64), "qwen2": {}}[family]
    common = dict(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=512, num_hidden_layers=LAYERS[family],
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=tie,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        dtype="float32")
    config = getattr(transformers, f"{name}Config")(**{**common, **more, **settings})
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = getattr(transformers, f"{name}ForCausalLM")(config)
        for key, p in model.named_parameters():
            if "norm" in key:
                torch.nn.init.uniform_(p, 0.8, 1.2)
            else:
                torch.nn.init.normal_(p, std=1.0 if "embed" in key else 0.5 if "bias" in key else 0.05)
        if follows is not None:
            recite(model, torch.tensor(follows), lead)
        for p in model.parameters():
            p.copy_(p.bfloat16().float())
        toy.save_model(folder, model, tokenizer)
    return folder


def recite(model, follows, lead):
    """
    Sets head and embedding so that follows[i] has a logit of about `lead` after i, and the others about
    lead / 11 times a normal variate: the last hidden state is the embedding of i and at most as much again
    of what the layers add. Where both are one tensor, follows[follows[i]] must be i.
    """
    embedding, scale = model.get_input_embeddings().weight, lead * 2**0.5 / 256
    if not model.config.tie_word_embeddings:
        head = model.get_output_embeddings().weight
        head.mul_(0).index_add_(0, follows, embedding * scale)
        return
    signs = torch.randint(0, 2, (256,)) * 2.0 - 1
    later = follows > torch.arange(len(follows))
    embedding[follows[later]] = embedding[later] * signs
    model.model.norm.weight.copy_(signs * scale)


def recital():
    """
    For each token the one that follows it: after <k> comes <k + 1>, until after 20 of them the answer comes,
    \\boxed{3} and the end of the turn. So a problem that ends with <k> is answered in 4 to 23 tokens.
    """
    tokenizer = make_tokenizer()
    of, follows = tokenizer.get_vocab(), [(i + 1) % len(tokenizer) for i in range(len(tokenizer))]
    for chain in range(CHAINS):
        follows[of[f"<{(chain + 1) * LINKS - 1}>"]] = of[" \\boxed{"]
    for i, j in ((" \\boxed{", "3"), ("3", "}"), ("}", tokenizer.eos_token)):
        follows[of[i]] = of[j]
    return follows


def pairs(seed):
    """For each token its partner, at random."""
    order = torch.randperm(512, generator=torch.Generator().manual_seed(seed)).tolist()
    follows = [0] * 512
    for i, j in zip(order[::2], order[1::2]):
        follows[i], follows[j] = j, i
    return follows


def apart(a, b):
    """|a - b| / |b|."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def within(name, value, bound):
    """Prints a distance, and fails if it is over its bound."""
    print(f"{name}: {value:.3g} (at most {bound:.3g})")
    assert value <= bound, f"{name}: {value:.3g} is more than {bound:.3g}"


def must_see(check, *args):
    """Fails unless the check finds the fault that was planted in what it is given."""
    with pytest.raises(AssertionError) as found:
        check(*args)
    print(f"planted: {str(found.value).splitlines()[0]}")


def workers():
    """How many scripts to run at once: each has processes of its own that compile."""
    return max(1, len(os.sched_getaffinity(0)) // 2)


# -------------------------------------------------------------------------------------------------- attention
# logits [T, V] of every row, and the gradients of sum(logits * noise)

LENGTHS = (1, 17, 300, 64, 5, 129)


def rows_and_noise():
    g = torch.Generator().manual_seed(0)
    return [(torch.randint(0, 512, (n,), generator=g), torch.randn(n, 512, generator=g)) for n in LENGTHS]


def eager_pass(folder, dtype, device):
    """
    {name: logits or gradient} of transformers' eager attention, row by row; gradients added up in float64.
    """
    loaded = torch.float32 if dtype == torch.float64 else dtype  # frequencies of positions stay in float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=loaded, attn_implementation="eager").to(device)
    if dtype == torch.float64:
        model.double()
    wide, logits, grads = torch.promote_types(dtype, torch.float32), [], {}
    for ids, noise in rows_and_noise():
        hidden = model.get_decoder()(ids[None].to(device), use_cache=False).last_hidden_state[0]
        logits.append(hidden.to(wide) @ model.get_output_embeddings().weight.to(wide).T)
        (logits[-1] * noise.to(device, wide)).sum().backward()
        for name, p in model.named_parameters():
            grads[name] = grads.get(name, 0) + p.grad.double().cpu()
        model.zero_grad()
    return {"logits": torch.cat(logits).detach().double().cpu(), **grads}


def packed_pass(folder, dtype, ranks, attend=packed_attention):
    """The same of all rows in one batch, under FSDP2."""
    model = load_model(folder, ranks, make_mesh(ranks), dtype)
    AttentionInterface.register("packed", attend)
    rows, noise = zip(*rows_and_noise())
    batch = make_batch([ids.tolist() for ids in rows], ranks.device)
    found = []

    def loss(hidden, head):
        found.append(hidden.float() @ head.float().T)
        return (found[0] * torch.cat(noise).to(ranks.device)).sum()

    model(batch, torch.arange(len(batch.ids), device=ranks.device), loss).backward()
    AttentionInterface.register("packed", packed_attention)
    grads = {name: p.grad.full_tensor().double().cpu() for name, p in model.named_parameters()}
    return {"logits": found[0].detach().double().cpu(), **grads}


def check_no_further(got, eager, exact):
    """
    Packed rows are no further from float64 than 1.5 times what eager attention in the same dtype is: the
    logits, all gradients together, and each tensor's, for which 1 % is allowed in any case (the gradient of a
    bias of k is all but zero).
    """
    assert set(got) == set(eager) == set(exact)
    within("logits", apart(got["logits"], exact["logits"]), 1.5 * apart(eager["logits"], exact["logits"]))
    names = sorted(set(exact) - {"logits"})
    size = lambda grads: torch.cat([grads[name].flatten() / exact[name].norm() for name in names])
    within("gradients", apart(size(got), size(exact)), 1.5 * apart(size(eager), size(exact)))
    for name in names:
        within(name, apart(got[name], exact[name]), 1.5 * apart(eager[name], exact[name]) + 0.01)


def window_off_by_one(*args, sliding_window=None, **how):
    return packed_attention(*args, sliding_window=sliding_window and sliding_window + 1, **how)


def rows_that_see_each_other(*args, starts, segments, longest, **how):
    ends = [0, int(starts[-1])]
    return packed_attention(*args, starts=starts[[0, -1]], segments=segments and ends, longest=ends[1], **how)


@pytest.fixture(params=[2, 4])
def flash(request):
    """--flash"""
    if request.param == 2:
        yield
    elif installed_flash_4() != FLASH_4:
        pytest.skip(f"flash-attn-4 {FLASH_4} is not installed")
    else:
        use_flash_4()
        yield
        restore_flash_attention_impl()


@on_gpu
@pytest.mark.parametrize("family", LAYERS)
def test_packed_attention_against_eager(family, flash, ranks, tmp_path):
    folder, dtype = make_model(str(tmp_path / "model"), family, tie=family == "qwen3"), torch.bfloat16
    exact, eager = eager_pass(folder, torch.float64, "cpu"), eager_pass(folder, dtype, ranks.device)
    check_no_further(packed_pass(folder, dtype, ranks), eager, exact)
    must_see(check_no_further, packed_pass(folder, dtype, ranks, rows_that_see_each_other), eager, exact)
    if family == "olmo3":
        must_see(check_no_further, packed_pass(folder, dtype, ranks, window_off_by_one), eager, exact)


# --------------------------------------------------------------------------------------------------------- KL
# 300 rows in chunks of 128, 4,096 tokens; what is bf16 is so on both sides

CASES = [("cross entropy", 0)] + [(kind, k) for k in (0, 8, 64) for kind in kl.KINDS]


def head_inputs(topk, device):
    """
    hidden and head of both sides in bf16; targets; weights. No row whose topk-th and next logit are too near
    to tell apart.
    """
    g = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=g).bfloat16()
    hidden, hidden_t = make(300, 256) / 4, make(300, 192) / 4
    head, head_t = make(4096, 256) / 2, make(4096, 192) / 2
    targets, weight = torch.randint(0, 4096, (300,), generator=g), torch.rand(300, generator=g)
    if topk:
        highest = (hidden_t.double() @ head_t.double().T).topk(topk + 1).values
        clear = highest[:, -2] - highest[:, -1] > 1e-4
        hidden, hidden_t, targets, weight = (a[clear] for a in (hidden, hidden_t, targets, weight))
    return [a.to(device) for a in (hidden, head, hidden_t, head_t, targets, weight)]


def head_pass(kind, topk, device, compile=None):
    """{name: value} of a loss by kl.py; by autograd over whole logits in float64 where compile is None."""
    hidden, head, hidden_t, head_t, targets, weight = head_inputs(topk, device)
    if compile is None:
        hidden, head, hidden_t, head_t, weight = map(torch.Tensor.double,
                                                     (hidden, head, hidden_t, head_t, weight))
    a, b = hidden.requires_grad_(), head.requires_grad_()
    if compile is None:
        s, t = a @ b.T, hidden_t @ head_t.T
        log_p = s.log_softmax(-1)
        logp = log_p.gather(1, targets[:, None])[:, 0]
        each = -logp if kind == "cross entropy" else reference(s, t, kind, topk)
        loss, others = (each * weight).sum(), {
            "logp": logp, "entropy": -(log_p.exp() * log_p).sum(-1),
            "teacher_logp": t.log_softmax(-1).gather(1, targets[:, None])[:, 0]}
    elif kind == "cross entropy":
        (loss, each), others = kl.chunked_ce(a, b, targets, weight, chunk=128, compile=compile), {}
    else:
        found = kl.chunked_kl(a, b, hidden_t, head_t, weight, targets, kind, topk, chunk=128, compile=compile)
        loss, each, others = found.loss, found.kl, found._asdict()
    others = {name: others[name] for name in ("logp", "teacher_logp", "entropy") if name in others}
    (3 * loss).backward()  # a factor from above must reach the gradients that were made on the way
    values = {"loss": loss, "each": each, **others, "d_hidden": a.grad, "d_head": b.grad}
    return {name: value.detach().double().cpu() for name, value in values.items()}


def check_head(got, exact):
    """Values are as good as fp32 makes them; gradients, which pass through bf16 twice, within 0.6 %."""
    for name, value in got.items():
        within(name, apart(value, exact[name]), 6e-3 if name.startswith("d_") else 2e-5)


def other_sign(tile):
    """The compiled tile, its gradient with another sign."""
    fast = torch.compile(tile)

    def faulty(*args):
        seen = fast(*args)
        args[-1].neg_()
        return seen

    return faulty


def other_sums(tile):
    """The compiled tile, its first value (the loss of a row) off by one part in a thousand."""
    fast = torch.compile(tile)
    return lambda *args: fast(*args) * 1.001


@pytest.fixture
def fresh_compiler(monkeypatch):
    """
    No graphs of other cases: past a number of them torch.compile gives up and runs as it is written, without
    a word.
    """
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(kl, "compiled", functools.cache(torch.compile))
    yield
    torch._dynamo.reset()


@on_gpu
@pytest.mark.parametrize("kind, topk", CASES)
def test_kl_and_cross_entropy(kind, topk, fresh_compiler, monkeypatch):
    exact = head_pass(kind, topk, "cuda")
    check_head(head_pass(kind, topk, "cuda", compile=False), exact)
    check_head(head_pass(kind, topk, "cuda", compile=True), exact)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    for fault in (other_sign, other_sums):
        monkeypatch.setattr(kl, "compiled", fault)
        must_see(check_head, head_pass(kind, topk, "cuda", compile=True), exact)


# ------------------------------------------------------------------------------------------------ whole steps
# One step of each script by its command line: Olmo 3 through sft.py, Qwen3 through distill.py, whose model
# recites, so that what it samples is the same in bf16 and float32. The reference is the same command on the
# CPU, in float32.

VARIANTS = {f"compile {c}, checkpointing {k}": ["--compile", c, "--checkpointing", k]
            for c in (0, 1) for k in (0, 1)}
if installed_flash_4() == FLASH_4:
    VARIANTS["flash 4"] = ["--flash", 4]
COMMON = ["--batch", 12, "--lr", "1e-3", "--micro_tokens", 300, "--save_every", 1]
HOW = {"sft.py": [*COMMON, "--objective", "sum", "--epochs", 1],
       "distill.py": [*COMMON, "--steps", 1, "--warmup", 0, "--max_tokens", 32, "--temperature", "0.1"]}
HF = {"sft.py": [], "distill.py": ["--engine", "hf"]}


class Step(NamedTuple):
    """What a run has left after its last step."""
    row: dict  # of metrics.jsonl
    weights: dict  # in float32, by name
    moments: dict  # AdamW's first; after one step a tenth of the gradient


def step_of(out):
    """Reads the Step of a run's folder."""
    whole = f"{out}/state.pt"
    dcp_to_torch_save(states(f"{out}/state")[-1], whole)
    state = torch.load(whole)
    weights = {name: tensor for name, tensor in state.items() if f"{name}.exp_avg" in state}
    moments = {name: state[f"{name}.exp_avg"] for name in weights}
    return Step(read(f"{out}/metrics.jsonl")[-1], weights, moments)


def recited_problems(path, tokenizer, n):
    """Problems that end with <k>, for different k; every second one's answer is what the model recites, 3."""
    toy_problems = [toy.make_problem(np.random.default_rng(i)) for i in range(n)]
    rows = [{"id": f"p{i}", "problem": f"{p}<{(7 * i + 3) % (CHAINS * LINKS)}>", "answer": "34"[i % 2]}
            for i, p in enumerate(toy_problems)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def step_inputs(folder, problems_file):
    """
    {script: (model, the same with a planted fault, data)}: a window off by one, a weight of another model.
    """
    olmo = [make_model(str(folder / f"olmo{window}"), "olmo3", sliding_window=window)
            for window in (WINDOW, WINDOW + 1)]
    qwen = [make_model(str(folder / f"qwen{seed}"), "qwen3", seed, follows=recital()) for seed in (0, 1)]
    own, other = (load_file(f"{path}/model.safetensors") for path in qwen)
    save_file({**own, STALE: other[STALE]}, f"{qwen[1]}/model.safetensors", metadata={"format": "pt"})
    rows = make_rows(load_tokenizer(olmo[0]), problems_file, "olmo")[:12]
    (folder / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = recited_problems(folder / "problems.jsonl", load_tokenizer(qwen[0]), 12)
    return {"sft.py": (*olmo, folder / "d.jsonl"), "distill.py": (*qwen, problems)}


def one_step(script, out, model, data, how, env=None, nproc=0):
    run(script, "--model", model, "--data", data, "--out", out, *HOW[script], *how, env=env, nproc=nproc)
    return step_of(out)


def make_steps(folder, inputs, how=(), env=None, variants=VARIANTS):
    """
    {(script, name): Step}: the reference, each variant, and the fault with the last variant. how, env: of all
    but the reference.
    """
    jobs = {}
    for script, (model, faulty, data) in inputs.items():
        jobs[script, "reference"] = model, data, [*HF[script], "--dtype", "float32"], HIDDEN
        for name, flags in variants.items():
            jobs[script, name] = model, data, [*HF[script], *flags, *how], env
        jobs[script, "planted"] = faulty, data, [*HF[script], *flags, *how], env
    with ThreadPoolExecutor(workers()) as pool:
        made = {key: pool.submit(one_step, key[0], folder / "-".join(key), model, data, flags, env)
                for key, (model, data, flags, env) in jobs.items()}
        return {key: step.result() for key, step in made.items()}


# At most so far from the float32 run, and from the first variant: loss and gradient norm (relative), all
# gradients together, the gradient of any one tensor, all updates together. AdamW's first update is the
# learning rate times the sign of the gradient, which is anyone's guess where it is all but zero.
FROM_REFERENCE = 0.003, 0.01, 0.03, 0.06, 0.25
FROM_EACH_OTHER = 0.002, 0.005, 0.02, 0.04, 0.2


def check_step(got, want, start, bounds):
    """A step against another from the weights `start`: loss, gradients, weights after it."""
    loss, norm, gradients, each, update = bounds
    for name in {"tokens", "loss_tokens", "reward", "response_len"} & set(want.row):
        assert got.row[name] == want.row[name], name
    within("loss", abs(got.row["loss"] / want.row["loss"] - 1), loss)
    within("norm", abs(got.row["grad_norm"] / want.row["grad_norm"] - 1), norm)
    whole = lambda tensors: torch.cat([tensors[name].flatten() for name in sorted(start)])
    within("gradients", apart(whole(got.moments), whole(want.moments)), gradients)
    worst = max(start, key=lambda name: apart(got.moments[name], want.moments[name]))
    within(worst, apart(got.moments[worst], want.moments[worst]), each)
    moved = lambda step: whole(step.weights) - whole(start)
    within("update", apart(moved(got), moved(want)), update)


@pytest.fixture(scope="module")
def inputs(problems_file, tmp_path_factory):
    return step_inputs(tmp_path_factory.mktemp("inputs"), problems_file)


@pytest.fixture(scope="module")
def steps(inputs, tmp_path_factory):
    few = {"TORCHINDUCTOR_COMPILE_THREADS": "4"}  # each of the scripts would start as many as there are cores
    return make_steps(tmp_path_factory.mktemp("steps"), inputs, env=few)


@on_gpu
@pytest.mark.parametrize("script", HOW)
def test_step_against_float32(script, steps, inputs):
    """Compiled or not, with checkpointing or not; and of each other they are nearer."""
    want, start = steps[script, "reference"], load_file(f"{inputs[script][0]}/model.safetensors")
    assert want.row["peak_gb"] == 0 and want.row["loss"] > 0.05
    first = steps[script, next(iter(VARIANTS))]
    for name in VARIANTS:
        print(f"-- {name}")
        assert steps[script, name].row["peak_gb"] > 0
        check_step(steps[script, name], want, start, FROM_REFERENCE)
        check_step(steps[script, name], first, start, FROM_EACH_OTHER)
    must_see(check_step, steps[script, "planted"], want, start, FROM_REFERENCE)


@two_gpus
@pytest.mark.parametrize("script", HOW)
def test_step_of_two_ranks(script, steps, inputs, tmp_path):
    model, _, data = inputs[script]
    got = one_step(script, tmp_path / "out", model, data, HF[script], nproc=2)
    check_step(got, steps[script, "reference"], load_file(f"{model}/model.safetensors"), FROM_REFERENCE)


# ------------------------------------------------------------------------------------------------------- vLLM
# Engines with CUDA graphs, each in a process of its own.

HAVE_VLLM = find_spec("vllm") is not None
on_vllm = pytest.mark.skipif(not GPUS or not HAVE_VLLM, reason="vLLM is not installed" if GPUS else NO_GPU)
CYCLES = 10


def in_process(function, *paths):
    """
    Calls a function of this file in a process of its own; returns what it writes, as json, to the last path.
    """
    start = f"import sys; sys.path[:0] = {[str(REPO), str(REPO / 'tests')]}; import test_gpu"
    code = f"{start}; test_gpu.{function.__name__}(*sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", code, *map(str, paths)], capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    return json.loads(Path(paths[-1]).read_text())


def engine_on(folder, ranks):
    """(sampler, greedy): greedy() gives [[ids], [log-probabilities]] of 12 prompts of some 200 tokens."""
    dtype = torch.bfloat16 if ranks.device.type == "cuda" else torch.float32
    sampler = VLLMSampler(folder, load_tokenizer(folder), 256, ranks.device, dtype, memory=0.1, max_seqs=16)
    g = torch.Generator().manual_seed(0)
    prompts = [torch.randint(100, 512, (190 + i,), generator=g).tolist() for i in range(12)]

    def greedy():
        samples = sampler.generate(prompts, range(len(prompts)), max_tokens=24, temperature=0.0)
        return [[s.ids for s in samples], [s.logprobs for s in samples]]

    return sampler, greedy


def finish(sampler, out, found):
    """Writes what was found and ends the engine."""
    Path(out).write_text(json.dumps(found))
    sampler.close()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def sample_afresh(folder, out):
    """Greedy samples of a new engine."""
    sampler, greedy = engine_on(folder, launch())
    finish(sampler, out, greedy())


def free_gib():
    return torch.cuda.mem_get_info()[0] / 2**30 if torch.cuda.is_available() else 0.0


def sync_and_sleep(old, new, saved, out):
    """
    An engine on the folder `old` is given other weights, those of `new` a little larger, which are saved to
    `saved`: samples before and after, samples with each planted fault, and free memory in GiB.
    """
    ranks = launch()
    dtype = torch.bfloat16 if ranks.device.type == "cuda" else torch.float32
    # as in distill.py the trainer's models come first
    trained, first = (load_model(folder, ranks, make_mesh(ranks), dtype) for folder in (new, old))
    with torch.no_grad():
        for p in trained.parameters():
            p.mul_(1.01)
    save_model(saved, trained, load_tokenizer(new), PHRASES["qwen"], dtype)
    found = {"free": free_gib(), "planted": {}}
    sampler, greedy = engine_on(old, ranks)
    weights = lambda model, *but: (pair for pair in full_tensors(model, dtype) if pair[0] not in but)
    found["before"] = greedy()  # the prefix cache now holds keys and values of the old weights
    sampler.load(weights(trained))
    found["after"] = greedy()
    found["free awake"] = free_gib()

    head = "model.embed_tokens.weight" if trained.config.tie_word_embeddings else "lm_head.weight"
    for name in (STALE, head):
        sampler.load(weights(first))
        sampler.load(weights(trained, name))
        found["planted"][f"without {name}"] = greedy()
    sampler.load(weights(first))
    greedy()
    reset, sampler.llm.reset_prefix_cache = sampler.llm.reset_prefix_cache, lambda: None
    sampler.load(weights(trained))
    found["planted"]["prefix cache not reset"] = greedy()
    sampler.llm.reset_prefix_cache = reset

    kept = []
    for leak in (0, 32 << 20):  # bytes a cycle
        found[f"leak {leak > 0}"] = []
        for _ in range(CYCLES):
            sampler.sleep()
            found[f"leak {leak > 0}"].append(free_gib())
            kept.append(torch.empty(leak, dtype=torch.uint8, device=ranks.device))
            sampler.load(weights(trained))
            found["last"] = greedy()
    finish(sampler, out, found)


def check_samples(got, want):
    """
    The same greedy ids; log-probabilities no further apart than sampler and trainer are in a healthy run.
    """
    assert got[0] == want[0], "other ids"
    mine, theirs = (torch.tensor(sum(logprobs, [])) for _, logprobs in (got, want))
    within("mean |difference of log-probabilities|", (mine - theirs).abs().mean().item(), 0.01)


def check_sleep(free, awake, asleep):
    """Asleep the engine has given back at least 80 % of what it took; CUDA's graphs and context stay."""
    within("GiB held asleep", free - asleep, 0.2 * (free - awake))


def check_steady(free):
    """From the second cycle to the last no more than 64 MiB go."""
    within("GiB that cycles have taken", free[1] - free[-1], 1 / 16)


@on_vllm
@pytest.mark.parametrize("tie", [True, False])
def test_sync_sleep_and_cycles(tie, tmp_path):
    """
    Through CUDA graphs: new weights are the samples', asleep the memory is free, and ten cycles do not grow.
    """
    folders = [make_model(str(tmp_path / f"model{seed}"), "qwen3", seed, tie, follows=pairs(seed), lead=5)
               for seed in (0, 1)]
    found = in_process(sync_and_sleep, *folders, tmp_path / "saved", tmp_path / "found.json")
    fresh = in_process(sample_afresh, tmp_path / "saved", tmp_path / "fresh.json")
    for samples in (found["after"], found["last"]):
        check_samples(samples, fresh)
    for samples in (found["before"], *found["planted"].values()):
        must_see(check_samples, samples, fresh)
    free, awake, asleep = found["free"], found["free awake"], found["leak False"]
    print(f"GiB free: before {free:.2f}, with an engine {awake:.2f}, asleep {asleep}")
    assert free - awake > 0.5  # it may have a tenth of the GPU's
    check_sleep(free, awake, asleep[0])
    must_see(check_sleep, free, awake, awake)
    check_steady(asleep)
    must_see(check_steady, found["leak True"])


@on_vllm
@pytest.mark.parametrize("nproc", [0, pytest.param(2, marks=two_gpus)])
def test_distill_with_vllm(nproc, steps, inputs, tmp_path):
    """
    What the README's command does on GPUs: vLLM samples, asleep while the student trains. It recites as
    transformers does.
    """
    model, _, data = inputs["distill.py"]
    how = ["--engine", "vllm", "--vllm_memory", 0.1]
    got = one_step("distill.py", tmp_path / "out", model, data, how, nproc=nproc)
    check_step(got, steps["distill.py", "reference"], load_file(f"{model}/model.safetensors"), FROM_REFERENCE)
    within("gap of sampler and trainer", got.row["sync_gap"], 0.03)


# ---------------------------------------------------------------------------------------------------- SIGKILL

STEPS = 12


def kill(args, out, env):
    """
    Kills all processes of a run once it has saved its fourth step; returns the last step that it has saved.
    """
    with open(f"{out}.log", "w") as log:
        process = subprocess.Popen(args, stdout=log, stderr=log, start_new_session=True, env=env)
        end = time.time() + 200
        while not (out / "state/step-000004").exists():
            assert process.poll() is None and time.time() < end, Path(f"{out}.log").read_text()[-3000:]
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    return int(states(out / "state")[-1].name.removeprefix("step-"))


def resume(folder, model, data, how=(), env=None):
    """
    [(rows of metrics.jsonl, last Step)] of a whole run, of one that was killed and resumed, and of one
    resumed as if it had made one step more than it has (a planted fault).
    """
    whole, killed, skips = outs = [folder / name for name in ("whole", "killed", "skips")]
    env = {**os.environ, **(env or {})}
    command = lambda out: list(map(str, [
        sys.executable, REPO / "distill.py", "--model", model, "--data", data, "--out", out,
        *HF["distill.py"], *HOW["distill.py"], "--steps", STEPS, "--lr", "1e-4", "--save_every", 2, *how]))
    start = lambda out: subprocess.run(command(out), capture_output=True, text=True, timeout=250, env=env)
    with ThreadPoolExecutor(2) as pool:
        unbroken = pool.submit(start, whole)
        saved = kill(command(killed), killed, env)
        assert 4 <= saved < STEPS and not (killed / "final").exists()
        shutil.copytree(killed, skips)
        progress = states(skips / "state")[-1] / "progress.json"
        progress.write_text(progress.read_text().replace(f'"step": {saved}', f'"step": {saved + 1}'))
        runs = [unbroken.result(), *pool.map(start, (killed, skips))]
    for out, done, first in zip(outs, runs, (0, saved, saved + 1)):
        assert done.returncode == 0 and f"from step {first}\n" in done.stdout, done.stderr[-3000:]
    return [(read(out / "metrics.jsonl"), step_of(out)) for out in outs]


def check_resumed(got, want, start):
    """
    The same losses within 1 %; weights within 5 % of what the run has moved them, AdamW's moments within
    10 %.
    """
    whole_run = {row["step"]: row["loss"] for row in want[0]}
    within("losses", max(abs(row["loss"] / whole_run[row["step"]] - 1) for row in got[0]), 0.01)
    whole = lambda tensors: torch.cat([tensors[name].flatten() for name in sorted(start)])
    moved = lambda run: whole(run[1].weights) - whole(start)
    within("weights", apart(moved(got), moved(want)), 0.05)
    within("moments", apart(whole(got[1].moments), whole(want[1].moments)), 0.1)


@on_gpu
def test_killed_and_resumed(inputs, tmp_path):
    """
    SIGKILL in the middle of a run; the same command goes on to where an unbroken run ends, as near as a GPU's
    sums allow.
    """
    model, _, data = inputs["distill.py"]
    whole, killed, skips = resume(tmp_path, model, data, ["--compile", 0])
    start = load_file(f"{model}/model.safetensors")
    for rows, _ in (whole, killed):
        assert [row["step"] for row in rows] == list(range(STEPS))
    check_resumed(killed, whole, start)
    must_see(check_resumed, skips, whole, start)


# ------------------------------------------------------------------------------------------------------ error


@on_gpu
def test_an_error_is_all_that_is_printed(tmp_path):
    """NCCL warns at the end of a process that has left its group open."""
    left = ("import torch.distributed as dist; dist.init_process_group('cpu:gloo,cuda:nccl', "
            "store=dist.HashStore(), rank=0, world_size=1); exit('error: planted')")
    script = [REPO / "kl.py", "--out", tmp_path]
    for name in ("student", "teacher", "responses"):
        script += [f"--{name}", tmp_path / "none"]
    printed = lambda args: subprocess.run([sys.executable, *args], capture_output=True, text=True).stderr
    seen, planted = printed(script).splitlines(), printed(["-c", left]).splitlines()
    assert len(seen) == 1 and seen[0].startswith("error:"), seen
    must_see(within, "lines", len(planted), 1)


# ----------------------------------------------------------------------------------------------------- hidden


def test_the_gpu_is_hidden_from_other_tests(tmp_path):
    """
    In pytest's workers and in what they start, where anything but this file is asked for; here it is left as
    it was.
    """
    (tmp_path / "test_other.py").write_text("""
import os, subprocess, sys

def test_other():
    show = "import os; print(os.environ.get('CUDA_VISIBLE_DEVICES'))"
    child = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True).stdout
    assert child == "\\n" and os.environ["CUDA_VISIBLE_DEVICES"] == ""
""")
    this, worker = f"{__file__}::test_what_this_file_sees", ["-n", "1"] if find_spec("xdist") else []
    pytest_on = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *worker]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "7"}
    start = lambda *files: subprocess.run([*pytest_on, *files], cwd=REPO, capture_output=True, text=True,
                                          env=env).stdout
    hidden, seen = start(this, tmp_path / "test_other.py"), start(this)
    assert "1 passed, 1 skipped" in hidden, hidden
    assert "1 passed" in seen and "skipped" not in seen, seen


def test_what_this_file_sees():
    """Part of the test above."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        pytest.skip("the GPU is hidden")
