"""
What training needs, whatever the loss: rows packed without padding, a model under FSDP2, an optimizer's step.

  packing   pack() puts rows into bins, make_batch() makes a Batch of one; packed_attention() keeps the rows
            of a batch apart
  model     load_weights(): as transformers has it; load_model() -> a model whose forward is
            packed_forward(batch, positions, loss): the loss gets the hidden states there and the whole head;
            full_tensors() gives its weights whole, one at a time
  step      make_optimizer(), optimizer_step(), keep_compiled()
  speed     forward_flops(), mfu()
  flags     add_training_flags(), settle_flags()
"""
import contextlib
import functools
import gc
import inspect
import itertools
import math
import os
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import torch
import torch._functorch.config
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry, register_flop_formula

import verify
from common.run import fail, natural, say
from common.tracker import TRACKER_HELP, TRACKERS, tracker_name

# ------------------------------------------------------------------------------------- rows without padding

# fewer heads of k and v than of q: torch 2.11 takes them without the flag
GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}

FLASH_4 = "4.0.0b18"  # later ones return more than torch 2.13 takes

if torch.ops.torch_attn._varlen_attn not in flop_registry:  # torch 2.11: it would seem free to compute again
    @register_flop_formula(torch.ops.torch_attn._varlen_attn)
    def attention_flops(q, k, v, starts_q, starts_k, longest, *_, **__):
        return 4 * math.prod(q) * longest  # q is a shape, (T, H, D); no mask, as torch counts


def packed_attention(module, q, k, v, attention_mask, scaling=None, sliding_window=None, starts=None,
                     longest=None, segments=None, **_):
    """
    Causal attention within each of the rows that are packed one after another; no row sees another.
    q [1, H, T, D]; k, v [1, H_kv, T, D]; row i starts at starts[i], on a CPU at segments[i]. With a
    sliding_window w a token sees w tokens, itself included. Returns ([1, T, H, D], None).
    """
    if segments is None:
        q, k, v = (a[0].transpose(0, 1) for a in (q, k, v))  # [T, H, D]
        window = (sliding_window - 1 if sliding_window else -1, 0)
        out = varlen_attn(q, k, v, starts, starts, longest, longest, scale=scaling, window_size=window,
                          **GROUPED)
        return out[None], None
    outs = []
    for start, stop in itertools.pairwise(segments):
        T, row = stop - start, [a[:, :, start:stop] for a in (q, k, v)]
        mask = torch.ones(T, T, dtype=torch.bool).tril().triu(1 - (sliding_window or T))
        outs.append(scaled_dot_product_attention(*row, attn_mask=mask, scale=scaling, enable_gqa=True))
    return torch.cat(outs, dim=2).transpose(1, 2), None


class Batch(NamedTuple):
    ids: torch.Tensor  # [T] the rows one after another
    positions: torch.Tensor  # [T] from 0 in each row
    starts: torch.Tensor  # [rows + 1], int32
    longest: int
    segments: list  # starts, as Python numbers


def make_batch(rows, device):
    """Packs rows (lists of token ids) into one Batch."""
    segments = [0, *itertools.accumulate(map(len, rows))]
    ids = torch.tensor([i for row in rows for i in row])
    positions = torch.tensor([i for row in rows for i in range(len(row))])
    starts = torch.tensor(segments, dtype=torch.int32)
    tensors = (a.to(device, non_blocking=True) for a in (ids, positions, starts))
    return Batch(*tensors, max(map(len, rows)), segments)


def pack(lengths, budget, device):
    """
    Row numbers in bins of at most `budget` tokens, by first fit, from longest to shortest; a longer row has
    its own. Empty bins follow until every rank has as many: all must enter each collective.
    """
    bins = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        b = next((b for b in bins if sum(lengths[j] for j in b) + lengths[i] <= budget), [])
        if not b:
            bins.append(b)
        b.append(i)
    most = torch.tensor(len(bins), device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return bins + [[] for _ in range(int(most) - len(bins))]


# ------------------------------------------------------------------------------------------------ the model


def installed_flash_4():
    """The version of flash-attn-4, or 'none'."""
    with contextlib.suppress(PackageNotFoundError):
        return version("flash-attn-4")
    return "none"


def use_flash_4():
    """packed_attention by FlashAttention 4 from here on; ends the program where that cannot be."""
    from torch.nn.attention import activate_flash_attention_impl
    there = installed_flash_4()
    major = torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else "none"
    if major not in (9, 10) or torch.__version__ < "2.13" or there != FLASH_4:
        fail("--flash 4 needs a GPU of compute capability 9 or 10 (H100, B200), torch 2.13 and flash-attn-4 "
             f"{FLASH_4} (pip install flash-attn-4=={FLASH_4}); here are {major}, torch {torch.__version__} "
             f"and flash-attn-4 {there}")
    activate_flash_attention_impl("FA4")


def make_mesh(ranks):
    """One node: shard over all ranks. Several: replicate across nodes, shard within each."""
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world))
    if ranks.world % per_node:
        fail(f"{ranks.world} ranks on nodes of {per_node}: every node must run as many")
    shape = ranks.world // per_node, per_node
    mesh = dist.init_device_mesh(ranks.device.type, shape, mesh_dim_names=("replicate", "shard"))
    return mesh["shard"] if shape[0] == 1 else mesh


