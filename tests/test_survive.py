"""Runs that survive: killed, signalled, resumed with other ranks, on several nodes, with broken disks and bad input."""
import contextlib
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zlib
from concurrent.futures import Future
from pathlib import Path

import chaos
import pytest
import torch
import torch.distributed as dist
from chaos import go
from conftest import REPO, make_rows, read, seconds_of_children
from transformers import GPT2Config, GPT2LMHeadModel

import srt
import verify
import common.run
from common import checkpoint, training
from common.metrics import Metrics
from common.run import launch, mendable, write_atomically
from common.sampler import HFSampler


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """What uninterrupted runs of one rank end with."""
    folder = tmp_path_factory.mktemp("whole")
    for script, args in inputs.items():
        go(script, [*args, "--out", folder / script], folder)
    return folder


def wait_for(condition, seconds=60):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "it did not come"
        time.sleep(0.01)


def rows_of(path):
    return len(path.read_bytes().splitlines()) if path.exists() else 0


# ------------------------------------------------------------------------------------------------------- SIGKILL


def test_chaos(tmp_path):
    """Six SIGKILLs, two for each script. The long version, under torchrun: make chaos."""
    seed = 7
    for script, blows, same, seconds in chaos.table(chaos.Forked, tmp_path, 3, 2, 2, random.Random(seed)):
        print(f"seed {seed} {script} {blows} {'equal' if same else 'DIFFERENT'} {seconds:.1f} s")
        assert same, (script, blows)


def test_a_kill_while_a_folder_is_replaced(tmp_path, monkeypatch):
    """Whichever call is the last: what stands there when the run goes on is whole, the old one or the new."""
    found = []
    for last in range(6):
        folder, calls = tmp_path / str(last), []
        for name, text in (("step-000003", "old"), ("step-000003.tmp", "new")):
            (folder / name).mkdir(parents=True)
            for part in "ab":
                (folder / name / part).write_text(text)

        def dying(call):
            def until(*args, **how):
                if len(calls) == last:
                    raise KeyboardInterrupt
                calls.append(call(*args, **how))
            return until

        with monkeypatch.context() as patched:
            patched.setattr(os, "rename", dying(os.rename))
            patched.setattr(shutil, "rmtree", dying(shutil.rmtree))
            with contextlib.suppress(KeyboardInterrupt):
                checkpoint.replace_folder(folder / "step-000003.tmp", folder / "step-000003")
        checkpoint.mend(folder)
        state, = checkpoint.states(folder)
        assert list(folder.iterdir()) == [state] and sorted(os.listdir(state)) == ["a", "b"]
        old, = {part.read_text() for part in state.iterdir()}
        found.append(old)
    assert found == ["old"] * 3 + ["new"] * 3


def test_half_a_line_and_half_a_file(tmp_path, monkeypatch):
    """What a kill has left of the last row goes; a file is written whole or stays as it was."""
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n{"st')
    Metrics(str(tmp_path), 1)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0}\n'
    with pytest.raises(UnicodeEncodeError):
        write_atomically(str(tmp_path / "metrics.jsonl"), "x" * 10**5 + "\ud800")
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0}\n'


def exits(where, name, when):
    """For `patch`: the process ends, without a word, where a function is about to be called so."""
    def patch(rank):
        call = getattr(where, name)
        setattr(where, name, lambda *args, **how: os._exit(9) if when(*args) else call(*args, **how))
    return patch


def test_a_moving_teacher_goes_on(inputs, tmp_path):
    """Its head is that of the state (two ranks, for the head of one is the parameter itself), and no step is forgotten."""
    args = [*inputs["distill.py"], "--sync_every", 2, "--save_every", 3, "--steps", 6]
    go("distill.py", [*args, "--out", tmp_path / "whole"], tmp_path, 2)
    go("distill.py", [*args, "--out", tmp_path / "out"], tmp_path, 2, ok=False,
       patch=exits(Metrics, "report", lambda self, title, row: row["step"] == 4))
    assert "from step 3" in go("distill.py", [*args, "--out", tmp_path / "out"], tmp_path, 2)[0]
    assert chaos.equal("distill.py", tmp_path / "whole", tmp_path / "out")
    for out in ("whole", "out"):
        assert len(json.load(open(tmp_path / out / "state/step-000006/progress.json"))["history"]) == 6


def test_a_run_that_goes_on_has_not_finished(inputs, tmp_path):
    """
    Killed when final/ is new and summary.json would come: the old command is refused, and leaves all as it was. Without its state
    a finished run does not begin again.
    """
    out = tmp_path / "out"
    start = lambda *more, **how: go("distill.py", [*inputs["distill.py"], "--out", out, *more], tmp_path, **how)
    start("--steps", 1)
    start("--steps", 2, ok=False, patch=exits(common.run, "finish", lambda *_: True))
    assert (out / "final").exists() and not (out / "summary.json").exists()
    before = (out / "flags.json").read_text()
    assert f"the run in {out} has made 2; give as many, or --fresh" in start("--steps", 1, "--lr", 7, ok=False)[1]
    assert (out / "flags.json").read_text() == before
    start("--steps", 2)
    assert json.load(open(out / "summary.json"))["steps"] == 2
    shutil.rmtree(out / "state")
    rows = read(out / "metrics.jsonl")
    assert "has a final/ but no state/ to go on from" in start("--steps", 3, ok=False)[1]
    assert read(out / "metrics.jsonl") == rows and len(rows) == 2 and (out / "summary.json").exists()


