"""
Phase 2 of SD-Zero: on-policy self-distillation. The SRT model, told the outcome of the student's own
answer, is the teacher.

  each step
    1. weights of the student -> sampler
    2. y ~ pi_student(. | x)                                      --batch prompts, one y each
    3. r = 1 if y is right, else 0
    4. the frozen SRT model reads x, y, "\\n\\n" + P_r + "\\n\\n", y: its hidden states at the second y
    5. loss = mean over all tokens of all y of KL( pi_student(. | x, y_<t) || pi_SRT(. | x, y, P_r, y_<t) ),
       over the whole vocabulary; backward; clip; AdamW

Departures from the official code: the KL is exact and reverse; the first copy of y has no end-of-turn (as
in phase 1) and the second has, so that ending is distilled too; every step compares the sampler's
log-probabilities with the trainer's, and the run stops when they part (--max_sync_gap): stale weights would
train on the wrong policy without a sign. A run that gets worse says so: a falling KL alone means nothing.

    python distill.py --model runs/srt/final --data problems.jsonl --range 10000:19000 --out runs/sdzero
    torchrun --nproc_per_node 8 distill.py ... the same
"""
import argparse
import functools
import os
import random
from typing import NamedTuple

import torch

import verify
from common import checkpoint, run, training
from common.metrics import Clock, Metrics, flops_of, getting_worse, log, sum_over_ranks, tally, wilson
from common.run import fail, natural, positive, share, within
from common.samples import SHOWN, add_samples, cut_samples
from common.sampler import check_lengths, close, engine_name, hand_out, make_sampler, request_seed
from kl import COPIED, KINDS, chunked_kl

# flags that a run that goes on may change: none of them changes the objective or what a step is made of
FREE = ("steps lr warmup weight_decay clip val_every save_every max_sync_gap stop_when_worse micro_tokens "
        "dtype checkpointing compile flash tracker engine vllm_memory judge_seconds unsafe_no_sandbox")


class Row(NamedTuple):
    """One y as both sides read it. y_t is predicted at position len(before) - 1 + t of before + y."""
    x: list  # what the student reads before y
    seen: list  # what the teacher reads before y
    y: list  # ids as sampled, end-of-turn included
    logprobs: list  # the sampler's
    correct: bool
    weight: float  # of each token of y in the loss: 0 leaves the row out, 1 / len(y) averages per response


# where a rank has nothing left and others do; it counts nowhere
DUMMY = Row(x=[0], seen=[0], y=[0], logprobs=[0.0], correct=False, weight=0.0)


def make_row(tokenizer, phrases, problem, x, sample, correct, max_teacher_len):
    """
    The Row of one sample. Where x, y, P_r, y is longer than max_teacher_len, both copies of y are cut to fit;
    where not even one token does, y is empty.
    """
    y = verify.fitting(tokenizer, problem, x, sample.ids, correct, phrases, max_teacher_len)
    seen = verify.teacher_reads(tokenizer, problem, x, y, correct, phrases)
    return Row(x, seen, y, sample.logprobs[:len(y)], correct, weight=1.0)


def micro_batches(rows, side, budget, device):
    """
    Packs `before + y` of the rows, before = row.x or row.seen; DUMMY is the last. A list of (numbers of the
    rows, Batch, positions that predict their y), on the device. A forward pass is a collective, so that every
    rank has as many: where one has nothing left, DUMMY.
    """
    full, packed = [getattr(row, side) + row.y for row in rows], []
    for members in training.pack(list(map(len, full[:-1])), budget, device):
        members, select, end = members or [len(rows) - 1], [], 0
        for i in members:
            end += len(full[i])
            select.extend(range(end - len(rows[i].y) - 1, end - 1))
        batch = training.make_batch([full[i] for i in members], device)
        packed.append((members, batch, torch.tensor(select).to(device)))
    return packed


