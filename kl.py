"""
Exact KL over the whole vocabulary, in chunks of tokens, without ever holding a [tokens, vocab] tensor.

A 4B model has 151,936 vocabulary entries: the fp32 logits of 8,192 tokens alone are 4.6 GiB, and autograd would keep
several such tensors for the student and the teacher. Here the loss *and its gradient* are computed in one pass:

  for each chunk of n tokens                                                     (4B: n = 2048)
    for each tile of b of them                                                   (b = 512)
      1. s = h_student W_student^T,  t = h_teacher W_teacher^T  logits in fp32   [b, V]
      2. KL(s, t) and dKL/ds in closed form                     softmax algebra  [b], [b, V]
    3. dh = (dKL/ds) W_student,  dW += (dKL/ds)^T h_student     in fp32          [n, H], [V, H]

so the cost is four matrix products per token and the memory is that of dW, one tile of logits and one chunk of dKL/ds,
which is held in the type of h_student. The backward pass of autograd only multiplies the stored gradients by the incoming
scalar. dW is accumulated in fp32 over the chunks: rounding it to bf16 after each of them would bias training.

Departures from the official code: the KL is exact over the vocabulary, not renormalised over the teacher's top 64
(that approximation is `topk=64`, to compare with), and the default is the paper's reverse KL, not a mixture.

As a script it draws where the reviser disagrees with the student:
    python kl.py --student runs/srt/final --teacher runs/srt/final --responses runs/collect/responses.jsonl --out runs/kl
"""
import argparse
import functools
import html
import json
import os

import torch

KINDS = ("reverse", "forward", "mixed", "jsd")


def divergence(log_p, log_q, kind):
    """
    The divergence of each row of log-probabilities and its gradient in the student's logits; p student, q teacher:

        reverse  KL(p || q) = sum_v p (log p - log q)        gradient  p (log p - log q - KL)    the paper's loss
        forward  KL(q || p) = sum_v q (log q - log p)        gradient  p - q
        mixed    half of each                                gradient  half of each
        jsd      KL(p || m)/2 + KL(q || m)/2, m = (p+q)/2    gradient  p (log p - log m - KL(p || m)) / 2

    log_p, log_q: fp32 [n, V]. Returns ([n], [n, V]) in fp32, in nats. A row with p = q gives exactly 0 and a gradient of
    exactly 0. To try another divergence, add its lines here.
    """
    p, d = log_p.exp(), log_p - log_q
    reverse = (p * d).sum(-1)
    if kind == "reverse":
        return reverse, p * (d - reverse[:, None])
    q = log_q.exp()
    if kind == "forward":
        return -(q * d).sum(-1), p - q
    if kind == "jsd":  # log m - log p = f(-d), log m - log q = f(d), with f(x) = log((1 + e^x) / 2) = max(x, 0) + tail
        tail = torch.log1p(torch.expm1(-d.abs()) / 2)  # 0 at d = 0, and nothing overflows at |d| = 1e4
        p_to_m = -(tail + (-d).clamp(min=0))
        kl_pm = (p * p_to_m).sum(-1)
        return (kl_pm - (q * (tail + d.clamp(min=0))).sum(-1)) / 2, p * (p_to_m - kl_pm[:, None]) / 2
    return (reverse - (q * d).sum(-1)) / 2, (p * (d - reverse[:, None]) + p - q) / 2  # mixed


def topk_divergence(log_p, log_q, kind, k):
    """The official code's approximation: both sides renormalised over the teacher's k likeliest tokens, the rest ignored."""
    index = log_q.topk(k, dim=-1).indices  # [n, k]
    value, grad = divergence(log_p.gather(1, index).log_softmax(-1), log_q.gather(1, index).log_softmax(-1), kind)
    return value, torch.zeros_like(log_p).scatter_(1, index, grad)


def kl_tile(s, t, weight, targets, kind, topk, d_s):
    """All that is done to a tile of logits: writes weight * dKL/ds to d_s [n, V]; returns KL [n] and log p(target) [n]."""
    log_p, log_q = s.log_softmax(-1), t.log_softmax(-1)
    value, grad = topk_divergence(log_p, log_q, kind, topk) if topk else divergence(log_p, log_q, kind)
    d_s.copy_(grad * weight[:, None])
    return value, log_p.gather(1, targets[:, None])[:, 0]


