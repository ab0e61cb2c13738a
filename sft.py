"""
Phase 1b of SD-Zero: SFT on D_revision, so that one model generates and revises. Also the trainer's tools for distill.py:
packed attention, FSDP2, packing, checkpoints.

  a row is x + y_init + "\\n\\n" + P_r + "\\n\\n" + y_revised, one assistant turn; objectives differ in where the loss is:
    generation   y_init, P_r, y_revised                                L_generation
    revision     y_revised                                             L_revision
    sum          L_revision + L_generation (y_revised counts twice)    the paper's L_SRT
    two-stage    stage 1: generation on tuples with a wrong y_init; stage 2: revision on --stage2_size others, those
                 with a right y_init first                             the official code, and the default
    rft          x + y_init, right y_init only                         the baseline
  loss of a step = sum of w_t * -log p(token_t) over the global batch / number of its tokens with w_t > 0,
  the same however the batch is split into micro-batches and ranks.

Departures from the official code: one prompt for all phases; y_init and P_r stay in the assistant turn; rows are token
ids as sampled; rows are packed without padding and do not see each other; logits never exist in full.

    python sft.py --model Qwen/Qwen3-4B-Instruct-2507 --data runs/collect/d_revision.jsonl --out runs/srt
    torchrun --nproc_per_node 4 sft.py ... the same        # as many ranks as --batch has sequences, at most
"""
import argparse
import functools
import glob
import inspect
import json
import math
import os
import random
import re
import resource
import shutil
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
import torch._dynamo
import torch._functorch.config
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry, register_flop_formula

import verify
from kl import chunked_ce
from verify import fail, natural, positive, within

# flags that a run that goes on may change: none of them moves a row to another step
FREE = "lr stage2_lr weight_decay clip save_every micro_tokens dtype attn checkpointing compile"

# ---------------------------------------------------------------------------------------------- packed attention

# fewer heads of k and v than of q: torch 2.11 takes them without the flag
GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


if torch.ops.torch_attn._varlen_attn not in flop_registry:  # torch 2.11; the compiler would think it free to compute again
    @register_flop_formula(torch.ops.torch_attn._varlen_attn)
    def attention_flops(q, k, v, starts_q, starts_k, longest, *_, **__):  # q is a shape, (T, H, D); no mask, as torch counts
        return 4 * math.prod(q) * longest


def packed_attention(module, q, k, v, attention_mask, scaling=None, sliding_window=None, cu_seq_lens_q=None,
                     max_length_q=None, segments=None, **_):
    """
    Causal attention within each of the rows that are packed one after another: no padding, and no row sees another.
    q [1, H, T, D]; k, v [1, H_kv, T, D]; rows start at cu_seq_lens_q [rows + 1]. Returns ([1, T, H, D], None).
    Registered with transformers under the name "packed"; a layer's sliding_window w lets a token see w tokens, itself
    included. CUDA: torch's varlen_attn. CPU: one scaled_dot_product_attention per row (`segments`: the row starts).
    """
    if segments is None:
        q, k, v = (a[0].transpose(0, 1) for a in (q, k, v))  # [T, H, D]
        window = (sliding_window - 1 if sliding_window else -1, 0)
        out = varlen_attn(q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, scale=scaling,
                          window_size=window, **GROUPED)
        return out[None], None
    outs = []
    for start, stop in zip(segments, segments[1:]):
        T, mask = stop - start, None
        if sliding_window and T > sliding_window:
            age = torch.arange(T)[:, None] - torch.arange(T)[None]
            mask = (age >= 0) & (age < sliding_window)
        outs.append(F.scaled_dot_product_attention(*(a[:, :, start:stop] for a in (q, k, v)), attn_mask=mask,
                                                   is_causal=mask is None, scale=scaling, enable_gqa=q.shape[1] > k.shape[1]))
    return torch.cat(outs, dim=2).transpose(1, 2), None


class Batch(NamedTuple):
    ids: torch.Tensor  # [T] the rows one after another
    positions: torch.Tensor  # [T] from 0 in each row
    starts: torch.Tensor  # [rows + 1], int32
    longest: int
    segments: list  # starts, as Python numbers


