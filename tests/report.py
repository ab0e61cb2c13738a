"""
Pictures and tables of what the scripts wrote.

    python tests/report.py runs/demo                  # the end of make demo and make real: the table, report.png, and
                                                      # report.html, which has all of it in one file
    python tests/report.py runs/sdzero                # a run of sft.py or distill.py: its curves.png
    python tests/report.py runs/a runs/b --out ab.png # several of one kind over each other: folders, metrics.jsonl
"""
import argparse
import base64
import html
import importlib
import json
import math
import os
import shlex
import sys
from pathlib import Path
from unittest import mock

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
plt.rcParams["axes.prop_cycle"] = plt.cycler(color=plt.cm.tab10.colors + plt.cm.tab20.colors[1::2])  # C0 to C19

sys.path.insert(0, str(Path(__file__).parents[1]))
from common.run import fail, need, read_jsonl, write_atomically

NAMES = {"base": "base", "rft": "RFT", "srt": "SRT", "sdzero": "SD-Zero"}
COLOURS = dict(zip(NAMES, ("tab:gray", "tab:orange", "tab:green", "tab:blue")))
# title of a panel: {field of metrics.jsonl: its label}
PANELS = {
    "sft.py": {"loss, nats per token": {"loss": ""}, "probability of P_r after y_init": {"p_r": ""},
               "gradient norm": {"grad_norm": ""}, "learning rate": {"lr": ""}},
    "distill.py": {
        "reward": {"reward": "reward", "val_accuracy": "validation"},
        "KL per token, nats": {"kl_right": "on right y", "kl_wrong": "on wrong y"},
        "entropy per token, nats": {"entropy": ""}, "tokens of a response": {"response_len": ""},
        "share truncated": {"truncated": ""}, "sync gap, nats per token": {"sync_gap": ""},
        "gradient norm": {"grad_norm": ""}},
}
LINES = ("-", "--")  # of the fields of a panel, where the colour tells the run


# ---- rows of metrics.jsonl


def read_run(path):
    """(script that made it, its rows by step) of a run's folder or metrics.jsonl. A step made again counts once."""
    file = Path(path, "metrics.jsonl") if os.path.isdir(path) else Path(path)
    if not file.is_file():
        fail(f"{path}: no run of sft.py or distill.py ({file} is not there); give such a folder, or a metrics.jsonl")
    rows = {}
    for line, row in read_jsonl(file, torn_ok=True):  # a row that is being written is left out
        need(row, file, line, step=int)
        rows[row["step"]] = row
    if not rows:
        fail(f"{file} has no rows yet; draw it after the first step")
    rows = [rows[step] for step in sorted(rows)]
    script = "sft.py" if "stage" in rows[0] else "distill.py"
    summary = file.with_name("summary.json")  # a run's last validation has no row
    last = json.loads(summary.read_text()) if script == "distill.py" and summary.is_file() else {}
    if "val_accuracy" in last and last["step"] == rows[-1]["step"] + 1:
        rows.append({"step": last["step"], "val_accuracy": last["val_accuracy"]})
    return script, rows


def values(rows, field):
    """
    (steps, numbers) of a field. Rows without it are passed over (validation has few); null, nan and infinity are
    nan, a gap in the line. Nothing where there is no number, or zeros alone.
    """
    found = [(row["step"], row[field]) for row in rows if field in row]
    found = [(step, math.nan if y is None or not math.isfinite(y) else y) for step, y in found]
    return zip(*found) if any(y and not math.isnan(y) for _, y in found) else ((), ())


