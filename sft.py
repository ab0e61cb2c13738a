"""
Phase 1b of SD-Zero: SFT on D_revision, so that one model generates and revises.

  a row is x + y_init + "\\n\\n" + P_r + "\\n\\n" + y_revised, one assistant turn; the loss is on
    generation   y_init, P_r, y_revised                                L_generation
    revision     y_revised                                             L_revision
    sum          L_revision + L_generation (y_revised counts twice)    the paper's L_SRT, and the default
    two-stage    stage 1: generation on tuples with a wrong y_init     the official code
                 stage 2: revision on --stage2_size others, those with a right y_init first
    rft          y_init of x + y_init, right ones only                 the baseline
  loss of a step = sum of w_t * -log p(token_t) over the global batch / number of its tokens with w_t > 0,
  the same however the batch is split into micro-batches and ranks.

Departures from the official code: one prompt for all phases; y_init and P_r stay in the assistant turn; rows
are token ids as sampled, packed without padding, and do not see each other; logits never exist in full.

    python sft.py --model Qwen/Qwen3-4B-Instruct-2507 --data runs/collect/d_revision.jsonl --out runs/srt
    torchrun --nproc_per_node 4 sft.py ... the same        # as many ranks as --batch has sequences, at most
"""
import argparse
import glob
import math
import os
import random
import re
import time
from collections import Counter
from typing import NamedTuple

import torch
import torch.distributed as dist

import verify
from common import checkpoint, run, training
from common.metrics import Metrics
from common.run import fail, natural, positive, within
from kl import chunked_ce

# flags that a run that goes on may change: none of them moves a row to another step
FREE = "lr stage2_lr weight_decay clip save_every micro_tokens dtype checkpointing compile flash tracker"
# A warning where P_r's first token, the empty line, has a smaller mean probability after y_init at the end:
# .8 where two stages worked (the demo), 1e-8 where not. P_r's first word would be no measure: .02 in the
# demo, for stage 1 taught only "Wait", and stage 2 asks for "Let".
UNSAID = 0.3

# ----------------------------------------------------------------------------------------------------- data

# Openings of a model that believes a user has complained; D_revision has no such user.
FLATTERY = re.compile(
    r"(?:\s*(?:(?:yes|indeed)[,!.]?\s+)?(?:"
    r"you(?:'re|’re| are) (?:absolutely |completely |quite )?right"  # and "You're right to ask."
    r"(?: to\b(?:[^.!?\n]|\.(?=\d))*|[^.!?\n—–,:-]{0,20})(?:[!?—–]|[.,:](?!\d)|--+|-(?!\w))+"
    r"|(?:thanks|thank you) for\b(?:[^.!?\n—]|\.(?=\d))*(?:[!?—]|\.(?!\d))"
    r"|(?:great|good|nice|excellent) (?:question|catch|point|observation)\b[^.!?\n—]{0,20}[.!?—]"
    r")\s*)*", re.IGNORECASE)


def strip_flattery(tokenizer, ids):
    """ids without a flattering opening. Only the tokens that the cut runs through are encoded anew."""
    text = tokenizer.decode(ids)
    cut = FLATTERY.match(text).end()
    if cut in (0, len(text)):
        return ids
    heads = ((k, tokenizer.decode(ids[:k])) for k in range(1, len(ids) + 1))
    keep, head = next((k, head) for k, head in heads if len(head) > cut and text.startswith(head))
    return tokenizer.encode(head[cut].upper() + head[cut + 1:], add_special_tokens=False) + ids[keep:]