def teacher_states(teacher, rows, budget, device):
    """The teacher's hidden states that predict the second copy of y: a list of [len(y), H], one per row."""
    states = [None] * len(rows)
    with torch.no_grad():
        for members, batch, select in micro_batches(rows, "seen", budget, device):
            hidden = teacher(batch, select, lambda hidden, head: hidden)  # [n, H]
            states[-1] = hidden[:1]  # of DUMMY: any will do
            for i, part in zip(members, hidden.split([len(rows[i].y) for i in members])):
                states[i] = part
    return states


def student_pass(student, rows, states, teacher_head, normaliser, args, ranks):
    """
    Forward, exact KL, backward over this rank's rows, DUMMY last; gradients add up in the student.
    normaliser: the sum of the weights of all y tokens of the global batch. Returns sums over this rank's y
    tokens, by name: its share of the loss; sync_gap, |log pi_sampler(y_t) - log pi_trainer(y_t)|; KL, and KL
    where y is right; the student's entropy; tokens copied.
    """
    names = "loss", "sync_gap", "kl", "kl_right", "entropy", "copied"
    sums = torch.zeros(len(names), device=ranks.device)
    columns = [(p, row.weight, row.correct, row is not DUMMY) for row in rows for p in row.logprobs]
    columns = torch.tensor(columns, dtype=torch.float32).to(ranks.device)  # [tokens, 4], then by row
    columns = columns.split([len(row.y) for row in rows])
    for members, batch, select in micro_batches(rows, "x", args.micro_tokens, ranks.device):
        # from here to the next micro-batch the host waits for nothing
        states_y = torch.cat([states[i] for i in members])  # [n, H]
        sampled, weight, right, counts = torch.cat([columns[i] for i in members]).unbind(1)
        # FSDP averages gradients over ranks; times world makes that a sum over the global batch
        found = student(batch, select, lambda hidden, head: chunked_kl(
            hidden, head, states_y, teacher_head, weight * (ranks.world / normaliser), batch.ids[select + 1],
            args.kl, args.topk, compile=args.compile))
        found.loss.backward()
        each = ((found.logp - sampled).abs(), found.kl, found.kl * right, found.entropy,
                found.teacher_logp > COPIED)
        sums += torch.stack([found.loss.detach() / ranks.world, *((value * counts).sum() for value in each)])
    return dict(zip(names, sums.tolist()))


def sample_and_judge(sampler, judge, tokenizer, problems, prompts, mine, seeds, args, temperature):
    """One y for each number in `mine`, and the future of its verdict: judging goes on while others come."""
    samples, verdicts = [None] * len(mine), [None] * len(mine)
    for sample in sampler.stream(hand_out([prompts[i] for i in mine], seeds), max_tokens=args.max_tokens,
                                 temperature=temperature, top_p=args.top_p):
        at, text = sample.request.key, tokenizer.decode(sample.ids, skip_special_tokens=True)
        samples[at], verdicts[at] = sample, judge.submit(problems[mine[at]], text)
    return samples, verdicts


def validate(sampler, judge, tokenizer, problems, prompts, args, ranks):
    """avg@k over the validation problems, k = --val_samples; and this rank's part of samples.md."""
    mine = [(i, k) for i in range(len(problems)) for k in range(args.val_samples)][ranks.rank::ranks.world]
    seeds = [request_seed(args.seed, "val", problems[i].id, k) for i, k in mine]
    ys, verdicts = sample_and_judge(sampler, judge, tokenizer, problems, prompts, [i for i, _ in mine], seeds,
                                    args, args.val_temperature or args.temperature)
    verdicts = [verdict.result() for verdict in verdicts]
    right = sum_over_ranks(ranks, right=sum(v.correct for v in verdicts))["right"]
    shown = [(i, problems[i].id, verdict.reason, len(y.ids), y.truncated,
              tokenizer.decode(y.ids, skip_special_tokens=True))
             for (i, k), y, verdict in zip(mine, ys, verdicts) if i < SHOWN and k == 0]
    return right / (len(problems) * args.val_samples), shown