def keep_compiled():
    """What torch.compile has made stays until the end: vLLM collects garbage and need not look there."""
    gc.collect()
    gc.freeze()


def load_weights(path, **how):
    """
    A causal LM as transformers loads it, with `how`. Ends the program where weights that its config wants are
    missing or of another shape: transformers would make them up, and only warn.
    """
    from transformers import AutoModelForCausalLM
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True,
                                                       ignore_mismatched_sizes=True, **how)
    made_up = sorted([*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])])
    if made_up:
        fail(f"model {path}: {len(made_up)} weights are missing or not of the shape that config.json says: "
             f"{', '.join(made_up[:3])}{', ...' * (len(made_up) > 3)}; give a whole model")
    return model


def check_ids(ids, vocabulary, where):
    """Ends the program, naming the place, if one of these is no token id of a model with so many tokens."""
    for i in ids:
        if type(i) is not int or not 0 <= i < vocabulary:
            fail(f"{where}: a token id is {i!r}, but the model's are 0 to {vocabulary - 1}; collect the data "
                 "with this model")


def unlike(model):
    """What a model does that packed_attention, packed_forward and the losses do not: names, sorted."""
    config = model.config.get_text_config()
    odd = {*(getattr(config, "layer_types", None) or ())} - {"full_attention", "sliding_attention"}
    for name in ("attn_logit_softcapping", "final_logit_softcapping", "logits_scaling", "logit_scale"):
        if getattr(config, name, None) not in (None, 1):
            odd.add(name)
    odd |= {name for name, _ in model.named_parameters() if name.endswith((".sinks", "lm_head.bias"))}
    return sorted(odd)


def load_model(path, ranks, mesh, dtype, trainable=True, checkpointing=False, compile=False,
               held=torch.float32):
    """
    A causal LM under FSDP2: weights held in `held`, gradients and their sums in fp32, compute in `dtype`.
    Its forward is packed_forward. Without checkpointing activations and gathered weights stay until backward.
    """
    from transformers import AttentionInterface
    AttentionInterface.register("packed", packed_attention)
    model = load_weights(path, attn_implementation="packed")
    if not hasattr(model.get_decoder(), "layers"):
        fail(f"model {path}: {type(model).__name__} has no decoder layers that take packed rows; give one "
             "built as Qwen, Llama or Olmo are")
    if odd := unlike(model):
        fail(f"model {path} has {', '.join(odd)}, which packed rows or the loss would leave out; give one "
             "built as Qwen, Llama or Olmo are")
    options = dict(mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32))
    torch._dynamo.config.recompile_limit = 64  # student, teacher, ranges of lengths share a layer's code
    if trainable:  # for the whole process: of a compiled block the compiler chooses what backward keeps,
        # within a share of the memory that all would take, attention too or not; 0.85 costs no time
        torch._functorch.config.activation_memory_budget = 0.3 if checkpointing else 0.85
        torch._functorch.config.is_non_builtin_to_include = checkpointing
    for layer in model.get_decoder().layers:
        if compile:
            layer.forward = torch.compile(layer.forward)
        elif checkpointing:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
        layer.to(ranks.device, held)
        fully_shard(layer, **options, reshard_after_forward=checkpointing or not trainable)
    for p in model.parameters():  # embedding, final norm and head; a tied head stays one tensor
        if not isinstance(p, DTensor):
            p.data = p.data.to(ranks.device, held)
    model.forward = functools.partial(packed_forward, model)
    fully_shard(model, **options, reshard_after_forward=None if trainable else True)
    return model.requires_grad_(trainable).train(trainable)


