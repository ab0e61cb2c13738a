"""Curves of one run and of several, from whole, torn and strange rows; the page at the end of make demo."""
import json
import math
import sys
import time

import pytest
from matplotlib.colors import to_hex
from PIL import Image

from common.metrics import Metrics
from tests import report


def write(folder, rows):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def sft_rows(n):
    return [{"step": i, "stage": 1 + (i > n // 2), "loss": 1 / (i + 1), "p_r": 0.5, "grad_norm": 1.0,
             "lr": 1e-4, "seconds": 0.1} for i in range(n)]


def distill_rows(n):
    return [{"step": i, "reward": 0.5, "loss": 0.3, "kl_right": None if i % 3 else 0.2,
             "kl_wrong": math.nan if i == 1 else 0.4, "entropy": 0.1, "response_len": 100 + i,
             "truncated": 0.0, "sync_gap": 0.001, "grad_norm": 1.0, "seconds": 1.5,
             "seconds_generate": 1.0, "seconds_student": 0.5} for i in range(n)]


@pytest.mark.parametrize("rows", [sft_rows(1), sft_rows(12), sft_rows(10_000), distill_rows(1),
                                  distill_rows(40)])
def test_curves_of_a_run(rows, tmp_path, monkeypatch):
    run = write(tmp_path / "run", rows)
    monkeypatch.setattr("sys.argv", ["report.py", run])
    report.main()
    with Image.open(tmp_path / "run/curves.png") as picture:
        assert picture.width == 1200 and picture.height > 250 and len(picture.getcolors(1_000_000)) > 20
    assert [path.name for path in (tmp_path / "run").iterdir()].count("curves.png") == 1
    assert len(list((tmp_path / "run").iterdir())) == 2  # nothing half-written is left


def test_a_step_made_again_counts_once(tmp_path):
    """A resumed run's rows, the last line torn: the later row of a step holds, in order of the steps."""
    run = write(tmp_path / "run", [*sft_rows(6), {**sft_rows(6)[4], "loss": 9.0}])
    with open(tmp_path / "run/metrics.jsonl", "a") as f:
        f.write('{"step": 7, "lo')
    script, rows = report.read_run(run)
    assert script == "sft.py" and [row["step"] for row in rows] == list(range(6)) and rows[4]["loss"] == 9.0


def test_the_last_validation(tmp_path):
    """It stands in summary.json alone; one of an earlier end does not count."""
    run = write(tmp_path / "run", distill_rows(4))
    for step, seen in ((4, 1), (2, 0)):
        (tmp_path / "run/summary.json").write_text(json.dumps({"step": step, "val_accuracy": 0.7}))
        assert sum("val_accuracy" in row for row in report.read_run(run)[1]) == seen


def test_what_is_missing_is_not_drawn():
    rows = distill_rows(4)
    steps, kl = report.values(rows, "kl_right")
    assert steps == (0, 1, 2, 3) and [math.isnan(v) for v in kl] == [False, True, True, False]
    assert report.values(rows, "truncated") == report.values(rows, "no such field") == ((), ())


def test_names_tell_runs_apart():
    paths = ["runs/a/sdzero", "runs/b/sdzero", "runs/b/other/metrics.jsonl"]
    assert list(report.names_of(paths[:2]).values()) == ["a", "b"]
    assert list(report.names_of(paths).values()) == ["a/sdzero", "b/sdzero", "b/other"]
    assert list(report.names_of(["x/one.jsonl", "x/two.jsonl"]).values()) == ["one", "two"]


def test_colours():
    """A run's own, of up to twenty."""
    assert len({to_hex(f"C{number}") for number in range(20)}) == 20


def test_several_runs(tmp_path, monkeypatch, capsys):
    runs = [write(tmp_path / name, distill_rows(n)) for name, n in (("a", 5), ("b", 9))]
    out = str(tmp_path / "ab.png")
    monkeypatch.setattr("sys.argv", ["report.py", *runs, "--out", out])
    report.main()
    assert capsys.readouterr().out == f"picture: {out}\n" and Image.open(out).width == 1200


def test_a_run_draws_itself(ranks, tmp_path, monkeypatch):
    """Once a minute and at its end, from 10 steps on, in a process of its own, whatever becomes of that."""
    metrics = Metrics(str(tmp_path), 0)
    for row in distill_rows(10):
        metrics.draw()
        assert metrics.steps < 10 and not (tmp_path / "curves.png").exists()
        metrics.report("", {**row, "tokens": 5, "lr": 0.1, "mfu": None})
    metrics.drawn -= 61
    metrics.report("", {**row, "step": 10, "tokens": 5, "lr": 0.1, "mfu": None})
    assert time.perf_counter() - metrics.drawn < 60
    for _ in range(300):
        if (tmp_path / "curves.png").exists():
            break
        time.sleep(0.1)
    assert Image.open(tmp_path / "curves.png").width == 1200
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    metrics.draw()


@pytest.mark.parametrize("arguments, words", [
    (["nowhere"], "nowhere"), (["a", "s"], "runs of one script"), (["a", "a"], "twice"),
    (["a", "--out", "a.doc"], "--out"), (["a/metrics.jsonl"], "--out"), (["empty"], "no rows yet"),
    (["broken"], "broken/metrics.jsonl:1")])
def test_bad_input(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, rows in (("a", distill_rows(3)), ("s", sft_rows(3)), ("empty", []), ("broken", [{"loss": 1}])):
        write(tmp_path / name, rows)
    monkeypatch.setattr("sys.argv", ["report.py", *arguments])
    with pytest.raises(SystemExit, match="^error: ") as error:
        report.main()
    assert words in str(error.value)


def test_the_page_of_make_demo(tmp_path, monkeypatch, capsys):
    """The table, each picture, each command with its seconds, kl.py's page; nothing from elsewhere."""
    out = tmp_path / "demo"

    def put(path, **data):
        path.mkdir(parents=True, exist_ok=True)
        for name, value in data.items():
            (path / f"{name}.json").write_text(json.dumps(value))

    summary = {"init_accuracy": 0.5, "init_accuracy_95": [0.4, 0.6], "init_mean_tokens": 20.0,
               "init_truncated": 0.0, "init_first_accuracy": 0.45, "revised_accuracy": 0.6,
               "net_correction": 0.2, "problems": 10,
               "init_total": 20, "temperature": 0.7, "init_correct": 9, "revised_total": 8, "kept": 7,
               "wrong_to_right": 6, "seconds": 12.5}
    common = {"model": "m", "data": "d<b>.jsonl"}
    for name in ("eval/base", "eval/rft", "eval/srt", "eval/sdzero", "collect", "collect_rft"):
        put(out / name, summary=summary, flags={**common, "eval": name.startswith("eval")})
    for name, rows in (("srt", sft_rows(8)), ("rft", sft_rows(8)), ("sdzero", distill_rows(8))):
        write(out / name, rows)
        put(out / name, summary={}, flags={**common, "lr": 0.25})
    put(out / "kl")
    (out / "kl/heatmap.html").write_text("<script>'kl'</script>")
    monkeypatch.setattr("sys.argv", ["report.py", str(out)])
    report.main()
    printed, page = capsys.readouterr().out, (out / "report.html").read_text()
    assert "SD-Zero     0.500  [0.400, 0.600]    20.0      0.000   0.450    0.600   +0.20" in printed
    assert page.count("data:image/png;base64,") == 4 and page.count('class="command"') == 9
    assert "<td>12.5</td>" in page
    assert "python sft.py --model m --data &#x27;d&lt;b&gt;.jsonl&#x27; --lr 0.25" in page
    assert "srcdoc=\"&lt;script&gt;&#x27;kl&#x27;" in page and "<script" not in page and "http" not in page
    (out / "srt/metrics.jsonl").unlink()
    with pytest.raises(SystemExit, match="error: "):
        report.main()
