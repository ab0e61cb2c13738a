"""
Phase 2 of SD-Zero: on-policy self-distillation. The SRT model, told the outcome of the student's own answer, is the teacher.

  each step
    1. weights of the student -> sampler
    2. y ~ pi_student(. | x)                                      --batch prompts, one y each
    3. r = 1 if the last \\boxed{} of y is right, else 0
    4. the frozen SRT model reads x, y, "\\n\\n" + P_r + "\\n\\n", y: its hidden states at the second copy of y
    5. loss = mean over all tokens of all y of KL( pi_student(. | x, y_<t) || pi_SRT(. | x, y, P_r, y_<t) ), over the
       whole vocabulary; backward; clip; AdamW

Departures from the official code: the KL is exact and reverse; the first copy of y has no end-of-turn (as in phase 1) and
the second has, so that ending is distilled too; every step compares the sampler's log-probabilities with the trainer's
and the run stops when they part (--max_sync_gap): stale weights would train on the wrong policy without a sign.

    python distill.py --model runs/srt/final --data problems.jsonl --range 10000:19000 --out runs/sdzero
    torchrun --nproc_per_node 8 distill.py ... the same
"""
import argparse
import gc
import json
import os
import random
import shutil
import time
from typing import NamedTuple

import torch
import torch.distributed as dist

import sft
import srt
import verify
from kl import KINDS, chunked_kl
from verify import fail, natural, positive, share, within

# flags that a run that goes on may change: none of them changes the objective or what a step is made of
FREE = ("steps lr warmup weight_decay clip val_every save_every max_sync_gap micro_tokens dtype attn checkpointing compile "
        "engine vllm_memory judge_seconds unsafe_no_sandbox")


class Row(NamedTuple):
    """One y as both sides read it. The token y_t is predicted at position len(before) - 1 + t of before + y."""
    x: list  # what the student reads before y
    seen: list  # what the teacher reads before y: x, y without its end-of-turn, P_r
    y: list  # ids as sampled, end-of-turn included
    logprobs: list  # the sampler's


def make_row(tokenizer, family, x, sample, correct, max_teacher_len):
    """
    The Row of one sample. Where x, y, P_r, y is longer than max_teacher_len, both copies of y are cut to
    (max_teacher_len - |x| - |P_r|) / 2 tokens; where not even one fits, y is empty and the row has no weight.
    """
    room = (max_teacher_len - len(x) - len(verify.control_ids(tokenizer, correct, family))) // 2
    y = sample.ids[:max(0, room)]
    return Row(x, verify.revision_ids(tokenizer, x, y, correct, family), y, sample.logprobs[:len(y)])


def micro_batches(rows, side, budget, device):
    """
    Packs `before + y` of all rows, before = row.x or row.seen. A list of (numbers of the rows, Batch, positions that predict
    their y), all on the device, as long on every rank; an empty share is a dummy of two tokens, one selected, with weight 0.
    """
    full, packed = [getattr(row, side) + row.y for row in rows], []
    for members in sft.pack(list(map(len, full)), budget, device):
        select, offset = [], 0
        for i in members:
            first = offset + len(full[i]) - len(rows[i].y) - 1
            select.extend(range(first, first + len(rows[i].y)))
            offset += len(full[i])
        packed.append((members, sft.make_batch([full[i] for i in members] or [[0, 0]], device),
                       torch.tensor(select or [0]).to(device)))
    return packed


def teacher_states(teacher, rows, budget, device):
    """The teacher's hidden states that predict the second copy of y: a list of [len(y), H], one per row."""
    states = [None] * len(rows)
    with torch.no_grad():
        for members, batch, select in micro_batches(rows, "seen", budget, device):
            hidden = teacher(batch, select, lambda hidden, head: hidden)  # [n, H]
            for i, part in zip(members, hidden.split([len(rows[i].y) for i in members]) if members else ()):
                states[i] = part
    return states


