"""
Both samplers: what they return, and that weights reach them. The vLLM half runs where its CPU build is installed (on a GPU: test_gpu.py).
conftest.py runs it last: vLLM takes the process group down when an engine ends.
"""
import os
import sys
import types

import numpy as np
import pytest
import torch
from conftest import have_vllm

import verify
from common import checkpoint, training
from common.sampler import Request, VLLMSampler, make_sampler, pick

HAVE_VLLM = have_vllm()
if os.environ.get("REQUIRE_VLLM") and not HAVE_VLLM:
    raise RuntimeError("REQUIRE_VLLM is set and vLLM's CPU build is not installed")
NEEDS_VLLM = pytest.mark.skipif(not HAVE_VLLM, reason="vLLM's CPU build is not installed")
ENGINES = ["hf", pytest.param("vllm", marks=NEEDS_VLLM)]
engines = {}


@pytest.fixture(scope="module", autouse=True)
def close_engines(ranks):
    """Before the process group goes: vLLM's own clean-up wants to take it down itself."""
    yield
    for engine in engines.values():
        engine.close()
    engines.clear()


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Two sets of weights each for a tied and an untied Qwen3 and for Olmo 3."""
    import toy
    root = tmp_path_factory.mktemp("models")
    make = {"tied": lambda p, s: toy.tiny_qwen3(p, tie=True, seed=s), "untied": lambda p, s: toy.tiny_qwen3(p, tie=False, seed=s),
            "olmo": lambda p, s: toy.tiny_olmo3(p, seed=s)}
    return {(kind, seed): make[kind](str(root / f"{kind}{seed}"), seed) for kind in make for seed in (0, 1)}


@pytest.fixture(scope="module")
def trainers(models, ranks):
    return {folder: training.load_model(folder, ranks, training.make_mesh(ranks), torch.float32, trainable=False)
            for (kind, seed), folder in models.items() if seed == 0}


def sampler_of(engine, folder, ranks):
    """One engine per folder for the whole file: vLLM takes seconds to come up."""
    if (engine, folder) not in engines:
        tokenizer = verify.load_tokenizer(folder)
        engines[engine, folder] = make_sampler(engine, folder, tokenizer, 256, ranks.device, torch.float32, 0.3)
    return engines[engine, folder]


class Engine:
    """In place of vLLM's: each step ends the oldest request. `asked`: how many were in flight as each came."""

    def __init__(self):
        self.flying, self.asked = [], []

    def add_request(self, name, prompt, params):
        self.asked.append(len(self.flying))
        self.flying.append(name)

    def step(self):
        y = types.SimpleNamespace(token_ids=[5], logprobs=None, finish_reason="stop")
        return [types.SimpleNamespace(finished=True, request_id=self.flying.pop(0), outputs=[y])]


@NEEDS_VLLM
@pytest.mark.parametrize("most, first", [(32, 30), (4, 3), (1, 0)])
def test_prompts_come_several_at_once(most, first):
    """No prompt while more than 15 of 16 places are taken, then as many as there is room for; all are answered."""
    sampler, engine = VLLMSampler.__new__(VLLMSampler), Engine()
    sampler.llm, sampler.max_seqs, sampler.max_len, sampler.end_ids = types.SimpleNamespace(llm_engine=engine), most, 100, [5]
    samples = sampler.generate([[1, 2]] * 200, range(200), max_tokens=9, logprobs=False)
    assert [sample.request.key for sample in samples] == list(range(200))
    begins = [now for before, now in zip([-2, *engine.asked], engine.asked) if now != before + 1]  # of each group
    assert begins[0] == 0 and set(begins[1:]) == {first} and max(engine.asked) == most - 1


def prompts_of(folder, n=12):
    tokenizer = verify.load_tokenizer(folder)
    rng = np.random.default_rng(0)
    import toy
    return [verify.chat_ids(tokenizer, verify.Problem(str(i), toy.make_problem(rng), "1"))[: 29 - i % 3] for i in range(n)]


def greedy(sampler, folder):
    prompts = [(x * 8)[:200] for x in prompts_of(folder)]  # longer than a block of the prefix cache, 128 tokens on a CPU
    return [s.ids for s in sampler.generate(prompts, range(len(prompts)), max_tokens=24, temperature=0.0)]


@pytest.mark.parametrize("error, named", [
    (ValueError("Free memory on device cuda:0 (3.1/79.2 GiB) on startup is less than\ndesired"), True),
    (AssertionError("Error in memory profiling. Initial free memory 1, current free memory 2."), True),
    (ValueError("Model architectures ['X'] are not supported for now."), False)])
def test_too_little_memory_for_vllm(error, named, models, ranks, monkeypatch):
    """vLLM's own words speak of its flags, so ours is named first; what is no matter of memory stays as it is."""
    def llm(*_, **__):
        raise error

    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(LLM=llm))
    folder = models["tied", 0]
    with pytest.raises(SystemExit if named else ValueError) as found:
        VLLMSampler(folder, verify.load_tokenizer(folder), 256, ranks.device, torch.float32, memory=0.85)
    said = " ".join(str(error).split())
    assert str(found.value) == (f"error: --vllm_memory 0.85 does not do for vLLM: {said}" if named else said)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["tied", "untied", "olmo"])