def step_problems(step, batch, total, seed):
    """Numbers of the problems of a step: epochs of fresh permutations, one after another."""
    @functools.cache
    def order(epoch):
        numbers = list(range(total))
        random.Random(f"{seed}/{epoch}").shuffle(numbers)
        return numbers

    return [order(at // total)[at % total] for at in range(step * batch, (step + 1) * batch)]


def whole_head(teacher, dtype):
    """[V, H], for the KL of all micro-batches."""
    return teacher.get_output_embeddings().weight.full_tensor().to(dtype)


def move_teacher(teacher, student):
    """Sets the teacher to the student: iterative self-evolution."""
    with torch.no_grad():
        for mine, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
            mine.copy_(theirs)


def parse_args():
    parser = argparse.ArgumentParser(description="On-policy self-distillation (phase 2).")
    add = parser.add_argument
    add("--model", required=True, help="the SRT model: where the student starts")
    add("--data", required=True, help=".jsonl, .json, .parquet or hub name[:config][@split]")
    add("--out", required=True, help="folder: final/, best/, state/, metrics.jsonl")
    add("--teacher", help="default: --model")
    add("--range", metavar="A:B", help="rows of the data; others than those of srt.py")
    # optimisation
    add("--steps", type=natural, default=400)
    add("--batch", type=natural, default=128, help="prompts of a step, over all ranks; one y each")
    add("--lr", type=positive, default=5e-6)
    add("--warmup", type=within(int, 0), default=20, help="steps of linear warmup; constant after")
    add("--weight_decay", type=within(float, 0), default=0.01)
    add("--clip", type=positive, default=1.0, help="largest gradient norm")
    add("--kl", choices=KINDS, default="reverse")
    add("--topk", type=within(int, 0), default=0, help="KL over the teacher's k largest logits; 0: exact")
    add("--sync_every", type=within(int, 0), default=0, help="teacher := student so often; 0: never")
    # sampling
    add("--max_tokens", type=natural, default=8192, help="per response")
    add("--max_teacher_len", type=natural, default=32768, help="of x, y, P_r, y: both y are cut to fit")
    add("--temperature", type=positive, default=1.0)
    add("--top_p", type=share, default=1.0)
    add("--engine", type=engine_name, choices=("vllm", "hf"), help="default: vllm where it is installed")
    add("--vllm_memory", type=share, default=0.3, help="share of the GPU's memory for vLLM")
    verify.add_judge_flags(parser)
    # watching, validation and saving
    add("--max_sync_gap", type=positive, default=0.1, help="stop where sampler and trainer differ by more: "
        "healthy is 0.01-0.02 nats per token in bf16, stale weights give 0.2")
    add("--stop_when_worse", action="store_true", help="end a run that gets worse; without it, only say so")
    add("--val", help="validation problems, as --data")
    add("--val_range", metavar="A:B", help="rows of --val")
    add("--val_every", type=natural, default=20)
    add("--val_samples", type=natural, default=8, help="responses per validation problem")
    add("--val_temperature", type=positive, help="default: --temperature; better: that of your evaluation")
    add("--save_every", type=natural, default=10, help="steps between states to go on from")
    training.add_training_flags(parser)
    args = run.parse(parser)
    if args.val_range and not args.val:
        parser.error("--val_range is for the problems of --val; give that too")
    args.teacher = args.teacher or args.model
    return args


def distill(args, ranks, judge):
    """Steps 1 to 5, --steps times, and what watches them."""
    tokenizer = verify.load_tokenizer(args.model)
    verify.same_vocabulary(args.model, tokenizer, args.teacher, verify.load_tokenizer(args.teacher))
    phrases = verify.phrases_of(args.teacher, args.phrases)
    load = functools.partial(run.from_rank_0, verify.load_problems)
    problems, dropped = load(args.data, judge, args.range)
    prompts = [verify.chat_ids(tokenizer, problem) for problem in problems]
    val_problems = load(args.val, judge, args.val_range, flag="--val")[0] if args.val else []
    val_prompts = [verify.chat_ids(tokenizer, problem) for problem in val_problems]
    if both := {p.problem for p in problems} & {p.problem for p in val_problems}:
        run.say(f"note: {len(both)} of {len(val_problems)} problems of --val are in --data: they are learnt")
    if args.batch > len(problems):
        fail(f"--batch {args.batch} is more than the {len(problems)} problems of --data; lower it"
             + f" (dropped: {dict(dropped)})" * bool(dropped))
    longest = check_lengths(args.model, problems, prompts, args.max_tokens)
    if args.val:
        longest = max(longest, check_lengths(args.model, val_problems, val_prompts, args.max_tokens, "--val"))
    if args.topk > tokenizer.vocabulary:
        fail(f"--topk {args.topk} is more than the {tokenizer.vocabulary} tokens of the vocabulary; lower it")
    if not args.fresh and (made := run.from_rank_0(checkpoint.steps_made, args.out)) > args.steps:
        fail(f"--steps {args.steps}: the run in {args.out} has made {made}; give as many, or --fresh")
    max_teacher_len = min(args.max_teacher_len, verify.context_length(args.teacher))
    if run.open_out(args, ranks, FREE, "final", problems + val_problems, steps=args.steps):
        return run.leave()
    training.settle_flags(args, ranks.device)

    mesh = training.make_mesh(ranks)
    moving = args.sync_every > 0  # a teacher in fp32, for small steps vanish in bf16, and part of the state
    student = training.load_model(args.model, ranks, mesh, args.dtype, checkpointing=args.checkpointing,
                                  compile=args.compile)
    teacher = training.load_model(args.teacher, ranks, mesh, args.dtype, trainable=False,
                                  compile=args.compile, held=torch.float32 if moving else args.dtype)
    optimizer = training.make_optimizer(student, args.weight_decay, betas=(0.9, 0.999))
    tensors = lambda: checkpoint.training_state(student, optimizer, teacher if moving else None)
    progress = {"step": 0, "best": [], "history": [], "worse": None}
    progress |= checkpoint.load_state(args.out, tensors) or {}
    run.begin(args, ranks)
    teacher_head = whole_head(teacher, args.dtype)
    metrics = Metrics(args.out, progress["step"], args.tracker)
    cut_samples(args.out, progress["step"] + 1, ranks)  # this step's section is of these very weights
    saver = checkpoint.Saver(args.out, args.save_every, ranks.device)
    sampler = make_sampler(args.engine, args.model, tokenizer, longest + args.max_tokens, ranks.device,
                           args.dtype, args.vllm_memory)
    run.say(f"{len(problems)} problems ({sum(dropped.values())} dropped), judged by {args.mode}, "
            f"{type(sampler).__name__}, phrases {' | '.join(phrases)}, "
            f"KL {args.kl}{f' top {args.topk}' if args.topk else ''}, from step {progress['step']}")

    save = lambda path: checkpoint.save_model(path, student, tokenizer, phrases, args.dtype)

    def check(step):
        """Accuracy before this step, and samples.md; the weights are kept if they are among the best."""
        accuracy, shown = validate(sampler, judge, tokenizer, val_problems, val_prompts, args, ranks)
        add_samples(args.out, step, shown, ranks)
        progress["best"] = checkpoint.keep_best(args.out, progress["best"], step, accuracy, save)
        low, high = wilson(accuracy, len(val_problems))  # a problem's samples count as one
        return {"val_accuracy": accuracy, "val_low": low, "val_high": high}

    first, stop, clock = progress["step"], getting_worse(progress, args), Clock()
    for step in range(first, args.steps):
        if stop:
            break
        sampler.load(training.full_tensors(student, args.dtype))
        clock.lap("sync")
        accuracy = {}
        if args.val and step % args.val_every == 0:
            accuracy = check(step)
            clock.lap("validate")

        places = range(args.batch)[ranks.rank::ranks.world]
        mine = step_problems(step, args.batch, len(problems), args.seed)[ranks.rank::ranks.world]
        seeds = [request_seed(args.seed, step, place, problems[i].id) for place, i in zip(places, mine)]
        samples, verdicts = sample_and_judge(sampler, judge, tokenizer, problems, prompts, mine, seeds, args,
                                             args.temperature)
        sampler.sleep()
        torch.distributed.barrier()  # a wait for the slowest is no time of the teacher
        clock.lap("generate")
        verdicts = [verdict.result() for verdict in verdicts]

        rows = [make_row(tokenizer, phrases, problems[i], prompts[i], y, verdict.correct, max_teacher_len)
                for i, y, verdict in zip(mine, samples, verdicts)]
        rows = [row for row in rows if row.y]  # not one without room for y
        weight = sum_over_ranks(ranks, weight=sum(row.weight * len(row.y) for row in rows))["weight"]
        clock.lap("judge")
        states = teacher_states(teacher, rows + [DUMMY], args.micro_tokens, ranks.device)
        clock.lap("teacher")
        sums = student_pass(student, rows + [DUMMY], states, teacher_head, weight or 1.0, args, ranks)
        del states  # or they stay while the next step samples
        lr, norm = args.lr * min(1.0, (step + 1) / max(1, args.warmup)), 0.0
        if weight:  # where no row has any, the step makes no update
            norm = training.optimizer_step(student, optimizer, lr, args.clip)
        clock.lap("student")
        if moving and (step + 1) % args.sync_every == 0:
            move_teacher(teacher, student)
            teacher_head = whole_head(teacher, args.dtype)

        sums |= tally(rows, samples, verdicts) | {"flops": flops_of(student, teacher, rows)}
        row = log(metrics, args, ranks, step, sums, clock, grad_norm=norm, lr=lr, updated=bool(weight),
                  **accuracy)
        if not row["sync_gap"] <= args.max_sync_gap:  # nor nan
            fail(f"step {step + 1}: the sampler's log-probabilities differ from the trainer's by "
                 f"{row['sync_gap']:.3f} nats per token (--max_sync_gap {args.max_sync_gap}): its weights "
                 "are stale, or its numerics differ")
        clock = Clock()
        progress["step"] = step + 1
        progress["history"].append([row["reward"], row["truncated"], row["entropy"]])
        stop = getting_worse(progress, args)
        stop |= saver.after_step(step + 1, tensors, progress, last=stop)
        if step == first:
            training.keep_compiled()
        clock.lap("save")  # in the next row

    saver.wait()
    if stop:
        why = f": {progress['worse']}; it goes on without --stop_when_worse" * getting_worse(progress, args)
        run.say(f"ended after {progress['step']} of {args.steps} steps{why}")
    else:
        sampler.load(training.full_tensors(student, args.dtype))
        accuracy = check(args.steps) if args.val else {}
        if args.val or args.steps % args.save_every:  # else this very state is there already
            saver.save(args.steps, tensors(), progress)  # a larger --steps goes on from here
            saver.wait()
        save(os.path.join(args.out, "final"))
        run.finish(args, ranks, {"dtype": str(args.dtype), "phrases": phrases, **progress, **accuracy})
        best = f"; validation {accuracy['val_accuracy']:.3f}, best {progress['best']}" if args.val else ""
        run.say(f"saved {args.out}/final{best}")
    metrics.close()
    close(sampler)


def main():
    args = parse_args()
    ranks = run.launch()
    with verify.make_judge(args) as judge:
        distill(args, ranks, judge)


if __name__ == "__main__":
    main()
