"""samples.md: the first responses of each validation, the same file whatever the ranks and the kills."""
import re

import torch.distributed as dist
from chaos import go
from conftest import read
from test_tracker import killed_after

from common.run import Ranks
from common.samples import SHOWN, add_samples, before, cut_samples, section


NASTY = [
    "plain",
    "",
    "```python\nprint(1)\n```\nso \\boxed{1}",
    "# step 1\n## p0: right (1 tokens)\n\n````\n# step 0\n````",
    "`````` never closed\r\n# step 2\r",
    "ends with a fence\n```",
    "other ends of lines\x0b# step 1\u2028# step 1\x85# step 1\f# step 1",
    "    indented\n\n\n\n# step 1\n",
]


def responses_in(text):
    """[(step, title, response)]: two kinds of headings, and below the second what is indented."""
    found, step = [], None
    for line in text.splitlines(keepends=True):
        if line.startswith("# "):
            step = line[2:].strip()
        elif line.startswith("## "):
            found.append((step, line[3:].strip(), ""))
        elif line.startswith("    "):
            found[-1] = (*found[-1][:2], found[-1][2] + line[4:])
        else:
            assert line == "\n"
    return found


def test_whatever_a_model_writes(tmp_path):
    """Headings in a response are none, and no section is cut at them."""
    steps = {step: section(step, [(f"p{i}", "no answer", 7, i == 0, text) for i, text in enumerate(NASTY)])
             for step in (0, 1, 2, 10)}
    for step, part in steps.items():
        want = [(f"step {step}", f"p{i}: no answer (7 tokens{', truncated' if i == 0 else ''})", text)
                for i, text in enumerate(NASTY)]
        unended = lambda found: [(*heads, text.removesuffix("\n")) for *heads, text in found]
        assert unended(responses_in(part)) == unended(want)
    text = "".join(steps.values())
    for step in (0, 1, 2, 3, 10, 11):
        assert before(text, step) == "".join(part for s, part in steps.items() if s < step)
    assert section(3, [("a\nb", "my\tword", 1, False, "")]).startswith("# step 3\n\n## a b: my word (1 t")


def test_sections_are_replaced(tmp_path, monkeypatch):
    """One of a step that is there already, and those after it; nothing is made of nothing."""
    monkeypatch.setattr(dist, "all_gather_object", lambda each, mine: each.__setitem__(0, mine))
    alone, of_file = Ranks(0, 1, None, None), lambda responses: [response for _, *response in responses]
    cut_samples(tmp_path, 0, alone)
    assert not list(tmp_path.iterdir())
    one = [(0, "p", "right", 3, False, NASTY[4])]
    for step in (0, 2, 4, 2):
        add_samples(tmp_path, step, one, alone)
    there = lambda: (tmp_path / "samples.md").read_bytes().decode()
    assert there() == section(0, of_file(one)) + section(2, of_file(one))
    cut_samples(tmp_path, 3, alone)
    assert there() == section(0, of_file(one)) + section(2, of_file(one))
    cut_samples(tmp_path, 1, alone)
    assert there() == section(0, of_file(one))
    add_samples(tmp_path, 1, [(0, "\ud800", "wrong", 1, False, "half of a pair")], alone)  # JSON may hold one
    assert there().endswith("# step 1\n\n## ?: wrong (1 tokens)\n\n    half of a pair\n\n")


def test_samples_of_a_killed_run(inputs, tmp_path):
    """Killed after a validation and resumed, the file is as if nothing had been; more steps add to it."""
    args = [*inputs["distill.py"], "--val_samples", 2, "--out"]
    go("distill.py", [*args, tmp_path / "whole"], tmp_path)
    text = (tmp_path / "whole/samples.md").read_text()
    shown, problems = responses_in(text), read(inputs["distill.py"][3])
    assert [step for step, *_ in shown] == [f"step {step}" for step in (0, 2, 4, 5) for _ in range(SHOWN)]
    assert [title.split(":")[0] for _, title, _ in shown] == [p["id"] for p in problems[:SHOWN]] * 4
    assert all(re.search(r": [a-z ]+ \(\d+ tokens(, truncated)?\)$", title) for _, title, _ in shown)
    assert "(24 tokens, truncated)" in text and len({response for *_, response in shown}) > SHOWN

    out = tmp_path / "out"
    go("distill.py", [*args, out], tmp_path, ok=False, patch=killed_after(4))
    assert "# step 4\n" in (out / "samples.md").read_text()
    go("distill.py", [*args, out], tmp_path)
    assert (out / "samples.md").read_text() == text
    go("distill.py", [*args, out, "--steps", 6], tmp_path)
    longer = (out / "samples.md").read_text()
    assert longer.startswith(text) and longer.count("# step 5\n") == longer.count("# step 6\n") == 1


def test_samples_of_two_ranks(inputs, tmp_path):
    """The same file as alone, where the weights stay: moved weights differ by rounding."""
    args = [*inputs["distill.py"], "--lr", "1e-30", "--val_samples", 2, "--steps", 2, "--out"]
    for nproc in (1, 2):
        go("distill.py", [*args, tmp_path / str(nproc)], tmp_path, nproc=nproc)
    text = (tmp_path / "1/samples.md").read_text()
    assert text.count("# step ") == 2 and text.count("\n## ") == 2 * SHOWN
    assert (tmp_path / "2/samples.md").read_text() == text