def smooth(y, width):
    """Means of the numbers in windows of this width; nan where the window's middle is."""
    sums, counts = [0.0], [0]
    for v in y:
        sums.append(sums[-1] + (0.0 if math.isnan(v) else v))
        counts.append(counts[-1] + (not math.isnan(v)))
    spans = [(max(0, i - width // 2), min(len(y), i + width // 2 + 1)) for i in range(len(y))]
    return [math.nan if math.isnan(v) else (sums[b] - sums[a]) / (counts[b] - counts[a])
            for v, (a, b) in zip(y, spans)]


def draw_line(ax, x, y, colour, style, label):
    """A line; dots where there are few numbers, and where one stands between gaps; many get a mean over them."""
    finite = [not math.isnan(v) for v in y]
    alone = [i for i, here in enumerate(finite)
             if here and not any(finite[max(0, i - 1):i]) and not any(finite[i + 1:i + 2])]
    dots = [i for i, here in enumerate(finite) if here] if sum(finite) <= 60 else alone
    many = sum(finite) > 300
    ax.plot(x, y, style, color=colour, marker=".", markevery=dots, linewidth=0.6 if many else 1.3,
            alpha=0.3 if many else 1, label=None if many else label)
    if many:
        ax.plot(x, smooth(y, len(y) // 50), style, color=colour, linewidth=1.5, label=label)


def scale(ax, numbers):
    """A log scale where positive numbers span a factor of 30; else from 0."""
    numbers = sorted(v for v in numbers if not math.isnan(v))
    # a few zeros or first steps must not decide
    if numbers[0] > 0 and numbers[-1] > 30 * numbers[0] and ax.get_title() != "learning rate":
        ax.set_yscale("log")
    else:
        ax.set_ylim(min(0, numbers[0]) * 1.05, numbers[-1] * 1.05 if numbers[-1] > 0 else None)


def seconds_of(rows):
    """(steps, {part: seconds of it in each step}), the parts of distill.py that are there."""
    rows = [row for row in rows if "seconds" in row]
    parts = dict.fromkeys(name for row in rows for name in row if name.startswith("seconds_"))
    found = {name[8:]: [row.get(name) or 0.0 for row in rows] for name in parts}
    return [row["step"] for row in rows], {name: y for name, y in found.items() if any(y)}


def draw_seconds(ax, runs):
    """Seconds of a step: of one run as a stack of its parts, of several the sums."""
    for number, (name, rows) in enumerate(runs.items()):
        x, parts = seconds_of(rows)
        if len(runs) > 1:
            draw_line(ax, *map(list, values(rows, "seconds")), f"C{number}", "-", None)
        elif len(x) > 1:
            ax.stackplot(x, parts.values(), labels=parts, colors=[f"C{i}" for i in range(len(parts))], linewidth=0)
        else:
            below = 0.0
            for part, (y,) in parts.items():
                ax.bar(x, y, bottom=below, width=0.3, label=part)
                below += y
    ax.set_ylim(bottom=0)


def draw(path, runs):
    """Draws runs {name: rows} of one script to `path`, 1,200 pixels wide; of several the colour tells which."""
    script = "sft.py" if "stage" in next(iter(runs.values()))[0] else "distill.py"
    panels = []  # (title, draw it on ax)
    for title, fields in PANELS[script].items():
        lines = [(number, name, place, label, *map(list, values(rows, field)))
                 for number, (name, rows) in enumerate(runs.items()) for place, (field, label) in enumerate(fields.items())]
        lines = [line for line in lines if line[-1]]
        if lines:
            panels.append((title, lines))
    stacked = script == "distill.py" and any(seconds_of(rows)[1] for rows in runs.values())
    count = len(panels) + stacked
    columns = min(3, count)
    height = math.ceil(count / columns)
    fig, axes = plt.subplots(height, columns, figsize=(12, 2.7 * height), squeeze=False)
    axes = list(axes.flat)
    for ax, (title, lines) in zip(axes, panels):
        several = len({place for _, _, place, *_ in lines}) > 1
        for number, name, place, label, x, y in lines:
            if len(runs) == 1:
                draw_line(ax, x, y, f"C{place}", "-", label)
            else:
                draw_line(ax, x, y, f"C{number}", LINES[place], None)
        ax.set_title(title, fontsize=10)
        scale(ax, [v for *_, y in lines for v in y])
        if several:
            looks = [("gray", style) for style in LINES] if len(runs) > 1 else [("C0", "-"), ("C1", "-")]
            ax.legend([plt.Line2D([], [], color=colour, linestyle=style) for colour, style in looks],
                      list(PANELS[script][title].values()), fontsize=7)
    if stacked:
        draw_seconds(axes[len(panels)], runs)
        axes[len(panels)].set_title("seconds of a step", fontsize=10)
        if len(runs) == 1:
            axes[len(panels)].legend(fontsize=7, loc="upper right")
    for number, rows in enumerate(runs.values()):  # where a stage of sft.py ends
        for before, row in zip(rows, rows[1:]):
            if row.get("stage") != before.get("stage") and "stage" in row:
                for ax in axes[:count]:
                    ax.axvline(row["step"] - 0.5, color="gray" if len(runs) == 1 else f"C{number}", linestyle=":", linewidth=1)
    for ax in axes[:count]:
        ax.tick_params(labelsize=8)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(alpha=0.25)
    for ax in axes[max(0, count - columns):count]:
        ax.set_xlabel("step", fontsize=8)
    for ax in axes[count:]:
        ax.remove()
    room = 0.0
    if len(runs) > 1:  # one legend for all panels
        lines = [plt.Line2D([], [], color=f"C{number}") for number in range(len(runs))]
        fig.legend(lines, runs, ncols=min(4, len(runs)), loc="lower center", fontsize=8)
        room = 0.25 * (1 + math.ceil(len(runs) / 4)) / fig.get_figheight()
    fig.tight_layout(rect=(0, room, 1, 1))
    write_picture(fig, path, dpi=100)


def write_picture(fig, path, dpi):
    """Beside its place, then renamed: who looks meanwhile sees a whole one."""
    tmp = f"{path}.{os.getpid()}.tmp"
    fig.savefig(tmp, dpi=dpi, format=Path(path).suffix[1:] or "png")
    plt.close(fig)
    os.replace(tmp, path)


def names_of(paths):
    """What tells the paths of runs apart, e.g. {runs/a/sdzero: a, runs/b/sdzero: b}."""
    parts = {path: list(Path(os.path.abspath(path)).parts) for path in paths}
    for own in parts.values():
        if own[-1] == "metrics.jsonl":
            own.pop()
    if len({tuple(own) for own in parts.values()}) < len(paths):
        fail("a run is given twice; give each once")
    while len({own[0] for own in parts.values()}) == 1 and all(len(own) > 1 for own in parts.values()):
        parts = {path: own[1:] for path, own in parts.items()}
    while len({own[-1] for own in parts.values()}) == 1 and all(len(own) > 1 for own in parts.values()):
        parts = {path: own[:-1] for path, own in parts.items()}
    return {path: "/".join(own).removesuffix(".jsonl") for path, own in parts.items()}


def compare(paths, out):
    names, read = names_of(paths), {path: read_run(path) for path in paths}
    scripts = {script: path for path, (script, _) in read.items()}
    if len(scripts) > 1:
        fail("runs of one script are wanted: " + ", ".join(f"{path} is of {script}" for script, path in scripts.items()))
    draw(out, {names[path]: rows for path, (_, rows) in read.items()})
    print(f"picture: {out}")


# ---- the end of make demo and make real


def read_json(*path):
    file = Path(*path)
    if not file.is_file():
        fail(f"{file} is not there: the run has not come so far; the same make goes on where it was")
    return json.loads(file.read_text())


def make_table(results):
    """The cells of the table, a list of rows; the first are the names of the columns."""
    table = [["", "accuracy", "95 % interval", "tokens", "truncated", "first", "revised", "net"]]
    for key, name in NAMES.items():
        r = results[key]
        low, high = r["init_accuracy_95"]
        first = f"{r['init_first_accuracy']:.3f}" if "init_first_accuracy" in r else "-"  # of an earlier version
        table.append([name, f"{r['init_accuracy']:.3f}", f"[{low:.3f}, {high:.3f}]", f"{r['init_mean_tokens']:.1f}",
                      f"{r['init_truncated']:.3f}", first, f"{r['revised_accuracy']:.3f}", f"{r['net_correction']:+.2f}"])
    return table


def say_table(table):
    widths = {"": -8, "accuracy": 8, "95 % interval": 15, "tokens": 7, "truncated": 10, "first": 7, "revised": 8, "net": 7}
    widths = [widths[column] for column in table[0]]
    return "\n".join(" ".join(f"{cell:{'<' if w < 0 else '>'}{abs(w)}s}" for cell, w in zip(row, widths)) for row in table)


def draw_report(path, results, steps):
    fig, axes = plt.subplots(1, 4, figsize=(15, 3.6), layout="constrained")
    for ax, value, title in ((axes[0], "init_accuracy", "accuracy, held-out problems"),
                             (axes[1], "init_mean_tokens", "mean tokens")):
        heights = [results[key][value] for key in NAMES]
        error = None
        if value == "init_accuracy":
            bounds = [results[key]["init_accuracy_95"] for key in NAMES]
            error = [[h - b[0] for h, b in zip(heights, bounds)], [b[1] - h for h, b in zip(heights, bounds)]]
        bars = ax.bar(list(NAMES.values()), heights, yerr=error, capsize=4, color=COLOURS.values())
        ax.bar_label(bars, fmt="%.2f" if error else "%.0f", label_type="center", color="white", fontweight="bold")
        ax.set_title(title)
    axes[0].set_ylim(0, 1)
    for ax, title, lines in (
            (axes[2], "phase 2: reward, KL, entropy", {"reward": ("reward", "tab:blue"), "loss": ("KL per token, nats", "tab:red"),
                                                       "entropy": ("entropy per token, nats", "tab:purple")}),
            (axes[3], "phase 2: tokens of a response", {"response_len": ("", "tab:blue")})):
        for field, (label, colour) in lines.items():
            ax.plot([row["step"] + 1 for row in steps], [row[field] for row in steps], color=colour, label=label)
        ax.set(title=title, xlabel="step")
        ax.set_ylim(bottom=0)
    axes[2].legend()
    write_picture(fig, path, dpi=120)


def command(folder):
    """(the command that made a folder, without flags at their defaults; the seconds of its steps or sampling)."""
    flags, summary = read_json(folder, "flags.json"), read_json(folder, "summary.json")
    rows = Path(folder, "metrics.jsonl")
    script = read_run(folder)[0] if rows.is_file() else "srt.py"
    with mock.patch.object(sys, "argv", [script, "--model", "", "--data", "", "--out", ""]):
        defaults = importlib.import_module(script[:-3]).parse_args().defaults
    words = ["python", script]
    for name, value in {**flags, "out": str(folder)}.items():
        if name in ("verifier", "fresh") or value == defaults.get(name) or (name, value) == ("teacher", flags["model"]):
            continue
        words += [f"--{name}"] if value is True else [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    seconds = sum(row.get("seconds", 0) for row in read_run(folder)[1]) if rows.is_file() else summary["seconds"]
    return shlex.join(words), seconds


STYLE = """
:root { color-scheme: light dark; --line: #8884 }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1240px; margin: 0 auto; padding: 16px }
h1 { font-size: 22px } h2 { font-size: 17px; margin: 28px 0 8px }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: 4px 10px; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
.command, th.command { text-align: left; white-space: normal; font: 12px/1.4 monospace; overflow-wrap: anywhere; min-width: 240px }
img { width: 100%; height: auto; background: #fff }
iframe { width: 100%; height: 80vh; border: 1px solid var(--line) }
@media (prefers-color-scheme: dark) { img { filter: invert(0.93) hue-rotate(180deg) } }
@media (max-width: 600px) { .wide img { width: 900px } th, td { padding: 4px 6px } }
"""


def write_page(path, out, title, table, text):
    """report.html: one file without references to others, so that it can be sent."""
    escape = html.escape
    runs = [Path(out, name) for name in ("srt", "rft", "sdzero")]
    folders = [Path(out, "collect"), runs[0], Path(out, "collect_rft"), *runs[1:], *(Path(out, "eval", key) for key in NAMES)]
    image = lambda file: (f'<div class="wide"><img alt="{escape(file.stem)} of {escape(file.parent.name)}" '
                          f'src="data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"></div>')
    row = lambda tag, cells: "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"
    body = [f"<h1>{escape(title)}</h1>", '<div class="wide"><table>', row("th", table[0]),
            *(row("td", cells) for cells in table[1:]), "</table></div>",
            *(f"<p>{escape(part)}</p>" for part in text), image(Path(out, "report.png"))]
    for run in runs:
        body += [f"<h2>{escape(str(run))}</h2>", image(run / "curves.png")]
    body += ["<h2>Commands</h2>", '<div class="wide"><table>', "<tr><th>seconds</th><th class=command>command</th></tr>"]
    for folder in folders:
        words, seconds = command(folder)
        body.append(f'<tr><td>{seconds:,.1f}</td><td class="command">{escape(words)}</td></tr>')
    body.append("</table></div><p>Seconds: of the steps (sft.py, distill.py) or of sampling and judging (srt.py), over all "
                "starts, without loading. Flags that are not shown had their defaults.</p>")
    for file in sorted(Path(out, "kl").glob("*.html")):  # srcdoc: its own page within this one, styles apart
        body += [f"<h2>{escape(str(file))}</h2>", f'<details><summary>where the reviser disagrees, token by token '
                 f'({file.stat().st_size / 2**20:.1f} MiB)</summary>',
                 f'<iframe title="{escape(file.stem)}" sandbox="allow-scripts" srcdoc="{escape(file.read_text())}"></iframe></details>']
    head = (f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
            f"<title>{escape(title)}</title><style>{STYLE}</style>")
    write_atomically(path, head + "\n".join(body) + "</html>\n")


def report(out):
    """Prints the table of make demo and make real; writes report.png, curves.png of its runs, report.html."""
    results = {key: read_json(out, "eval", key, "summary.json") for key in NAMES}
    steps = [row for row in read_run(os.path.join(out, "sdzero"))[1] if "reward" in row]
    collect, rft = read_json(out, "collect", "summary.json"), read_json(out, "collect_rft", "summary.json")
    table, base = make_table(results), results["base"]
    print(say_table(table))
    text = [f"{base['problems']} held-out problems, {base['init_total'] // base['problems']} responses each, temperature "
            f"{base['temperature']}. accuracy: of the whole response (its last \\boxed{{}}); first: of what stands before the first P_r in it; revised: of one more "
            "attempt after P_r;\nnet: share of the errors which that attempt removes, negative where it adds some.",
            f"SRT: {collect['init_total']} + {collect['revised_total']} generations, {collect['kept']} tuples kept "
            f"({collect['wrong_to_right']} after a wrong y_init). RFT: {rft['init_total']} generations, "
            f"{rft['init_correct']} right."]
    print("\n" + "\n".join(text))
    draw_report(os.path.join(out, "report.png"), results, steps)
    for name in ("srt", "rft", "sdzero"):
        draw(os.path.join(out, name, "curves.png"), {name: read_run(os.path.join(out, name))[1]})
    page = os.path.join(out, "report.html")
    write_page(page, out, f"SD-Zero: {out}", table, text)
    print(f"\npicture: {os.path.join(out, 'report.png')}   all in one page: {page}   "
          f"where the reviser disagrees: {os.path.join(out, 'kl', 'heatmap.html')}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="the folder of make demo or make real; or runs of sft.py or distill.py")
    parser.add_argument("--out", help="the picture of runs; default: curves.png in the folder of one, compare.png of several")
    args = parser.parse_args()
    kinds = tuple(plt.figure().canvas.get_supported_filetypes())
    if args.out and Path(args.out).suffix[1:] not in kinds:
        fail(f"--out {args.out}: a picture is wanted, .{', .'.join(kinds)}")
    first = args.runs[0]
    if len(args.runs) > 1:
        compare(args.runs, args.out or "compare.png")
    elif os.path.isdir(os.path.join(first, "eval")):
        report(first)
    elif not args.out and not os.path.isdir(first) and os.path.isfile(first):
        fail(f"{first}: give --out picture.png for a file, or the folder of the run")
    else:
        draw(args.out or os.path.join(first, "curves.png"), {Path(first).name: read_run(first)[1]})


if __name__ == "__main__":
    main()
