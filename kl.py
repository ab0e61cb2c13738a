"""
Exact KL over the whole vocabulary, in chunks of tokens, without ever holding a [tokens, vocab] tensor.

A 4B model has 151,936 vocabulary entries: the fp32 logits of 8,192 tokens alone are 4.6 GiB, and autograd
would keep several such tensors for each side. Here the loss *and its gradient* are computed in one pass:

  for each chunk of n tokens                                                     (4B: n = 2048)
    for each tile of b of them                                                   (b = 512)
      1. s = h_student W_student^T,  t = h_teacher W_teacher^T  logits in fp32   [b, V]
      2. KL(s, t) and dKL/ds in closed form                     softmax algebra  [b], [b, V]
    3. dh = (dKL/ds) W_student,  dW += (dKL/ds)^T h_student     in fp32          [n, H], [V, H]

so the cost is four matrix products per token, and the memory that of dW, one tile of logits and one chunk of
dKL/ds, which has the type of h_student. Autograd's backward pass only multiplies the stored gradients by the
incoming scalar. dW is accumulated in fp32: rounding it to bf16 after each chunk would bias training.

Departures from the official code: the KL is exact over the vocabulary, not renormalised over the teacher's
top 64 (`topk=64`, to compare with), and the default is the paper's reverse KL, not a mixture.

As a script it says whether the teacher corrects or only copies, and draws where it disagrees:
    python kl.py --student runs/srt/final --teacher runs/srt/final \\
        --responses runs/collect/responses.jsonl --out runs/kl
"""
import argparse
import functools
import json
import math
import os
import runpy
from typing import NamedTuple

import torch
from tqdm import tqdm

import verify
from common.run import fail, launch, make_out, natural, need, read_jsonl, write_atomically
from common.training import check_ids, load_weights

KINDS = ("reverse", "forward", "mixed", "jsd")
COPIED = math.log(0.99)  # over this the teacher, who has read the token, expects it


def divergence(log_p, log_q, kind, targets=None):
    """
    The divergence of each row of log-probabilities, student p, teacher q, and its gradient in p's logits:

        reverse  KL(p || q) = sum_v p (log p - log q)        p (log p - log q - KL)    the paper's loss
        forward  KL(q || p) = sum_v q (log q - log p)        p - q
        mixed    half of each                                half of each
        jsd      KL(p || m)/2 + KL(q || m)/2, m = (p+q)/2    p (log p - log m - KL(p || m)) / 2

    log_p, log_q: fp32 [n, V]; targets: the sampled tokens [n], for a loss that looks at them. Returns
    ([n], [n, V]) in fp32, in nats; a row with p = q gives exact zeros. To try another, add its lines here.
    """
    p, d = log_p.exp(), log_p - log_q
    reverse = (p * d).sum(-1)
    if kind == "reverse":
        return reverse, p * (d - reverse[:, None])
    q = log_q.exp()
    if kind == "forward":
        return -(q * d).sum(-1), p - q
    if kind == "jsd":  # log m - log p = f(-d), log m - log q = f(d), f(x) = log((1 + e^x)/2) = x^+ + tail
        tail = torch.log1p(torch.expm1(-d.abs()) / 2)  # 0 at d = 0, and nothing overflows at |d| = 1e4
        p_to_m = -(tail + (-d).clamp(min=0))
        kl_pm = (p * p_to_m).sum(-1)
        return (kl_pm - (q * (tail + d.clamp(min=0))).sum(-1)) / 2, p * (p_to_m - kl_pm[:, None]) / 2
    if kind == "mixed":
        return (reverse - (q * d).sum(-1)) / 2, (p * (d - reverse[:, None]) + p - q) / 2
    raise ValueError(f"no divergence here is called {kind!r}")


def topk_divergence(log_p, log_q, kind, k):
    """The official code's approximation: both renormalised over the teacher's k likeliest tokens."""
    index = log_q.topk(k, dim=-1).indices  # [n, k]
    few_p, few_q = (log.gather(1, index).log_softmax(-1) for log in (log_p, log_q))
    value, grad = divergence(few_p, few_q, kind)
    return value, torch.zeros_like(log_p).scatter_(1, index, grad)


