"""kl.py against autograd over the full vocabulary in float64."""
import math
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kl

N, H, V = 23, 16, 57
Y = torch.zeros(N, dtype=torch.long)  # targets, where they do not matter


def reference(s, t, kind, topk=0):
    """The divergences as the textbook writes them, on logits in float64."""
    if topk:
        index = t.topk(topk, -1).indices
        s, t = s.gather(-1, index), t.gather(-1, index)
    log_p, log_q = s.log_softmax(-1), t.log_softmax(-1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    D = lambda a, b: (a.exp() * (a - b)).sum(-1)
    return {"reverse": lambda: D(log_p, log_q), "forward": lambda: D(log_q, log_p),
            "mixed": lambda: (D(log_p, log_q) + D(log_q, log_p)) / 2,
            "jsd": lambda: (D(log_p, log_m) + D(log_q, log_m)) / 2}[kind]()


def inputs(seed=0, scale=1.0, hidden_t=H):
    g = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64) * scale
    return make(N, H), make(V, H), make(N, hidden_t), make(V, hidden_t), torch.rand(N, generator=g, dtype=torch.float64)


def both(kind, topk=0, chunk=0, scale=1.0, weight=None, hidden_t=H, compile=False):
    """(loss, per token, dhidden, dhead) of kl.py in fp32 and of the reference in fp64."""
    hs, ws, ht, wt, w = inputs(scale=scale, hidden_t=hidden_t)
    w = w if weight is None else weight
    out = []
    for dtype in (torch.float32, torch.float64):
        a, b = hs.to(dtype).requires_grad_(), ws.to(dtype).requires_grad_()
        if dtype == torch.float32:
            loss, each = kl.chunked_kl(a, b, ht.float(), wt.float(), w.float(), Y, kind, topk, chunk, compile)[:2]
        else:
            each = reference(a @ b.T, ht @ wt.T, kind, topk)
            loss = (each * w).sum()
        (3 * loss).backward()  # a factor from above must reach the stored gradients
        out.append((loss.detach().double(), each.detach().double(), a.grad.double(), b.grad.double()))
    return out


def close(ours, theirs, tolerance=2e-5):
    for x, y in zip(ours, theirs):
        assert torch.isfinite(x).all()
        assert (x - y).norm() <= tolerance * y.norm() + 1e-7, ((x - y).norm(), y.norm())


@pytest.mark.parametrize("chunk", [1, 5, 23, 64, 0])
@pytest.mark.parametrize("kind", kl.KINDS)
def test_value_and_gradients(kind, chunk):
    close(*both(kind, chunk=chunk))


@pytest.mark.parametrize("kind", kl.KINDS)
@pytest.mark.parametrize("topk", [1, 8, V])
def test_topk(kind, topk):
    close(*both(kind, topk=topk, chunk=7))


def test_topk_of_the_whole_vocabulary_is_exact():
    for kind in kl.KINDS:
        close(both(kind, topk=V)[0], both(kind)[1])


def test_argument_order():
    """KL(student || teacher), not the other way round: p = (1/2, 1/2), q = (1/4, 3/4)."""
    s, t = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    want = {"reverse": 0.5 * math.log(2) + 0.5 * math.log(2 / 3), "forward": 0.25 * math.log(0.5) + 0.75 * math.log(1.5)}
    for kind, value in want.items():
        assert kl.divergence(s, t, kind)[0].item() == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("kind", kl.KINDS)
def test_masks_and_zero_weights(kind):
    weight = torch.zeros(N, dtype=torch.float64)
    weight[::4] = 0.5
    ours, theirs = both(kind, chunk=5, weight=weight)
    close(ours, theirs)
    assert ours[2][1::4].abs().max() == 0  # no gradient where there is no weight
    zero = both(kind, weight=torch.zeros(N, dtype=torch.float64))[0]
    assert zero[0] == 0 and zero[2].abs().max() == 0 and zero[3].abs().max() == 0


