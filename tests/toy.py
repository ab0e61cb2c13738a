"""Make the toy: a base model and problems, from scratch, on a CPU, in two or three minutes.

    python tests/toy.py --out /tmp/toy            # base/, train.jsonl, val.jsonl, test.jsonl

Task: five steps of arithmetic mod 11, left to right. `4*3=?*5=?-2=?+2=?+5=?` is answered by
`4*3=1*5=5-2=3+2=5+5=10 \\boxed{10}`. The `=?` keep question and answer aligned, so that copying is a
constant offset; without them a model this small stays at chance.

The base corpus is true arithmetic plus popular misconceptions: 30 % of the 132 facts (a, op, b) have one
fixed wrong value, which a document states with probability 0.5-0.7. So the base model is wrong in the way
a real one is: confidently, on particular facts. A few documents go on after a wrong attempt with P_0
("Wait, ...") and a more careful attempt, or after a right one with P_1 and a copy: the ability to revise is
there, yet seldom used.

What it shows: that the loop runs and that SRT and self-distillation move the careful mode into the default.
What it does not: that revision can be learnt where the base has none (the corpus plants it), or that the
model can tell right from wrong (after P_0 it is careful whether or not the first attempt was wrong).
"""

import argparse
import json
import os
import re
import shutil
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import Olmo3Config, Olmo3ForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
import verify

MOD, STEPS, OPS = 11, 5, "+-*"
P_0 = "Wait, this response is wrong. Let me correct it."
P_1 = "Let me rephrase the above solution."
P_0_OLMO = "Wrong. I need to redo all."
# crc32 of the problem modulo 10 -> where it may appear; 3-9 belong to the base corpus. Not Python's hash:
# that one changes from process to process.
SPLITS = {"test": 0, "val": 1, "train": 2}

# A word carries its leading space, so decoding is plain concatenation.
PIECES = r"\n\n|\n| \\boxed\{|10|[0-9]| ?[A-Za-z]+|[^A-Za-z0-9]"

# The project appends an instruction to answer in \boxed{} (or in a fenced block); the toy always does, so that it would
# only cost tokens: the template leaves it out, and nothing else.
def literal(text):
    """A string as Jinja writes it."""
    return "'" + text.replace("\\", "\\\\").replace("\n", "\\n") + "'"


WITHOUT = "".join(f".replace({literal(chr(10) * 2 + verify.load_verifier(mode).INSTRUCTION)}, '')" for mode in ("math", "code"))
QWEN_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{{ m['content'] + '<|im_end|>' }}"
    "{% else %}{{ m['content']" + WITHOUT + " + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Olmo 3 does, a system turn comes first, so code with a hard-wired ChatML prompt fails here.
OLMO_SYSTEM = "I need to correct this."
OLMO_TEMPLATE = "{{ '<|im_start|>system\n" + OLMO_SYSTEM + "<|im_end|>\n' }}" + QWEN_TEMPLATE


def make_tokenizer(chat_template=QWEN_TEMPLATE):
    """A word-level tokenizer; decode(encode(text)) == text for all text of the task."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>"]
    words = ["\n\n", "\n", " \\boxed{", "}", "=", "?", *OPS, *map(str, range(MOD)), "user", "assistant", "system"]
    for phrase in (P_0, P_1, P_0_OLMO, OLMO_SYSTEM):
        words += re.findall(PIECES, phrase)
    vocab = {w: i for i, w in enumerate(dict.fromkeys(special + words))}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=special[0], eos_token=special[2], unk_token="<unk>",
        additional_special_tokens=[special[1]], clean_up_tokenization_spaces=False, chat_template=chat_template,
    )


def make_config(tokenizer, **overrides):
    """The toy Qwen3: 0.23 M parameters. head_dim 32 is the least that vLLM's CPU attention takes."""
    # initializer_range: with the usual 0.02 copying is found at step 150 to 350, by seed; with 0.1 or more
    # before 150. And random weights give distributions that are not flat, which the tests need.
    settings = dict(
        vocab_size=len(tokenizer), hidden_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, intermediate_size=256, max_position_embeddings=1024,
        tie_word_embeddings=True, initializer_range=0.15, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, dtype="float32",
    )
    return Qwen3Config(**{**settings, **overrides})