def kl_tile(s, t, weight, targets, kind, topk, d_s):
    """
    All that is done to a tile of logits: writes weight * dKL/ds to d_s [n, V]. Returns [4, n]: KL,
    log p(target) of the student and of the teacher, and the student's entropy.
    """
    log_p, log_q = s.log_softmax(-1), t.log_softmax(-1)
    if topk:
        value, grad = topk_divergence(log_p, log_q, kind, topk)
    else:
        value, grad = divergence(log_p, log_q, kind, targets)
    d_s.copy_(grad * weight[:, None])
    logp, teacher_logp = (log.gather(1, targets[:, None])[:, 0] for log in (log_p, log_q))
    return torch.stack([value, logp, teacher_logp, -(log_p.exp() * log_p).sum(-1)])


def ce_tile(s, weight, targets, d_s):
    """The same for cross entropy: weight * (p - onehot(target)) to d_s. Returns [1, n]: -log p(target)."""
    log_p = s.log_softmax(-1)
    hit = torch.arange(s.shape[1], device=s.device) == targets[:, None]
    d_s.copy_((log_p.exp() - hit.float()) * weight[:, None])
    return -log_p.gather(1, targets[:, None]).T


@functools.cache
def compiled(tile):
    """torch.compile makes one pass of a tile's many; the vocabulary is a fixed size to it, rows are not."""
    return torch.compile(tile)


def matmul_fp32(a, b, total=None):
    """a @ b in fp32, or total += a @ b, not rounded before the sum. Tensor cores take bf16 as it is."""
    if not a.is_cuda or a.dtype == torch.float32:
        a, b = a.float(), b.float()
        return a @ b if total is None else total.addmm_(a, b)
    if total is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


class HeadLoss(torch.autograd.Function):
    """
    sum_i w_i * loss_i of losses that see one row of logits each; gradients are made on the way.
    tile(logits [b, V], rows, d [b, V]) of a slice of rows writes w * dloss/dlogits to d and returns [k, b]:
    the losses, and what else is wanted.
    """

    @staticmethod
    def forward(ctx, hidden, weight, token_weight, chunk, block, tile):
        N, V = hidden.shape[0], weight.shape[0]
        needs_grad = hidden.requires_grad or weight.requires_grad
        d_hidden = torch.zeros_like(hidden) if needs_grad else None  # [N, H]
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_grad else None  # [V, H]
        seen = []  # [k, n] of each tile, its first row the loss
        d_logits = hidden.new_empty(min(chunk, N), V)
        for i in range(0, N, chunk):
            d_s = d_logits[:N - i]
            for j in range(0, len(d_s), block):
                d_tile = d_s[j:j + block]
                rows = slice(i + j, i + j + len(d_tile))
                seen.append(tile(matmul_fp32(hidden[rows], weight.T), rows, d_tile))
            if needs_grad:
                rows = slice(i, i + chunk)
                d_hidden[rows] = matmul_fp32(d_s, weight)
                matmul_fp32(d_s.T, hidden[rows], total=d_weight)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype = weight.dtype
        seen = torch.cat(seen, dim=1)  # [k, N]
        ctx.mark_non_differentiable(seen)
        return (seen[0] * token_weight).sum(), seen

    @staticmethod
    def backward(ctx, grad, _):
        d_hidden, d_weight = ctx.saved_tensors
        d_weight = torch.mul(d_weight, grad, out=torch.empty_like(d_weight, dtype=ctx.weight_dtype))
        return d_hidden * grad.to(d_hidden.dtype), d_weight, None, None, None, None