def test_log_probabilities_that_are_no_numbers(inputs, tmp_path):
    def patch(rank):
        whole = HFSampler.sample
        HFSampler.sample = lambda *args: (y._replace(logprobs=[float("nan")] * len(y.ids)) for y in whole(*args))
    _, err = go("distill.py", [*inputs["distill.py"], "--out", tmp_path / "out"], tmp_path, ok=False, patch=patch)
    assert "differ from the trainer's by nan nats" in err and not (tmp_path / "out/final").exists()


# ------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("script, number, nproc", [("sft.py", signal.SIGTERM, 2), ("distill.py", signal.SIGINT, 1)])
def test_a_signal_saves_and_ends(script, number, nproc, inputs, tmp_path):
    """Sent to one rank: all end well after the same step, its state is whole, and the run goes on to the same weights."""
    args = [*inputs[script], "--save_every", 100]
    go(script, [*args, "--out", tmp_path / "whole"], tmp_path, nproc)
    out, log = tmp_path / "out", tmp_path / "log"
    run = chaos.Forked(script, [*args, "--out", out], nproc, log)
    wait_for(lambda: rows_of(out / "metrics.jsonl") >= 1)
    os.kill(run.pids[-1], number)
    assert run.wait(60), Path(f"{log}.err").read_text()
    assert "stopped by a signal after step" in log.read_text() and "the same command goes on" in log.read_text()
    states = os.listdir(out / "state")
    assert len(states) == 1 and not (out / "final").exists() and int(states[0][5:]) == rows_of(out / "metrics.jsonl")
    go(script, [*args, "--out", out], tmp_path, nproc)
    assert chaos.equal(script, tmp_path / "whole", out)


def test_a_signal_keeps_what_is_judged(inputs, whole, tmp_path):
    """srt.py with two ranks, of which one gets the signal; the run goes on with one rank."""
    out, log = tmp_path / "out", tmp_path / "log"
    args = [*inputs["srt.py"], "--out", out]
    run = chaos.Forked("srt.py", args, 2, log)
    wait_for(lambda: rows_of(out / "responses.rank1.jsonl") >= 4)
    os.kill(run.pids[1], signal.SIGTERM)
    assert run.wait(60), Path(f"{log}.err").read_text()
    assert "stopped by a signal" in log.read_text() and not (out / "responses.jsonl").exists()
    assert "Traceback" not in Path(f"{log}.err").read_text()
    before = {line for path in out.glob("responses.rank*.jsonl") for line in open(path)}
    assert 4 <= len(before) < 72
    go("srt.py", args, tmp_path)
    assert chaos.equal("srt.py", whole / "srt.py", out) and before <= set(open(out / "responses.jsonl"))


# --------------------------------------------------------------------------------------------- other numbers of ranks


@pytest.mark.parametrize("script, first, then", [("sft.py", 2, 1), ("sft.py", 1, 3), ("distill.py", 1, 2)])
def test_another_number_of_ranks(script, first, then, inputs, whole, tmp_path):
    """The state of `first` ranks goes on with `then`: the same steps, up to rounding."""
    out = tmp_path / "out"
    args = [*inputs[script], "--save_every", 3, "--out", out]
    run = chaos.Forked(script, args, first, tmp_path / "log")
    wait_for(lambda: (out / "state/step-000003").exists())
    run.kill("all")
    run.wait()
    go(script, args, tmp_path, then)
    rows, want = read(out / "metrics.jsonl"), read(whole / script / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(len(want)))
    for a, b in zip(rows, want):
        if a["tokens"] != b["tokens"]:
            assert script == "distill.py"  # a rounding error has changed a sampled token
            break
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-3)


def even_is_right(rank):
    """A judge that says right to half of what a model of random weights says, the same half in every process."""
    def submit(self, problem, response):
        done = Future()
        right = zlib.crc32(response.encode()) % 2 == 0
        done.set_result(verify.Verdict(right, "right" if right else "wrong"))
        return done
    verify.Judge.submit = submit


def slow_gold(rank):
    """A judge that on all ranks but the first finds no gold answer in time."""
    if rank:
        verify.Judge.gold = lambda self, row: (None, "gold: timeout")


