"""--tracker: TensorBoard and wandb have what metrics.jsonl has, each step once, also after a kill."""
import json
import os
import signal
import struct
import subprocess
import sys
import time
import types

import pytest
from chaos import go
from conftest import REPO, read

import distill
import sft
from common import tracker
from common.metrics import Metrics
from common.tracker import Tracker, numbers_of


def killed_after(step, seconds=0.0):
    """A patch by which rank 0 dies when it has reported this step, before its state is saved."""
    def patch(rank):
        def dying(metrics, title, row):
            report(metrics, title, row)
            if rank == 0 and row["step"] == step:
                time.sleep(seconds)
                os.kill(os.getpid(), signal.SIGKILL)
        report, Metrics.report = Metrics.report, dying
    return patch


def columns(rows):
    """{name: [(step, number)]} of the numbers in rows of metrics.jsonl."""
    found = {}
    for row in rows:
        for name, number in numbers_of(row).items():
            found.setdefault(name, []).append((row["step"], number))
    return found


# ------------------------------------------------------------------------------------------------ the flag


COMMAND = ["x.py", "--model", "none", "--data", "none", "--out", "out", "--tracker"]


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
@pytest.mark.parametrize("script", [sft, distill])
def test_a_missing_package(script, name, tmp_path, monkeypatch, capsys):
    """Named before anything is read, also where earlier runs have left a folder of that name."""
    for module in [m for m in sys.modules if m.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sys, "argv", [*COMMAND, name])
    for _ in range(2):
        with pytest.raises(SystemExit):
            script.parse_args()
        assert f"--tracker: {name} is not installed; pip install {name}" in capsys.readouterr().err
        (tmp_path / name).mkdir(exist_ok=True)


def test_an_unknown_tracker(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [*COMMAND, "json"])
    with pytest.raises(SystemExit):
        sft.parse_args()
    error = capsys.readouterr().err
    assert "invalid choice: 'json'" in error and "wandb" in error and "tensorboard" in error


def test_numbers_of_a_row():
    row = {"step": 3, "loss": 0.5, "mfu": None, "objective": "generation", "updated": True}
    assert json.dumps(numbers_of(row)) == '{"step": 3, "loss": 0.5, "updated": 1}'


# --------------------------------------------------------------------------------------------- tensorboard


def read_tensorboard(out):
    """({name: [(step, number)]}, the newest text of the flags) by TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    scalars = {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}
    flags = events.Tensors("flags/text_summary")[-1]
    return scalars, flags.tensor_proto.string_val[0].decode()


def same_numbers(got, want):
    """Steps exactly, values as float32 has them."""
    assert got.keys() == want.keys()
    for name in want:
        assert [step for step, _ in got[name]] == [step for step, _ in want[name]], name
        assert [x for _, x in got[name]] == pytest.approx([x for _, x in want[name]], rel=1e-6), name


@pytest.mark.parametrize("script, nproc, step", [("sft.py", 2, 8), ("distill.py", 1, 3)])
def test_tensorboard_of_a_killed_run(script, nproc, step, inputs, tmp_path):
    pytest.importorskip("tensorboard")
    out = tmp_path / "out"
    args = [*inputs[script], "--out", out, "--tracker", "tensorboard"]
    go(script, args, tmp_path, ok=False, nproc=nproc, patch=killed_after(step))
    same_numbers(read_tensorboard(out)[0], columns(read(out / "metrics.jsonl")))
    assert len(read(out / "metrics.jsonl")) == step + 1
    torn, = (out / "tensorboard").iterdir()
    torn.write_bytes(torn.read_bytes()[:-20])  # as a machine that goes down leaves it
    go(script, [*args, "--clip", 0.9], tmp_path, nproc=nproc)
    rows, (scalars, flags) = read(out / "metrics.jsonl"), read_tensorboard(out)
    assert [row["step"] for row in rows] == list(range(len(rows))) and len(rows) > step + 1
    same_numbers(scalars, columns(rows))
    assert '"clip": 0.9' in flags and len(list((out / "tensorboard").iterdir())) == 2


def test_a_tracker_given_later_has_all_steps(inputs, tmp_path):
    """--tracker may change in a run that goes on."""
    pytest.importorskip("tensorboard")
    out = tmp_path / "out"
    args = [*inputs["sft.py"], "--out", out]
    go("sft.py", args, tmp_path, ok=False, patch=killed_after(6))
    assert "--tracker None -> tensorboard" in go("sft.py", [*args, "--tracker", "tensorboard"], tmp_path)[0]
    same_numbers(read_tensorboard(out)[0], columns(read(out / "metrics.jsonl")))


# --------------------------------------------------------------------------------------------------- wandb


def records(path):
    """
    The records of a .wandb file: 7 bytes, then LevelDB's format of logs, in blocks of 32 KiB; a piece has a
    checksum (4 bytes), its length (2) and its kind (1): 1 whole, 2 to 4 first, middle and last.
    """
    from wandb.proto.wandb_internal_pb2 import Record
    data, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        length, kind = struct.unpack_from("<HB", data, at + 4)
        left = 32768 - at % 32768
        if left < 7 or kind == 0:  # the rest of a block is empty
            at += left
            continue
        record += data[at + 7:at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield Record.FromString(record)
            record = b""


def read_wandb(folder):
    """(id, flags, rows) of one part of a run."""
    path, = folder.glob("*.wandb")
    found = list(records(path))
    run = next(record.run for record in found if record.HasField("run"))
    flags = {item.key: json.loads(item.value_json) for item in run.config.update}
    del flags["_wandb"]
    rows = [{item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            for record in found if record.HasField("history")]
    return run.run_id, flags, rows


def test_wandb_of_a_killed_run(inputs, tmp_path, monkeypatch):
    """Offline. Both parts are of one run, and the second has every step once."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL", "0.1")  # s
    out = tmp_path / "out"
    args = [*inputs["distill.py"], "--out", out, "--tracker", "wandb"]
    go("distill.py", args, tmp_path, ok=False, patch=killed_after(3, seconds=2))
    parts = lambda: sorted((out / "wandb").glob("offline-run-*"))
    first, = parts()
    name, flags, rows = read_wandb(first)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    go("distill.py", [*args, "--clip", 0.9], tmp_path)
    again, new, all_rows = read_wandb(parts()[1])
    assert name == again == (out / "wandb_id.txt").read_text().strip() and first.name.endswith(name)
    assert (flags["clip"], new["clip"]) == (1.0, 0.9) and new == json.load(open(out / "flags.json"))
    want = [numbers_of(row) for row in read(out / "metrics.jsonl")]
    assert len(want) == 5 and [row["_step"] for row in all_rows] == list(range(5))
    assert [{name: row[name] for name in row if name[0] != "_"} for row in all_rows] == want