def student_pass(student, rows, states, teacher_head, tokens, args, ranks):
    """
    Forward, exact KL, backward over this rank's rows. tokens: number of y tokens in the global batch. Gradients add up in
    the student. Returns this rank's share of the loss, and its sum of |log pi_sampler(y_t) - log pi_trainer(y_t)|.
    """
    loss_sum, gap_sum = torch.zeros(2, device=ranks.device)
    logprobs = torch.tensor([p for row in rows for p in row.logprobs]).to(ranks.device).split([len(row.y) for row in rows])
    for members, batch, select in micro_batches(rows, "x", args.micro_tokens, ranks.device):
        # from here to the next micro-batch the host waits for nothing
        states_y = torch.cat([states[i] for i in members] or [torch.zeros_like(teacher_head[:1])])  # [n, H]
        sampled = torch.cat([logprobs[i] for i in members] or [torch.zeros(1, device=ranks.device)])  # [n]
        # FSDP averages gradients over ranks; times world makes that a sum over the global batch
        weight = torch.full_like(sampled, ranks.world / tokens if members else 0.0)
        loss, _, logp = student(batch, select, lambda hidden, head: chunked_kl(
            hidden, head, states_y, teacher_head, weight, args.kl, args.topk, targets=batch.ids[select + 1]))
        loss.backward()
        loss_sum += loss.detach() / ranks.world
        gap_sum += (logp - sampled).abs().sum() * bool(members)
    return loss_sum, gap_sum


def sample_and_judge(sampler, judge, tokenizer, problems, prompts, seeds, args):
    """One y per problem, and its verdict; judging goes on while others are still being sampled."""
    samples, verdicts = [None] * len(prompts), [None] * len(prompts)
    for sample in sampler.stream(srt.hand_out(prompts, seeds), max_tokens=args.max_tokens, temperature=args.temperature,
                                 top_p=args.top_p):
        i = sample.request.key
        samples[i] = sample
        verdicts[i] = judge.submit(problems[i], tokenizer.decode(sample.ids, skip_special_tokens=True))
    return samples, verdicts


def validate(sampler, judge, tokenizer, problems, prompts, args, ranks):
    """avg@k over the validation problems (k = --val_samples), all ranks sharing the work."""
    mine = [(i, k) for i in range(len(problems)) for k in range(args.val_samples)][ranks.rank::ranks.world]
    seeds = [srt.request_seed(args.seed, "val", problems[i].id, k) for i, k in mine]
    _, verdicts = sample_and_judge(sampler, judge, tokenizer, [problems[i] for i, _ in mine],
                                   [prompts[i] for i, _ in mine], seeds, args)
    right = torch.tensor([float(sum(v.result().correct for v in verdicts)), len(mine)], device=ranks.device)
    dist.all_reduce(right)
    return (right[0] / right[1]).item()


def keep_best(out, best, step, accuracy, save, keep=3):
    """Saves out/best/step-N if it is among the `keep` best validations; best: [[accuracy, step]], best first."""
    name = "step-{:06d}".format
    there = [b for b in best if os.path.isdir(os.path.join(out, "best", name(b[1])))]  # a killed run may have gone further
    ranked = sorted(there + [[accuracy, step]], key=lambda b: (-b[0], b[1]))[:keep]
    if [accuracy, step] in ranked:
        save(os.path.join(out, "best", name(step)))
    if dist.get_rank() == 0:
        for folder in set(os.listdir(os.path.join(out, "best"))) - {name(kept) for _, kept in ranked}:
            shutil.rmtree(os.path.join(out, "best", folder))  # also what a killed run has left
    return ranked


class Clock:
    """Seconds of each part of a step; waits for the GPU at the end of a part, not within."""

    def __init__(self):
        self.seconds, self.last = {}, time.time()

    def lap(self, name):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.time()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
        self.last = now


def step_problems(step, batch, total, seed):
    """Numbers of the problems of a step: epochs of fresh permutations, one after another."""
    numbers, orders = [], {}
    for at in range(step * batch, (step + 1) * batch):
        epoch, place = divmod(at, total)
        if epoch not in orders:
            orders[epoch] = list(range(total))
            random.Random(f"{seed}/{epoch}").shuffle(orders[epoch])
        numbers.append(orders[epoch][place])
    return numbers