def packed_forward(model, batch, select, loss):
    """
    loss(hidden [n, H], head weight [V, H]) at the positions `select` [n] of a Batch. In here FSDP has the
    whole weight of the head at hand: outside it is a shard.
    """
    segments = None if batch.ids.is_cuda else batch.segments
    # not get_decoder()(...): where vLLM runs a model by transformers (Olmo 3), it has put its __call__ there
    hidden = torch.nn.Module.__call__(model.get_decoder(), input_ids=batch.ids[None], use_cache=False,
                                      position_ids=batch.positions[None], starts=batch.starts,
                                      longest=batch.longest, segments=segments).last_hidden_state[0]
    return loss(hidden[select], model.get_output_embeddings().weight)


def full_tensors(model, dtype):
    """(name, whole tensor in `dtype`) of every weight, in turn; all ranks must walk through them together."""
    for name, p in model.named_parameters():
        p = p.detach().to(dtype)
        yield name, p.full_tensor() if isinstance(p, DTensor) else p  # a forward pass leaves some whole


def make_optimizer(model, weight_decay, betas):
    return torch.optim.AdamW(model.parameters(), 0.0, betas, eps=1e-8, weight_decay=weight_decay, fused=True)


def optimizer_step(model, optimizer, lr, clip):
    """Clips the gradient norm, steps with this learning rate, clears gradients. Returns the norm before."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip).full_tensor().item()
    if not math.isfinite(norm):  # the same on every rank; a step would make every weight nan
        fail(f"the gradient norm is {norm}: no step was made; lower --lr and go on from the last whole state")
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return norm


# ---------------------------------------------------------------------------------------------------- speed

PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12}  # dense bf16


def forward_flops(config, lengths, head_tokens):
    """
    Floating-point operations of a forward pass over rows of these lengths, head at `head_tokens` positions:
    2 n per token for a matrix of n weights; 4 D per layer, head, query and key that it sees (q.k, sum of v).
    A training step is 3 times that; what is computed again is not counted.
    """
    c, flops = config, 2 * head_tokens * config.hidden_size * config.vocab_size
    D = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    qkvo = 2 * c.hidden_size * D * (c.num_attention_heads + c.num_key_value_heads)
    weights = qkvo + 3 * c.hidden_size * c.intermediate_size
    for kind in getattr(c, "layer_types", None) or ["full_attention"] * c.num_hidden_layers:
        for T in lengths:
            window = min(T, c.sliding_window) if kind == "sliding_attention" else T
            pairs = window * (window + 1) // 2 + (T - window) * window
            flops += 2 * weights * T + 4 * D * c.num_attention_heads * pairs
    return flops


def mfu(flops, seconds, world):
    """Share of the machine's peak, or None where the peak is not known (CPU)."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peak = next((peak for name, peak in PEAK_FLOPS.items() if name in gpu), None)
    return flops / seconds / world / peak if peak else None


# ---------------------------------------------------------------------------------------------------- flags


def add_training_flags(parser):
    """The flags that sft.py and distill.py share."""
    add, cuda = parser.add_argument, torch.cuda.is_available()
    add("--micro_tokens", type=natural, default=16384, help="tokens of a packed micro-batch on one rank")
    dtypes = ("bfloat16",) if cuda else ("float32", "bfloat16")  # a GPU's attention takes no other
    add("--dtype", choices=dtypes, default=dtypes[0], help="float32 only on a CPU; it is the default there")
    add("--checkpointing", type=int, choices=(0, 1), default=int(cuda), help="1 (default on cuda): recompute "
        "activations; 0: keep them, and gathered weights too: faster, and larger")
    add("--compile", type=int, choices=(0, 1), default=int(cuda), help="blocks and loss; default: 1 on cuda")
    add("--flash", type=int, choices=(2, 4), default=2, help="FlashAttention; for 4 see docs/performance.md")
    add("--phrases", type=verify.phrases_flag, help=verify.PHRASES_HELP)
    add("--seed", type=int, default=0)
    add("--tracker", type=tracker_name, choices=TRACKERS, help=TRACKER_HELP)
    add("--fresh", action="store_true", help="start over; an old --out is renamed, not deleted")


def settle_flags(args, device):
    """Makes args.dtype torch's and the switches bool, and says what holds on this device."""
    args.dtype = getattr(torch, args.dtype)
    args.checkpointing, args.compile = bool(args.checkpointing), bool(args.compile)
    if args.flash == 4:
        use_flash_4()
    say(f"{dist.get_world_size()} rank(s) on {device.type}: {args.dtype}, "
        f"checkpointing {args.checkpointing}, compile {args.compile}"
        + (f", FlashAttention {args.flash}" if device.type == "cuda" else ""))