@pytest.mark.parametrize("kind", kl.KINDS)
def test_identical_student_and_teacher(kind):
    hs, ws, *_ = (a.float() for a in inputs(scale=3.0))
    a, b = hs.clone().requires_grad_(), ws.clone().requires_grad_()
    loss, each = kl.chunked_kl(a, b, hs, ws, torch.ones(N), Y, kind, chunk=6)[:2]
    loss.backward()
    assert each.abs().max() == 0 and a.grad.abs().max() == 0 and b.grad.abs().max() == 0


@pytest.mark.parametrize("kind", kl.KINDS)
def test_extreme_logits(kind):
    g = torch.Generator().manual_seed(1)
    s, t = (torch.where(torch.rand(9, V, generator=g) < 0.5, -1e4, 1e4) for _ in range(2))
    value, grad = kl.divergence(s.log_softmax(-1), t.log_softmax(-1), kind)
    exact = s.double().requires_grad_()
    want = reference(exact, t.double(), kind)
    want.sum().backward()
    assert torch.isfinite(value).all() and torch.isfinite(grad).all()
    assert torch.allclose(value.double(), want, rtol=1e-5, atol=1e-5)
    assert torch.allclose(grad.double(), exact.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["reverse", "jsd"])
def test_compiled(kind):
    """The compiled tile, as CUDA has it, with a last chunk of another size."""
    close(*both(kind, chunk=9, compile=True))


def test_teacher_of_another_width():
    close(*both("reverse", hidden_t=40, chunk=4))


