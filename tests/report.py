"""The end of `make demo` and `make real`: reads what the scripts wrote and prints the table; draws report.png.

    python tests/report.py runs/demo
    python tests/report.py docs/real.png docs/real/*.jsonl      # metrics of several runs of phase 2 over each other
"""
import json
import os
import sys

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt

NAMES = {"base": "base", "rft": "RFT", "srt": "SRT", "sdzero": "SD-Zero"}
COLOURS = dict(zip(NAMES, ("tab:gray", "tab:orange", "tab:green", "tab:blue")))


def main(out):
    read = lambda *path: json.load(open(os.path.join(out, *path)))
    results = {key: read("eval", key, "summary.json") for key in NAMES}
    steps = [json.loads(line) for line in open(os.path.join(out, "sdzero", "metrics.jsonl"))]
    collect, rft = read("collect", "summary.json"), read("collect_rft", "summary.json")

    toy = os.path.isdir(os.path.join(out, "toy"))  # its answers are numbers, so that a first answer is easily found
    widths = {"accuracy": 8, "95 % interval": 15, "tokens": 7, "truncated": 10, **({"first": 7} if toy else {}), "revised": 8, "net": 7}
    row = lambda name, cells: f"{name:8s} " + " ".join(f"{cells[column]:>{width}s}" for column, width in widths.items())
    lines = [row("", {column: column for column in widths})]
    for key, name in NAMES.items():
        r = results[key]
        low, high = r["init_accuracy_95"]
        lines.append(row(name, {
            "accuracy": f"{r['init_accuracy']:.3f}", "95 % interval": f"[{low:.3f}, {high:.3f}]", "tokens": f"{r['init_mean_tokens']:.1f}",
            "truncated": f"{r['init_truncated']:.3f}", "first": f"{first_answer(out, key):.3f}" if toy else "",
            "revised": f"{r['revised_accuracy']:.3f}", "net": f"{r['net_correction']:+.2f}"}))
    print("\n".join(lines))
    base = results["base"]
    print(f"\n{base['problems']} held-out problems, {base['init_total'] // base['problems']} responses each, temperature "
          f"{base['temperature']}. accuracy: of the whole response (its last \\boxed{{}}); "
          + ("first: of the first \\boxed{} in it; " if toy else "") + "revised: of one more attempt after P_r;\n"
          "net: share of the errors which that attempt removes, negative where it adds some.")
    print(f"SRT: {collect['init_total']} + {collect['revised_total']} generations, {collect['kept']} tuples kept "
          f"({collect['wrong_to_right']} after a wrong y_init). RFT: {rft['init_total']} generations, {rft['init_correct']} right.")

    fig, axes = plt.subplots(1, 4, figsize=(15, 3.6), layout="constrained")
    for ax, value, title in ((axes[0], "init_accuracy", "accuracy, held-out problems"), (axes[1], "init_mean_tokens", "mean tokens")):
        heights = [results[key][value] for key in NAMES]
        error = None
        if value == "init_accuracy":
            bounds = [results[key]["init_accuracy_95"] for key in NAMES]
            error = [[h - b[0] for h, b in zip(heights, bounds)], [b[1] - h for h, b in zip(heights, bounds)]]
        bars = ax.bar(list(NAMES.values()), heights, yerr=error, capsize=4, color=COLOURS.values())
        ax.bar_label(bars, fmt="%.2f" if error else "%.0f", label_type="center", color="white", fontweight="bold")
        ax.set_title(title)
    axes[0].set_ylim(0, 1)
    x = [row["step"] + 1 for row in steps]
    axes[2].plot(x, [row["reward"] for row in steps], color="tab:blue", label="reward")
    axes[2].plot(x, [row["loss"] for row in steps], color="tab:red", label="KL per token, nats")
    axes[2].plot(x, [row["entropy"] for row in steps], color="tab:purple", label="entropy per token, nats")
    axes[2].set(title="phase 2: reward, KL, entropy", xlabel="step")
    axes[2].set_ylim(bottom=0)
    axes[2].legend()
    axes[3].plot(x, [row["response_len"] for row in steps], color="tab:blue")
    axes[3].set(title="phase 2: tokens of a response", xlabel="step")
    axes[3].set_ylim(bottom=0)
    path = os.path.join(out, "report.png")
    fig.savefig(path, dpi=120)
    print(f"\npicture: {path}   where the reviser disagrees: {os.path.join(out, 'kl', 'heatmap.html')}")


def first_answer(out, key):
    """Share of responses whose first \\boxed{} is right: what the model says before it corrects itself. Toy answers are numbers."""
    rows = [json.loads(line) for line in open(os.path.join(out, "eval", key, "responses.jsonl"))]
    rows = [row for row in rows if row["kind"] == "init"]
    first = lambda text: text.split("\\boxed{", 1)[1].split("}", 1)[0] if "\\boxed{" in text else None
    return sum(first(row["y_init"]) == row["answer"] for row in rows) / len(rows)


def curves(path, runs):
    """Draws reward, length, truncated share, entropy and KL of several metrics.jsonl of distill.py."""
    panels = {"reward": "reward", "response_len": "tokens of a response", "truncated": "share truncated",
              "entropy": "entropy, nats per token", "kl_wrong": "KL on wrong y, nats per token"}
    fig, axes = plt.subplots(1, len(panels), figsize=(17, 3.4), layout="constrained")
    for run in runs:
        rows = [json.loads(line) for line in open(run)]
        for ax, name in zip(axes, panels):
            seen = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            ax.plot(*zip(*seen), marker=".", label=os.path.basename(run).removesuffix(".jsonl"))
    for ax, title in zip(axes, panels.values()):
        ax.set(title=title, xlabel="step")
        ax.set_ylim(bottom=0)
    axes[0].legend(fontsize=8)
    fig.savefig(path, dpi=110)


if __name__ == "__main__":
    main(sys.argv[1]) if len(sys.argv) == 2 else curves(sys.argv[1], sys.argv[2:])