def trim_repeats(ids):
    """ids without a tail that repeats: a block of 4 to 500 tokens, there three times or more, stays once."""
    for block in range(4, min(500, len(ids) // 3) + 1):
        start = len(ids) - block
        while start > 0 and ids[start - 1] == ids[start - 1 + block]:
            start -= 1
        if len(ids) - start >= 3 * block:
            return trim_repeats(ids[:start + block])
    return ids


def clean(tokenizer, ids, counts, name):
    """A response as the official code cleans it; a trimmed one gets an end-of-turn, for it stops there."""
    body = verify.without_end(tokenizer, ids)
    trimmed = trim_repeats(body)
    end = ids[len(body):] if trimmed == body else tokenizer.end_ids[:1]
    kept = strip_flattery(tokenizer, trimmed) if name == "y_revised" else trimmed
    counts[f"{name}: repeating tail trimmed"] += trimmed != body
    counts[f"{name}: flattering opening stripped"] += kept != trimmed
    return kept + end


def spells(tokenizer, ids, text):
    """Whether ids are those of a text, if there is one, blanks aside: those of another tokenizer are not."""
    letters = lambda text: "".join(text.split())
    return text is None or letters(tokenizer.decode(ids, skip_special_tokens=True)) == letters(text)


class Example(NamedTuple):
    ids: list
    weights: list  # of the loss on each token; 0 for what is only read
    p_r: int = 0  # where P_r begins, with an empty line


def make_example(tokenizer, phrases, row, objective):
    """The ids of a cleaned row, and where the loss is (see the top of this file)."""
    x, y_init = verify.chat_ids(tokenizer, verify.Problem.of_row(row)), row["y_init_tokens"]
    if objective == "rft":
        return Example(x + y_init, [0] * len(x) + [1] * len(y_init))
    before = verify.revision_ids(tokenizer, x, y_init, row["y_init_correct"], phrases)
    on_init, on_revised = {"generation": (1, 1), "revision": (0, 1), "sum": (1, 2)}[objective]
    weights = [0] * len(x) + [on_init] * (len(before) - len(x))
    return Example(before + row["y_revised_tokens"], weights + [on_revised] * len(row["y_revised_tokens"]),
                   p_r=len(x) + len(verify.without_end(tokenizer, y_init)))


def read_rows(path, objective, tokenizer, phrases, max_len, no_clean, counts):
    """The rows to train on, cleaned, each once. Counts what was cleaned, and why others were dropped."""
    names = ["y_init"] if objective == "rft" else ["y_init", "y_revised"]  # the last must be right
    tokens, rows = {f"{name}_tokens": list for name in names}, {}  # rows: by their ids
    if glob.glob("responses.rank*.jsonl", root_dir=os.path.dirname(path) or "."):
        fail(f"--data {path}: the collection in its folder has not ended; start srt.py again with the same "
             "command, or copy this file elsewhere to train on what it has")
    for line, row in run.read_jsonl(path):
        if "kind" in row and objective != "rft":
            fail(f"{path}:{line}: a row of responses.jsonl; --objective {objective} wants d_revision.jsonl")
        if row.get("kind") == "revision":
            continue  # rft: each y_init has a row of its own
        counts["rows read"] += 1
        run.need(row, path, line, id=str, problem=str, **tokens, y_init_correct=bool)
        p_r = phrases[row["y_init_correct"]]
        if row.get("p_r") not in (None, p_r):
            fail(f"{path}:{line}: P_r is {row['p_r']!r}, not {p_r!r}; give the --phrases that srt.py had")
        if not row.get(f"{names[-1]}_correct"):
            counts[f"dropped: no right {names[-1]}"] += 1
            continue
        if not row[f"{names[-1]}_tokens"]:
            counts[f"dropped: empty {names[-1]}"] += 1
            continue
        for name in names:
            training.check_ids(row[f"{name}_tokens"], tokenizer.vocabulary, f"{path}:{line}")
            if not rows and not spells(tokenizer, row[f"{name}_tokens"], row.get(name)):
                fail(f"{path}:{line}: the tokens of {name} are not its text with this model's tokenizer; "
                     "give the --model that srt.py had, or one with its tokenizer")
            if not no_clean:
                row[f"{name}_tokens"] = clean(tokenizer, row[f"{name}_tokens"], counts, name)
        ids = tuple(make_example(tokenizer, phrases, row, "rft" if objective == "rft" else "revision").ids)
        if len(ids) > max_len:
            counts["dropped: longer than --max_len"] += 1
        elif rows.setdefault(ids, row) is not row:
            counts["dropped: duplicate"] += 1
    return list(rows.values())


def read_examples(path, objective, stage2_size, tokenizer, phrases, max_len, seed, no_clean=False):
    """
    The stages of a run, [(objective, [Example])], and counts of the cleaned, dropped and kept
    ("wrong -> right": tuples with a wrong y_init). path: d_revision.jsonl, for rft also responses.jsonl.
    Ends the program where a stage is empty.
    """
    counts = Counter()
    rows = read_rows(path, objective, tokenizer, phrases, max_len, no_clean, counts)
    random.Random(seed).shuffle(rows)
    stages = [(objective, rows)]
    if objective == "two-stage":
        rows.sort(key=lambda row: not row["y_init_correct"])  # those with a right y_init first
        stages = [("generation", [row for row in rows[stage2_size:] if not row["y_init_correct"]]),
                  ("revision", rows[:stage2_size])]
    counts["wrong -> right"] = sum(not row["y_init_correct"] for row in rows)
    counts["not used: right y_init over --stage2_size"] = len(rows) - sum(len(kept) for _, kept in stages)
    for number, (name, kept) in enumerate(stages, 1):
        counts[f"stage {number}: {name}"] = len(kept)
        if not kept:
            fail(f"--data {path}: no rows for stage {number} ({name}): {dict(+counts)}; get more with srt.py"
                 + f", or lower --stage2_size {stage2_size}" * (objective == "two-stage"))
    return [(name, [make_example(tokenizer, phrases, row, name) for row in kept])
            for name, kept in stages], +counts  # those above 0


# ----------------------------------------------------------------------------------------------------- main


def parse_args():
    parser = argparse.ArgumentParser(description="SFT on D_revision (SRT, phase 1b).")
    add = parser.add_argument
    add("--model", required=True, help="Hugging Face folder or hub name")
    add("--data", required=True, help="d_revision.jsonl (for rft also responses.jsonl) of srt.py")
    add("--out", required=True, help="folder: final/ (the model), state/, metrics.jsonl")
    add("--objective", choices=("sum", "two-stage", "generation", "revision", "rft"), default="sum")
    add("--stage2_size", type=natural, default=2000, help="of two-stage: tuples, right y_init first")
    add("--epochs", type=natural, default=3)
    add("--batch", type=natural, default=4, help="sequences of a step, over all ranks")
    add("--max_len", type=natural, default=32768, help="rows longer, or than the model takes, are dropped")
    add("--lr", type=positive, default=5e-6)
    add("--stage2_lr", type=positive, help="default: --lr")
    add("--weight_decay", type=within(float, 0), default=1e-4)
    add("--clip", type=positive, default=1.0, help="largest gradient norm")
    add("--save_every", type=natural, default=100, help="steps between states to go on from")
    add("--no_clean", action="store_true", help="leave repeating tails and flattering openings")
    training.add_training_flags(parser)
    args = run.parse(parser)
    if args.objective != "two-stage" and (args.stage2_lr or args.stage2_size != args.defaults["stage2_size"]):
        parser.error("--stage2_size and --stage2_lr are for --objective two-stage: give that too")
    return args


def step_examples(examples, step, size, seed):
    """The examples of a step: each epoch is a fresh permutation, cut into batches. The same on every rank."""
    epoch, place = divmod(step, math.ceil(len(examples) / size))
    examples = list(examples)
    random.Random(f"{seed}/{epoch}").shuffle(examples)
    return examples[place * size:(place + 1) * size]


def micro_batches(examples, budget, device):
    """
    This rank's examples, packed: [(Batch, positions whose prediction has a weight or begins P_r [n], weights
    [n], 1 where P_r begins [n])], as many on every rank; an empty share is a dummy of two tokens, no weight.
    """
    packed = []
    for rows in training.pack([len(e.ids) for e in examples], budget, device):
        members = [examples[i] for i in rows] or [Example([0, 0], [0, 0])]
        weights = [w for e in members for w in e.weights[1:] + [0]]  # position t predicts token t + 1
        begins = [t == e.p_r for e in members for t in range(1, len(e.ids) + 1)]
        select = [t for t, w in enumerate(weights) if w or begins[t]] or [0]
        marks = torch.tensor([[weights[t], begins[t]] for t in select], dtype=torch.float32)  # [n, 2]
        packed.append((training.make_batch([e.ids for e in members], device), torch.tensor(select).to(device),
                       *marks.to(device).unbind(1)))
    return packed


def cosine(step, steps):
    """Learning-rate factor: linear over the first 5 % of the steps, then half a cosine down to 0."""
    rise = max(1, round(0.05 * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def main():
    args = parse_args()
    ranks = run.launch()
    tokenizer = verify.load_tokenizer(args.model)
    phrases = verify.phrases_of(args.model, args.phrases)
    max_len = min(args.max_len, verify.context_length(args.model))
    stages, counts = read_examples(args.data, args.objective, args.stage2_size, tokenizer, phrases, max_len,
                                   args.seed, args.no_clean)
    run.say(f"phrases {'|'.join(phrases)}; " + ", ".join(f"{name} {n}" for name, n in counts.items()))
    if args.objective != "rft" and counts["wrong -> right"] < verify.FEW:
        run.say(f"warning: only {counts['wrong -> right']} tuples have a wrong y_init; with 1,548, of a 1.5B "
                "model, the teacher still copied (docs/real.md): collect more, or begin with a better model")
    if run.open_out(args, ranks, FREE, "final", (e.ids for _, examples in stages for e in examples)):
        return run.leave()
    training.settle_flags(args, ranks.device)
    model = training.load_model(args.model, ranks, training.make_mesh(ranks), args.dtype,
                                checkpointing=args.checkpointing, compile=args.compile)
    optimizer = training.make_optimizer(model, args.weight_decay, betas=(0.9, 0.95))
    tensors = lambda: checkpoint.training_state(model, optimizer)
    progress = checkpoint.load_state(args.out, tensors) or {"step": 0}
    run.begin(args, ranks)
    metrics = Metrics(args.out, progress["step"], args.tracker)
    saver = checkpoint.Saver(args.out, args.save_every, ranks.device)

    steps = [args.epochs * math.ceil(len(examples) / args.batch) for _, examples in stages]
    plan = [(stage, step) for stage in range(len(stages)) for step in range(steps[stage])]
    for number, (stage, step) in list(enumerate(plan))[progress["step"]:]:
        started = time.perf_counter()
        objective, examples = stages[stage]
        if step == 0:  # each stage begins without moments
            optimizer.state.clear()
        batch = step_examples(examples, step, args.batch, f"{args.seed}/{stage + 1}")
        loss_tokens = sum(w > 0 for e in batch for w in e.weights)

        sums = torch.zeros(2, device=ranks.device)  # loss; mean probability of P_r's first token
        scale = ranks.world / loss_tokens  # FSDP averages gradients over ranks; times world makes that a sum
        mine = batch[ranks.rank::ranks.world]
        for packed, select, weights, begins in micro_batches(mine, args.micro_tokens, ranks.device):
            part, each = model(packed, select, lambda hidden, head: chunked_ce(
                hidden, head, packed.ids[select + 1], weights * scale, compile=args.compile))
            part.backward()
            sums += torch.stack([part.detach() / ranks.world, (begins * torch.exp(-each)).sum() / len(batch)])
        dist.all_reduce(sums)
        loss, p_r = sums.tolist()
        lr = (args.stage2_lr or args.lr if stage == 1 else args.lr) * cosine(step, steps[stage])
        norm = training.optimizer_step(model, optimizer, lr, args.clip)

        seconds, lengths = time.perf_counter() - started, [len(e.ids) for e in batch]
        flops = 3 * training.forward_flops(model.config, lengths, loss_tokens)
        row = {"step": number, "stage": stage + 1, "objective": objective, "loss": loss,
               "p_r": p_r if args.objective != "rft" else None, "grad_norm": norm, "lr": lr,
               "tokens": sum(lengths), "loss_tokens": loss_tokens, "seconds": seconds,
               "mfu": training.mfu(flops, seconds, ranks.world)}
        says = f"  P_r {p_r:.3f}" if args.objective != "rft" else ""
        metrics.report(f"stage {stage + 1} step {step + 1}/{steps[stage]}  loss {loss:.4f}{says}", row)
        last = number + 1 == len(plan)
        if last and p_r < UNSAID and args.objective not in ("rft", "revision"):
            advice = "lower --stage2_size or give --objective sum" if len(stages) > 1 else "train it longer"
            run.say("warning: in the last batch P_r's beginning has a mean probability of "
                    f"{p_r:.2g} after y_init: it will seldom revise by itself; {advice} (docs/real.md)")
        if saver.after_step(number + 1, tensors, {"step": number + 1}, last):
            metrics.close()
            return run.leave()

    saver.wait()
    checkpoint.save_model(os.path.join(args.out, "final"), model, tokenizer, phrases, args.dtype)
    run.finish(args, ranks, {"dtype": str(args.dtype), "phrases": phrases, "counts": counts,
                             "steps": len(plan)})
    run.say(f"saved {args.out}/final")
    metrics.close()
    run.leave()


if __name__ == "__main__":
    main()