def test_sync_equals_a_fresh_engine(engine, kind, models, trainers, ranks, tmp_path):
    """Weights of an FSDP model go into a running engine; greedy samples are those of a new engine on the saved folder."""
    old, new = models[kind, 0], models[kind, 1]
    tokenizer = verify.load_tokenizer(new)
    # as in distill.py the trainer's models come first: vLLM changes transformers' classes where it serves by them
    trained, back = (training.load_model(folder, ranks, training.make_mesh(ranks), torch.float32) for folder in (new, old))
    with torch.no_grad():  # not weights that lie in any folder yet
        for p in trained.parameters():
            p.mul_(1.01)
    checkpoint.save_model(str(tmp_path / "saved"), trained, tokenizer, "qwen", torch.float32)
    sampler = sampler_of(engine, old, ranks)
    before = greedy(sampler, old)  # fills the prefix cache with the old weights' keys and values
    sampler.load(training.full_tensors(trained, torch.float32))
    after = greedy(sampler, old)
    assert after != before
    fresh = sampler_of(engine, str(tmp_path / "saved"), ranks)
    assert after == greedy(fresh, old)
    sampler.load(training.full_tensors(back, torch.float32))
    assert greedy(sampler, old) == before


@pytest.mark.parametrize("engine, kind", [("hf", "tied"), pytest.param("vllm", "tied", marks=NEEDS_VLLM),
                                          pytest.param("vllm", "olmo", marks=NEEDS_VLLM)])
def test_logprobs_are_the_trainers(engine, kind, models, trainers, ranks):
    """log pi of the sampled tokens, at temperature 1 over the whole vocabulary, whatever they were sampled with."""
    folder = models[kind, 0]
    sampler, prompts = sampler_of(engine, folder, ranks), prompts_of(folder)
    for how in (dict(temperature=1.0), dict(temperature=0.7, top_p=0.8)):
        for x, sample in zip(prompts, sampler.generate(prompts, range(len(prompts)), max_tokens=20, **how)):
            select = torch.arange(len(x) - 1, len(x) + len(sample.ids) - 1)
            with torch.no_grad():
                logp = trainers[folder](training.make_batch([x + sample.ids], ranks.device), select,
                                        lambda hidden, head: (hidden @ head.T).log_softmax(-1))
            want = logp[torch.arange(len(sample.ids)), torch.tensor(sample.ids)]
            assert torch.allclose(torch.tensor(sample.logprobs), want, atol=2e-3)


@pytest.mark.parametrize("engine", ENGINES)
def test_samples(engine, models, ranks):
    """One seed per request, whatever else is in the batch; ends are in the ids; truncation is told; any number of requests."""
    folder = models["tied", 0]
    sampler, prompts = sampler_of(engine, folder, ranks), prompts_of(folder)
    ends = verify.load_tokenizer(folder).end_ids
    many = sampler.generate(prompts * 3, range(36), max_tokens=12)
    some = sampler.generate(prompts[:5], range(5), max_tokens=12)
    assert [s.ids for s in some] == [s.ids for s in many[:5]]
    assert [s.ids for s in many[:12]] != [s.ids for s in many[12:24]]  # other seeds, same prompts
    assert any(s.truncated for s in many) and not all(s.truncated for s in many)
    for s in many:
        assert len(s.ids) == len(s.logprobs) and not any(i in ends for i in s.ids[:-1])
        assert s.truncated == (s.ids[-1] not in ends) and (not s.truncated or len(s.ids) == 12)
    assert sampler.generate([], [], max_tokens=12) == []
    long = prompts[0] * 8  # 232 tokens of the engine's 256: there is room for 24 more
    assert len(sampler.generate([long], [0], max_tokens=100, temperature=0.0)[0].ids) <= 24


@pytest.mark.parametrize("engine", ENGINES)
def test_streaming_takes_requests_as_they_come(engine, models, ranks):
    """A request that is made when another finishes is served in the same stream."""
    folder = models["tied", 0]
    sampler, prompts = sampler_of(engine, folder, ranks), prompts_of(folder)
    queue = [Request(("init", i), x, i) for i, x in enumerate(prompts)]
    served = []
    for sample in sampler.stream(lambda: queue.pop(0) if queue else None, max_tokens=8):
        served.append(sample.request.key)
        if sample.request.key[0] == "init":
            queue.append(Request(("revision", sample.request.key[1]), sample.request.ids + sample.ids, 7))
    assert sorted(served) == sorted([(k, i) for k in ("init", "revision") for i in range(len(prompts))])


def test_pick_follows_the_distribution():
    """Inverse-CDF sampling against the exact probabilities, with temperature and top-p."""
    logits = torch.tensor([[1.0, 3.0, 0.0, 2.0, -1.0]])
    uniform = (torch.arange(20000) + 0.5) / 20000  # a grid: frequencies are exact up to 1 / 20000
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.9), (2.0, 0.5)):
        p = (logits[0].double() / temperature).softmax(-1)
        order = p.argsort(descending=True)
        inside = order[: int((p[order].cumsum(0) < top_p).sum()) + 1]
        want = torch.zeros(5, dtype=torch.double)
        want[inside] = p[inside] / p[inside].sum()
        got = torch.bincount(pick(logits.expand(20000, 5), uniform, temperature, top_p), minlength=5) / 20000
        assert torch.allclose(got.double(), want, atol=2e-4)
    assert pick(logits, uniform[:1], 0.0, 1.0).item() == 1
