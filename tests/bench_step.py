"""
Training speed at the Qwen3-4B shape with random weights: model TFLOP/s (attention and head counted, recomputation not) and
peak memory of one SFT step and one teacher forward on 16,384 packed tokens in 4 rows, head and loss included.

    python tests/bench_step.py [--only sft teacher] [--shape 4B]         # needs a GPU
    torchrun --nproc_per_node 2 tests/bench_step.py

`make_shape` also serves by itself to run the real scripts at that size: python tests/bench_step.py --make FOLDER
"""
import argparse
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))
import sft
import verify
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


def measure(step, repeats):
    """Seconds of one step after two for warm-up, and peak GiB."""
    sync = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    step(), step(), sync()
    sft.peak_gb()
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    sync()
    return (time.perf_counter() - start) / repeats, sft.peak_gb()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--make", metavar="FOLDER", help="write the model folder and stop")
    parser.add_argument("--model", default="/tmp/bench-model", help="folder to make, or to use if it is there")
    parser.add_argument("--shape", choices=SHAPES, default="4B" if torch.cuda.is_available() else "tiny")
    parser.add_argument("--rows", type=int, nargs="+", default=[4096] * 4 if torch.cuda.is_available() else [64] * 4)
    parser.add_argument("--only", nargs="+", default=["sft 1 1", "sft 0 1", "teacher 0 1"], help="'kind checkpointing compile'")
    parser.add_argument("--repeats", type=int, default=4)
    args = parser.parse_args()
    if args.make:
        return make_shape(args.make, args.shape)
    ranks = verify.launch()
    if ranks.rank == 0 and not Path(args.model, "config.json").exists():
        make_shape(args.model, args.shape)
    dist.barrier()
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    if ranks.rank == 0:
        print(f"{args.shape}, rows {args.rows}, {ranks.world} rank(s), {dtype}, torch {torch.__version__}, "
              f"{torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'}")
        print(f"{'':28s} {'s':>8s} {'tok/s per rank':>15s} {'model TFLOP/s':>14s} {'MFU':>6s} {'peak GiB':>9s}")
    for what in args.only:
        kind, checkpointing, compile = what.split()[0], what.split()[1], what.split()[2] == "1"
        model = sft.load_model(args.model, ranks, sft.make_mesh(ranks), dtype, trainable=kind == "sft",
                               checkpointing=checkpointing == "1", compile=compile)
        optimizer = sft.make_optimizer(model, 0.0, (0.9, 0.95)) if kind == "sft" else None
        generator = torch.Generator().manual_seed(ranks.rank)
        batch = sft.make_batch([torch.randint(4, model.config.vocab_size, (n,), generator=generator).tolist()
                                for n in args.rows], ranks.device)
        T = len(batch.ids)
        select, targets = torch.arange(T, device=ranks.device), batch.ids.roll(-1)
        weights = torch.full((T,), 1 / T, device=ranks.device)

        def step():
            if kind == "teacher":
                with torch.no_grad():
                    return model(batch, select, lambda hidden, head: hidden)
            model(batch, select, lambda hidden, head: chunked_ce(hidden, head, targets, weights))[0].backward()
            sft.optimizer_step(model, optimizer, 1e-6, 1.0)

        seconds, peak = measure(step, args.repeats)
        flops = (3 if kind == "sft" else 1) * sft.forward_flops(model.config, args.rows, T if kind == "sft" else 0)
        share = sft.mfu(flops, seconds, 1)
        if ranks.rank == 0:
            print(f"{f'{kind}, checkpointing {checkpointing}, compile {int(compile)}':28s} {seconds:8.3f} {T / seconds:15.0f} "
                  f"{flops / seconds / 1e12:14.1f} {f'{share:.1%}' if share else '-':>6s} {peak:9.1f}", flush=True)
        del model, optimizer, step
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        torch._dynamo.reset()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
