"""
Speed, memory and error of the KL at the 4B shape, against the floor (the four matrix products alone), full logits, and
the kernels of TRL and Liger where they are installed. Forward and backward, reverse KL unless a row says otherwise.

    python tests/bench_kl.py        # N = 8192, H = 2560, V = 151936, bf16; needs a GPU (on a CPU: a small shape, eager)

What was tried (one H200, torch 2.11), and what it gave:
  logits and dlogits in chunks of one size, 768 rows: eager 84.9 ms, 5.2 GiB; compiled 55.6 ms, 3.2 GiB. Small tiles of
    fp32 logits and large chunks of bf16 dlogits: 74.3 ms, 3.2 GiB (256 and 2048 rows) and 50.9-51.8 ms, 2.9 GiB (512 and
    2048); kept. The head's gradient then goes through memory 4 times instead of 11: all of its products take 11.3 ms in
    chunks of 2048, 15.5 in 768, 36.1 in 256. 3072 rows: 50.3 ms, 3.2 GiB. 2560 rows: 56.9 ms, for the products get slow.
  log_softmax once, for the target's log-probability too: part of the above; kept.
  dW by addmm with an fp32 accumulator instead of mm and add: 50 instead of 56 ms; kept.
  Inductor without split reductions: 50.5 ms; and with realize_reads_threshold=16, which saves an fp32 copy of a tile:
    50.4 ms, 2.6 GiB; coordinate descent: the elementwise part in 8.2 instead of 9.6 ms, of 51; none kept.
  max-and-sums written out by hand instead of log_softmax, compiled: 50 instead of 51.5 ms; not kept, harder to read.
"""
import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import kl

CUDA = torch.cuda.is_available()
N, H, V = (8192, 2560, 151936) if CUDA else (512, 128, 8192)
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)


def measure(f, repeats=5):
    """(milliseconds, GiB above what was there) of f, after a warm-up."""
    sync = torch.cuda.synchronize if CUDA else lambda: None
    torch._dynamo.reset()  # a row of the table must not pay for the graphs of the others
    f(), f(), sync()
    base = 0
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
    start = time.perf_counter()
    for _ in range(repeats):
        f()
    sync()
    ms = (time.perf_counter() - start) / repeats * 1e3
    return ms, (torch.cuda.max_memory_allocated() - base) / 2**30 if CUDA else float("nan")


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.manual_seed(0)
    hs = torch.randn(N, H, device=DEVICE).to(DTYPE)
    ht = (hs.float() + 0.3 * torch.randn(N, H, device=DEVICE)).to(DTYPE)
    ws = (torch.randn(V, H, device=DEVICE) * 0.02).to(DTYPE)
    wt = (ws.float() + 0.002 * torch.randn(V, H, device=DEVICE)).to(DTYPE)
    weight, targets = torch.full((N,), 1 / N, device=DEVICE), torch.randint(0, V, (N,), device=DEVICE)
    x, y = hs.clone().requires_grad_(), ws.clone().requires_grad_()

    def products():
        for i in range(0, N, 2048):
            s, _ = hs[i:i + 2048] @ ws.T, ht[i:i + 2048] @ wt.T
            _, _ = s @ ws, s.T @ hs[i:i + 2048]

    def backward(loss):
        x.grad = y.grad = None
        loss.backward()

    def ours(kind="reverse", topk=0, compile=CUDA):
        return lambda: backward(kl.chunked_kl(x, y, ht, wt, weight, targets, kind, topk, compile=compile)[0])

    def naive():
        s, t = (x @ y.T).float().log_softmax(-1), (ht @ wt.T).float().log_softmax(-1)
        backward((s.exp() * (s - t)).sum(-1).mean())

    rows = {"four products alone": products, "full logits": naive, "ours, eager": ours(compile=False)}
    if CUDA:
        rows["ours, compiled"] = ours()
    rows |= {f"ours, {kind}": ours(kind) for kind in kl.KINDS[1:]} | {"ours, top 64": ours(topk=64)}
    try:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
        rows["TRL, Triton"] = lambda: backward(ChunkedDivergenceFunction.apply(x, y, None, ht, wt, None, 1.0)[0].mean())
    except ImportError as e:
        print(f"skipped TRL: {e}")
    try:
        from liger_kernel.ops.fused_linear_jsd import LigerFusedLinearJSDFunction as Liger
        for name, accumulate in (("Liger JSD", None), ("Liger JSD, fp32 sums", torch.float32)):
            rows[name] = lambda a=accumulate: backward(Liger.apply(x, y, ht, wt, None, 1.0, -100, 1.0, a))
    except ImportError as e:
        print(f"skipped Liger: {e}")

    want = reference(hs, ws, ht, wt)
    print(f"N {N}, H {H}, V {V}, {DTYPE}, torch {torch.__version__}, {torch.cuda.get_device_name() if CUDA else 'CPU'}")
    print(f"{'':22s} {'ms':>8s} {'x products':>11s} {'GiB':>6s} {'error of dh':>12s} {'of dW':>9s}")
    floor = None
    for name, f in rows.items():
        try:
            ms, gib = measure(f)
        except Exception as e:  # a peer that does not run here must not hide the others
            print(f"{name:22s} failed: {str(e).splitlines()[0][:90]}")
            continue
        floor = floor or ms
        error = ["", ""]
        if name in ("full logits", "ours, eager", "ours, compiled") or name.startswith(("TRL", "Liger")):
            error = [f"{((g.double() - w).norm() / w.norm()).item():.1e}" for g, w in zip((x.grad[:512], y.grad), want)]
        print(f"{name:22s} {ms:8.1f} {ms / floor:11.2f} {gib:6.2f} {error[0]:>12s} {error[1]:>9s}", flush=True)
        x.grad = y.grad = None


def reference(hs, ws, ht, wt):
    """Gradients in float64: of the first 512 hidden rows, and of the whole head."""
    dh, dw = None, torch.zeros(V, H, dtype=torch.float64, device=DEVICE)
    w64, t64 = ws.double(), wt.double()
    for i in range(0, N, 512):
        h = hs[i:i + 512].double()
        s, t = (h @ w64.T).log_softmax(-1), (ht[i:i + 512].double() @ t64.T).log_softmax(-1)
        d = s - t
        p = s.exp()
        g = p * (d - (p * d).sum(-1, keepdim=True)) / N
        dw += g.T @ h
        if i == 0:
            dh = g @ w64
    return dh, dw


if __name__ == "__main__":
    main()