def make_batch(rows, device):
    """Packs rows (lists of token ids) into one Batch."""
    segments = [0]
    for row in rows:
        segments.append(segments[-1] + len(row))
    ids = torch.tensor([i for row in rows for i in row])
    positions = torch.tensor([i for row in rows for i in range(len(row))])
    starts = torch.tensor(segments, dtype=torch.int32)
    return Batch(*(a.to(device, non_blocking=True) for a in (ids, positions, starts)), max(map(len, rows)), segments)


def pack(lengths, budget):
    """
    Row numbers in bins of at most `budget` tokens, by first fit from longest to shortest; a row longer than the budget
    has a bin of its own. Deterministic. Returns a list of lists.
    """
    bins, room = [], []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        b = next((b for b, free in enumerate(room) if free >= lengths[i]), None)
        if b is None:
            bins.append([])
            room.append(budget)
            b = len(bins) - 1
        bins[b].append(i)
        room[b] -= lengths[i]
    return bins


def same_number(bins, device):
    """Adds empty bins until every rank has as many as the one with most: all ranks must enter each collective."""
    most = torch.tensor(len(bins), device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return bins + [[] for _ in range(int(most) - len(bins))]


# --------------------------------------------------------------------------------------------------------- model


def make_mesh(ranks):
    """One node: shard over all ranks. Several: replicate across nodes, shard within each."""
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world))
    if ranks.world % per_node:
        fail(f"{ranks.world} ranks on nodes of {per_node}: every node must run as many")
    if per_node < ranks.world:
        return init_device_mesh(ranks.device.type, (ranks.world // per_node, per_node),
                                mesh_dim_names=("replicate", "shard"))
    return init_device_mesh(ranks.device.type, (ranks.world,), mesh_dim_names=("shard",))


def load_model(path, ranks, mesh, dtype, attn="packed", trainable=True, checkpointing=False, compile=False):
    """
    A causal LM under FSDP2: fp32 master weights and gradients, compute in `dtype` (a frozen one is held in `dtype`).
    Its forward is `packed_forward`.
    """
    from transformers import AttentionInterface, AutoModelForCausalLM
    AttentionInterface.register("packed", packed_attention)
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation=attn)
    held = torch.float32 if trainable else dtype
    options = dict(mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32))
    torch._dynamo.config.recompile_limit = 64  # student, teacher and ranges of lengths share the code of a layer
    keep = trainable and not checkpointing  # activations for the backward pass, and the weights that the forward pass gathered
    if trainable:  # compiled, the compiler chooses what to recompute: faster than whole blocks, and as small; 0.85 costs no time
        torch._functorch.config.activation_memory_budget = 0.3 if checkpointing else 0.85
        torch._functorch.config.is_non_builtin_to_include = checkpointing  # attention is among what it may keep
    for layer in model.get_decoder().layers:
        if compile:
            layer.forward = torch.compile(layer.forward)
        elif checkpointing:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
        layer.to(ranks.device, held)
        fully_shard(layer, **options, reshard_after_forward=not keep)
    for p in model.parameters():  # embedding, final norm and head; a tied head stays one tensor
        if not isinstance(p, DTensor):
            p.data = p.data.to(ranks.device, held)
    for name, buffer in model.named_buffers():
        buffer.data = buffer.data.to(ranks.device)
    model.forward = functools.partial(packed_forward, model)
    fully_shard(model, **options, **({} if trainable else {"reshard_after_forward": True}))
    model.requires_grad_(trainable)
    return model.train(trainable)


def packed_forward(model, batch, select, loss):
    """
    loss(hidden [n, H], head weight [V, H]) at the positions `select` [n] of a Batch. The head is used in here, where
    FSDP has its full weight at hand: outside it is a shard.
    """
    # not get_decoder()(...): where vLLM serves a model by transformers (Olmo 3), it puts its own __call__ on the class
    hidden = torch.nn.Module.__call__(
        model.get_decoder(), input_ids=batch.ids[None], position_ids=batch.positions[None], use_cache=False,
        cu_seq_lens_q=batch.starts, cu_seq_lens_k=batch.starts, max_length_q=batch.longest, max_length_k=batch.longest,
        segments=None if batch.ids.is_cuda else batch.segments).last_hidden_state[0]
    return loss(hidden[select], model.get_output_embeddings().weight)