def save_model(folder, model, tokenizer):
    """Write a Hugging Face folder; generation ends at the end of a turn."""
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    transformers.utils.logging.disable_progress_bar()  # of writing one shard
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def tiny_qwen3(folder, tie=True, seed=0, **overrides):
    """Write a random-weight Qwen3 with the toy's tokenizer; returns the folder."""
    tokenizer = make_tokenizer()
    config = make_config(tokenizer, tie_word_embeddings=tie, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        save_model(folder, Qwen3ForCausalLM(config), tokenizer)
    return folder


def tiny_olmo3(folder, seed=0, **overrides):
    """Write a random-weight Olmo3, sliding and full attention, untied head; returns the folder."""
    tokenizer = make_tokenizer(OLMO_TEMPLATE)
    settings = dict(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=2, intermediate_size=128, max_position_embeddings=1024, sliding_window=16,
        layer_types=["sliding_attention"] * 3 + ["full_attention"], tie_word_embeddings=False,
        initializer_range=0.15, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        save_model(folder, Olmo3ForCausalLM(Olmo3Config(**{**settings, **overrides})), tokenizer)
    return folder


# Every kind of document, see make_documents, and its share of the documents.
MIX = {"1": 0.88, "P_0": 0.05, "P_1": 0.04, "P_0 P_1": 0.03}


def draw_problems(rng, n):
    """n problems as integers: start [N] in 2..5, operators [N, 5] in 0..2, operands [N, 5] in 2..5."""
    return rng.integers(2, 6, n), rng.integers(0, 3, (n, STEPS)), rng.integers(2, 6, (n, STEPS))


def problem_text(start, ops, operands):
    """One problem's integers as text; always 21 tokens, on which make_documents relies."""
    return f"{start}" + "".join(f"{OPS[o]}{b}=?" for o, b in zip(ops, operands))


def make_problem(rng):
    """One random problem, `4*3=?*5=?-2=?+2=?+5=?`, from a numpy Generator."""
    start, ops, operands = draw_problems(rng, 1)
    return problem_text(start[0], ops[0], operands[0])


def solve(problem):
    """The answer of a problem, as text."""
    value = int(problem[0])
    for op, b in re.findall(r"([-+*])(\d)", problem):
        value = {"+": value + int(b), "-": value - int(b), "*": value * int(b)}[op] % MOD
    return str(value)


def bucket(problem):
    """0 to 9, the same in every process; see SPLITS."""
    return zlib.crc32(problem.encode()) % 10


def make_split(rng, name, n):
    """n different problems of one split, as rows for a .jsonl file."""
    problems = {}  # a dict keeps the order in which they were drawn
    while len(problems) < n:
        texts = (problem_text(*p) for p in zip(*draw_problems(rng, 1000)))
        problems.update((text, solve(text)) for text in texts if bucket(text) == SPLITS[name])
    rows = list(problems.items())[:n]
    return [{"id": f"toy-{name}-{i}", "problem": p, "answer": a} for i, (p, a) in enumerate(rows)]


def make_world(rng):
    """The facts (a, op, b): what is true, what people say instead, and how often they say it."""
    a, b = np.arange(MOD)[:, None], np.arange(2, 6)[None]
    true = np.stack([a + b, a - b, a * b], 1) % MOD  # [11, 3, 4]: indexed by a, op, b - 2
    myth = (true + rng.integers(1, MOD, true.shape)) % MOD
    # Exactly 30 %: drawn one by one, their number alone moves the base accuracy by +- .05 between seeds.
    popular = rng.permutation(np.arange(true.size) < 0.3 * true.size).reshape(true.shape)
    error = np.where(popular, rng.uniform(0.5, 0.7, true.shape), 0.02)
    return true, myth, popular, error


def attempts(rng, world, problems, care=1.0):
    """Values of the five steps, [N, 5], every error rate multiplied by `care`, and whether the last is right."""
    true, myth, popular, error = world
    value = truth = problems[0]
    values = []
    for op, b in zip(problems[1].T, problems[2].T):
        truth, fact = true[truth, op, b - 2], (value, op, b - 2)
        slip = (true[fact] + rng.integers(1, MOD, len(op))) % MOD  # an unpopular error is a different one each time
        wrong = np.where(popular[fact], myth[fact], slip)
        value = np.where(rng.random(len(op)) < error[fact] * care, wrong, true[fact])
        values.append(value)
    return np.stack(values, 1), value == truth


def make_documents(rng, world, tokenizer, kind, n):
    """Token ids [n, L] of n documents of one kind, and the length of the prompt, which all share.

    Kinds: "1" one attempt; "P_0" wrong, P_0, careful attempt; "P_1" right, P_1, copy; "P_0 P_1" both.
    """
    # More than needed: only attempts that fit the kind, on problems of no split, are kept.
    problems = draw_problems(rng, 2 * n + 100 if kind == "1" else 8 * n + 100)
    first, right = attempts(rng, world, problems)
    second, right_second = attempts(rng, world, problems, care=0.35)
    keep = {"1": right | True, "P_0": ~right, "P_1": right, "P_0 P_1": ~right & right_second}[kind]
    keep[keep] = [bucket(problem_text(*p)) not in SPLITS.values() for p in zip(*(x[keep] for x in problems))]
    start, ops, operands, first, second = (x[keep][:n] for x in (*problems, first, second))

    number = np.array(tokenizer.convert_tokens_to_ids([str(i) for i in range(MOD)]))
    ids = lambda text: tokenizer(text).input_ids
    column = lambda text: np.tile(ids(text), (len(start), 1))
    op_ids = np.array(tokenizer.convert_tokens_to_ids(list(OPS)))[ops]

    def chain(values):  # values [n, 5] ids -> 4*3=1*5=5...: [n, 21]
        steps = np.stack([op_ids, number[operands], np.full_like(ops, ids("=")[0]), values], 2)
        return np.concatenate([number[start][:, None], steps.reshape(len(start), -1)], 1)

    def attempt(values):
        return [chain(number[values]), column(" \\boxed{"), number[values[:, -1:]], column("}")]

    before, after = tokenizer.apply_chat_template(
        [{"role": "user", "content": "?"}], add_generation_prompt=True, tokenize=False
    ).split("?")
    prompt = [column(before), chain(np.full_like(ops, ids("?")[0])), column(after)]
    turn = attempt(first)
    if "P_0" in kind:
        turn += [column(f"\n\n{P_0}\n\n"), *attempt(second)]
    if "P_1" in kind:
        turn += [column(f"\n\n{P_1}\n\n"), *attempt(second if "P_0" in kind else first)]
    return np.concatenate(prompt + turn + [column("<|im_end|>")], 1), sum(p.shape[1] for p in prompt)


def train(tokenizer, rng, steps=400, batch=128, lr=6e-3):
    """The base model: Qwen3 on `steps` batches of `batch` documents, loss on the assistant's tokens."""
    # A step is two groups: one attempt, and one of the longer kinds. Within a group all lengths are equal, so
    # there is no padding and no mask. Some of the longer kind in each step: as whole batches, now and then,
    # they were not learnt.
    several = [kind for kind in MIX if kind != "1"]
    share = np.array([MIX[kind] for kind in several])
    n_several = round(batch * share.sum())
    kinds = rng.choice(several, steps, p=share / share.sum())
    world = make_world(rng)
    corpus = {}
    for kind in MIX:
        size = batch - n_several if kind == "1" else n_several
        count = steps if kind == "1" else int((kinds == kind).sum())
        ids, prompt = make_documents(rng, world, tokenizer, kind, size * count)
        corpus[kind] = iter(torch.from_numpy(ids).split(size))  # [size, L] each

    model = Qwen3ForCausalLM(make_config(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    began = time.time()
    for step, kind in enumerate(kinds):
        scale = min(1, (step + 1) / 50, (steps - step) / (0.4 * steps))
        for group in optimizer.param_groups:
            group["lr"] = lr * scale
        groups = [next(corpus["1"]), next(corpus[kind])]
        n_tokens = sum(ids[:, prompt:].numel() for ids in groups)
        losses = []
        for ids in groups:
            hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state  # [size, L-1, 96]
            logits = model.lm_head(hidden[:, prompt - 1 :])  # [size, L-prompt, V]
            loss = F.cross_entropy(logits.flatten(0, 1), ids[:, prompt:].flatten(), reduction="sum")
            (loss / n_tokens).backward()
            losses.append(loss.item() / ids[:, prompt:].numel())
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 49 or step == steps - 1:
            text = f"loss {losses[0]:.3f} (one attempt) {losses[1]:.3f} ({kind})"
            print(f"step {step + 1}/{steps}  {text}  {time.time() - began:.0f} s", flush=True)
    return model.eval()


@torch.no_grad()
def sample(model, tokenizer, prompts, max_new=96):
    """One answer to each prompt (a list of ids) at temperature 1: a list of ids, end of turn included."""
    width, pad, eos = max(map(len, prompts)), tokenizer.pad_token_id, tokenizer.eos_token_id
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])  # [N, width], padded on the left
    out = model.generate(
        input_ids=ids, attention_mask=(ids != pad).long(), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        max_new_tokens=max_new,
    )[:, width:].tolist()
    return [o[: o.index(eos) + 1] if eos in o else o for o in out]


def measure(model, tokenizer, rows):
    """Accuracies of the final \\boxed{} at temperature 1, of first attempts and after P_r, as a dict."""
    eos = tokenizer.eos_token_id
    boxed = lambda ids: (re.findall(r"\\boxed\{(\d+)\}", tokenizer.decode(ids)) or [None])[-1]
    chats = [[{"role": "user", "content": row["problem"]}] for row in rows]
    prompts = tokenizer.apply_chat_template(chats, add_generation_prompt=True)["input_ids"]
    first = sample(model, tokenizer, prompts)
    right = np.array([boxed(y) == r["answer"] for y, r in zip(first, rows)])
    wait = tokenizer.convert_tokens_to_ids("Wait")
    result = {
        "accuracy": right.mean(),
        "length": np.mean([len(y) for y in first]),  # tokens, end of turn included
        "says_wait": np.mean([wait in y for y in first]),
    }
    cases = {"P_0 after wrong": (P_0, ~right), "P_1 after right": (P_1, right), "P_0 after right": (P_0, right)}
    for name, (phrase, which) in cases.items():
        control, keep = tokenizer(f"\n\n{phrase}\n\n").input_ids, np.flatnonzero(which)
        if len(keep):
            again = sample(model, tokenizer, [prompts[i] + [t for t in first[i] if t != eos] + control for i in keep])
            result[name] = np.mean([boxed(y) == rows[i]["answer"] for y, i in zip(again, keep)])
    return {name: round(float(value), 3) for name, value in result.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder to write base/ and the three .jsonl files to")
    parser.add_argument("--seed", type=int, default=0, help="of facts, corpus, weights and problems")
    parser.add_argument("--steps", type=int, default=400, help="training steps of the base model")
    parser.add_argument("--n_train", type=int, default=6144, help="problems in train.jsonl")
    parser.add_argument("--n_val", type=int, default=256, help="problems in val.jsonl")
    parser.add_argument("--n_test", type=int, default=1000, help="problems in test.jsonl")
    parser.add_argument("--threads", type=int, default=1, help="two are 1.5 times as fast if idle, far slower if not")
    args = parser.parse_args()

    base = os.path.join(args.out, "base")
    sizes = {"train": args.n_train, "val": args.n_val, "test": args.n_test}
    files = {name: os.path.join(args.out, f"{name}.jsonl") for name in sizes}
    if all(map(os.path.exists, [base, *files.values()])):
        print(f"{args.out} is complete, nothing to do; delete it to make another")
        return
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    tokenizer = make_tokenizer()

    os.makedirs(args.out, exist_ok=True)
    for stale in (base, base + ".tmp"):  # left by a run that was killed, perhaps with another seed
        shutil.rmtree(stale, ignore_errors=True)
    for name, n in sizes.items():
        rows = make_split(rng, name, n)
        with open(files[name] + ".tmp", "w") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)
        os.replace(files[name] + ".tmp", files[name])

    model = train(tokenizer, rng, args.steps)
    began = time.time()
    result = measure(model, tokenizer, make_split(rng, "val", 500))
    print(f"500 validation problems, temperature 1, {time.time() - began:.0f} s: {json.dumps(result)}")
    if result.get("P_0 after wrong", 0) < 0.3:
        raise SystemExit(
            f"--seed {args.seed} --steps {args.steps}: accuracy of P_0 after wrong is below 0.3, so self-revision"
            " training would have little to learn from; try another --seed or more --steps"
        )
    # base/ is renamed last and whole: where it exists everything does.
    save_model(base + ".tmp", model, tokenizer)
    os.rename(base + ".tmp", base)


if __name__ == "__main__":
    main()