def test_target_whatever_the_ranks(inputs, tmp_path):
    """The same D_revision of --target tuples from one rank, from three, and after a kill; all ranks stop there together."""
    args = [*inputs["srt.py"], "--target", 10, "--out"]
    for name, nproc in (("one", 1), ("three", 3)):
        go("srt.py", [*args, tmp_path / name], tmp_path, nproc, patch=even_is_right)
        assert len(read(tmp_path / name / "responses.jsonl")) < 72  # not all was sampled
    run = chaos.Forked("srt.py", [*args, tmp_path / "killed"], 2, tmp_path / "log", patch=even_is_right)
    wait_for(lambda: rows_of(tmp_path / "killed/responses.rank0.jsonl") >= 5)
    run.kill("all")
    run.wait()
    go("srt.py", [*args, tmp_path / "killed"], tmp_path, patch=even_is_right)
    kept = [read(tmp_path / name / "d_revision.jsonl") for name in ("one", "three", "killed")]
    assert len(kept[0]) == 10 and kept[0] == kept[1] == kept[2]


def test_all_ranks_have_the_problems_of_rank_0(inputs, tmp_path):
    """A gold answer that took too long on rank 1 is no reason to leave its problem out there."""
    go("srt.py", [*inputs["srt.py"], "--out", tmp_path / "two"], tmp_path, 2, patch=slow_gold)
    rows = read(tmp_path / "two/responses.jsonl")
    assert {row["id"] for row in rows} == {row["id"] for row in read(inputs["srt.py"][inputs["srt.py"].index("--data") + 1])}


# --------------------------------------------------------------------------------------------------------- flags


def test_p_r_of_the_data(inputs, tmp_path):
    """sft.py ends where the data was collected with other phrases than it would train on."""
    rows = read(inputs["sft.py"][inputs["sft.py"].index("--data") + 1])
    rows[3]["p_r"] = verify.PHRASES["paper"][rows[3]["y_init_correct"]] + "!"
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, err = go("sft.py", [*inputs["sft.py"], "--data", tmp_path / "d.jsonl", "--out", tmp_path / "out"], tmp_path, ok=False)
    assert "d.jsonl:4: P_r is" in one_error(err) and "--phrases" in err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("fresh", [[], ["--fresh"]], ids=["", "fresh"])
def test_one_run_at_a_time(fresh, inputs, whole, tmp_path):
    """A second run into the same folder ends with a line, also with --fresh; nothing is touched. The first goes on."""
    out, args = tmp_path / "out", [*inputs["sft.py"], "--out", tmp_path / "out"]
    if fresh:  # the folder that the first one makes in place of the old is held, too
        out.mkdir()
        (out / "old").touch()
    run = chaos.Forked("sft.py", [*args, *fresh], 1, tmp_path / "log")
    wait_for(lambda: rows_of(out / "metrics.jsonl") >= 1)
    os.kill(run.pids[0], signal.SIGSTOP)
    try:
        before = sorted(out.rglob("*"))
        for more in ([], ["--fresh"]):
            _, err = go("sft.py", [*args, *more], tmp_path, ok=False)
            assert f"--out {out}: another run is at work there" in err and sorted(out.rglob("*")) == before
    finally:
        os.kill(run.pids[0], signal.SIGCONT)
    assert run.wait(60) and chaos.equal("sft.py", whole / "sft.py", out)


@pytest.mark.parametrize("script", ["srt.py", "sft.py", "distill.py"])
def test_changed_data(script, inputs, whole, tmp_path):
    """Other rows in the same file, here one less, would make another run of it: refused, before anything is written."""
    place, args = whole / script, [*map(str, inputs[script])]
    data, written = Path(args[args.index("--data") + 1]), {path: path.read_bytes() for path in (whole / script).iterdir() if path.is_file()}
    rows = data.read_text()
    try:
        data.write_text(rows.partition("\n")[2])
        _, err = go(script, [*args, "--out", place], tmp_path, ok=False)
    finally:
        data.write_text(rows)
    assert "what the files of data give (its hash)" in one_error(err) and "--fresh" in err
    assert written == {path: path.read_bytes() for path in place.iterdir() if path.is_file()}
    assert "nothing to do" in go(script, [*args, "--out", place], tmp_path)[0]