class FakeRun:
    """What the server has of a run, and what it is given."""
    disabled = False

    def __init__(self, step):
        self.step, self.given = step, []

    def define_metric(self, *_, **__):
        pass

    def log(self, numbers, step, commit):
        assert commit
        self.given.append((step, numbers))


def test_wandb_is_given_what_the_server_lacks(tmp_path, monkeypatch):
    """It has steps 0 to 3 of six; a killed part had made 0 to 4."""
    run, asked = FakeRun(4), []
    fake = types.SimpleNamespace(Settings=dict, init=lambda **how: asked.append(how) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    (tmp_path / "flags.json").write_text('{"lr": 0.1}')
    for _ in range(2):
        run.given.clear()
        sent = Tracker("wandb", str(tmp_path), [{"step": step, "loss": 1.0} for step in range(5)])
        sent.send({"step": 5, "loss": 0.5, "mfu": None})
        assert [step for step, _ in run.given] == [4, 5] and run.given[-1][1] == {"step": 5, "loss": 0.5}
    assert asked[0] == asked[1] and asked[0]["config"] == {"lr": 0.1} and asked[0]["resume"] == "allow"
    assert len(asked[0]["id"]) == 8


def test_wandb_without_a_key(tmp_path, monkeypatch, capsys):
    """It gives a run that takes everything and keeps nothing. And its hook for uncaught errors goes again."""
    run, ours = FakeRun(0), sys.excepthook
    run.disabled = True

    def init(**how):
        monkeypatch.setattr(sys, "excepthook", print)
        return run

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(Settings=dict, init=init))
    (tmp_path / "flags.json").write_text("{}")
    sent = Tracker("wandb", str(tmp_path), [{"step": 0, "loss": 1.0}])
    sent.send({"step": 1, "loss": 1.0})
    said = capsys.readouterr().out
    assert said.count("warning:") == 1 and "has no key" in said and not run.given and sys.excepthook is ours


# ------------------------------------------------------------------------------------- a tracker that fails


def test_a_failing_tracker_ends_no_run(inputs, tmp_path):
    """Said once; the run has its rows and its model. One fails at step 2, another at its start."""
    pytest.importorskip("tensorboard")

    def breaks(rank):
        def send(self, row):
            if row["step"] == 2:
                raise ConnectionError("the network\nis down")
        tracker.TensorBoard.send = send

    args = [*inputs["distill.py"], "--tracker", "tensorboard", "--out"]
    said, _ = go("distill.py", [*args, tmp_path / "a"], tmp_path, patch=breaks)
    lines = [line for line in said.splitlines() if "warning: --tracker tensorboard has failed" in line]
    assert len(lines) == 1 and r"ConnectionError('the network\nis down')" in lines[0]
    (tmp_path / "b").mkdir()
    (tmp_path / "b/tensorboard").write_text("a file, where a folder should be")
    said, _ = go("distill.py", [*args, tmp_path / "b"], tmp_path)
    assert said.count("warning: --tracker tensorboard has failed") == 1
    for out in ("a", "b"):
        assert len(read(tmp_path / out / "metrics.jsonl")) == 5 and (tmp_path / out / "final").exists()


@pytest.mark.parametrize("error", ["fail('planted')", "raise OSError('planted')"])
def test_wandb_of_a_run_that_fails(error, tmp_path):
    """wandb hears of it, by fail() and by an error that nobody catches: else its page shows a good run."""
    pytest.importorskip("wandb")
    (tmp_path / "flags.json").write_text("{}")
    code = (f"import sys; sys.path.insert(0, {str(REPO)!r}); from common.run import fail; from common import "
            f"tracker; tracker.Tracker('wandb', {str(tmp_path)!r}, [{{'step': 0}}]); {error}")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env={**os.environ, "WANDB_MODE": "offline"})
    assert done.returncode == 1 and done.stderr.count("planted") == 1 + done.stderr.count("raise OSError")
    path, = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    ends = [record.exit.exit_code for record in records(path) if record.HasField("exit")]
    assert ends == [1]
