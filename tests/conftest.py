"""What the tests share: tiny models, rows of D_revision made by hand, and a way to run the real scripts."""
import fcntl
import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: a second thread only waits
REPO = Path(__file__).parents[1]
sys.path[:0] = [str(REPO), str(REPO / "tests")]

import numpy as np
import pytest

SHARED = REPO.parent / "shared"
LONG = "test_survive", "test_scripts", "test_distill", "test_train"  # their tests start scripts


def pytest_configure(config):
    """
    Only test_gpu.py, asked for by itself, sees a GPU: the other tests hold bits or float32, and fork. Here nothing has opened CUDA
    yet, in pytest nor in its workers; what the tests start inherits the variable.
    """
    if {Path(arg.split("::")[0]).name for arg in config.args} != {"test_gpu.py"}:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, two_cores(int(os.environ["PYTEST_XDIST_WORKER"][2:]), os.sched_getaffinity(0)))


def two_cores(worker, cores):
    """Those of a process of tests, of those that the machine has: each script that it starts takes a judge's worker per core."""
    cores = sorted(cores)
    return {cores[i % len(cores)] for i in (2 * worker, 2 * worker + 1)}


def have_vllm():
    """Whether vLLM is here and runs where the GPU is hidden: its CUDA build, beside torch's, does not."""
    import torch
    return importlib.util.find_spec("vllm") is not None and not torch.version.cuda


def pytest_collection_modifyitems(items):
    """The longest files first, for processes share them; vLLM's last: it changes transformers' classes."""
    order = [*LONG, "", "test_vllm"]
    items.sort(key=lambda item: order.index(item.path.stem if item.path.stem in order else ""))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A process gets one test of a long file at a time, any other file as a whole, and both of those with a sandbox."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            name = Path(nodeid.split("::")[0]).stem
            return nodeid if name in LONG else name.removesuffix("_pipeline")

    return ByFile(config, log)


@pytest.fixture(scope="module")
def only_sandbox():
    """One file of tests at a time uses the sandbox: the attacks count the processes of the machine."""
    with open(os.path.join(tempfile.gettempdir(), "sandbox-tests.lock"), "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


def run(script, *args, nproc=0, ok=True, seconds=300, env=None):
    """Runs a script as a user would, alone or under torchrun; returns the CompletedProcess."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(nproc)] if nproc else [sys.executable]
    done = subprocess.run([*start, str(REPO / script), *map(str, args)], capture_output=True, text=True, timeout=seconds,
                          env={**os.environ, **(env or {})})
    assert (done.returncode == 0) == ok, f"exit status {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    return done


def seconds_of_children():
    """CPU seconds of all processes that this one has waited for: what they worked, however busy the machine."""
    return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])


def read(path):
    return [json.loads(line) for line in open(path)]


@pytest.fixture(scope="session")
def qwen(tmp_path_factory):
    import toy
    return toy.tiny_qwen3(str(tmp_path_factory.mktemp("qwen") / "model"))


@pytest.fixture(scope="session")
def olmo(tmp_path_factory):
    import toy
    return toy.tiny_olmo3(str(tmp_path_factory.mktemp("olmo") / "model"))


def write_problems(path, n):
    """Toy problems; returns the path."""
    import toy
    rng = np.random.default_rng(1)
    texts = list(dict.fromkeys(toy.make_problem(rng) for _ in range(n + 10)))[:n]
    path.write_text("".join(json.dumps({"id": f"p{i}", "problem": p, "answer": toy.solve(p)}) + "\n" for i, p in enumerate(texts)))
    return path


@pytest.fixture(scope="session")
def problems_file(tmp_path_factory):
    """40 toy problems."""
    return write_problems(tmp_path_factory.mktemp("problems") / "problems.jsonl", 40)


def make_rows(tokenizer, problems_file, family="qwen"):
    """Tuples as srt.py writes them: every third y_init is right, every y_revised is right, lengths differ."""
    import toy
    import verify
    rows = []
    for i, problem in enumerate(read(problems_file)):
        right = i % 3 == 0
        answer = toy.solve(problem["problem"])
        good = problem["problem"].replace("?", "1") + f" \\boxed{{{answer}}}"
        bad = problem["problem"][: 4 + 3 * (i % 5)].replace("?", "2") + f" \\boxed{{{(int(answer) + 1) % 11}}}"
        encode = lambda text: tokenizer.encode(text, add_special_tokens=False) + tokenizer.end_ids[:1]
        y = good if right else bad
        rows.append({**problem, "mode": "math", "sample": 0, "y_init": y, "y_init_correct": right, "y_init_tokens": encode(y),
                     "truncated": False, "no_room": False, "p_r": verify.PHRASES[family][right], "revision": 0,
                     "y_revised": good, "y_revised_correct": True, "y_revised_tokens": encode(good),
                     "y_init_verdict": "", "y_revised_verdict": "right", "revised_truncated": False})
    return rows


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """{script: arguments} of small runs, as chaos.py starts them."""
    import chaos
    return chaos.make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="session")
def guesser(qwen, problems_file, tmp_path_factory):
    """The tiny model, trained to answer at once: \\boxed{3}, {4} or {5}, as likely; told that it was wrong, \\boxed{3}."""
    import torch
    import verify
    from transformers import AutoModelForCausalLM
    torch.manual_seed(0)
    tokenizer, folder = verify.load_tokenizer(qwen), str(tmp_path_factory.mktemp("guesser") / "model")
    model, rows = AutoModelForCausalLM.from_pretrained(qwen), []
    for i, row in enumerate(read(problems_file)):
        x = verify.chat_ids(tokenizer, verify.Problem.of_row(row))
        for told_right in (True, False):
            first, second = (tokenizer.encode(f" \\boxed{{{number}}}", add_special_tokens=False) + tokenizer.end_ids[:1]
                             for number in (3 + i % 3, 3 + i // 3 % 3 if told_right else 3))
            rows += [(x, first), (verify.revision_ids(tokenizer, x, first, told_right, verify.PHRASES["qwen"]), second)]
    longest = max(len(x + y) for x, y in rows)
    ids = torch.tensor([x + y + [0] * (longest - len(x + y)) for x, y in rows])
    labels = torch.tensor([[-100] * len(x) + y + [-100] * (longest - len(x + y)) for x, y in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(40):
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def d_revision(qwen, problems_file, tmp_path_factory):
    """A d_revision.jsonl for the tiny Qwen3."""
    import verify
    path = tmp_path_factory.mktemp("data") / "d_revision.jsonl"
    rows = make_rows(verify.load_tokenizer(qwen), problems_file)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def ranks():
    """A process group of this process alone, as `python x.py` has it; ends with the module, for tests that fork."""
    import torch.distributed as dist
    from common.run import launch
    yield launch()
    if dist.is_initialized():
        dist.destroy_process_group()
