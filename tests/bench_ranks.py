"""
Tokens per second of srt.py and distill.py on one GPU and on several, each rank with the same work, and loss and gradient
norm of one fixed batch. The Qwen3-4B shape with random weights, vLLM, prompts of about 128 tokens; sft.py: bench_step.py.

    python tests/bench_ranks.py --ranks 1 2 [--only fixed srt distill]     # on a CPU: a tiny model, which shows that it runs

srt.py samples 128 prompts x 512 tokens per rank, distill.py makes steps of 32 prompts x 1,024 tokens per rank, of which
the last counts: what compiles has compiled.
"""
import argparse
import json
import random
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from bench_step import make_shape
from conftest import read, run

from common import training
from common.run import launch
from kl import chunked_ce

CUDA = torch.cuda.is_available()
SHAPE = "4B" if CUDA else "tiny"


def fixed_batch(model_folder):
    """Prints loss and gradient norm of eight rows of 512 tokens, whatever the ranks; run by each rank."""
    ranks = launch()
    model = training.load_model(model_folder, ranks, training.make_mesh(ranks), torch.bfloat16 if CUDA else torch.float32, checkpointing=True)
    rows = torch.randint(4, model.config.vocab_size, (8, 512), generator=torch.Generator().manual_seed(7)).tolist()
    batch = training.make_batch(rows[ranks.rank::ranks.world], ranks.device)
    select = (batch.positions < 511).nonzero()[:, 0]  # the end of a row predicts nothing: what follows depends on the ranks
    weights = torch.full((len(select),), ranks.world / (8 * 511), device=ranks.device)
    loss, _ = model(batch, select, lambda hidden, head: chunked_ce(hidden, head, batch.ids[select + 1], weights, compile=CUDA))
    loss.backward()
    norm = training.optimizer_step(model, training.make_optimizer(model, 0.0, (0.9, 0.95)), 0.0, 1.0)
    loss = loss.detach() / ranks.world
    dist.all_reduce(loss)
    if ranks.rank == 0:
        print(f"fixed batch on {ranks.world} rank(s): loss {loss.item():.6f}, gradient norm {norm:.6f}", flush=True)
    dist.destroy_process_group()


def show(done, start):
    for line in done.stdout.splitlines():
        if line.startswith(start):
            print(line, flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--only", nargs="+", choices=("fixed", "srt", "distill"), default=["fixed", "srt", "distill"])
    parser.add_argument("--model", default=f"/tmp/bench-{SHAPE}", help="folder to make, or to use if it is there")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--fixed", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.fixed:
        return fixed_batch(args.model)
    if CUDA and torch.cuda.device_count() < max(args.ranks):
        return print(f"skipped: --ranks {max(args.ranks)}, and this machine has {torch.cuda.device_count()} GPU(s)")
    if not Path(args.model, "config.json").exists():
        make_shape(args.model, SHAPE)
    per_rank, tokens, engine = ((128, 512), (32, 1024), []) if CUDA else ((16, 16), (8, 16), ["--engine", "hf"])
    folder, rng = Path(tempfile.mkdtemp()), random.Random(0)
    vocabulary = json.loads(Path(args.model, "config.json").read_text())["vocab_size"]
    (folder / "data.jsonl").write_text("".join(json.dumps({"id": str(i), "answer": "3", "problem": " ".join(
        f"t{rng.randrange(4, vocabulary)}" for _ in range(110))}) + "\n" for i in range(per_rank[0] * max(args.ranks))))
    common = ["--model", args.model, "--data", folder / "data.jsonl", *engine]
    speed = {}
    for ranks in args.ranks:
        if "fixed" in args.only:
            show(run("tests/bench_ranks.py", "--fixed", "--model", args.model, nproc=ranks), "fixed batch")
        if "srt" in args.only:
            out = folder / f"srt{ranks}"
            run("srt.py", *common, "--eval", "--max_problems", per_rank[0] * ranks, "--max_tokens", per_rank[1], "--out", out, nproc=ranks)
            summary = json.loads((out / "summary.json").read_text())
            speed["srt", ranks] = summary["tokens_per_second"]
            print(f"srt.py, {ranks} rank(s): {speed['srt', ranks]:.0f} tok/s, of each rank {summary['tokens_per_rank']}", flush=True)
        if "distill" in args.only:
            out = folder / f"distill{ranks}"
            show(run("distill.py", *common, "--batch", tokens[0] * ranks, "--max_tokens", tokens[1], "--steps", args.steps, "--lr", "1e-6",
                     "--vllm_memory", "0.2", "--max_sync_gap", "1", "--save_every", "1000", "--out", out, nproc=ranks), "step ")
            speed["distill", ranks] = read(out / "metrics.jsonl")[-1]["tokens_per_s"]
    for (script, ranks), value in speed.items():
        first = speed[script, args.ranks[0]]
        print(f"{script:8s} {ranks} rank(s) {value:10.0f} tok/s  {value / first:.2f} x {args.ranks[0]} rank(s)", flush=True)


if __name__ == "__main__":
    main()