def test_changed_flags(inputs, whole, tmp_path):
    """Named; refused where they would mix two runs; --fresh renames; a flag that changes nothing of that goes on."""
    out = tmp_path / "out"
    start = lambda *more, **how: go("distill.py", [*inputs["distill.py"], "--out", out, *more], tmp_path, **how)
    start("--steps", 2)
    for script, place, changes in (("distill.py", out, [("--kl", "forward")]), ("sft.py", whole / "sft.py", [
            ("--seed", 1), ("--batch", 5), ("--stage2_size", 9), ("--max_len", 900)]),
            ("srt.py", whole / "srt.py", [("--range", "0:9"), ("--phrases", "paper")])):
        recorded = (place / "flags.json").read_text()
        for flag, value in changes:
            _, err = go(script, [*inputs[script], "--out", place, flag, value], tmp_path, ok=False)
            assert err.startswith("error:") and f"{flag} " in err and "--fresh" in err and err.count("\n") == 1
        assert (place / "flags.json").read_text() == recorded
    said, _ = start("--steps", 3, "--save_every", 7, "--lr", "2e-3")
    assert "--steps 2 -> 3" in said and "--save_every 1 -> 7" in said and "--lr 0.001 -> 0.002" in said
    assert [row["lr"] for row in read(out / "metrics.jsonl")] == [1e-3, 1e-3, 2e-3]
    assert "nothing to do" in start("--steps", 3, "--save_every", 7)[0]
    assert json.load(open(out / "flags.json"))["lr"] == 2e-3 and not (out / "flags.json.tmp").exists()
    assert "--steps 1" in one_error(start("--steps", 1, ok=False)[1])
    shutil.copy(inputs["distill.py"][inputs["distill.py"].index("--data") + 1], out / "data.jsonl")
    for flag, inside in (("--model", out / "final"), ("--data", out / "data.jsonl")):
        assert f"{flag} lies in --out {out}" in one_error(start(flag, inside, "--fresh", ok=False)[1])
    start("--steps", 1, "--seed", 1, "--fresh")
    old, = tmp_path.glob("out.old-*")
    assert len(read(old / "metrics.jsonl")) == 3 and len(read(out / "metrics.jsonl")) == 1


# -------------------------------------------------------------------------------------------------------- failures


def one_error(err):
    """The one line of an error among the progress bars on stderr."""
    assert "Traceback" not in err, err
    line, = [line for line in err.replace("\r", "\n").splitlines() if "error:" in line]  # a progress bar may stand before it
    return line


def test_a_failing_rank_ends_all(inputs, tmp_path):
    """Under torchrun: rank 1 fails while rank 0 waits for it; all end within a minute, with the message of rank 1."""
    script = tmp_path / "broken.py"
    script.write_text(f"import sys; sys.path[:0] = [{str(REPO)!r}]\nimport os, sft\nfrom common import training\n"
                      "from common.run import fail\nreal = training.optimizer_step\n"
                      "def broken(*args):\n    if os.environ['RANK'] == '1':\n"
                      "        fail('rank 1 cannot go on')\n"
                      "    return real(*args)\ntraining.optimizer_step = broken\nsft.main()\n")
    began = time.time()
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script,
                           *map(str, inputs["sft.py"]), "--out", tmp_path / "out"], capture_output=True, text=True, timeout=100)
    assert done.returncode != 0 and "rank 1 cannot go on" in done.stderr and time.time() - began < 60
    assert "[rank0]" not in done.stderr  # no traceback of the other


def tmpfs(folder, size):
    """A disk of so many bytes at `folder`; skips the test where one may not mount."""
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    return folder