def head_loss(hidden, weight, token_weight, chunk, compile, tile):
    """HeadLoss with its sizes chosen: 80 M logits a tile, half in eager mode, which keeps several copies."""
    block = max(256, 80_000_000 // weight.shape[0] // 256 * 256)  # matrix products like multiples of 256
    chunk = chunk or 4 * block
    block = block if compile else block // 2
    return HeadLoss.apply(hidden, weight, token_weight, chunk, min(chunk, block), tile)


class KL(NamedTuple):
    loss: torch.Tensor  # a scalar, with gradients for student_hidden and student_weight
    kl: torch.Tensor  # nats; this and what follows fp32 [N], detached
    logp: torch.Tensor  # the student's log p(target)
    teacher_logp: torch.Tensor  # the teacher's
    entropy: torch.Tensor  # the student's, nats


def chunked_kl(student_hidden, student_weight, teacher_hidden, teacher_weight, token_weight, targets,
               kind="reverse", topk=0, chunk=0, compile=False):
    """
    sum_i token_weight_i * KL_i of student and teacher (equation 3 of the paper). But for memory it equals

        log_p = (student_hidden.float() @ student_weight.float().T).log_softmax(-1)            # [N, V]
        log_q = (teacher_hidden.float() @ teacher_weight.float().T).log_softmax(-1).detach()   # [N, V]
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)                                # [N], kind "reverse"
        loss = (token_weight * kl).sum()
        logp, teacher_logp = (log.gather(1, targets[:, None])[:, 0] for log in (log_p, log_q))
        entropy = -(log_p.exp() * log_p).sum(-1)
        return KL(loss, kl.detach(), logp.detach(), teacher_logp, entropy.detach())

    student_hidden, teacher_hidden: last hidden states [N, H], [N, H'] (any float type).
    student_weight, teacher_weight: the heads [V, H], [V, H']. token_weight: fp32 [N]; 0 leaves a row out.
    targets: the sampled tokens [N]. kind: see `divergence`. topk: 0 is exact; k > 0 renormalises over the
    teacher's k largest logits. chunk: rows at a time, 0 = chosen. compile: the elementwise part.
    Raises ValueError for an unknown kind, a topk beyond V, heads of different V.
    """
    if student_weight.shape[0] != teacher_weight.shape[0]:
        raise ValueError(f"vocabulary rows: student {len(student_weight)}, teacher {len(teacher_weight)}")
    if topk > teacher_weight.shape[0] or topk < 0:
        raise ValueError(f"topk must lie in 0..{teacher_weight.shape[0]}, got {topk}")
    run = compiled(kl_tile) if compile else kl_tile

    def tile(s, rows, d_s):
        t = matmul_fp32(teacher_hidden[rows], teacher_weight.T)
        return run(s, t, token_weight[rows], targets[rows], kind, topk, d_s)

    loss, seen = head_loss(student_hidden, student_weight, token_weight, chunk, compile, tile)
    return KL(loss, *seen)


def chunked_ce(hidden, weight, targets, token_weight, chunk=0, compile=False):
    """sum_i token_weight_i * -log p(target_i), the SFT loss, by the same pass. Returns (loss, [N])."""
    run = compiled(ce_tile) if compile else ce_tile

    def tile(s, rows, d_s):
        return run(s, token_weight[rows], targets[rows], d_s)

    loss, (each,) = head_loss(hidden, weight, token_weight, chunk, compile, tile)
    return loss, each


# --------------------------------------------------------------------------------------------- as a script

def buckets(values, n=20):
    """Shares of the total in n equal slices of the tokens, sorted from largest to smallest: a list of n."""
    parts = values.double().clamp(min=0).sort(descending=True).values.repeat_interleave(n)  # n of each token
    return (parts.view(n, -1).sum(1) / parts.sum().clamp(min=1e-12)).tolist()


def read_responses(path, most, vocabulary):
    """The y_init rows of a responses.jsonl, at most `most`, half of them right where there are as many."""
    kinds = {True: {}, False: {}}
    for line, row in read_jsonl(path):
        if row.get("kind", "init") == "init":
            need(row, path, line, id=str, sample=int, problem=str, y_init_tokens=list, y_init_correct=bool)
            check_ids(row["y_init_tokens"], vocabulary, f"{path}:{line}")
            kinds[row["y_init_correct"]].setdefault((row["id"], row["sample"]), row)
    right, wrong = ([row for row in kinds[ok].values() if row["y_init_tokens"]] for ok in (True, False))
    rows = (right[:max(most - len(wrong), most // 2)] + wrong)[:most]
    return rows or fail(f"--responses {path} holds no responses; srt.py writes such a file")


def load(model, device):
    """A model whole on one device, to read with: bf16 on a GPU, fp32 on a CPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return load_weights(model, dtype=dtype).to(device).eval().requires_grad_(False)


def read(model, before, y):
    """The hidden states [T, H] that predict the ids y [T] after `before`, and the head [V, H]."""
    hidden = model.get_decoder()(torch.tensor([before + y], device=model.device)).last_hidden_state
    return hidden[0, len(before) - 1:-1], model.get_output_embeddings().weight


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description="Does the teacher correct or copy? Where does it disagree?")
    add = parser.add_argument
    add("--student", required=True, help="folder of the model that generates")
    add("--teacher", required=True, help="folder of the model that revises (SRT)")
    add("--responses", required=True, help="responses.jsonl of srt.py; its y_init are scored")
    add("--out", required=True, help="folder for heatmap.html, buckets.png and summary.json")
    add("--kl", choices=KINDS, default="reverse")
    add("--max_responses", type=natural, default=200, help="half of them right, if there are as many")
    add("--phrases", type=verify.phrases_flag, help=verify.PHRASES_HELP)
    args, ranks = parser.parse_args(), launch()
    if ranks.rank:  # one is enough
        return torch.distributed.destroy_process_group()
    make_out(args.out)  # not after all is scored
    if os.path.exists(os.path.join(args.out, "flags.json")):
        fail(f"--out {args.out} is the folder of a run, whose summary.json would go; give another")
    tokenizer = verify.load_tokenizer(args.teacher)
    verify.same_vocabulary(args.student, verify.load_tokenizer(args.student), args.teacher, tokenizer)
    phrases = verify.phrases_of(args.teacher, args.phrases)
    rows = read_responses(args.responses, args.max_responses, tokenizer.vocabulary)
    student, teacher = (load(model, ranks.device) for model in (args.student, args.teacher))

    def likely(hidden, head):  # at each row of hidden the five likeliest tokens: [[(id, probability)]]
        top = [matmul_fp32(rows, head.T).softmax(-1).topk(5) for rows in hidden.split(256)]
        return [list(zip(*row)) for p, ids in top for row in zip(ids.tolist(), p.tolist())]

    columns = ("kl", "logp_student", "logp_teacher", "copied", "contrast", "abs_contrast")
    summary, found, shown = {"kl": args.kl, "phrases": phrases}, {True: [], False: []}, []
    cut, context = 0, min(map(verify.context_length, (args.student, args.teacher)))
    for row in tqdm(rows, desc="score", unit="response"):
        problem, whole, correct = verify.Problem.of_row(row), row["y_init_tokens"], row["y_init_correct"]
        x = verify.chat_ids(tokenizer, problem)
        y = min((verify.fitting(tokenizer, problem, x, whole, told, phrases, context)
                 for told in (False, True)), key=len)  # it fits, whatever is told
        cut += y != whole
        if not y:
            continue
        row["y_init_tokens"], targets = y, torch.tensor(y, device=ranks.device)
        seen = [verify.teacher_reads(tokenizer, problem, x, y, told, phrases) for told in (False, True)]
        p, q = read(student, x, y), [read(teacher, before, y) for before in seen]
        after = [chunked_kl(*p, *side, torch.ones_like(targets), targets, args.kl) for side in q]
        true, contrast = after[correct], after[False].teacher_logp - after[True].teacher_logp
        values = torch.stack([true.kl, true.logp, true.teacher_logp, (true.teacher_logp > COPIED).float(),
                              contrast, contrast.abs()])
        found[correct].append([*values.mean(1).tolist(), buckets(true.kl), buckets(contrast.abs())])
        if len(found[correct]) <= 10:
            shown.append((row, *values[:3].tolist(), likely(*p), likely(*q[correct])))

    any(found.values()) or fail(f"--responses {args.responses}: no y has room in {context} tokens")
    if cut:
        print(f"{cut} of {len(rows)} y_init were cut: x, y, P_r, y takes at most {context} tokens here")
    print("y_init  " + " ".join(f"{name:>13s}" for name in ("responses", *columns)))
    for name, each in zip(("right", "wrong"), found.values()):  # means over responses of means over tokens
        means = [len(each)] + [torch.tensor(values).mean(0).tolist() for values in zip(*each)]
        summary[name] = dict(zip(("responses", *columns, "kl_by_bucket", "contrast_by_bucket"), means))
        print(f"{name:8s}" + " ".join(f"{value:13.5g}" for value in means[:7]))
    print("copied: share of tokens to which the teacher, having read y, gives over .99. contrast: log p(y_t)"
          "\ntold wrong minus told right; small beside logp_teacher - logp_student, the teacher only copies.")

    write_atomically(os.path.join(args.out, "summary.json"), json.dumps(summary, indent=1))
    page = os.path.join(os.path.dirname(os.path.abspath(__file__)), "tests", "page.py")
    if os.path.exists(page):
        print(runpy.run_path(page)["write"](args.out, summary, shown, tokenizer))
    else:
        print(f"{args.out}/heatmap.html was not written: {page} is not there")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
