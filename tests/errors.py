"""
Do the KL, the student's surprise or the contrast between the phrases find an error? In GSM8K the first false
equation `a op b (op c ...) = d` of a wrong y_init is one that can be labelled: the tokens of d.

    python tests/errors.py --model runs/srt/final --responses runs/collect/responses.jsonl --out runs/errors

Of the labelled tokens the highest counts, by its rank among all of y: 0 the highest, 1 the lowest. Chance is
the expected best of k ranks of n, (n - k) / (k + 1), over n - 1: 1/2 for one token, about 1/3 for two. Only
equations of plain numbers are read: none with words, brackets, variables, powers or percentages in it, nor
one whose d ends y. A d may be rounded to its digits; after a division, cut or rounded up. A response that
does not fit the model's context twice is left out.
"""
import argparse
import json
import re
import sys
from fractions import Fraction
from itertools import accumulate
from pathlib import Path
from statistics import mean, median

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
import kl
import page
import verify
from common import run

NEUTRAL = "Here is the response once more."
COLUMNS = ("KL after P_r for wrong", "KL after P_r for right", "KL after a neutral phrase",
           "surprise, -log p(y_t)", "log p(y_t) told right, minus wrong", "chance")

# one alphabet, each spelling as long as what it stands for
PLAIN = {r"\times": "*", r"\cdot": "*", r"\div": "/", "×": "*", "·": "*", "÷": "/", "−": "-", "$": " ",
         "£": " ", "€": " ", r"\(": " ", r"\)": " ", r"\[": " ", r"\]": " ", r"\,": " ", "**": " "}
SPELLED = re.compile("|".join(map(re.escape, PLAIN)) + r"|(?<=\d)\s*[xX]\s*(?=\d)|(?<=\d )x(?= +\d)")
NUMBER = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?"
EQUATION = re.compile(rf"(?<![\w.,:%^]){NUMBER}(?: *[-+*/] *{NUMBER}){{1,30}} *= *-?{NUMBER}"
                      r"(?![,.:]?\w| *[-+*/%^(\d]| *\\frac)")
GOES_ON = re.compile(r"(?:[-–+*/^)(\\]|\d,?|\b(?:x|of|by|times|plus|minus|and)) *\Z")  # from before it


def false_equation(text):
    """(equation, start, stop) of the first false one in a text, the latter two of its d; None without one."""
    plain = SPELLED.sub(lambda found: PLAIN.get(found[0], "*").ljust(len(found[0])), text)
    for found in EQUATION.finditer(plain):
        left, d = (side.replace(",", "").strip() for side in found[0].split("="))
        goes_on = GOES_ON.search(plain, max(0, found.start() - 9), found.start())
        if goes_on or left.count("/") > 1 or found.end() == len(plain):
            continue
        try:  # nothing but numbers and + - * / fits EQUATION
            gap = abs(eval(re.sub(r"[\d.]+", r"Fraction('\g<0>')", left)) - Fraction(d))
        except ZeroDivisionError:
            continue
        unit = Fraction(1, 10 ** len(d.partition(".")[2]))
        if gap > unit / 2 and ("/" not in left or gap >= unit):
            start = found.end() - len(found[0].rpartition("=")[2].lstrip(" -"))
            return text[found.start():found.end()], start, found.end()
    return None


def label(tokenizer, y):
    """(equation, the tokens of its d) of the first false one in the ids y; None if it holds none."""
    words = [word if isinstance(word := page.spell(tokenizer, i), bytes) else b"\n" for i in y]
    if found := false_equation(text := b"".join(words).decode("utf-8", "surrogateescape")):
        start, stop = (len(text[:i].encode("utf-8", "surrogateescape")) for i in found[1:])
        ends = enumerate(accumulate(map(len, words)))
        return found[0], [t for t, end in ends if end - len(words[t]) < stop and start < end]


def rank(values, tokens):
    """The place of the highest of these tokens in values [T], 0 to 1; among equals, what chance expects."""
    best = values[tokens].max()
    n, k = int((values == best).sum()), int((values[tokens] == best).sum())
    return (int((values > best).sum()) + (n - k) / (k + 1)) / max(1, len(values) - 1)


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description="What finds the first false equation of a wrong y_init?")
    add = parser.add_argument
    add("--model", required=True, help="folder of the model that generates")
    add("--teacher", help="folder of the model that revises; default: --model")
    add("--responses", required=True, help="responses.jsonl of srt.py; its wrong y_init are searched")
    add("--out", required=True, help="folder for summary.json")
    add("--max_responses", type=run.natural, default=200, help="of those that hold a false equation")
    args, device = parser.parse_args(), run.launch().device
    reader = args.teacher or args.model
    tokenizer, phrases = verify.load_tokenizer(reader), verify.phrases_of(reader)
    verify.same_vocabulary(args.model, verify.load_tokenizer(args.model), reader, tokenizer)
    wrong = [row for row in kl.read_responses(args.responses, sys.maxsize, len(tokenizer))
             if not row["y_init_correct"]]
    found = [(row, *error) for row in wrong if (error := label(tokenizer, row["y_init_tokens"]))]
    found or run.fail(f"--responses {args.responses}: {len(wrong)} wrong y_init, no false equation; add more")
    run.make_out(args.out)
    student, teacher = (kl.load(model, device) for model in (args.model, reader))
    context = min(map(verify.context_length, (args.model, reader)))
    told, errors = ((False, phrases), (True, phrases), (True, [NEUTRAL] * 2)), []
    for row, equation, tokens in tqdm(found[:args.max_responses], desc="score", unit="response"):
        problem, y = verify.Problem.of_row(row), row["y_init_tokens"]
        x, targets = verify.chat_ids(tokenizer, problem), torch.tensor(y, device=device)
        seen = [verify.teacher_reads(tokenizer, problem, x, y, *each) for each in told]
        if max(map(len, seen)) + len(y) > context:
            continue
        p, q = kl.read(student, x, y), [kl.read(teacher, before, y) for before in seen]
        after = [kl.chunked_kl(*p, *side, torch.ones_like(targets), targets) for side in q]
        contrast = after[1].teacher_logp - after[0].teacher_logp
        columns = *(side.kl for side in after), -after[0].logp, contrast, torch.zeros(len(y))
        errors.append({"id": row["id"], "sample": row["sample"], "equation": equation, "tokens": tokens,
                       **{name: rank(values, tokens) for name, values in zip(COLUMNS, columns)}})
    errors or run.fail(f"--responses {args.responses}: x, y, P_r, y takes over {context} tokens in each")
    print(f"{'sorted by':38s}mean  median   {len(found)} of {len(wrong)} wrong y_init hold a false equation")
    summary = {"wrong": len(wrong), "responses": len(errors), "phrases": phrases, "neutral": NEUTRAL}
    for name in COLUMNS:
        places = [error[name] for error in errors]
        summary[name] = {"mean": mean(places), "median": median(places)}
        print(f"{name:34s}{mean(places):8.3f}{median(places):8.3f}")
    run.write_atomically(f"{args.out}/summary.json", json.dumps(summary | {"errors": errors}, indent=1))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
