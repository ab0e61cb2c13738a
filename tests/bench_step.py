"""
Training speed at the Qwen3-4B shape with random weights: model TFLOP/s (attention and head counted, recomputation not) and
peak memory of one SFT step (head, loss and optimizer included) and of one teacher forward (up to the hidden states) on
16,384 packed tokens in 4 rows.

    python tests/bench_step.py [--only "sft 1 1"] [--varied] [--state FOLDER]       # on a CPU: a tiny model
    torchrun --nproc_per_node 2 tests/bench_step.py
    python tests/bench_step.py --peer                   # distill.py against TRL's SDFT trainer, and srt.py's sampler
    python tests/bench_step.py --memory                 # what fits, by shape and length
    python tests/bench_step.py --make FOLDER            # the model alone, to run the real scripts at that size

What was tried (one H200, torch 2.11, transformers 5.17, vLLM 0.26, trl 1.16), and what it gave:
  checkpointing of whole compiled blocks: 346 model TFLOP/s, 75.4 GiB. The compiler's choice of what to recompute
    (activation_memory_budget 0.3) and fused AdamW: 406-412, 70.6 GiB; kept. No checkpointing: 458, 116 GiB; with
    AdamW that is not fused 435. Teacher forward: 512-525. Micro-batches of 8,192 tokens instead of 16,384: 368.
  attention with 8 heads of k and v as they are, not repeated to 32: 404 and 67.3 GiB, without checkpointing 455 and 109; kept for
    the memory. (Alone, compiled, forward and backward: 6.79 against 6.85 ms.)
  a profile of both steps: the GPU is busy 97.6 % of the time, the rest lies around the gradient norm, which the host reads. Of 975 ms
    without checkpointing, attention takes 277 (forward 70, backward 207), the optimizer with the norm and the clipping 46. With it the
    compiler took attention for free and computed it twice (72 forward kernels for 36 layers). Told what it costs, and that it
    may keep it (is_non_builtin_to_include), rows of 4,096 are as fast as before, 414 at 67.9 GiB, for it computes other things twice; a
    row of 16,384 takes 1.71 s (369 TFLOP/s), where by the kernels' times it would be 1.87 s; kept. With a budget of 0.4 instead of 0.3
    423 TFLOP/s and 74 GiB (before 414 and 74), with 0.5 438 and 80 (429 and 80).
  no checkpointing: weights that stay gathered after the forward pass: 457 -> 466, 6.9 GiB more; budget 0.85 instead of 1: the same
    speed, 16 GiB less; both kept: 468, 99.6 GiB, in a process of its own. (The row of this table read 459 and 114.7: 15.0 GiB
    more, the fp32 weights of the row before, which `free` has let go since; not seen again on a GPU.) The clipping inside of fused AdamW (its grad_scale): 0.5 % more; AdamW on
    local tensors instead of DTensors: 1 % less; neither kept.
  other kernels for attention, alone, 4 rows of 4,096, forward / backward: torch's varlen_attn 1.7 / 5.1 ms (322 / 271 TFLOP/s), twice
    as far from the peak as the matrix products. cuDNN by torch's _cudnn_attention_forward with row starts: 62 / 56 ms, its gradients
    are nan. FlashAttention 4 (4.0.0b18) by torch's activate_flash_attention_impl: torch 2.11 refuses the backward pass of packed rows. One H100,
    torch 2.13: forward 1.68 -> 0.94 ms, both 6.76 -> 3.88; out, dq, dk, dv 0.1 to 0.3 % apart, with a window of 1,024 too; a step of SFT
    with checkpointing 384 -> 432 TFLOP/s, the teacher 492 -> 541: kept, --flash 4. Its 4.0.0b36 returns more than torch 2.13 takes.
  torch.compile(layer.forward, dynamic=True) (one H100, torch 2.11, 0.6B: teacher and student with checkpointing, 14 steps of 16,384
    tokens, rows of other lengths in each): first step 97.0 s, another 15.0 s where a single row comes, 118 s in all, then 0.255 s a
    step. As it is: 22.4, 13.6, 2.4 and 8.7 s, 50 s in all, then 0.250; not kept.
  other row lengths in each step (--varied): 423 TFLOP/s (short rows have less attention), 5 graphs in all. distill.py with
    log-normal lengths made 5 graphs of a layer and 2 of the KL: a step that meets new lengths took up to 10 s longer.
  distill.py, 64 prompts x 2,048 tokens: packing fills 75 to 85 % of the token budget with rows of such lengths, 87 % with log-normal ones
    (128 of them: 93 %); what is not filled is not computed, so every slot is a token. All that the host sends to the device goes
    before the first micro-batch: 27.8 s a step as before.
  --peer, TRL in brackets, before the next three: 1,024 tokens each: generate 5.3 s (4.8), the rest 3.24 s (6.82): 0.73;
    log-normal lengths: 6.5 (5.5), 1.91 (10.51): 0.52. After: 5.2 (5.0), 3.27 (7.75): 0.67; 5.9 (5.5), 1.85 (10.56): 0.48.
    TRL asks vLLM for no log-probabilities; ours need them for the check of the weights' age: 4.87 against 4.73 s in 1,024 steps,
    of which vLLM's kernel 0.1 s: 115 us per step at 32 rows. The same kernel with tiles of 16,384 takes 22 us, log_softmax 58 us;
    not kept, it would be a patch of vLLM. srt.py asks for none: 128 x 512 tokens at 18.8k tok/s, with them 18.0k, bare 18.8k.
  vLLM asleep (level 2) while the student trains: 26.6 GiB less on the device in that part. To sleep takes 0.16 s, most of it
    Python's garbage collection, which walks through what torch.compile has made: gc.freeze after the first step saves that; kept.
    To wake and load: 0.2 s. torch's own peak goes on counting what sleeps: 117 GiB where the device had 96 in use, caches included.
  flat_logprobs in vLLM: generate 5.1 s as before; kept for the shorter code.
  two ranks, sft with checkpointing: 14.5k tok/s each against 14.8k of one rank: 1.95 x.
  a state (weights and AdamW, fp32) at 4B, 45.0 GiB: written in 31-43 s by a thread, loaded in 33 s. The loop waited 45.8 s for the
    first copy and 3.4 s for later ones; now memory is taken while the first step runs (6.9 s), and each copy takes 3.3-3.5 s.
"""
import argparse
import gc
import importlib.util
import json
import math
import random
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

