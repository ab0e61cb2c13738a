"""The end of `make demo`: reads what the scripts wrote and prints the table; draws report.png.

    python tests/report.py runs/demo
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

    lines = [f"{'':8s} {'accuracy':>8s} {'95 % interval':>15s} {'tokens':>7s} {'truncated':>10s} {'first':>7s} {'revised':>8s} {'net':>7s}"]
    for key, name in NAMES.items():
        r = results[key]
        low, high = r["init_accuracy_95"]
        lines.append(f"{name:8s} {r['init_accuracy']:8.3f} {f'[{low:.3f}, {high:.3f}]':>15s} {r['init_mean_tokens']:7.1f} "
                     f"{r['init_truncated']:10.3f} {first_answer(out, key):7.3f} {r['revised_accuracy']:8.3f} {r['net_correction']:+7.2f}")
    print("\n".join(lines))
    print(f"\n{results['base']['problems']} held-out problems, temperature {results['base']['temperature']}. accuracy: of the whole "
          "response (its last \\boxed{}); first: of the first \\boxed{} in it;\nrevised: of one more attempt after P_r; net: share "
          "of the errors which that attempt removes, negative where it adds some.")
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
    axes[2].set(title="phase 2: reward and KL", xlabel="step")
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


if __name__ == "__main__":
    main(sys.argv[1])