def parse_args():
    parser = argparse.ArgumentParser(description="On-policy self-distillation (phase 2).")
    parser.add_argument("--model", required=True, help="the SRT model: where the student starts")
    parser.add_argument("--data", required=True, help=".jsonl, .json, .parquet or hub name[:config][@split]")
    parser.add_argument("--out", required=True, help="folder: final/, best/, state/, metrics.jsonl")
    parser.add_argument("--teacher", help="default: --model")
    parser.add_argument("--mode", default="math", help=verify.MODE_HELP)
    parser.add_argument("--range", dest="range_", metavar="A:B", help="rows of the data; others than those of srt.py")
    # optimisation
    parser.add_argument("--steps", type=natural, default=400)
    parser.add_argument("--batch", type=natural, default=128, help="prompts of a step, over all ranks; one y each")
    parser.add_argument("--lr", type=positive, default=5e-6)
    parser.add_argument("--warmup", type=within(int, 0), default=20, help="steps of linear warmup; constant after")
    parser.add_argument("--weight_decay", type=within(float, 0), default=0.01)
    parser.add_argument("--clip", type=positive, default=1.0, help="largest gradient norm")
    parser.add_argument("--kl", choices=KINDS, default="reverse")
    parser.add_argument("--topk", type=within(int, 0), default=0, help="renormalise over the teacher's k largest logits; 0: exact")
    parser.add_argument("--sync_every", type=within(int, 0), default=0, help="set the teacher to the student so often; 0: frozen")
    # sampling
    parser.add_argument("--max_tokens", type=natural, default=8192, help="per response")
    parser.add_argument("--max_teacher_len", type=natural, default=32768, help="of x, y, P_r, y, at most what the teacher takes; both y "
                        "are cut to fit")
    parser.add_argument("--temperature", type=positive, default=1.0)
    parser.add_argument("--top_p", type=share, default=1.0)
    parser.add_argument("--engine", type=srt.engine_name, choices=("vllm", "hf"), help="default: vllm where it is installed")
    parser.add_argument("--vllm_memory", type=share, default=0.3, help="share of the GPU's memory for vLLM")
    parser.add_argument("--judge_seconds", type=positive, default=5.0, help="limit of one verdict; for code, of one test")
    parser.add_argument("--unsafe_no_sandbox", action="store_true", help=verify.UNSAFE)
    parser.add_argument("--max_sync_gap", type=positive, default=0.1, help="stop where sampler and trainer differ by more, in "
                        "nats per token; healthy is 0.01-0.02 in bf16, stale weights give about 0.2")
    # validation and saving
    parser.add_argument("--val", help="validation problems, as --data")
    parser.add_argument("--val_every", type=natural, default=20)
    parser.add_argument("--val_samples", type=natural, default=8, help="responses per validation problem")
    parser.add_argument("--save_every", type=natural, default=10, help="steps between states to go on from")
    sft.add_training_flags(parser)
    args = verify.parse(parser)
    if args.topk and args.kl == "jsd":
        parser.error("--topk cannot go with --kl jsd; use --topk 0, or another --kl")
    args.teacher = args.teacher or args.model
    return args