sys.path.insert(0, str(Path(__file__).parents[1]))
import verify
from common import checkpoint, training
from common.metrics import Metrics, memory
from common.run import launch
from common.sampler import VLLMSampler
from kl import chunked_ce

SHAPES = {"tiny": (64, 128, 2, 4, 2, 16, 512), "0.6B": (1024, 3072, 28, 16, 8, 128, 151936), "1.7B": (2048, 6144, 28, 16, 8, 128, 151936),
          "4B": (2560, 9728, 36, 32, 8, 128, 151936), "8B": (4096, 12288, 36, 32, 8, 128, 151936)}


def make_shape(folder, shape):
    """A Qwen3 folder of a shape with random bf16 weights and a word-level tokenizer t0, t1, ... with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
    hidden, inner, layers, heads, kv_heads, head_dim, vocabulary = SHAPES[shape]
    special = ["<unk>", "<pad>", "<|im_end|>", "<|im_start|>"]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(special + [f"t{i}" for i in range(4, vocabulary)])},
                                         unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.WhitespaceSplit(), decoders.WordPiece(prefix="")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>", eos_token="<|im_end|>")
    tokenizer.chat_template = ("{% for m in messages %}<|im_start|> {{ m['content'] }} <|im_end|> {% endfor %}"
                               "{% if add_generation_prompt %}<|im_start|> {% endif %}")
    config = Qwen3Config(vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
                         num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim, bos_token_id=None,
                         tie_word_embeddings=shape != "8B", max_position_embeddings=40960, eos_token_id=2, pad_token_id=1,
                         rope_theta=5e6)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        torch.set_default_dtype(torch.bfloat16)
        model = Qwen3ForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def measure(step, batches, warm_up=2):
    """Seconds of step(batch), the mean over `batches` after the first few for warm-up, and peak GiB."""
    sync = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    for batch in batches[:warm_up]:
        step(batch)
    sync()
    memory()
    start = time.perf_counter()
    for batch in batches:
        step(batch)
    sync()
    return (time.perf_counter() - start) / len(batches), memory()["peak_gb"]


def host_syncs(f):
    """How often f makes the host wait for the GPU."""
    if not torch.cuda.is_available():
        return 0
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        f()
    torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def free():
    gc.collect()  # a model holds its forward, which holds the model
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def draw_lengths(number, longest, seed):
    """Lengths of responses: log-normal, median 600, 95 % below 2,000 (for `longest` 2,048; in proportion else)."""
    rng = random.Random(seed)
    return [max(1, min(longest, round(rng.lognormvariate(math.log(600), math.log(2000 / 600) / 1.645) * longest / 2048)))
            for _ in range(number)]


def time_state(folder, tensors, ranks):
    """Size of a training state, and seconds: that the loop waits for a save (twice), to write, to read."""
    saver, waits, writes = checkpoint.Saver(folder, 1, ranks.device), [], []
    for step in (0, 1):
        shutil.rmtree(saver.folder, ignore_errors=True)  # two of them may not fit on the disk
        dist.barrier()
        start = time.perf_counter()
        saver.save(step, tensors, {})
        waits.append(time.perf_counter() - start)
        saver.wait()
        writes.append(time.perf_counter() - start - waits[-1])
    start = time.perf_counter()
    dcp.load(tensors, checkpoint_id=checkpoint.states(saver.folder)[-1])
    loaded = time.perf_counter() - start
    if ranks.rank == 0:
        size = sum(f.stat().st_size for f in Path(checkpoint.states(saver.folder)[-1]).iterdir())
        print(f"state: {size / 2**30:.1f} GiB; the loop waits {waits[0]:.1f} and {waits[1]:.1f} s; "
              f"written in {writes[0]:.1f} and {writes[1]:.1f} s, loaded in {loaded:.1f} s", flush=True)


def compare_sampler(sampler, tokenizer, number=128, tokens=512):
    """
    Tokens per second of the sampler's stream, without log-probabilities (srt.py) and with (distill.py), and of a bare
    LLM.generate (no seed of a request's own either) on the same prompts. The better of two runs.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind
    prompts = torch.randint(1000, len(tokenizer), (number, 128)).tolist()

    def stream(top_p, logprobs=False):
        return sum(len(sample.ids) for sample in sampler.generate(prompts, range(number), max_tokens=tokens, top_p=top_p,
                                                                  logprobs=logprobs))

    def bare(top_p):
        params = SamplingParams(max_tokens=tokens, temperature=1.0, top_p=top_p, stop_token_ids=tokenizer.end_ids,
                                detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY)
        outputs = sampler.llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    for top_p in (1.0, 0.9):
        speed = {}
        for name, run in 2 * [("stream", stream), ("stream with log-probabilities", lambda p: stream(p, True)), ("bare", bare)]:
            sampler.llm.reset_prefix_cache()
            start = time.perf_counter()
            count = run(top_p)
            speed[name] = max(speed.get(name, 0), count / (time.perf_counter() - start))
        print(f"{number} prompts of 128, {tokens} tokens each, top_p {top_p}: " + ", ".join(
            f"{name} {value:.0f} tok/s" for name, value in speed.items())
            + f"; stream / bare {speed['stream'] / speed['bare']:.3f}", flush=True)


# ------------------------------------------------------------------------------------------------ what fits

BATCH, MICRO = 64, 16384


def measure_memory(length, student, teacher, optimizer, ranks):
    """
    Peak GiB of training in a step of distill.py, without vLLM: BATCH responses of `length` tokens after 128 of prompt. The
    student walks through two micro-batches; the teacher's hidden states of the other responses are there, but not computed.
    """
    import distill
    vocabulary, width = student.config.vocab_size, student.config.hidden_size
    number = max(2, math.ceil(2 * MICRO / (length + 128)))
    ids = lambda n: torch.randint(4, vocabulary, (n,)).tolist()
    rows = [distill.Row(ids(128), ids(length + 138), ids(length), [-12.0] * length, True, 1.0) for _ in range(number)]
    rows.append(distill.DUMMY)
    args = argparse.Namespace(micro_tokens=MICRO, kl="reverse", topk=0, compile=True)
    head = teacher.get_output_embeddings().weight.full_tensor()
    others = torch.empty((BATCH - number) * length, width, dtype=head.dtype, device=ranks.device)
    for _ in range(2):  # the second has the optimizer's moments from its start
        memory()
        states = distill.teacher_states(teacher, rows, MICRO, ranks.device)
        distill.student_pass(student, rows, states, head, number * length, args, ranks)
        training.optimizer_step(student, optimizer, 1e-6, 1.0)
    del others
    return memory()["peak_gb"]


def expected_memory(shape, length, gpus):
    """
    The same in GiB by a formula: 18 bytes per weight (fp32 weight, gradient and two moments, the teacher's bf16) over the
    GPUs; per vocabulary entry and hidden number 2 for the teacher's head and 4.7 in the KL; 1.4 GiB of its tiles; per token of a
    micro-batch and layer 2.3 bytes x (hidden + inner + heads x head_dim); the teacher's hidden states. The constants 4.7, 1.4
    and 2.3 are fitted to the measurements.
    """
    hidden, inner, layers, heads, kv_heads, head_dim, vocabulary = SHAPES[shape]
    layer = 2 * hidden * head_dim * (heads + kv_heads) + 3 * hidden * inner
    weights = layers * layer + vocabulary * hidden * (2 if shape == "8B" else 1)  # its head is not tied
    tokens = max(1, MICRO // (length + 128)) * (length + 128)
    return (18 * weights / gpus + 6.7 * vocabulary * hidden + 2.3 * tokens * layers * (hidden + inner + heads * head_dim)
            + 2 * BATCH / gpus * length * hidden) / 2**30 + 1.4


def memory_table(ranks):
    print(f"GiB per GPU while distill.py trains, {BATCH} responses per step, micro-batches of {MICRO} tokens, vLLM asleep")
    print("shape   response   one GPU, measured   by formula   two GPUs, by formula")
    for shape in ("0.6B", "1.7B", "4B", "8B"):
        models = None
        if torch.cuda.is_available() and expected_memory(shape, 2048, 1) < torch.cuda.mem_get_info()[0] / 2**30:
            folder, mesh = f"/tmp/bench-{shape}", training.make_mesh(ranks)
            if not Path(folder, "config.json").exists():
                make_shape(folder, shape)
            student = training.load_model(folder, ranks, mesh, torch.bfloat16, checkpointing=True, compile=True)
            teacher = training.load_model(folder, ranks, mesh, torch.bfloat16, trainable=False, compile=True)
            models = student, teacher, training.make_optimizer(student, 0.0, (0.9, 0.999))
        for length in (2048, 8192, 16384):
            measured = f"{measure_memory(length, *models, ranks):.1f}" if models else "-"
            print(f"{shape:7s} {length:8d} {measured:>19s} {expected_memory(shape, length, 1):12.1f} "
                  f"{expected_memory(shape, length, 2):22.1f}", flush=True)
        if models:
            del student, teacher, models
            free()
            torch._dynamo.reset()


# ------------------------------------------------------------------------------------------- against TRL's SDFT trainer
# Both train the 4B shape for five steps of 32 prompts of 128 tokens: three with responses of 1,024 tokens, two with
# log-normal lengths. The first word of a prompt tells its row, the row its length; nothing else is done to either.

STEPS, ROWS, MARK = ["equal"] * 3 + ["log-normal"] * 2, 32, 150_000


def peer_rows(words):
    """(prompt of `words` words, length of its response), in the order of use."""
    rng = random.Random(0)
    lengths = [1024] * (ROWS * STEPS.count("equal")) + draw_lengths(ROWS * STEPS.count("log-normal"), 2048, 1)
    return [(" ".join([f"t{MARK + row}"] + [f"t{rng.randrange(1000, MARK)}" for _ in range(words - 1)]), length)
            for row, length in enumerate(lengths)]


def length_of(rows, ids):
    return rows[next(i for i in ids if i >= MARK) - MARK][1]


def report_step(step, generate, training, seconds, peak):
    free, total = torch.cuda.mem_get_info()
    print("PEER " + json.dumps({"step": step, "lengths": STEPS[step], "generate": generate, "training": training,
                                "step seconds": seconds, "peak GiB": peak, "in use GiB": (total - free) / 2**30}), flush=True)


def ours_child(model):
    """distill.py itself, as a user runs it, but for the lengths and the order of the problems."""
    import distill
    folder = Path(tempfile.mkdtemp())
    tokenizer = verify.load_tokenizer(model)
    around = len(verify.chat_ids(tokenizer, verify.Problem("", "t9", ""))) - 1
    rows = peer_rows(128 - around)
    (folder / "data.jsonl").write_text("".join(
        json.dumps({"id": str(i), "problem": text, "answer": "3"}) + "\n" for i, (text, _) in enumerate(rows)))
    make_sampler = distill.make_sampler

    def make_and_compare(*how):
        sampler = make_sampler(*how)
        compare_sampler(sampler, tokenizer)
        return sampler

    distill.make_sampler = make_and_compare
    VLLMSampler.room = lambda self, ids, max_tokens: (
        length_of(rows, ids) if max(ids) >= MARK and len(ids) == 128 and max_tokens == 2048 else max_tokens)
    distill.step_problems = lambda step, batch, total, seed: list(range(step * batch, (step + 1) * batch))
    report = Metrics.report

    def report_both(self, title, row):
        report(self, title, row)
        report_step(row["step"], row["seconds_generate"] + row["seconds_sync"],
                    row["seconds_teacher"] + row["seconds_student"], row["seconds"], row["peak_gb"])

    Metrics.report = report_both
    sys.argv = ["distill.py", "--model", model, "--data", str(folder / "data.jsonl"), "--out", str(folder / "out"), "--steps",
                str(len(STEPS)), "--batch", str(ROWS), "--max_tokens", "2048", "--lr", "1e-6", "--vllm_memory", "0.2",
                "--max_sync_gap", "1", "--save_every", "100"]
    checkpoint.save_model = lambda *_: None  # the last thing it does; not part of a step
    distill.main()


def trl_child(model):
    """TRL's trainer on the same rows: exact reverse KL, bf16 over fp32 weights, checkpointing, vLLM in the same process."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer
    from vllm import LLM
    rows = peer_rows(125)
    rng = random.Random(1)
    data = Dataset.from_list([{"prompt": [{"role": "user", "content": text}], "privileged_context": " ".join(
        f"t{rng.randrange(1000, MARK)}" for _ in range(length + 10))} for text, length in rows])
    generate = LLM.generate

    def generate_to_length(self, prompts, sampling_params, **how):
        each = [sampling_params.clone() for _ in prompts]
        for params, prompt in zip(each, prompts):
            params.max_tokens = length_of(rows, prompt["prompt_token_ids"])
        return generate(self, prompts, sampling_params=each, **how)

    LLM.generate = generate_to_length
    clock = {}

    class Report(TrainerCallback):
        def on_step_begin(self, *_, **__):
            clock["start"] = time.perf_counter()

        def on_step_end(self, args, state, control, **_):
            torch.cuda.synchronize()
            seconds = time.perf_counter() - clock["start"]
            report_step(state.global_step - 1, clock["generate"], seconds - clock["generate"], seconds, memory()["peak_gb"])

    config = SDFTConfig(
        output_dir=tempfile.mkdtemp(), max_steps=len(STEPS), per_device_train_batch_size=2, gradient_accumulation_steps=ROWS // 2,
        num_generations=1, max_prompt_length=None, max_completion_length=2048, shuffle_dataset=False, temperature=1.0,
        use_vllm=True, vllm_mode="colocate", vllm_gpu_memory_utilization=0.2, vllm_max_model_length=4352,
        generation_kwargs={"ignore_eos": True}, distillation_mode="full_logits", distillation_alpha=1.0,
        distillation_is_clip=None, teacher_model_kind="base", bf16=True, gradient_checkpointing=True, learning_rate=1e-6,
        model_init_kwargs={"attn_implementation": "sdpa", "dtype": "float32"}, save_strategy="no", report_to=[])
    tokenizer = verify.load_tokenizer(model)
    tokenizer.padding_side = "left"
    trainer = SDFTTrainer(model=model, args=config, train_dataset=data, callbacks=[Report()], processing_class=tokenizer)
    inner = trainer._generate

    def timed(*how):
        start = time.perf_counter()
        out = inner(*how)
        torch.cuda.synchronize()
        clock["generate"] = time.perf_counter() - start
        return out

    trainer._generate = timed
    trainer.train()


def compare_with_trl(model, shape):
    if importlib.util.find_spec("trl") is None or importlib.util.find_spec("vllm") is None:
        return print("skipped: the comparison needs trl and vllm")
    if not Path(model, "config.json").exists():
        make_shape(model, shape)
    last = {}
    for name in ("ours", "TRL"):
        child = subprocess.Popen([sys.executable, __file__, "--child", name, "--model", model], stdout=subprocess.PIPE,
                                 text=True)
        for line in child.stdout:
            if line.startswith("PEER "):
                row = json.loads(line[5:])
                last[name, row["lengths"]] = row  # the last step of its kind counts: what compiles has compiled
            if line.startswith(("PEER", "128 prompts", "step ")):
                print(name, line, end="", flush=True)
        child.wait()
    for lengths in dict.fromkeys(STEPS):
        for key in ("generate", "training", "step seconds", "peak GiB", "in use GiB"):
            a, b = (last[name, lengths][key] if (name, lengths) in last else math.nan for name in ("ours", "TRL"))
            print(f"{lengths:12s} {key:16s} ours {a:7.2f}  TRL {b:7.2f}  ratio {a / b:.2f}", flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--make", metavar="FOLDER", help="write the model folder and stop")
    parser.add_argument("--model", help="folder to make, or to use if it is there; default: /tmp/bench-SHAPE")
    parser.add_argument("--shape", choices=SHAPES, default="4B" if torch.cuda.is_available() else "tiny")
    parser.add_argument("--rows", type=int, nargs="+", default=[4096] * 4 if torch.cuda.is_available() else [64] * 4)
    parser.add_argument("--only", nargs="+", default=["sft 1 1", "sft 0 1", "teacher 0 1"], help="'kind checkpointing compile'")
    parser.add_argument("--varied", action="store_true", help="rows of other lengths in each step, as many tokens as --rows")
    parser.add_argument("--flash", type=int, choices=(2, 4), default=2, help="FlashAttention")
    parser.add_argument("--peer", action="store_true", help="distill.py against TRL's SDFT trainer, and stop")
    parser.add_argument("--child", choices=("ours", "TRL"), help=argparse.SUPPRESS)
    parser.add_argument("--state", metavar="FOLDER", help="save and load the state of an sft row there too, timed")
    parser.add_argument("--memory", action="store_true", help="what fits: peak memory of training in distill.py, by shape, and stop")
    parser.add_argument("--repeats", type=int, default=4)
    args = parser.parse_args()
    args.model = args.model or f"/tmp/bench-{args.shape}"
    if args.make:
        return make_shape(args.make, args.shape)
    if args.peer:
        return compare_with_trl(args.model, args.shape)
    if args.child:
        return {"ours": ours_child, "TRL": trl_child}[args.child](args.model)
    if args.flash == 4:
        training.use_flash_4()
    ranks = launch()
    if args.memory:
        memory_table(ranks)
        return dist.destroy_process_group()
    if ranks.rank == 0 and not Path(args.model, "config.json").exists():
        make_shape(args.model, args.shape)
    dist.barrier()
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    if ranks.rank == 0:
        print(f"{args.shape}, rows {args.rows}, {ranks.world} rank(s), {dtype}, torch {torch.__version__}, "
              f"{torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'}")
        print(f"{'':28s} {'s':>8s} {'tok/s per rank':>15s} {'model TFLOP/s':>14s} {'MFU':>6s} {'peak GiB':>9s} {'graphs':>7s} {'syncs':>6s}")
    for what in args.only:
        kind, checkpointing, compile = what.split()[0], what.split()[1], what.split()[2] == "1"
        model = training.load_model(args.model, ranks, training.make_mesh(ranks), dtype, trainable=kind == "sft",
                                    checkpointing=checkpointing == "1", compile=compile)
        optimizer = training.make_optimizer(model, 0.0, (0.9, 0.95)) if kind == "sft" else None
        generator = torch.Generator().manual_seed(ranks.rank)
        batches = []
        for number in range(args.repeats):
            lengths = args.rows
            if args.varied:  # a bin of the right size, its rows of other lengths in each step
                lengths = draw_lengths(100, max(args.rows), f"{ranks.rank} {number}")
                lengths = lengths[:max(k for k in range(100) if sum(lengths[:k]) <= sum(args.rows))]
            batches.append(training.make_batch([torch.randint(4, model.config.vocab_size, (n,), generator=generator).tolist()
                                                for n in lengths], ranks.device))

        def micro_batch(batch):
            T = len(batch.ids)
            select = torch.arange(T, device=ranks.device)
            if kind == "teacher":
                with torch.no_grad():
                    return model(batch, select, lambda hidden, head: hidden)
            weights = torch.full((T,), 1 / T, device=ranks.device)
            targets = batch.ids.roll(-1)
            model(batch, select, lambda hidden, head: chunked_ce(hidden, head, targets, weights, compile=compile))[0].backward()

        def step(batch):
            micro_batch(batch)
            if optimizer:
                training.optimizer_step(model, optimizer, 1e-6, 1.0)

        seconds, peak = measure(step, batches, len(batches) if args.varied else 2)
        syncs = host_syncs(lambda: micro_batch(batches[0]))
        tokens = sum(len(batch.ids) for batch in batches) / len(batches)
        flops = (3 if kind == "sft" else 1) / len(batches) * sum(training.forward_flops(
            model.config, [b - a for a, b in zip(batch.segments, batch.segments[1:])],
            len(batch.ids) if kind == "sft" else 0) for batch in batches)
        share = training.mfu(flops, seconds, 1)
        if ranks.rank == 0:
            name = f"{kind}, checkpointing {checkpointing}, compile {int(compile)}"
            print(f"{name:28s} {seconds:8.3f} {tokens / seconds:15.0f} {flops / seconds / 1e12:14.1f} "
                  f"{f'{share:.1%}' if share else '-':>6s} {peak:9.1f} "
                  f"{torch._dynamo.utils.counters['stats']['unique_graphs']:7d} {syncs:6d}", flush=True)
        if args.state and kind == "sft":
            time_state(args.state, checkpoint.training_state(model, optimizer), ranks)
        del model, optimizer, micro_batch, step
        free()
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