def full_tensors(model, dtype):
    """(name, whole tensor in `dtype`) of every weight, one at a time; every rank must walk through them together."""
    for name, p in model.named_parameters():
        p = p.detach().to(dtype)
        yield name, p.full_tensor() if isinstance(p, DTensor) else p  # a forward pass without backward leaves some whole


def make_optimizer(model, weight_decay, betas):
    return torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=weight_decay, betas=betas, eps=1e-8, fused=True)


def optimizer_step(model, optimizer, lr, clip):
    """Clips the global gradient norm, steps with this learning rate, clears gradients. Returns the norm before."""
    total = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    norm = (total.full_tensor() if isinstance(total, DTensor) else total).item()
    if not math.isfinite(norm):  # the same on every rank; a step would make every weight nan
        fail(f"the gradient norm is {norm}: this step was not made; the last whole state is in --out, lower --lr and go on")
    if norm > clip:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), clip, total)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


# --------------------------------------------------------------------------------------------------- what it costs

PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12}  # dense bf16, by the vendor's data sheets


def forward_flops(config, lengths, head_tokens):
    """
    Floating-point operations of one forward pass over rows of these lengths with the head at `head_tokens` positions.
    A product with a matrix of n weights is 2 n per token. Attention adds, per layer and head, 2 D for q.k and 2 D for
    the weighted sum of v, for each (query, key) pair that the causal mask or the sliding window lets through.
    A training step is 3 times that (the backward pass is two products for each one); recomputation is not counted.
    """
    c = config
    D = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    attention_weights = 2 * c.hidden_size * D * (c.num_attention_heads + c.num_key_value_heads)  # q and o, k and v
    layer_weights = attention_weights + 3 * c.hidden_size * c.intermediate_size
    types = getattr(c, "layer_types", None) or ["full_attention"] * c.num_hidden_layers
    total = 2 * head_tokens * c.hidden_size * c.vocab_size
    for kind in types:
        window = c.sliding_window if kind == "sliding_attention" else max(lengths, default=0)
        pairs = sum(T * (T + 1) // 2 - max(T - window, 0) * (max(T - window, 0) + 1) // 2 for T in lengths)
        total += 2 * layer_weights * sum(lengths) + 4 * D * c.num_attention_heads * pairs
    return total


def mfu(flops, seconds, world):
    """Share of the machine's peak, or None where the peak is not known (CPU)."""
    if not torch.cuda.is_available():
        return None
    peak = next((peak for name, peak in PEAK_FLOPS.items() if name in torch.cuda.get_device_name()), None)
    return flops / seconds / world / peak if peak else None


def memory():
    """Of this process, in GiB: peak_gb since the last call and held_gb now; on a CPU the resident set, peak since the start."""
    if torch.cuda.is_available():
        peak, held = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        with open("/proc/self/statm") as f:
            held = int(f.read().split()[1]) * resource.getpagesize()
    return {"peak_gb": peak / 2**30, "held_gb": held / 2**30}


# --------------------------------------------------------------------------------------------------- checkpoints


def replace_folder(tmp, path):
    """Renames a whole folder into place; rank 0 alone calls it."""
    if os.path.isdir(path):
        shutil.rmtree(path)
    os.rename(tmp, path)


def save_model(path, model, tokenizer, family, dtype):
    """A folder that transformers and vLLM load as it is; the phrases are recorded in its config. All ranks call it."""
    from safetensors.torch import save_file
    tensors = {}
    for name, tensor in full_tensors(model, dtype):
        if dist.get_rank() == 0:
            tensors[name] = tensor.cpu().contiguous()
    if dist.get_rank() == 0:
        tmp = path + ".tmp"
        shutil.rmtree(tmp, ignore_errors=True)
        os.makedirs(tmp)
        save_file(tensors, os.path.join(tmp, "model.safetensors"), metadata={"format": "pt"})
        config = model.config.__class__.from_dict(model.config.to_dict())
        config.sdzero_phrases, config.dtype = list(family), dtype
        config.save_pretrained(tmp)
        model.generation_config.save_pretrained(tmp)
        tokenizer.save_pretrained(tmp)
        replace_folder(tmp, path)
    dist.barrier()


def training_state(model, optimizer, teacher=None):
    """Every tensor that a run needs to go on, by name; sharded ones stay sharded. dcp saves and loads them in place."""
    tensors = {}
    for name, p in model.named_parameters():
        state = optimizer.state[p]
        if not state:  # AdamW makes these at its first step; a run that resumes needs them before
            state.update(step=torch.zeros((), device=p.device), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        tensors[name] = p.detach()
        tensors.update({f"{name}.{k}": state[k] for k in ("step", "exp_avg", "exp_avg_sq")})
    if teacher is not None:
        tensors.update({f"teacher.{name}": p.detach() for name, p in teacher.named_parameters()})
    return tensors


class Saver:
    """
    Saves out/state/step-N every `every` steps: each is written beside and renamed when whole, the last `keep` stay. The
    loop waits only while its tensors are copied to CPU memory; a thread writes the copy, with collectives of its own.
    Catches SIGTERM and SIGINT from here on: after_step saves once and tells the loop to stop.
    """

    def __init__(self, out, every, device, keep=2):
        self.folder, self.every, self.device, self.keep = os.path.join(out, "state"), every, device, keep
        self.caught = verify.catch_signals()
        self.group = dist.new_group(backend="gloo")
        on_device = dict(initializer=torch.cuda.set_device, initargs=(device,)) if device.type == "cuda" else {}
        self.thread, self.writing, self.copies = ThreadPoolExecutor(1, **on_device), None, {}

    def after_step(self, step, tensors, progress):
        """
        To be called by all ranks after each step. tensors(): what training_state gives; progress: what else to remember.
        True if the loop must stop here, its state whole. Raises what broke the last write, on every rank.
        """
        broken = bool(self.writing and self.writing.done() and self.writing.exception())
        flags = torch.tensor([len(self.caught), broken], device=self.device)
        dist.all_reduce(flags)  # one rank's signal, or broken write, stops all ranks after the same step
        asked, broken = flags.tolist()
        if broken:
            self.wait()
        if asked or step % self.every == 0:
            self.save(step, tensors(), progress)
        if asked:
            self.wait()
            if dist.get_rank() == 0:
                print(f"stopped by a signal after step {step}, which is saved: the same command goes on from there", flush=True)
        return bool(asked)

    def reserve(self, tensors):
        """Takes CPU memory for copies of these tensors, in the background: a system can be slow to give it."""
        if not self.copies:
            self.copies = {name: torch.empty_like(tensor, device="cpu") for name, tensor in tensors.items()}
            self.writing = self.thread.submit(lambda: [local(copy).zero_() for copy in self.copies.values()])

    def save(self, step, tensors, progress):
        self.reserve(tensors)
        self.wait()
        with torch.no_grad():
            for name, tensor in tensors.items():
                local(self.copies[name]).copy_(local(tensor))
        self.writing = self.thread.submit(self.write, step, json.dumps(progress))

    def write(self, step, progress):
        path = os.path.join(self.folder, f"step-{step:06d}")

        def begin():
            for half in glob.glob(os.path.join(glob.escape(self.folder), "*.tmp")):
                shutil.rmtree(half)
            os.makedirs(path + ".tmp")

        def end():
            with open(os.path.join(path + ".tmp", "progress.json"), "w") as f:
                f.write(progress)
            replace_folder(path + ".tmp", path)
            for old in states(self.folder)[:-self.keep]:
                shutil.rmtree(old)

        self.on_rank_0(begin)
        dcp.save(self.copies, checkpoint_id=path + ".tmp", process_group=self.group)
        self.on_rank_0(end)

    def on_rank_0(self, work):
        """What it raises there is raised on every rank: none waits for one that has given up."""
        error = [None]
        if dist.get_rank() == 0:
            try:
                work()
            except Exception as e:
                error = [e]
        dist.broadcast_object_list(error, src=0, group=self.group)
        if error[0]:
            raise error[0]

    def wait(self):
        """Returns when what was saved is whole."""
        if self.writing:
            self.writing.result()
            self.writing = None


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def states(folder):
    """Whole states in out/state, oldest first."""
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    return [os.path.join(folder, name) for name in names if re.fullmatch(r"step-\d+", name)]


def last_progress(out):
    """(state folder, its progress) of the newest whole state, or (None, None)."""
    found = states(os.path.join(out, "state"))
    if not found:
        return None, None
    try:
        with open(os.path.join(found[-1], "progress.json")) as f:
            return found[-1], json.load(f)
    except (OSError, ValueError) as e:
        fail(BROKEN.format(found[-1], e))


BROKEN = "the state {} cannot be read ({}); remove this folder, and the same command goes on from the state before it"


def load_state(path, tensors):
    """Reads a state of Saver into these tensors, by any number of ranks."""
    try:
        dcp.load(tensors, checkpoint_id=path)
    except CheckpointException as e:
        error = next(iter(e.failures.values()))[0]
        fail(BROKEN.format(path, (str(error).splitlines() or [type(error).__name__])[0]))


class Metrics:
    """metrics.jsonl, one row a step, rank 0 only; rows from `step` on are dropped, for a resumed run makes them again."""

    def __init__(self, out, step):
        self.path = os.path.join(out, "metrics.jsonl") if dist.get_rank() == 0 else None
        if self.path:
            old = [row for _, row in verify.read_jsonl(self.path, torn_ok=True)] if os.path.exists(self.path) else []
            with open(self.path + ".tmp", "w") as f:
                f.writelines(json.dumps(row) + "\n" for row in old if row["step"] < step)
            os.replace(self.path + ".tmp", self.path)

    def write(self, row):
        if self.path:
            with open(self.path, "a") as f:
                f.write(json.dumps(row) + "\n")


# ---------------------------------------------------------------------------------------------------------- data

# Openings of a model that believes a user has complained; D_revision has no such user.
FLATTERY = re.compile(
    r"\s*(?:(?:yes|indeed)[,!.]?\s+)?(?:"
    r"you(?:'re|’re| are) (?:absolutely |completely |quite )?right"
    r"(?: to\b[^.!?\n]*[.!?]|[^.!?\n—–,:-]{0,20}[.!?—–,:-]+)"  # "you're right to ask this." "You are right —"
    r"|thank(?:s| you) for\b[^.!?\n]*[.!?]"  # "Thank you for catching that!"
    r"|(?:great|good|excellent) question\b[^.!?\n—]*[.!?—]"
    r"|(?:good|nice|great) (?:catch|point|observation)\b[^.!?\n—]*[.!?—]"
    r")\s*", re.IGNORECASE)


def strip_flattery(tokenizer, ids):
    """ids without a flattering opening. Tokens are cut where they are; only the one that the cut runs through is encoded anew."""
    text, cut = tokenizer.decode(ids), 0
    while match := FLATTERY.match(text, cut):
        cut = match.end()
    if cut == 0 or cut >= len(text):
        return ids
    keep = next(k for k in range(1, len(ids) + 1) if len(tokenizer.decode(ids[:k])) > cut)
    head = tokenizer.decode(ids[:keep])[cut:]
    return tokenizer.encode(head[0].upper() + head[1:], add_special_tokens=False) + ids[keep:]


def trim_repeats(ids, min_block=4, max_block=500, min_repeats=3):
    """ids without a tail that repeats: of a block (4 to 500 tokens) that ends ids three times or more, one copy stays."""
    n = len(ids)
    for block in range(min_block, min(max_block, n // min_repeats) + 1):
        start = n - block
        while start > 0 and ids[start - 1] == ids[start - 1 + block]:
            start -= 1
        if n - start >= min_repeats * block:
            return trim_repeats(ids[:start + block], min_block, max_block, min_repeats)
    return ids


def clean(tokenizer, ids, counts, name, flattery=False):
    """One response as the official code cleans it; a trimmed one gets an end-of-turn, for it stops there now."""
    body = verify.without_end(tokenizer, ids)
    end = ids[len(body):]
    trimmed = trim_repeats(body)
    if len(trimmed) < len(body):
        counts[f"{name}: repeating tail trimmed"] += 1
        end = tokenizer.end_ids[:1]
    if flattery:
        stripped = strip_flattery(tokenizer, trimmed)
        counts[f"{name}: flattering opening stripped"] += stripped != trimmed
        trimmed = stripped
    return trimmed + end


class Example(NamedTuple):
    ids: list
    weights: list  # of the loss on each token; 0 for what is only read


def make_example(tokenizer, family, row, objective):
    """The ids of a cleaned row, and where the loss is (see the top of this file)."""
    x = verify.chat_ids(tokenizer, verify.Problem.of_row(row))
    if objective == "rft":
        return Example(x + row["y_init_tokens"], [0] * len(x) + [1] * len(row["y_init_tokens"]))
    before = verify.revision_ids(tokenizer, x, row["y_init_tokens"], row["y_init_correct"], family)
    y = row["y_revised_tokens"]
    on_init, on_revised = {"generation": (1, 1), "revision": (0, 1), "sum": (1, 2)}[objective]
    return Example(before + y, [0] * len(x) + [on_init] * (len(before) - len(x)) + [on_revised] * len(y))


def read_examples(path, objective, stage2_size, tokenizer, family, max_len, seed, no_clean=False):
    """
    The stages of a run, [(name, [Example])], and counts of what was kept, cleaned and dropped.
    path: d_revision.jsonl, or responses.jsonl of srt.py. Ends the program when a stage is left without rows.
    """
    counts, seen, rows = Counter(), set(), []
    for line, row in verify.read_jsonl(path):
        if row.get("kind") == "revision":  # of responses.jsonl: only its y_init are read
            continue
        counts["rows read"] += 1
        verify.need(row, path, line, id=str, problem=str, y_init_tokens=list, y_init_correct=bool)
        p_r = family[row["y_init_correct"]]
        if row.get("p_r") not in (None, p_r):
            fail(f"{path}:{line}: P_r is {row['p_r']!r}, not {p_r!r} of --phrases {' | '.join(family)}; give the --phrases that srt.py had")
        if objective == "rft":
            usable = row["y_init_correct"]
        else:
            usable = row.get("y_revised_correct")
            if usable:
                verify.need(row, path, line, y_revised_tokens=list)
        if not usable:
            counts["dropped: y_init wrong" if objective == "rft" else "dropped: no right y_revised"] += 1
            continue
        row = dict(row)
        if not no_clean:
            row["y_init_tokens"] = clean(tokenizer, row["y_init_tokens"], counts, "y_init")
            if objective != "rft":
                row["y_revised_tokens"] = clean(tokenizer, row["y_revised_tokens"], counts, "y_revised", flattery=True)
        key = (row["problem"], tuple(row["y_init_tokens"]),
               None if objective == "rft" else tuple(row["y_revised_tokens"]))
        if key in seen:
            counts["dropped: duplicate"] += 1
            continue
        seen.add(key)
        ids = make_example(tokenizer, family, row, "rft" if objective == "rft" else "revision").ids
        if max(ids) >= len(tokenizer):
            fail(f"{path}:{line}: token id {max(ids)}, but --model has {len(tokenizer)} tokens; collect the data with this model")
        if len(ids) > max_len:
            counts["dropped: longer than --max_len"] += 1
            continue
        rows.append(row)
    random.Random(seed).shuffle(rows)
    if objective == "two-stage":
        wrong = [row for row in rows if not row["y_init_correct"]]
        right = [row for row in rows if row["y_init_correct"]][:stage2_size]
        filler = max(0, stage2_size - len(right))
        counts["stage 2: right y_init"], counts["stage 2: wrong y_init"] = len(right), len(wrong[:filler])
        counts["not used: right y_init over --stage2_size"] = sum(row["y_init_correct"] for row in rows) - len(right)
        stages = [("generation", wrong[filler:]), ("revision", right + wrong[:filler])]
    else:
        stages = [(objective, rows)]
    for number, (name, members) in enumerate(stages, 1):
        counts[f"stage {number}: {name}"] = len(members)
        if not members:
            fail(f"--data {path}: no rows for stage {number} ({name}); counts: {dict(counts)}; collect more"
                 + (f", or lower --stage2_size {stage2_size}" if objective == "two-stage" else ""))
    return [(name, [make_example(tokenizer, family, row, name) for row in members]) for name, members in stages], counts


# ---------------------------------------------------------------------------------------------------------- main


def cosine(step, steps, warmup=0.05):
    """Learning-rate factor: linear over the first 5 % of the steps, then half a cosine down to 0."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def add_training_flags(parser):
    """The flags that sft.py and distill.py share."""
    parser.add_argument("--micro_tokens", type=natural, default=16384, help="tokens of a packed micro-batch on one rank")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="of compute; default: bfloat16 on cuda, float32 on cpu")
    parser.add_argument("--attn", choices=("packed", "flash_attention_2"), default="packed", help="packed: torch's varlen_attn")
    parser.add_argument("--checkpointing", type=int, choices=(0, 1), help="1 (default on cuda): recompute activations; 0: "
                        "keep them, and gathered weights too: faster, and larger")
    parser.add_argument("--compile", type=int, choices=(0, 1), help="torch.compile each block; default: 1 on cuda")
    parser.add_argument("--phrases", type=verify.phrases_flag, help=verify.PHRASES_HELP)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh", action="store_true", help="start over; an old --out is renamed, not deleted")


def resolve_defaults(args, device):
    """Fills in the defaults that depend on the device, and says so."""
    cuda = device.type == "cuda"
    if cuda and args.dtype == "float32":
        fail("--dtype float32: the attention of packed rows takes bfloat16 on a GPU")
    args.dtype = getattr(torch, args.dtype or ("bfloat16" if cuda else "float32"))
    args.checkpointing = cuda if args.checkpointing is None else bool(args.checkpointing)
    args.compile = cuda if args.compile is None else bool(args.compile)
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} rank(s) on {device.type}: {args.dtype}, checkpointing {args.checkpointing}, "
              f"compile {args.compile}, attention {args.attn}", flush=True)


def parse_args():
    parser = argparse.ArgumentParser(description="SFT on D_revision (SRT, phase 1b).")
    parser.add_argument("--model", required=True, help="Hugging Face folder or hub name")
    parser.add_argument("--data", required=True, help="d_revision.jsonl (for rft also responses.jsonl) of srt.py")
    parser.add_argument("--out", required=True, help="folder: final/ (the model), state/, metrics.jsonl")
    parser.add_argument("--objective", choices=("two-stage", "sum", "generation", "revision", "rft"), default="two-stage")
    parser.add_argument("--stage2_size", type=natural, default=2000, help="tuples of stage 2, right y_init first")
    parser.add_argument("--epochs", type=natural, default=3)
    parser.add_argument("--batch", type=natural, default=4, help="sequences of a step, over all ranks")
    parser.add_argument("--max_len", type=natural, default=32768, help="rows longer than this or than the model takes are dropped")
    parser.add_argument("--lr", type=positive, default=5e-6)
    parser.add_argument("--stage2_lr", type=positive, help="default: --lr")
    parser.add_argument("--weight_decay", type=within(float, 0), default=1e-4)
    parser.add_argument("--clip", type=positive, default=1.0, help="largest gradient norm")
    parser.add_argument("--save_every", type=natural, default=100, help="steps between states to go on from")
    parser.add_argument("--no_clean", action="store_true", help="leave repeating tails and flattering openings")
    add_training_flags(parser)
    return verify.parse(parser)


def main():
    args = parse_args()
    ranks = verify.launch()
    tokenizer = verify.load_tokenizer(args.model)
    family = verify.phrases_of(args.model, args.phrases)
    max_len = min(args.max_len, verify.context_length(args.model))
    stages, counts = read_examples(args.data, args.objective, args.stage2_size, tokenizer, family, max_len, args.seed,
                                   args.no_clean)
    if ranks.rank == 0:
        print(f"phrases {' | '.join(family)}; " + ", ".join(f"{name} {n}" for name, n in counts.items() if n), flush=True)
    verify.open_out(args, ranks, FREE)
    if verify.finished(args.out, "final"):
        return dist.destroy_process_group()
    state, progress = last_progress(args.out)
    resolve_defaults(args, ranks.device)
    model = load_model(args.model, ranks, make_mesh(ranks), args.dtype, args.attn, checkpointing=args.checkpointing,
                       compile=args.compile)
    step_count = progress["step"] if progress else 0
    metrics = Metrics(args.out, step_count)
    saver = Saver(args.out, args.save_every, ranks.device)
    done_before = 0  # steps of the stages before this one

    for stage, (name, examples) in enumerate(stages, 1):
        per_epoch = math.ceil(len(examples) / args.batch)
        steps = args.epochs * per_epoch
        if done_before + steps <= step_count and stage < len(stages):
            done_before += steps
            continue  # a resumed run whose state is in a later stage
        optimizer = make_optimizer(model, args.weight_decay, betas=(0.9, 0.95))
        if state:
            load_state(state, training_state(model, optimizer))
            state = None
            if done_before == step_count:  # the state is the end of the stage before: this one starts with a new optimizer
                optimizer = make_optimizer(model, args.weight_decay, betas=(0.9, 0.95))
        saver.reserve(training_state(model, optimizer))
        base_lr = args.stage2_lr or args.lr if stage == 2 else args.lr

        for step in range(step_count - done_before, steps):
            started = time.time()
            order = list(range(len(examples)))
            random.Random(f"{args.seed}/{stage}/{step // per_epoch}").shuffle(order)
            at = step % per_epoch * args.batch
            batch = [examples[i] for i in order[at:at + args.batch]]  # the same on every rank
            normaliser = sum(w > 0 for example in batch for w in example.weights)
            mine = batch[ranks.rank::ranks.world]

            micro_batches = []
            for rows in same_number(pack([len(e.ids) for e in mine], args.micro_tokens), ranks.device):
                members = [mine[i] for i in rows] or [Example(batch[0].ids[:2], [0, 0])]  # a dummy of no weight fills up
                packed = make_batch([e.ids for e in members], ranks.device)
                weights = [w for e in members for w in e.weights[1:] + [0]]  # position t predicts token t + 1
                select = [t for t, w in enumerate(weights) if w] or [0]
                micro_batches.append((packed, torch.tensor(select).to(ranks.device),
                                      torch.tensor([float(weights[t]) for t in select]).to(ranks.device)))
            total = torch.zeros((), device=ranks.device)
            for packed, select, weights in micro_batches:
                # FSDP averages gradients over ranks; times world makes that a sum
                loss, _, _ = model(packed, select, lambda hidden, head: chunked_ce(
                    hidden, head, packed.ids[select + 1], weights * (ranks.world / normaliser)))
                loss.backward()
                total += loss.detach() / ranks.world
            lr = base_lr * cosine(step, steps)
            norm = optimizer_step(model, optimizer, lr, args.clip)
            dist.all_reduce(total)
            step_count += 1

            seconds = time.time() - started
            lengths = [len(e.ids) for e in batch]
            flops = 3 * forward_flops(model.config, lengths, normaliser)
            row = {"step": step_count - 1, "stage": stage, "objective": name, "loss": total.item(), "grad_norm": norm,
                   "lr": lr, "tokens": sum(lengths), "loss_tokens": normaliser, "seconds": seconds,
                   "tokens_per_s": sum(lengths) / seconds, "mfu": mfu(flops, seconds, ranks.world), **memory()}
            metrics.write(row)
            if ranks.rank == 0:
                print(f"stage {stage} step {step + 1}/{steps}  loss {row['loss']:.4f}  |g| {norm:.3f}  lr {lr:.2e}  "
                      f"{seconds:.2f} s  {row['tokens_per_s']:.0f} tok/s"
                      + (f"  mfu {row['mfu']:.1%}" if row["mfu"] else "") + f"  peak {row['peak_gb']:.2f} GiB, held {row['held_gb']:.2f}", flush=True)
            if saver.after_step(step_count, lambda: training_state(model, optimizer), {"step": step_count}):
                return dist.destroy_process_group()
        done_before += steps

    saver.wait()
    save_model(os.path.join(args.out, "final"), model, tokenizer, family, args.dtype)
    if ranks.rank == 0:
        verify.write_atomically(os.path.join(args.out, "summary.json"), json.dumps(
            {"counts": counts, "phrases": family, "steps": step_count, **vars(args), "dtype": str(args.dtype)}, indent=1))
        print(f"saved {args.out}/final")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
