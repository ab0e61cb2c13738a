"""
samples.md: what the model answers to the first validation problems, with the verdicts. Loops, noise, answers
that never end: who reads them sees a collapse before the numbers show it.
"""
import os
import re
import textwrap

import torch.distributed as dist

from common.run import write_atomically

SHOWN = 5  # problems


def section(step, responses):
    """The text of a step, each response indented. responses: [(id, reason, tokens, truncated, text)]."""
    parts = [f"# step {step}\n"]
    for name, reason, tokens, truncated, text in responses:
        title = f"{name}: {reason} ({tokens} tokens{', truncated' if truncated else ''})"
        parts.append(f"## {' '.join(title.split())}\n\n{textwrap.indent(text, '    ', lambda line: True)}\n")
    return "\n".join(parts) + "\n"


def before(text, step):
    """The sections of steps before this one. A response is indented, and so no heading."""
    later = (m.start() for m in re.finditer(r"^# step (\d+)\n\n## ", text, re.M) if int(m[1]) >= step)
    return text[:next(later, None)]


def cut_samples(out, step, ranks, more=""):
    """Takes the sections from `step` on out of samples.md, and adds `more`. Rank 0 does it."""
    if ranks.rank:
        return
    path, text = os.path.join(out, "samples.md"), ""
    if os.path.exists(path):
        with open(path, newline="", encoding="utf-8", errors="replace") as f:
            text = f.read()
    if text or more:
        write_atomically(path, (before(text, step) + more).encode("utf-8", "replace"))


def add_samples(out, step, responses, ranks):
    """
    Writes the section of a step, in place of one that is there. All ranks call it, each with its responses:
    [(number of the problem, id, verdict's reason, tokens, truncated, text)].
    """
    each = [None] * ranks.world
    dist.all_gather_object(each, responses)
    cut_samples(out, step, ranks, section(step, [response for _, *response in sorted(sum(each, []))]))
