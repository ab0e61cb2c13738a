"""
What a run says of its steps: a row of metrics.jsonl and a line on the screen for each, and curves.png.

  of any training   Metrics; memory(), sum_over_ranks(), wilson(), Clock: what goes into a row
  of distill.py     tally(), flops_of(): what is summed over a step; log() makes its row; worse() and
                    getting_worse() look at all steps so far
"""
import contextlib
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from common import run, training
from common.tracker import Tracker

# ------------------------------------------------------------------------------------------ of any training


class Metrics:
    """
    metrics.jsonl, a row for each step, by rank 0. Rows of `step` and later are removed: a resumed run makes
    those steps again. A --tracker is given each row too.
    """

    def __init__(self, out, step, tracker=None):
        self.path = os.path.join(out, "metrics.jsonl") if dist.get_rank() == 0 else None
        self.steps, self.drawn, old = step, time.perf_counter(), []
        if self.path and os.path.exists(self.path):
            old = [row for _, row in run.read_jsonl(self.path, torn_ok=True) if row["step"] < step]
            run.write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in old))
        self.tracker = Tracker(tracker, out, old) if tracker and self.path else None

    def report(self, title, row):
        """Adds speed and memory to a row, writes it, and prints the line of this step, title first."""
        row |= {"tokens_per_s": row["tokens"] / row["seconds"], **memory()}
        self.steps = row["step"] + 1
        if self.path:
            with open(self.path, "a") as f:
                f.write(json.dumps(row) + "\n")
            if self.tracker:
                self.tracker.send(row)
            on_gpu = f"  peak {row['peak_gb']:.2f} GiB, held {row['held_gb']:.2f}" if row["peak_gb"] else ""
            on_gpu += f"  mfu {row['mfu']:.1%}" if row["mfu"] else ""
            print(f"{title}  |g| {row['grad_norm']:.3f}  lr {row['lr']:.2e}  {row['seconds']:.2f} s  "
                  f"{row['tokens_per_s']:.0f} tok/s{on_gpu}", flush=True)
        if time.perf_counter() - self.drawn > 60:
            self.draw()

    def close(self):
        """Draws, and ends the tracker."""
        self.draw()
        if self.tracker:
            self.tracker.close()

    def draw(self):
        """Starts tests/report.py, if it is there, on curves.png in the run's folder; nothing waits for it."""
        self.drawn = time.perf_counter()
        script = Path(__file__).parents[1] / "tests" / "report.py"
        if self.path and self.steps >= 10 and script.exists():
            with contextlib.suppress(OSError):  # a picture is not worth a run
                subprocess.Popen([sys.executable, script, os.path.dirname(self.path)], start_new_session=True,
                                 stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def memory():
    """GiB of this rank's GPU: peak_gb since the last call, held_gb now; 0 on a CPU."""
    peak, held = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    return {"peak_gb": peak / 2**30, "held_gb": held / 2**30}


def sum_over_ranks(ranks, **numbers):
    """{name: sum over all ranks}."""
    total = torch.tensor(list(numbers.values()), dtype=torch.float64, device=ranks.device)
    dist.all_reduce(total)
    return dict(zip(numbers, total.tolist()))


def wilson(p, n, z=1.96):
    """The 95 % Wilson interval of a share p seen over n problems."""
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [round(abs(bound) / (1 + z * z / n), 4) for bound in (centre - half, centre + half)]


class Clock:
    """Seconds of each part of a step; waits for the GPU at the end of a part, not within."""

    def __init__(self):
        self.seconds, self.last = {}, time.perf_counter()

    def lap(self, name):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
        self.last = now


# -------------------------------------------------------------------------------------------- of distill.py


def tally(rows, samples, verdicts):
    """What is counted of this rank's share of a step, beside the sums over its tokens."""
    return {"tokens": sum(len(r.y) for r in rows),
            "tokens_right": sum(len(r.y) for r in rows if r.correct),
            "reward": sum(v.correct for v in verdicts), "response_len": sum(len(y.ids) for y in samples),
            "truncated": sum(y.truncated for y in samples),
            "judge_failed": sum(v.reason in ("timeout", "crash") for v in verdicts)}


def flops_of(student, teacher, rows):
    """Floating-point operations of a step. The KL takes four products with a head for each token."""
    return (training.forward_flops(teacher.config, [len(r.seen) + len(r.y) for r in rows], 0)
            + 3 * training.forward_flops(student.config, [len(r.x) + len(r.y) for r in rows], 0)
            + 4 * training.forward_flops(teacher.config, [], sum(len(r.y) for r in rows)))


def log(metrics, args, ranks, step, sums, clock, **others):
    """Writes and prints the row of a step; returns it. sums: by name, over what this rank had."""
    sums = sum_over_ranks(ranks, **sums)
    tokens, right, wrong = max(1, sums["tokens"]), sums["tokens_right"], sums["tokens"] - sums["tokens_right"]
    spent = clock.seconds["teacher"] + clock.seconds["student"]
    row = {"step": step, "loss": sums["loss"], "kl_right": sums["kl_right"] / right if right else None,
           "kl_wrong": (sums["kl"] - sums["kl_right"]) / wrong if wrong else None,
           **{name: sums[name] / tokens for name in ("entropy", "copied", "sync_gap")},
           **{name: sums[name] / args.batch
              for name in ("reward", "response_len", "truncated", "judge_failed")},
           "cut": (sums["response_len"] - sums["tokens"]) / max(1, sums["response_len"]),
           "tokens": int(sums["tokens"]), "seconds": sum(clock.seconds.values()),
           **{f"seconds_{part}": seconds for part, seconds in clock.seconds.items()},
           "mfu": training.mfu(sums["flops"], spent, ranks.world), **others}
    validated = "  val {val_accuracy:.3f} [{val_low:.3f}, {val_high:.3f}]"
    more = validated.format(**row) if "val_accuracy" in row else ""
    more += f"  cut {row['cut']:.1%}" if row["cut"] else ""
    more += f"  judge failed {row['judge_failed']:.1%}" if row["judge_failed"] else ""
    more += "" if row["updated"] else "  no update: no row has weight"
    parts = " ".join(f"{part} {seconds:.1f}" for part, seconds in clock.seconds.items())
    metrics.report(f"step {step + 1}/{args.steps}  KL {row['loss']:.4f}  reward {row['reward']:.3f}  length "
                   f"{row['response_len']:.1f}  entropy {row['entropy']:.3f}  gap {row['sync_gap']:.4f}"
                   f"{more}  ({parts})", row)
    return row


def worse(history):
    """
    What shows that a run gets worse, or None. history: [reward, truncated, entropy] of each step so far; the
    means of the first 5 steps and of the last 10 are compared. docs/real.md: what they did on real runs.
    """
    if len(history) < 15:
        return None
    mean = lambda steps: [sum(column) / len(steps) for column in zip(*steps)]
    reward_0, truncated_0, entropy_0 = mean(history[:5])
    reward, truncated, entropy = mean(history[-10:])
    if reward < reward_0 / 2:
        return f"the reward has fallen from {reward_0:.3f} to {reward:.3f}"
    if truncated > max(0.5, truncated_0 + 0.1):
        return f"{truncated:.0%} of the responses are truncated"
    if entropy < entropy_0 / 5 and reward < reward_0:
        return f"the entropy has fallen from {entropy_0:.3f} to {entropy:.3f}, and the reward has not risen"
    return None


def getting_worse(progress, args):
    """Says once that the run gets worse. True if it is to end here, with steps left."""
    why = progress["worse"] or worse(progress["history"])
    if why and not progress["worse"]:
        progress["worse"] = why
        best = f" The best validation: {args.out}/best/step-{progress['best'][0][1]:06d}." if args.val else ""
        run.say(f"warning: step {progress['step']}: {why}. The teacher may only copy y (see kl.py): lower "
                f"--lr, or give SRT more wrong -> right tuples (docs/real.md).{best}")
    return bool(why) and args.stop_when_worse and progress["step"] < args.steps