@pytest.mark.parametrize("script", ["srt.py", "sft.py", "distill.py"])
def test_a_full_disk(script, inputs, whole, tmp_path):
    """One line; with more room the same command goes on to the same end."""
    used = sum(path.stat().st_size for path in (whole / script).rglob("*") if path.is_file())
    disk = tmpfs(tmp_path / "disk", used * 6 // 10)
    try:
        args = [*inputs[script], "--out", disk / "out"]
        line = one_error(go(script, args, tmp_path, ok=False)[1])
        assert "the same command goes on" in line
        subprocess.run(["mount", "-o", f"remount,size={used * 4}", disk], check=True)
        go(script, args, tmp_path)
        assert chaos.equal(script, whole / script, disk / "out")
    finally:
        subprocess.run(["umount", "-l", disk])


def test_a_read_only_disk(inputs, tmp_path):
    disk = tmpfs(tmp_path / "disk", 10**6)
    try:
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        for script, args in inputs.items():
            line = one_error(go(script, [*args, "--out", disk / "out"], tmp_path, ok=False)[1])
            assert f"--out {disk}/out: Read-only file system; give a folder that can be written" in line
    finally:
        subprocess.run(["umount", "-l", disk])


@pytest.mark.parametrize("where, broken_rank", [("begin", 0), ("data", 1), ("end", 0)])
def test_a_write_that_fails_on_one_rank_is_raised_on_all(where, broken_rank, tmp_path):
    """After the same step, so that none waits for another; the state before it stays."""
    def steps():
        ranks = launch()
        saver = checkpoint.Saver(str(tmp_path / "o[1]"), 2, ranks.device)
        broken = lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        for step in range(1, 200):
            if step == 4 and ranks.rank == broken_rank:
                saver.wait()
                writer = torch.distributed.checkpoint.filesystem.FileSystemWriter
                module, name = {"begin": (writer, "prepare_local_plan"), "data": (writer, "write_data"),
                                "end": (checkpoint, "replace_folder")}[where]
                setattr(module, name, broken)
            try:
                saver.after_step(step, lambda: {"a": torch.full((4,), float(step))}, {"step": step})
            except BaseException as error:  # CheckpointException is no Exception
                (tmp_path / f"rank{ranks.rank}").write_text(f"{step} {mendable(error)}")
                return
            time.sleep(0.02 * (1 + ranks.rank))

    assert chaos.Forked(steps, [], 2, tmp_path / "log").wait(60), (tmp_path / "log.err").read_text()
    one, other = ((tmp_path / f"rank{rank}").read_text() for rank in (0, 1))
    assert one == other and "No space left on device" in one
    assert [path.name for path in (tmp_path / "o[1]/state").iterdir() if path.suffix != ".tmp"] == ["step-000002"]


@pytest.mark.parametrize("damage", ["truncated", "no metadata", "progress"])
@pytest.mark.parametrize("script", ["sft.py", "distill.py"])
def test_an_unreadable_state(script, damage, inputs, whole, tmp_path):
    """Named, with what to do; when done, the run goes on from the state before and ends as ever."""
    out = tmp_path / "out"
    shutil.copytree(whole / script, out)
    shutil.rmtree(out / "final")
    state = sorted((out / "state").iterdir())[-1]
    target = {"truncated": next(state.glob("*.distcp")), "no metadata": state / ".metadata", "progress": state / "progress.json"}[damage]
    os.truncate(target, target.stat().st_size // 2)
    line = one_error(go(script, [*inputs[script], "--out", out], tmp_path, ok=False)[1])
    assert str(state) in line and "remove this folder" in line
    if damage == "truncated":
        shutil.rmtree(state)
        go(script, [*inputs[script], "--out", out], tmp_path)
        assert chaos.equal(script, whole / script, out)


def out_of_memory(rank):
    def broken(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
    training.optimizer_step = broken


def nan_gradient(rank):
    """From the fourth step on the gradients are nan."""
    real, steps = training.optimizer_step, []

    def broken(model, *args):
        steps.append(1)
        if len(steps) > 3:
            next(model.parameters()).grad.mul_(float("nan"))
        return real(model, *args)
    training.optimizer_step = broken


@pytest.mark.parametrize("script", ["sft.py", "distill.py"])
def test_memory_and_nan(script, inputs, whole, tmp_path):
    args = [*inputs[script], "--out", tmp_path / "out"]
    line = one_error(go(script, args, tmp_path, ok=False, patch=out_of_memory)[1])
    assert "--micro_tokens" in line and "--vllm_memory" in line
    line = one_error(go(script, args, tmp_path, ok=False, patch=nan_gradient)[1])
    assert "nan" in line and "--lr" in line
    go(script, args, tmp_path)
    assert chaos.equal(script, whole / script, tmp_path / "out")


# --------------------------------------------------------------------------------------------------- several nodes


def nodes_worker(model, problems_file, out):
    import test_train
    ranks = launch()
    mesh = training.make_mesh(ranks)
    rows = test_train.sampled_rows(verify.load_tokenizer(model), "qwen", problems_file)[:8]
    split = [[0], [1, 2, 3], [], [4, 5, 6, 7]][ranks.rank] if ranks.world > 1 else range(8)
    result = test_train.step_of(ranks, model, rows, split, 150)
    if ranks.rank == 0:
        torch.save((mesh.mesh_dim_names, tuple(mesh.shape), *result), out)
    dist.destroy_process_group()


def test_two_nodes_make_the_same_step(qwen, problems_file, tmp_path):
    """Four processes as 2 nodes x 2, each node with its own torchrun, against one process: loss and every gradient."""
    import test_train
    script = tmp_path / "worker.py"
    script.write_text(f"import sys; sys.path[:0] = [{str(REPO)!r}, {str(REPO / 'tests')!r}]; import test_survive as t; "
                      f"t.nodes_worker({qwen!r}, {str(problems_file)!r}, sys.argv[1])")
    port = chaos.free_port()
    nodes = [subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", str(k),
                               "--nproc_per_node", "2", "--master_addr", "127.0.0.1", "--master_port", str(port), script,
                               tmp_path / "two"], stderr=subprocess.PIPE, text=True) for k in range(2)]
    for node in nodes:
        _, err = node.communicate(timeout=200)
        assert node.returncode == 0, err[-3000:]
    go(lambda: nodes_worker(qwen, problems_file, tmp_path / "one"), [], tmp_path)
    names, shape, *two = torch.load(tmp_path / "two")
    assert names == ("replicate", "shard") and shape == (2, 2)
    test_train.assert_same(torch.load(tmp_path / "one")[2:], two)


def test_two_nodes_train(inputs, whole, tmp_path):
    """sft.py from end to end on 2 nodes x 2: states, final model, steps."""
    go("sft.py", [*inputs["sft.py"], "--out", tmp_path / "out"], tmp_path, 4, per_node=2)
    for a, b in zip(read(tmp_path / "out/metrics.jsonl"), read(whole / "sft.py/metrics.jsonl"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-3)


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.fixture(scope="module")
def bad(inputs, tmp_path_factory):
    """A folder of broken things, by name; `{name}` in the table below is its path here."""
    import toy
    folder = tmp_path_factory.mktemp("bad")
    model = Path(inputs["srt.py"][1])

    def copy(name, **changes):
        """The tiny model with other contents in some files; None removes one."""
        shutil.copytree(model, folder / name)
        for file, text in changes.items():
            path = next((folder / name).glob(f"{file}.*"))
            path.unlink() if text is None else path.write_text(text)

    (folder / "empty").mkdir()
    copy("broken_config", config="{")
    copy("unknown_type", config='{"model_type": "abacus"}')
    copy("no_tokenizer", tokenizer=None, tokenizer_config=None)
    copy("broken_tokenizer", tokenizer="{")
    copy("no_template", chat_template=None)
    copy("no_weights", model=None)
    copy("broken_generation", generation_config="{")
    copy("syntax", chat_template="{% if %}")
    copy("raises", chat_template="{{ raise_exception('no') }}")
    copy("divides", chat_template="{{ 1 / 0 }}")
    config = json.loads((model / "config.json").read_text())
    copy("no_length", config=json.dumps({**config, "max_position_embeddings": None}))
    copy("five_phrases", config=json.dumps({**config, "sdzero_phrases": 5}))
    copy("broken_weights", model="not weights")
    config = json.loads((model / "config.json").read_text())
    copy("five_layers", config=json.dumps({**config, "num_hidden_layers": 5, "layer_types": ["full_attention"] * 5}))
    copy("wide", config=json.dumps({**config, "intermediate_size": 300}))
    small = GPT2Config(vocab_size=config["vocab_size"], n_embd=8, n_layer=1, n_head=1, eos_token_id=2, bos_token_id=None)
    toy.save_model(str(folder / "gpt2"), GPT2LMHeadModel(small), verify.load_tokenizer(str(model)))
    toy.tiny_olmo3(str(folder / "olmo"))
    shutil.copytree(model, folder / "other_words")
    words = (folder / "other_words/tokenizer.json").read_text()
    (folder / "other_words/tokenizer.json").write_text(words.replace('"correct"', '"corrected"').replace('"Wait"', '"Weit"'))

    good = [json.dumps({"id": f"p{i}", "problem": f"{i}+1=?", "answer": str(i + 1)}) for i in range(6)]
    write = lambda name, *lines: (folder / name).write_text("".join(line + "\n" for line in lines))
    write("good.jsonl", *good)
    write("nothing.jsonl")
    write("not_json.jsonl", *good, "{")
    write("list.jsonl", *good, "[1]")
    write("unknown_field.jsonl", '{"riddle": "1+1=?", "answer": "2"}')
    write("no_answer.jsonl", '{"problem": "1+1=?"}')
    write("twice.jsonl", *good, good[0].replace("+1", "+2"))
    write("long.jsonl", *good, json.dumps({"problem": "1+" * 800 + "1=?", "answer": "2"}))
    write("text.txt", "1+1=?")
    copy("run/final")
    (folder / "broken_flags").mkdir()
    for name in ("flags.json", "responses.jsonl"):
        write(f"broken_flags/{name}", "[1]")
    write("broken.json", "{")
    write("object.json", "{}")
    (folder / "latin1.jsonl").write_bytes(good[0].encode() + b"\n" + '{"problem": "\xe9"}'.encode("latin1") + b"\n")
    rows = make_rows(verify.load_tokenizer(str(model)), inputs["srt.py"][3])
    srt.write_rows(str(folder / "all_right.jsonl"), [row for row in rows if row["y_init_correct"]])
    srt.write_rows(str(folder / "all_wrong.jsonl"), [row for row in rows if not row["y_init_correct"]])
    srt.write_rows(str(folder / "none_kept.jsonl"), [{**row, "y_revised_correct": False} for row in rows])
    srt.write_rows(str(folder / "other_ids.jsonl"), [{**row, "y_init_tokens": [10**6]} for row in rows])
    srt.write_rows(str(folder / "text_ids.jsonl"), [{**row, "y_init_tokens": "12"} for row in rows])
    for name, i in (("negative", -1), ("half", 1.5), ("letter", "a"), ("null", None)):
        srt.write_rows(str(folder / f"{name}.jsonl"), [rows[0], *({**row, "y_init_tokens": [3, i]} for row in rows)])
    srt.write_rows(str(folder / "run/responses.jsonl"), [{**row, "kind": "init", "sample": 0} for row in rows])
    write("run/responses.rank0.jsonl")
    return folder


BAD = """
srt.py      --model {missing}                       cannot be used
srt.py      --model {empty}                         cannot be used
srt.py      --model {good.jsonl}                    cannot be used
srt.py      --model {broken_config}                 broken_config
srt.py      --model {unknown_type}                  unknown_type
srt.py      --model {no_tokenizer}                  no_tokenizer
srt.py      --model {broken_tokenizer}              broken_tokenizer
srt.py      --model {no_template}                   Cannot use chat template
srt.py      --model {no_weights}                    no_weights
srt.py      --model {broken_generation}             not a valid JSON
srt.py      --model {syntax}                        TemplateSyntaxError
srt.py      --model {raises}                        cannot be used: TemplateError: no
srt.py      --model {divides}                       cannot be used: ZeroDivisionError
srt.py      --model {no_length}                     max_position_embeddings
srt.py      --model {five_phrases}                  give --phrases
srt.py      --model {broken_weights}                header
srt.py      --model {five_layers} --engine hf       33 weights are missing
srt.py      --model {wide} --engine hf              not of the shape that config.json says
srt.py      --data {missing.jsonl}                  missing.jsonl is not there
srt.py      --data {empty}                          not a .jsonl, .json or .parquet
srt.py      --data=                                 not a .jsonl, .json or .parquet
srt.py      --data {text.txt}                       not a .jsonl, .json or .parquet
srt.py      --data {nothing.jsonl}                  empty
srt.py      --data {not_json.jsonl}                 not_json.jsonl:7: not JSON
srt.py      --data {list.jsonl}                     list.jsonl:7: a JSON object is wanted
srt.py      --data {latin1.jsonl}                   latin1.jsonl:2: not JSON in UTF-8
srt.py      --data {unknown_field.jsonl}            no problem text
srt.py      --data {no_answer.jsonl}                no problem is left
srt.py      --data {twice.jsonl}                    ids must differ
srt.py      --data {long.jsonl}                     the prompt of problem 'long-6' has
srt.py      --data {broken.json}                    broken.json cannot be read
srt.py      --data {object.json}                    a list of objects is wanted
srt.py      --range 5                               A:B is wanted
srt.py      --range 9:5                             is empty
srt.py      --range 100:                            is empty
srt.py      --max_problems 0                        not at least 1
srt.py      --num_responses 0                       not at least 1
srt.py      --num_revisions -1                      not at least 0
srt.py      --target -5                             not at least 0
srt.py      --max_tokens 0                          not at least 1
srt.py      --max_tokens 1025                       takes 1024 tokens
srt.py      --max_tokens many                       invalid int value
srt.py      --temperature -1                        not at least 0
srt.py      --temperature nan                       not at least 0
srt.py      --top_p 0                               above 0
srt.py      --top_p 1.5                             at most 1
srt.py      --engine sglang                         invalid choice
srt.py      --engine vllm                           vLLM is not installed
srt.py      --vllm_memory 85                        at most 1
srt.py      --revisions_of_right 99                 lower it
srt.py      --judge_seconds 0                       above 0
srt.py      --batch_size 3                          unrecognized arguments
srt.py      --out {good.jsonl}                      good.jsonl: File exists; give a folder
srt.py      --out {good.jsonl}/deeper               deeper: Not a directory; give a folder
srt.py      --out=                                  --out : No such file or directory; give a folder
srt.py      --out {broken_flags}                    flags.json holds no JSON object; give another --out
sft.py      --model {missing}                       cannot be used
sft.py      --model {run}                           it is a run's folder; its model is
sft.py      --data {run/responses.jsonl}            the collection in its folder has not ended
sft.py      --model {broken_weights}                header
sft.py      --model {five_layers}                   33 weights are missing
sft.py      --model {gpt2}                          GPT2LMHeadModel has no decoder layers
sft.py      --flash 4                               --flash 4 needs a GPU of compute capability
sft.py      --data {missing.jsonl}                  missing.jsonl is not there
sft.py      --data {nothing.jsonl}                  no rows for stage 1
sft.py      --data {good.jsonl}                     field 'y_init_tokens'
sft.py      --data {text_ids.jsonl}                 should be list, found str
sft.py      --data {other_ids.jsonl}                collect the data with this model
sft.py      --data {negative.jsonl}                 negative.jsonl:2: a token id is -1
sft.py      --data {half.jsonl}                     half.jsonl:2: a token id is 1.5
sft.py      --data {letter.jsonl}                   letter.jsonl:2: a token id is 'a'
sft.py      --data {null.jsonl}                     null.jsonl:2: a token id is None
sft.py      --data {all_right.jsonl}                no rows for stage 1
sft.py      --data {none_kept.jsonl}                no rows for stage 1
sft.py      --data {all_wrong.jsonl} --objective rft --stage2_size 2000   no rows for stage 1
sft.py      --stage2_size 100                       lower --stage2_size
sft.py      --stage2_size 0                         not at least 1
sft.py      --max_len 20                            no rows for stage 1
sft.py      --objective dpo                         invalid choice
sft.py      --objective sum                         for --objective two-stage
sft.py      --epochs 0                              not at least 1
sft.py      --batch -4                              not at least 1
sft.py      --lr 0                                  above 0
sft.py      --lr inf                                above 0 and at most
sft.py      --epochs 99999999999999999999           at least 1 and at most
sft.py      --weight_decay -0.1                     not at least 0
sft.py      --save_every 0                          not at least 1
sft.py      --micro_tokens 0                        not at least 1
sft.py      --phrases polite                        invalid choice
sft.py      --out {good.jsonl}                      good.jsonl
distill.py  --model {missing}                       cannot be used
distill.py  --teacher {missing}                     cannot be used
distill.py  --teacher {other_words}                 one vocabulary
distill.py  --data {missing.jsonl}                  missing.jsonl is not there
distill.py  --val {nothing.jsonl}                   nothing.jsonl
distill.py  --val {long.jsonl}                      error: --val: the prompt of problem 'long-6' has
distill.py  --batch 25                              lower it
distill.py  --batch 0                               not at least 1
distill.py  --topk -1                               not at least 0
distill.py  --topk 1000000                          tokens of the vocabulary
distill.py  --kl cosine                             invalid choice
distill.py  --max_tokens 2000                       takes 1024 tokens
distill.py  --temperature 0                         above 0
distill.py  --steps 0                               not at least 1
distill.py  --sync_every -1                         not at least 0
distill.py  --max_sync_gap 0                        above 0
distill.py  --engine vllm                           vLLM is not installed
distill.py  --steps                                 expected one argument
kl.py       --student {missing}                     cannot be used
kl.py       --teacher {empty}                       cannot be used
kl.py       --teacher {other_words}                 one vocabulary
kl.py       --teacher {no_weights}                  no_weights
kl.py       --responses {nothing.jsonl}             holds no responses
kl.py       --responses {other_ids.jsonl}           other_ids.jsonl:1: a token id
kl.py       --teacher {five_layers}                 33 weights are missing
kl.py       --responses {negative.jsonl}            negative.jsonl:2: a token id is -1
kl.py       --responses {half.jsonl}                half.jsonl:2: a token id is 1.5
kl.py       --responses {letter.jsonl}              letter.jsonl:2: a token id is 'a'
kl.py       --responses {null.jsonl}                null.jsonl:2: a token id is None
kl.py       --out {good.jsonl}                      --out
kl.py       --out {good.jsonl}/deeper               --out
kl.py       --max_responses 0                       not at least 1
kl.py       --responses {missing.jsonl}             missing.jsonl is not there
kl.py       --responses {good.jsonl}                field 'sample'
kl.py       --kl cosine                             invalid choice
verify.py   --data {missing.jsonl}                  missing.jsonl is not there
verify.py   --data {nothing.jsonl}                  empty
verify.py   --data {twice.jsonl}                    ids must differ
verify.py   --range 9:5                             is empty
verify.py   --responses {missing.jsonl}             missing.jsonl is not there
verify.py   --responses {not_json.jsonl}            not_json.jsonl
verify.py   --mode poem                             poem.py cannot be used
"""


def test_bad_input(bad, inputs, tmp_path):
    """
    Each case: one line on stderr that names what is wrong, a non-zero exit within 10 s of its own time (more where a
    judge has workers on many cores; the clock's bound is wider, for other tests run meanwhile), nothing half-written.
    """
    model, problems = inputs["srt.py"][1], bad / "good.jsonl"
    commands = {**inputs, "verify.py": ["--data", problems],
                "kl.py": ["--student", model, "--teacher", model, "--responses", bad / "all_right.jsonl"]}
    wrong, cases = [], BAD.strip().splitlines()
    most = {script: max(10, 4 * os.cpu_count()) for script in ("srt.py", "distill.py", "verify.py")}  # 7 rows: 7 workers
    without_vllm = lambda rank: setattr(importlib.util, "find_spec", lambda name: None)
    for number, case in enumerate(cases):
        script, rest = case.split(None, 1)
        flags, want = (part.strip() for part in rest.split("   ", 1))
        flags = flags.replace("{", f"{bad}/").replace("}", "").split()
        out, before = tmp_path / str(number), sorted(bad.rglob("*"))
        args = [*commands[script], *([] if script == "verify.py" else ["--out", out]), *flags]
        log, began, used = tmp_path / f"log{number}", time.time(), seconds_of_children()
        run = chaos.Forked(script, args, 1, log, patch=without_vllm if "vllm" in flags else lambda rank: None)
        ended_well = run.wait(60)
        took, used = time.time() - began, seconds_of_children() - used
        err = Path(f"{log}.err").read_text().replace("\r", "\n")
        lines = [line for line in err.splitlines() if "error:" in line]
        written = set(os.listdir(out)) - {"flags.json"} if out.exists() else None
        if (ended_well or took > 60 or used > most.get(script, 10) or "Traceback" in err or len(lines) != 1 or want not in lines[0] or written
                or sorted(bad.rglob("*")) != before):
            wrong.append(f"{case}\n    {took:.1f} s, {used:.1f} s of its own, written {written}: {err[-600:]}")
    assert len(cases) >= 40 and not wrong, f"{len(wrong)} of {len(cases)}:\n" + "\n".join(wrong)
