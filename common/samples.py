"""
samples.md: what the model answers to the first validation problems, with the verdicts. Loops, noise, answers
that never end: who reads them sees a collapse before the numbers show it.
"""
import os
import re

import torch.distributed as dist

from common.run import write_atomically

SHOWN = 5  # problems


def fence_of(text):
    """A Markdown fence that no line of the text can close."""
    return "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))


def section(step, responses):
    """The text of a step. responses: [(id, verdict's reason, tokens, truncated, text)]."""
    parts = [f"# step {step}\n"]
    for name, reason, tokens, truncated, text in responses:
        title = f"{name}: {reason} ({tokens} tokens{', truncated' if truncated else ''})"
        fence = fence_of(text)
        parts.append(f"## {' '.join(title.split())}\n\n{fence}\n{text}\n{fence}\n")
    return "\n".join(parts) + "\n"


def before(text, step):
    """The sections of steps before this one. A line in a fence is no heading, whatever a model writes."""
    kept, fence = [], None
    for line in text.split("\n"):
        if fence is None and (heading := re.fullmatch(r"# step (\d+)", line)) and int(heading[1]) >= step:
            return "".join(kept)
        if fence is None and re.fullmatch("```+", line):
            fence = line
        elif line == fence:
            fence = None
        kept.append(line + "\n")
    return text


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