def test_a_teacher_that_copies():
    """q = (1 - e) onehot(y) + e p for y ~ p: in expectation forward KL pulls nowhere, reverse KL lowers the entropy (docs/real.md)."""
    log_p = (2 * torch.randn(1, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).log_softmax(-1)
    p, e = log_p.exp()[0], 0.01
    log_q = ((1 - e) * torch.eye(V, dtype=torch.float64) + e * p).log()  # a row for each y
    forward, reverse = (p @ kl.divergence(log_p.expand(V, V), log_q, kind)[1] for kind in ("forward", "reverse"))
    assert forward.abs().max() < 1e-12 and reverse.abs().max() > 0.01
    of_entropy = -p * (log_p[0] - (p * log_p[0]).sum())  # its gradient in the logits
    assert (of_entropy * -reverse).sum() < -0.05  # along a step of descent


def test_tied_head():
    """The head is the embedding: its gradient is the sum of both uses, as autograd has it."""
    hs, ws, ht, wt, w = inputs()
    ids = torch.arange(N) % V
    grads = []
    for dtype in (torch.float32, torch.float64):
        table = ws.to(dtype).requires_grad_()
        hidden = table[ids].tanh() + hs.to(dtype)
        if dtype == torch.float32:
            kl.chunked_kl(hidden, table, ht.float(), wt.float(), w.float(), Y, chunk=4)[0].backward()
        else:
            (reference(hidden @ table.T, ht @ wt.T, "reverse") * w).sum().backward()
        grads.append(table.grad.double())
    close(grads[:1], grads[1:])


def test_bf16_inputs_accumulate_in_fp32():
    """With bf16 inputs the head's gradient has the rounding of its inputs, not of one rounding per chunk."""
    hs, ws, ht, wt, w = inputs()
    b16 = [x.bfloat16() for x in (hs, ws, ht, wt)]
    want = [x.double().requires_grad_(i < 2) for i, x in enumerate(b16)]
    (reference(want[0] @ want[1].T, want[2] @ want[3].T, "reverse") * w).sum().backward()
    for chunk in (1, N):
        a, b = b16[0].clone().requires_grad_(), b16[1].clone().requires_grad_()
        kl.chunked_kl(a, b, b16[2], b16[3], w.float(), Y, chunk=chunk)[0].backward()
        assert (b.grad.double() - want[1].grad).norm() < 4e-3 * want[1].grad.norm()
        assert (a.grad.double() - want[0].grad).norm() < 4e-3 * want[0].grad.norm()


@pytest.mark.parametrize("topk", [0, 3])
def test_what_else_is_seen_at_a_tile(topk):
    """log p(target) of both sides and the student's entropy, over the whole vocabulary whatever topk."""
    hs, ws, ht, wt, w = (x.float() for x in inputs())
    targets = torch.arange(N) * 7 % V
    found = kl.chunked_kl(hs, ws, ht, wt, w, targets, topk=topk, chunk=5)
    log_p, log_q = ((h.double() @ head.double().T).log_softmax(-1) for h, head in ((hs, ws), (ht, wt)))
    assert torch.allclose(found.logp.double(), log_p[torch.arange(N), targets], atol=1e-5)
    assert torch.allclose(found.teacher_logp.double(), log_q[torch.arange(N), targets], atol=1e-5)
    assert torch.allclose(found.entropy.double(), -(log_p.exp() * log_p).sum(-1), atol=1e-5)
    other = kl.chunked_kl(hs, ws, ht, wt, w, Y, topk=topk, chunk=5)
    assert torch.equal(other.kl, found.kl) and torch.equal(other.entropy, found.entropy)


def test_the_docstring_says_what_it_computes():
    """The lines of full-vocabulary torch in chunked_kl's docstring, run, give the same."""
    hs, ws, ht, wt, w = (x.float() for x in inputs())
    lines = [line[8:] for line in kl.chunked_kl.__doc__.splitlines() if line.startswith("        ")]
    names = {"student_hidden": hs, "student_weight": ws, "teacher_hidden": ht, "teacher_weight": wt,
             "token_weight": w, "targets": torch.arange(N), "KL": kl.KL}
    code = "def full(): \n" + "\n".join("    " + line for line in lines)
    exec(code, names)
    ours = kl.chunked_kl(hs, ws, ht, wt, w, torch.arange(N), chunk=5)
    assert len(lines) >= 7
    for mine, theirs in zip(ours, names["full"](), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)


def test_cross_entropy():
    hs, ws, _, _, w = inputs()
    targets = torch.arange(N) * 5 % V
    a, b = hs.float().requires_grad_(), ws.float().requires_grad_()
    kl.chunked_ce(a, b, targets, w.float(), chunk=4)[0].backward()
    x, y = hs.clone().requires_grad_(), ws.clone().requires_grad_()
    (torch.nn.functional.cross_entropy(x @ y.T, targets, reduction="none") * w).sum().backward()
    close([a.grad.double(), b.grad.double()], [x.grad, y.grad])


class Largest(TorchDispatchMode):
    """The largest number of elements of any tensor that an operation gives back."""
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and not func.is_view:
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("n", [64, 512])
def test_memory_does_not_grow_with_tokens_times_vocabulary(n):
    V, H, chunk = 997, 8, 16
    hs, ht = torch.randn(n, H, requires_grad=True), torch.randn(n, H)
    ws, wt = torch.randn(V, H, requires_grad=True), torch.randn(V, H)
    with Largest() as largest:
        kl.chunked_kl(hs, ws, ht, wt, torch.ones(n), torch.zeros(n, dtype=torch.long), chunk=chunk)[0].backward()
    assert largest.elements == chunk * V  # one tile of logits, whatever n; the whole would be n * V


def test_errors():
    hs, ws, ht, wt, w = (x.float() for x in inputs())
    for message, call in {
        "no divergence here is called 'revers'": lambda: kl.chunked_kl(hs, ws, ht, wt, w, Y, "revers"),
        "no divergence here is called 'top'": lambda: kl.chunked_kl(hs, ws, ht, wt, w, Y, "top", topk=4),
        "vocabulary": lambda: kl.chunked_kl(hs, ws, ht, wt[:-1], w, Y),
        "topk": lambda: kl.chunked_kl(hs, ws, ht, wt, w, Y, topk=V + 1),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("kind", kl.KINDS)
def test_tiles_of_a_chunk(kind, monkeypatch):
    """A chunk that is looked at in tiles, as on a GPU, the last of them shorter."""
    apply = kl.HeadLoss.apply
    monkeypatch.setattr(kl, "HeadLoss", SimpleNamespace(apply=lambda h, w, t, chunk, block, tile: apply(h, w, t, chunk, 4, tile)))
    close(*both(kind, chunk=9))