def main():
    args = parse_args()
    ranks = verify.launch()
    tokenizer = verify.load_tokenizer(args.model)
    verify.same_vocabulary(args.model, tokenizer, args.teacher, verify.load_tokenizer(args.teacher))
    family = verify.phrases_of(args.teacher, args.phrases)
    judge = verify.Judge(args.mode, limit=args.judge_seconds, sandbox=not args.unsafe_no_sandbox)
    problems, dropped = verify.load_problems(args.data, judge, args.range_)
    prompts = [verify.chat_ids(tokenizer, problem) for problem in problems]
    val_problems = verify.load_problems(args.val, judge)[0] if args.val else []
    val_prompts = [verify.chat_ids(tokenizer, problem) for problem in val_problems]
    if args.batch > len(problems):
        fail(f"--batch {args.batch}: --data gives {len(problems)} problems, and a step takes different ones; lower it")
    longest = srt.check_lengths(args.model, prompts + val_prompts, args.max_tokens)
    srt.check_lengths(args.teacher, prompts, args.max_tokens)
    max_teacher_len = min(args.max_teacher_len, verify.context_length(args.teacher))
    verify.open_out(args, ranks, FREE)
    if verify.finished(args.out, "final", steps=args.steps):
        judge.close()
        return dist.destroy_process_group()
    sft.resolve_defaults(args, ranks.device)

    mesh = sft.make_mesh(ranks)
    student = sft.load_model(args.model, ranks, mesh, args.dtype, args.attn, checkpointing=args.checkpointing,
                             compile=args.compile)
    teacher = sft.load_model(args.teacher, ranks, mesh, args.dtype, args.attn, trainable=False, compile=args.compile)
    if student.config.vocab_size != teacher.config.vocab_size:
        fail(f"--teacher {args.teacher} has {teacher.config.vocab_size} vocabulary entries, --model {args.model} has "
             f"{student.config.vocab_size}: the KL needs one vocabulary")
    optimizer = sft.make_optimizer(student, args.weight_decay, betas=(0.9, 0.999))
    synchronised = teacher if args.sync_every else None
    tensors = lambda: sft.training_state(student, optimizer, synchronised)
    progress = sft.load_state(args.out, tensors) or {"step": 0, "best": []}
    if progress["step"] > args.steps:
        fail(f"--steps {args.steps}: the run in {args.out} has made {progress['step']}; give at least as many, or --fresh")
    teacher_head = teacher.get_output_embeddings().weight.full_tensor()  # [V, H]
    metrics = sft.Metrics(args.out, progress["step"])
    sampler = srt.make_sampler(args.engine, args.model, tokenizer, longest + args.max_tokens, ranks.device, args.dtype,
                               args.vllm_memory)
    if ranks.rank == 0:
        print(f"{len(problems)} problems ({sum(dropped.values())} dropped), {type(sampler).__name__}, phrases {' | '.join(family)}, "
              f"KL {args.kl}{f' top {args.topk}' if args.topk else ''}, from step {progress['step']}", flush=True)

    saver = sft.Saver(args.out, args.save_every, ranks.device)

    def save(path):
        sft.save_model(path, student, tokenizer, family, args.dtype)

    stop, first = False, progress["step"]
    for step in range(first, args.steps + 1):
        clock = Clock()
        sampler.load(sft.full_tensors(student, args.dtype))
        clock.lap("sync")
        row = {"step": step}
        if args.val and (step % args.val_every == 0 or step == args.steps):
            row["val_accuracy"] = validate(sampler, judge, tokenizer, val_problems, val_prompts, args, ranks)
            progress["best"] = keep_best(args.out, progress["best"], step, row["val_accuracy"], save)
            clock.lap("validate")
        if step == args.steps:  # the weights of the last step are validated too
            break

        numbers = step_problems(step, args.batch, len(problems), args.seed)
        mine = list(enumerate(numbers))[ranks.rank::ranks.world]
        samples, verdicts = sample_and_judge(
            sampler, judge, tokenizer, [problems[i] for _, i in mine], [prompts[i] for _, i in mine],
            [srt.request_seed(args.seed, step, place, problems[i].id) for place, i in mine], args)
        sampler.sleep()
        clock.lap("generate")
        verdicts = [verdict.result() for verdict in verdicts]
        correct = [verdict.correct for verdict in verdicts]
        clock.lap("judge")

        rows = [make_row(tokenizer, family, prompts[i], sample, ok, max_teacher_len)
                for (_, i), sample, ok in zip(mine, samples, correct)]
        rows = [r for r in rows if r.y]  # one without room for y has no weight
        counts = torch.tensor([sum(len(r.y) for r in rows), sum(correct), sum(len(s.ids) for s in samples),
                               sum(s.truncated for s in samples), sum(v.reason in ("timeout", "crash") for v in verdicts)],
                              dtype=torch.float64, device=ranks.device)
        dist.all_reduce(counts)
        tokens = int(counts[0])  # of the global batch, counted after sampling
        if not tokens:
            fail(f"step {step}: no prompt leaves room for a response in --max_teacher_len {max_teacher_len}")
        states = teacher_states(teacher, rows, args.micro_tokens, ranks.device)
        clock.lap("teacher")
        sums = torch.stack(student_pass(student, rows, states, teacher_head, tokens, args, ranks))
        lr = args.lr * min(1.0, (step + 1) / max(1, args.warmup))
        norm = sft.optimizer_step(student, optimizer, lr, args.clip)
        clock.lap("student")
        dist.all_reduce(sums)
        if args.sync_every and (step + 1) % args.sync_every == 0:
            teacher_head = copy_weights(student, teacher)

        flops = torch.tensor(float(
            sft.forward_flops(teacher.config, [len(r.seen) + len(r.y) for r in rows], 0)
            + 3 * sft.forward_flops(student.config, [len(r.x) + len(r.y) for r in rows], 0)
            + 8 * sum(len(r.y) for r in rows) * teacher_head.numel()), device=ranks.device)  # four products with a head
        dist.all_reduce(flops)
        seconds = sum(clock.seconds.values())
        training = clock.seconds["teacher"] + clock.seconds["student"]
        row |= {"loss": sums[0].item(), "reward": counts[1].item() / args.batch, "response_len": counts[2].item() / args.batch,
                "truncated": counts[3].item() / args.batch, "judge_failed": counts[4].item() / args.batch,
                "sync_gap": sums[1].item() / tokens, "grad_norm": norm, "lr": lr,
                "tokens": tokens, "seconds": seconds, **{f"seconds_{k}": v for k, v in clock.seconds.items()},
                "mfu": sft.mfu(flops.item(), training, ranks.world)}
        metrics.report(
            f"step {step + 1}/{args.steps}  KL {row['loss']:.4f}  reward {row['reward']:.3f}  length "
            f"{row['response_len']:.1f}  gap {row['sync_gap']:.4f}"
            + (f"  val {row['val_accuracy']:.3f}" if "val_accuracy" in row else "")
            + "  (" + " ".join(f"{k} {v:.1f} s" for k, v in clock.seconds.items()) + ")", row)
        if row["sync_gap"] > args.max_sync_gap:
            fail(f"step {step}: the sampler's log-probabilities differ from the trainer's by {row['sync_gap']:.3f} nats per "
                 f"token (--max_sync_gap {args.max_sync_gap}): its weights are stale, or its numerics differ")
        progress["step"] = step + 1
        stop = saver.after_step(step + 1, tensors, progress, last=step + 1 == args.steps)
        if stop:
            break
        if step == first:  # what torch.compile has made stays: vLLM, which collects garbage before it sleeps, need not look there
            gc.collect()
            gc.freeze()

    saver.wait()
    if not stop:
        save(os.path.join(args.out, "final"))
    if ranks.rank == 0 and not stop:
        verify.write_atomically(os.path.join(args.out, "summary.json"), json.dumps(
            {**vars(args), "dtype": str(args.dtype), "phrases": family, **progress, "val_accuracy": row.get("val_accuracy")},
            indent=1))
        print(f"saved {args.out}/final" + (f"; validation {row['val_accuracy']:.3f}, best {progress['best']}" if args.val else ""))
    srt.close(judge, sampler)


def copy_weights(student, teacher):
    """Sets the teacher to the student (iterative self-evolution). Returns its head, whole [V, H]."""
    with torch.no_grad():
        for mine, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
            mine.copy_(theirs)
    return teacher.get_output_embeddings().weight.full_tensor()


if __name__ == "__main__":
    main()