def ce_tile(s, weight, targets, d_s):
    """The same for cross entropy: weight * (p - onehot(target)) to d_s; -log p(target) and log p(target)."""
    log_p = s.log_softmax(-1)
    hit = torch.arange(s.shape[1], device=s.device) == targets[:, None]
    d_s.copy_((log_p.exp() - hit.float()) * weight[:, None])
    logp = log_p.gather(1, targets[:, None])[:, 0]
    return -logp, logp


@functools.cache
def compiled(tile):
    """torch.compile makes one pass of a tile's many; the vocabulary is a fixed size to it, the rows of a chunk are not."""
    return torch.compile(tile)


def matmul_fp32(a, b):
    """a @ b with an fp32 result. On CUDA the bf16 inputs go to the tensor cores as they are, which add up in fp32."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def add_matmul_fp32(total, a, b):
    """total += a @ b for an fp32 total, the product not rounded before the sum."""
    if a.is_cuda and a.dtype != torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())


class HeadLoss(torch.autograd.Function):
    """sum_i w_i * loss_i for losses that look at one row of logits each; gradients are made while the tile is at hand."""

    @staticmethod
    def forward(ctx, hidden, weight, token_weight, chunk, block, tile):
        N, V = hidden.shape[0], weight.shape[0]
        needs_grad = hidden.requires_grad or weight.requires_grad
        d_hidden = torch.zeros_like(hidden) if needs_grad else None  # [N, H]
        d_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if needs_grad else None
        per_token, logp = (torch.zeros(N, dtype=torch.float32, device=hidden.device) for _ in range(2))
        d_logits = hidden.new_empty(min(chunk, N), V)
        for i in range(0, N, chunk):
            d_s = d_logits[:N - i]
            for j in range(0, len(d_s), block):
                d_tile = d_s[j:j + block]
                rows = slice(i + j, i + j + len(d_tile))
                per_token[rows], logp[rows] = tile(matmul_fp32(hidden[rows], weight.T), rows, d_tile)
            if needs_grad:
                rows = slice(i, i + chunk)
                d_hidden[rows] = matmul_fp32(d_s, weight)
                add_matmul_fp32(d_weight, d_s.T, hidden[rows])
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(per_token, logp)
        return (per_token * token_weight).sum(), per_token, logp

    @staticmethod
    def backward(ctx, grad, *_):
        d_hidden, d_weight = ctx.saved_tensors
        d_weight = torch.mul(d_weight, grad, out=torch.empty_like(d_weight, dtype=ctx.weight_dtype))
        return d_hidden * grad.to(d_hidden.dtype), d_weight, None, None, None, None


def head_loss(hidden, weight, token_weight, chunk, compile, tile):
    """HeadLoss with its sizes chosen: about 80 M logits a tile, half as many in eager mode, which keeps several copies of a tile."""
    block = max(1, 80_000_000 // weight.shape[0])
    block = max(block // 256 * 256, min(block, 256))  # matrix products like multiples of 256
    chunk = chunk or 4 * block
    return HeadLoss.apply(hidden, weight, token_weight, chunk, min(chunk, block if compile else block // 2 or 1), tile)


def chunked_kl(student_hidden, student_weight, teacher_hidden, teacher_weight, token_weight, kind="reverse", topk=0,
               targets=None, chunk=0, compile=None):
    """
    sum_i token_weight_i * KL_i between student and teacher, over the whole vocabulary (equation 3 of the paper).

    student_hidden, teacher_hidden: last hidden states [N, H], [N, H'] (any float type).
    student_weight, teacher_weight: the heads [V, H], [V, H']. token_weight: fp32 [N]; 0 leaves a row out.
    kind: see `divergence`. topk: 0 is exact; k > 0 renormalises over the teacher's k largest logits.
    targets: token ids [N], if the student's log-probabilities of them are wanted. chunk: rows at a time, 0 = chosen.
    compile: torch.compile the elementwise part; default: on CUDA.

    Returns (loss, kl, logp): loss a scalar with gradients for the two student tensors; kl [N] in nats and
    logp [N] (of token 0 without targets), fp32 and detached.
    Raises ValueError for an unknown kind, for topk with jsd (both sides' supports would matter), for unlike V.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")
    if topk and kind == "jsd":
        raise ValueError("topk cannot go with jsd: a mixture over the teacher's top k alone is not a divergence")
    if student_weight.shape[0] != teacher_weight.shape[0]:
        raise ValueError(f"student has {student_weight.shape[0]} vocabulary rows and teacher {teacher_weight.shape[0]}")
    if topk > teacher_weight.shape[0] or topk < 0:
        raise ValueError(f"topk must lie in 0..{teacher_weight.shape[0]}, got {topk}")
    if targets is None:
        targets = torch.zeros(len(student_hidden), dtype=torch.long, device=student_hidden.device)
    compile = student_hidden.is_cuda if compile is None else compile
    run = compiled(kl_tile) if compile else kl_tile

    def tile(s, rows, d_s):
        t = matmul_fp32(teacher_hidden[rows], teacher_weight.T)
        return run(s, t, token_weight[rows], targets[rows], kind, topk, d_s)

    return head_loss(student_hidden, student_weight, token_weight, chunk, compile, tile)


def chunked_ce(hidden, weight, targets, token_weight, chunk=0, compile=None):
    """sum_i token_weight_i * -log p(target_i), the SFT loss, by the same pass. Returns (loss, per-token loss, logp)."""
    compile = hidden.is_cuda if compile is None else compile
    run = compiled(ce_tile) if compile else ce_tile

    def tile(s, rows, d_s):
        return run(s, token_weight[rows], targets[rows], d_s)

    return head_loss(hidden, weight, token_weight, chunk, compile, tile)


# ---------------------------------------------------------------------------------------------- as a script


def buckets(values, n=20):
    """Shares of the total that lie in n equal slices of the tokens, sorted from largest to smallest: a list of n."""
    values = values.clamp(min=0).sort(descending=True).values.double()
    cumulative = torch.cat([torch.zeros(1, dtype=torch.double), values.cumsum(0)]) / values.sum().clamp(min=1e-12)
    edges = torch.linspace(0, len(values), n + 1, dtype=torch.double)
    low = edges.floor().long().clamp(max=len(values) - 1)
    at = cumulative[low] + (edges - low) * (cumulative[low + 1] - cumulative[low])
    return at.diff().tolist()


def main():
    from transformers import AutoModelForCausalLM
    from tqdm import tqdm
    import verify

    parser = argparse.ArgumentParser(description="Where the reviser disagrees: per-token KL of responses, drawn.")
    parser.add_argument("--student", required=True, help="folder of the model that generates")
    parser.add_argument("--teacher", required=True, help="folder of the model that revises (SRT)")
    parser.add_argument("--responses", required=True, help="responses.jsonl of srt.py; its y_init are scored")
    parser.add_argument("--out", required=True, help="folder for heatmap.html, buckets.png and summary.json")
    parser.add_argument("--kl", choices=KINDS, default="reverse")
    parser.add_argument("--max_responses", type=verify.natural, default=200)
    parser.add_argument("--phrases", type=verify.phrases_flag, help=verify.PHRASES_HELP)
    args = verify.parse(parser)

    ranks = verify.launch()
    if ranks.rank:  # one is enough
        return torch.distributed.destroy_process_group()
    device = ranks.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokenizer = verify.load_tokenizer(args.teacher)
    verify.same_vocabulary(args.student, verify.load_tokenizer(args.student), args.teacher, tokenizer)
    family = verify.phrases_of(args.teacher, args.phrases)
    rows = {}
    for line, row in verify.read_jsonl(args.responses):
        if row.get("kind") == "revision":
            continue
        verify.need(row, args.responses, line, id=str, sample=int, problem=str, y_init_tokens=list, y_init_correct=bool)
        if max(row["y_init_tokens"], default=0) >= len(tokenizer):
            verify.fail(f"{args.responses}:{line}: a token id over the {len(tokenizer)} of --teacher; these are another model's")
        rows.setdefault((row["id"], row["sample"]), row)
    rows = [row for row in rows.values() if row["y_init_tokens"]][: args.max_responses]
    if not rows:
        verify.fail(f"--responses {args.responses} holds no responses; srt.py writes such a file")
    student, teacher = (AutoModelForCausalLM.from_pretrained(m, dtype=dtype).to(device).eval().requires_grad_(False)
                        for m in (args.student, args.teacher))

    curves, cells = {True: [], False: []}, []
    for row in tqdm(rows, desc="score", unit="response"):
        y = row["y_init_tokens"]
        x = verify.chat_ids(tokenizer, verify.Problem.of_row(row))
        seen = verify.revision_ids(tokenizer, x, y, row["y_init_correct"], family)
        hidden = []
        with torch.no_grad():
            for model, prefix in ((student, x), (teacher, seen)):
                ids = torch.tensor([prefix + y], device=device)
                hidden.append(model.get_decoder()(ids).last_hidden_state[0, len(prefix) - 1:-1])  # [T, H]
            targets, ones = torch.tensor(y, device=device), torch.ones(len(y), device=device)
            heads = [model.get_output_embeddings().weight for model in (student, teacher)]
            _, kl, logp = chunked_kl(hidden[0], heads[0], hidden[1], heads[1], ones, args.kl, targets=targets)
            _, _, teacher_logp = chunked_ce(hidden[1], heads[1], targets, ones)
        curves[row["y_init_correct"]].append(buckets(kl.cpu()))
        if len(cells) < 20:
            cells.append(heat_row(tokenizer, row, y, (logp - teacher_logp).tolist(), kl.tolist()))

    os.makedirs(args.out, exist_ok=True)
    mean = {name: torch.tensor(curves[ok]).mean(0).tolist() if curves[ok] else None
            for name, ok in (("right", True), ("wrong", False))}
    summary = {"responses": len(rows), "right": len(curves[True]), "wrong": len(curves[False]), "kl": args.kl,
               "share_of_kl_by_bucket": mean}
    with open(os.path.join(args.out, "summary.json"), "w") as f:
        json.dump(summary, f, indent=1)
    with open(os.path.join(args.out, "heatmap.html"), "w") as f:
        f.write(HEAT_PAGE + "".join(cells))
    draw_buckets(mean, summary, os.path.join(args.out, "buckets.png"))
    print(f"{len(rows)} responses; share of the KL on the first 5 % of tokens: " + ", ".join(
        f"{name} {curve[0]:.2f}" for name, curve in mean.items() if curve) + f"; see {args.out}/heatmap.html, buckets.png")
    torch.distributed.destroy_process_group()


HEAT_PAGE = """<!doctype html><meta charset="utf-8"><title>Where the reviser disagrees</title>
<style>body{font:15px/1.9 monospace;max-width:75em;margin:2em auto;padding:0 1em} span{padding:2px 0;white-space:pre-wrap}
h3{font:bold 15px sans-serif;margin:1.6em 0 .2em}</style>
<p style="font-family:sans-serif">Each token is coloured by log p_student - log p_reviser: <span style="background:
rgba(220,40,40,.6)">red</span> where the reviser, told the outcome, finds the token less likely than the student did,
<span style="background:rgba(40,90,220,.6)">blue</span> where more likely. Hover for the numbers.</p>
"""


def heat_row(tokenizer, row, ids, difference, kl):
    """One response as HTML, a coloured span per token."""
    spans = []
    for token, d, k in zip(ids, difference, kl):
        colour = "220,40,40" if d > 0 else "40,90,220"
        spans.append(f'<span style="background:rgba({colour},{min(abs(d) / 3, 1) * 0.8:.2f})" title="log ratio {d:+.2f}, '
                     f'KL {k:.3f}">{html.escape(tokenizer.decode([token]))}</span>')
    outcome = "right" if row["y_init_correct"] else "wrong"
    return f"<h3>{html.escape(str(row['id']))} · {outcome} · answer {html.escape(str(row.get('answer')))}</h3>{''.join(spans)}\n"


def draw_buckets(mean, summary, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for (name, curve), colour in zip(mean.items(), ("tab:blue", "tab:red")):
        if curve:
            ax.plot(range(1, 21), curve, marker="o", ms=3, color=colour, label=f"{name} ({summary[name]})")
    ax.set(xlabel="tokens of a response, sorted by KL, in 20 equal buckets", ylabel="share of the response's KL",
           title="Self-localisation: where the KL sits")
    ax.set_ylim(bottom=0)
    ax.set_xticks((1, 5, 10, 15, 20))
    ax.legend(title="y_init was")
    fig.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
