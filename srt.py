"""
Phase 1a of SD-Zero: sample, judge, revise, judge, keep -> D_revision. With --eval the same loop evaluates.

  for each problem x
    1. y_init ~ pi(. | x)                            --num_responses
    2. r = 1 if the verifier calls y_init right, else 0
    3. P_r tells the outcome: "Wait, this response is wrong. ..." or "Let me rephrase ..."
    4. y_revised ~ pi(. | x, y_init, P_r)            --num_revisions
    5. keep (x, y_init, P_r, y_revised) if y_revised is right, up to --target

Departures from the official code: every GPU samples, problem by problem; verdicts come in meanwhile; each
response is on disk once it is judged, so the same command goes on after a kill; no text is tokenised again.

    python srt.py --model Qwen/Qwen3-4B-Instruct-2507 --data open-r1/OpenR1-Math-220k --range 0:10000 \\
        --out runs/collect
    torchrun --nproc_per_node 8 srt.py ... the same
    python srt.py --eval --model runs/sdzero/final --data aime24.jsonl --num_responses 8 --temperature 0.7 \\
        --max_tokens 32768 --out runs/aime
"""
import argparse
import asyncio
import contextlib
import gc
import glob
import importlib.util
import json
import math
import os
import sys
import time
import zlib
from collections import Counter, defaultdict, deque
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import verify
from common import run
from common.run import fail, natural, positive, share, within

# flags that a run that goes on may change: they decide neither what is asked nor how it is sampled
FREE = "target engine dtype vllm_memory judge_seconds unsafe_no_sandbox"

# ------------------------------------------------------------------------------------------------ samplers
# Two engines, one interface:
#   stream(pull, ...)       yields a Sample as soon as it is finished; `pull()` gives the next Request, or
#                           None for now; logprobs=False where the caller needs none: vLLM is faster then
#   generate(prompts, ...)  the Samples of a list of prompts, in order
#   load(named_tensors)     new weights, named as in the checkpoint
#   max_seqs, max_len       how many are sampled at once; tokens of prompt and response together


class Request(NamedTuple):
    key: object  # the caller's own
    ids: list  # prompt token ids
    seed: int  # of this request alone: its sample does not depend on what else is in the batch


class Sample(NamedTuple):
    request: Request
    ids: list  # sampled token ids, end-of-turn included if it was sampled
    logprobs: list  # log pi(token) of each, at temperature 1 over the whole vocabulary, if asked for
    truncated: bool  # ended by max_tokens or the model's length, not by an end-of-turn


def hand_out(prompts, seeds):
    """A `pull` for these prompts; their numbers are the keys."""
    requests = iter([Request(i, ids, seed) for i, (ids, seed) in enumerate(zip(prompts, seeds, strict=True))])
    return lambda: next(requests, None)


class Sampler:
    def generate(self, prompts, seeds, **how):
        return sorted(self.stream(hand_out(prompts, seeds), **how), key=lambda sample: sample.request.key)

    def sleep(self):
        """Gives back the GPU's memory until the next `load`, where the engine can."""

    def room(self, ids, max_tokens):
        """How many tokens may follow a prompt."""
        return min(max_tokens, self.max_len - len(ids))


class HFSampler(Sampler):
    """transformers, for machines without vLLM: batched, KV-cached, finished rows dropped from the batch."""

    def __init__(self, model, tokenizer, max_len, device, dtype, max_seqs=256):
        from transformers import AutoModelForCausalLM
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(device).eval()
        self.end_ids = tokenizer.end_ids
        self.device, self.max_seqs = device, max_seqs
        self.max_len = min(max_len, verify.context_length(model))

    def stream(self, pull, max_tokens, temperature=1.0, top_p=1.0, logprobs=True):
        while batch := [r for r in (pull() for _ in range(self.max_seqs)) if r is not None]:
            yield from self.sample(batch, max_tokens, temperature, top_p)

    @torch.no_grad()
    def sample(self, requests, max_tokens, temperature, top_p):
        from transformers import DynamicCache
        width = max(len(r.ids) for r in requests)
        padding = [[0] * (width - len(r.ids)) for r in requests]
        ids = torch.tensor([left + r.ids for left, r in zip(padding, requests)], device=self.device)  # [B, T]
        mask = torch.tensor([left + [1] * (width - len(left)) for left in padding], device=self.device)
        position = (mask.cumsum(-1) - 1).clamp(min=0)
        cache = DynamicCache(config=self.model.config)
        noise = [np.random.Generator(np.random.Philox(r.seed)) for r in requests]
        tokens, logps = [[] for _ in requests], [[] for _ in requests]
        live = list(range(len(requests)))  # rows of the batch -> requests
        while live:
            logits = self.model(ids, attention_mask=mask, position_ids=position, past_key_values=cache,
                                logits_to_keep=1).logits[:, -1].float()  # [B, V]
            uniform = torch.tensor([noise[i].random() for i in live], dtype=torch.double, device=self.device)
            token = pick(logits, uniform, temperature, top_p)
            logp = logits.log_softmax(-1).gather(1, token[:, None])[:, 0]
            for i, a, b in zip(live, token.tolist(), logp.tolist()):
                tokens[i].append(a)
                logps[i].append(b)
            rows = [row for row, i in enumerate(live) if tokens[i][-1] not in self.end_ids
                    and len(tokens[i]) < self.room(requests[i].ids, max_tokens)]  # that go on
            if len(rows) < len(live):
                live = [live[row] for row in rows]
                token, position, mask = token[rows], position[rows], mask[rows]
                cache.batch_select_indices(torch.tensor(rows, dtype=torch.long, device=self.device))
            ids, position = token[:, None], position[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(live), 1)], dim=1)
        for request, y, logp in zip(requests, tokens, logps):
            yield Sample(request, y, logp, y[-1] not in self.end_ids)

    @torch.no_grad()
    def load(self, named_tensors):
        parameters = dict(self.model.named_parameters())
        for name, tensor in named_tensors:
            parameters[name].copy_(tensor)

    def close(self):
        del self.model


def pick(logits, uniform, temperature, top_p):
    """
    One token per row of logits [B, V], by inverting the cumulative distribution at `uniform` [B] in [0, 1):
    the same number gives the same token whatever the batch. top_p keeps the fewest most likely tokens whose
    mass reaches it.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probs = (logits.double() / temperature).softmax(-1)
    order = None
    if top_p < 1:
        probs, order = probs.sort(-1, descending=True)
        probs = probs * (probs.cumsum(-1) - probs < top_p)
    cdf = probs.cumsum(-1)
    index = torch.searchsorted(cdf, uniform[:, None].to(cdf) * cdf[:, -1:], right=True)
    index = index.clamp(max=cdf.shape[1] - 1)
    return (index if order is None else order.gather(1, index))[:, 0]


class VLLMSampler(Sampler):
    """vLLM in this process, an engine per rank; `step()` by hand, so that samples come out as they end."""

    def __init__(self, model, tokenizer, max_len, device, dtype, memory=0.85, max_seqs=256, eager=False):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process: weights go in by reference
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
        from vllm import LLM
        self.max_len = min(max_len, verify.context_length(model))
        self.max_seqs, self.on_cpu, self.asleep = max_seqs, device.type == "cpu", False
        self.end_ids = tokenizer.end_ids
        # on a CPU chunked prefill and a request's seed do not go together (vLLM 0.32), and nothing can sleep
        whole_prompts = dict(enable_chunked_prefill=False, max_num_batched_tokens=max(8192, self.max_len))
        self.llm = LLM(
            model, tensor_parallel_size=1, max_model_len=self.max_len, max_num_seqs=max_seqs, seed=0,
            dtype=str(dtype).removeprefix("torch."), gpu_memory_utilization=memory, generation_config="vllm",
            enforce_eager=eager or self.on_cpu,
            **(whole_prompts if self.on_cpu else {"enable_sleep_mode": True}),
            distributed_executor_backend="external_launcher" if dist.get_world_size() > 1 else None)

    def stream(self, pull, max_tokens, temperature=1.0, top_p=1.0, logprobs=True):
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind
        engine, flying, counter = self.llm.llm_engine, {}, 0
        while True:
            while len(flying) < self.max_seqs and (request := pull()) is not None:
                params = SamplingParams(
                    max_tokens=self.room(request.ids, max_tokens), temperature=temperature, top_p=top_p,
                    seed=request.seed, stop_token_ids=self.end_ids, detokenize=False, flat_logprobs=True,
                    logprobs=0 if logprobs else None, output_kind=RequestOutputKind.FINAL_ONLY)
                engine.add_request(str(counter), {"prompt_token_ids": request.ids}, params)
                flying[str(counter)] = request
                counter += 1
            if not flying:
                return
            for output in engine.step():
                if output.finished:
                    y = output.outputs[0]
                    yield Sample(flying.pop(output.request_id), list(y.token_ids),
                                 list(y.logprobs.logprobs) if logprobs else [], y.finish_reason == "length")

    def sleep(self):
        if not self.on_cpu:
            self.llm.sleep(level=2)  # weights and cache are dropped: `load` brings the weights anew
            self.asleep = True

    def load(self, named_tensors):
        if self.asleep:
            torch.cuda.empty_cache()  # or what training has used and freed would be missing here
            self.llm.wake_up()
            self.asleep = False
        if self.on_cpu:  # the CPU back end repacks weights after loading; a reload undoes and redoes that,
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": named_tensors})
            # but for the packed copy of a tied head, which would keep the old weights
            self.llm.apply_model(lambda m: m.lm_head.quant_method.process_weights_after_loading(m.lm_head))
        else:
            self.llm.apply_model(lambda model: len(model.load_weights(named_tensors)))
        self.llm.reset_prefix_cache()  # it holds keys and values of the old weights

    def close(self):
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm


def make_sampler(engine, model, tokenizer, max_len, device, dtype, vllm_memory):
    """The engine that --engine names: 'vllm', 'hf', or None for vllm where it is installed and else hf."""
    if (engine or ("vllm" if importlib.util.find_spec("vllm") else "hf")) == "vllm":
        return VLLMSampler(model, tokenizer, max_len, device, dtype, vllm_memory)
    return HFSampler(model, tokenizer, max_len, device, dtype)


def engine_name(text):
    """The argparse type of --engine."""
    if text == "vllm" and importlib.util.find_spec("vllm") is None:
        raise argparse.ArgumentTypeError("vLLM is not installed; install requirements.txt or use --engine hf")
    return text


def check_lengths(model, prompts, max_tokens):
    """The longest prompt's length; ends the program where the model cannot take it, or never --max_tokens."""
    limit, longest = verify.context_length(model), max(map(len, prompts))
    if max_tokens > limit:
        fail(f"--max_tokens {max_tokens}: --model {model} takes {limit} tokens with the prompt; lower it")
    if longest >= limit:
        fail(f"--data: a prompt has {longest} tokens but --model {model} takes {limit}; drop it with --range")
    return longest


def request_seed(*parts):
    """A 31-bit seed from what identifies a sample, the same whatever the process and the number of ranks."""
    return zlib.crc32("|".join(map(str, parts)).encode()) & 0x7FFFFFFF


class Progress:
    """A line on rank 0's stderr: in a terminal it stays in its place, elsewhere there is one a minute."""

    def __init__(self, ranks, problems, target):
        self.ranks, self.problems, self.target, self.tokens = ranks, problems, target, 0
        self.right, self.started, self.shown = defaultdict(list), time.time(), time.time()

    def judged(self, y, row, tokens=0):
        """A verdict on this rank's y_init or y_revised, for which this run has sampled so many tokens."""
        self.right[y].append(row[f"{y}_correct"])
        self.tokens += tokens
        if time.time() - self.shown > (0.5 if sys.stderr.isatty() else 60):
            self.show()

    def show(self, end=""):
        self.shown = time.time()
        if self.ranks.rank:
            return
        count = lambda name: self.ranks.store.add(name, 0)
        seconds, taken = max(1e-3, time.time() - self.started), min(count("taken"), self.problems)
        time_left = tqdm.format_interval(seconds / taken * (self.problems - taken)) if taken else "?"
        line = f"problems {taken}/{self.problems} [{tqdm.format_interval(seconds)}<{time_left}]"
        if self.target is not None:
            line += f"  kept {count('kept')}" + f"/{self.target}" * (self.target > 0)
        line += "".join(f"  {y[2:]} {mean(right):.3f}" for y, right in sorted(self.right.items()))
        line = f"{line}  {self.tokens / seconds:.0f} tok/s/rank"[:100]
        print(f"\r\033[K{line}{end}" if sys.stderr.isatty() else line, file=sys.stderr, flush=True,
              end="" if sys.stderr.isatty() else "\n")


def close(judge, sampler):
    """Ends a script's workers, its engine and its process group, which vLLM may have taken down already."""
    gc.unfreeze()  # vLLM and distill.py freeze; at the end triton's bindings would report it as leaked
    dist.barrier()
    judge.close()
    sampler.close()
    if dist.is_initialized():
        dist.destroy_process_group()


def serve(coroutines, waiting, judging, stopped, sampler, **how):
    """
    Runs coroutines until all have ended or stopped() is true. What they ask for they put into `waiting`, as
    Requests whose keys are futures of Samples, and the futures of verdicts into `judging`; these are awaited
    before it stops. Returns how many tokens were sampled; raises what they raise.
    """
    tokens = 0
    with asyncio.Runner() as runner:
        create_task = runner.get_loop().create_task
        everything = asyncio.gather(*map(create_task, coroutines))

        def pull():
            """Lets all go on whose sample or verdict has come; gives what one of them asks for next."""
            runner.run(asyncio.sleep(0))
            return waiting.popleft() if waiting else None

        while not everything.done() and not stopped():
            for sample in sampler.stream(pull, **how):
                sample.request.key.set_result(sample)
                tokens += len(sample.ids)
                if everything.done() or stopped():
                    break  # what is half-sampled is asked for again, with the same seeds
            if judging:  # a copy, here and below: `judging` may lose its last one before the wait begins
                runner.run(asyncio.wait({*judging}, return_when=asyncio.FIRST_COMPLETED))
        runner.run(asyncio.sleep(0))
        while judging and not everything.done():  # what is sampled is judged and written
            runner.run(asyncio.wait({*judging}))
        everything.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            runner.run(asyncio.wait_for(everything, None))  # raises what broke one
    return tokens


# ---------------------------------------------------------------------------------------------------- rows
# responses.jsonl, while ranks are at work responses.rankN.jsonl: a row for each judged response, of kind
# "init" or "revision". d_revision.jsonl: a row for each tuple kept, with the fields of both.

TRUNCATED = {"y_init": "truncated", "y_revised": "revised_truncated"}  # the field that says so of each


def row_key(row):
    """What a row answers: the problem's id, the number of its y_init, the number of the revision or -1."""
    return row["id"], row["sample"], row.get("revision", -1)


def read_rows(out):
    """{row_key: row} of everything that ranks have written in this folder."""
    rows = {}
    for path in glob.glob("responses*.jsonl", root_dir=out):
        path = os.path.join(out, path)
        for line, row in run.read_jsonl(path, torn_ok=True):
            if "kind" not in row:
                fail(f"{path}:{line}: written by an earlier version; give another --out, or --fresh")
            run.need(row, path, line, kind=str, id=str, sample=int)
            rows[row_key(row)] = row
    return rows


def merge(out, problems):
    """Makes one responses.jsonl of all ranks' files, in the order of the problems, and returns its rows."""
    order = {problem.id: i for i, problem in enumerate(problems)}
    rows = [row for row in read_rows(out).values() if row["id"] in order]
    rows.sort(key=lambda row: (order[row["id"]], *row_key(row)[1:]))
    if rows:
        write_rows(os.path.join(out, "responses.jsonl"), rows)
    for path in glob.glob("responses.rank*.jsonl", root_dir=out):
        os.remove(os.path.join(out, path))  # every line of it now stands in responses.jsonl
    return rows


def write_rows(path, rows):
    run.write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def tuples(rows):
    """The revisions among the rows of responses.jsonl, each with the fields of its y_init before its own."""
    inits = {row_key(row)[:2]: row for row in rows if row["kind"] == "init"}
    both = [inits[row_key(row)[:2]] | row for row in rows if row["kind"] == "revision"]
    return [{name: value for name, value in row.items() if name != "kind"} for row in both]


# ------------------------------------------------------------------------------------------------- summary


def wilson(p, n, z=1.96):
    """The 95 % Wilson interval of a share p seen over n problems."""
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [round(abs(bound) / (1 + z * z / n), 4) for bound in (centre - half, centre + half)]


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else None


def measures(name, rows):
    y = f"y_{name}"
    return {
        f"{name}_total": len(rows), f"{name}_correct": sum(row[f"{y}_correct"] for row in rows),
        f"{name}_accuracy": mean(row[f"{y}_correct"] for row in rows),
        f"{name}_verdicts": dict(Counter(row[f"{y}_verdict"] for row in rows)),
        f"{name}_mean_tokens": mean(len(row[f"{y}_tokens"]) for row in rows),
        f"{name}_truncated": mean(row[TRUNCATED[y]] for row in rows)}


def summarise(rows, kept, num_responses, phrases):
    """The counts of the official code, the measures of the paper; kept: the tuples kept, None with --eval."""
    inits, revised = [row for row in rows if row["kind"] == "init"], tuples(rows)
    by_problem = {}
    for row in inits:
        by_problem.setdefault(row["id"], []).append(row["y_init_correct"])
    s = {"problems": len(by_problem), **measures("init", inits), **measures("revised", revised)}
    p, q, verdicts = s["init_accuracy"], s["revised_accuracy"], s["revised_verdicts"]
    # y_init that correct themselves: what SRT is to teach, beside revising when told to
    s["init_self_revised"] = mean(any(p_r in row["y_init"] for p_r in phrases) for row in inits)
    s["init_accuracy_95"] = wilson(p, len(by_problem)) if inits else None  # a problem's samples count as one
    s[f"avg@{num_responses}"] = mean(map(mean, by_problem.values()))
    s[f"pass@{num_responses}"] = mean(map(any, by_problem.values()))
    for name, told in (("right", True), ("wrong", False)):
        s[f"revised_accuracy_of_{name}"] = mean(
            row["y_revised_correct"] for row in revised if row["y_init_correct"] == told)
    all_revised = len({row_key(row)[:2] for row in revised}) == len(inits) > 0
    # share of the errors that one revision removes
    s["net_correction"] = (q - p) / (1 - p) if all_revised and p < 1 else None
    s["kept"] = len(kept or ())
    if kept is not None:
        s["wrong_to_right"] = sum(not row["y_init_correct"] for row in kept)
        s["no_answer_revised"] = mean(row["y_revised_verdict"] == "no answer" for row in revised)
    s["dropped"] = {f"y_revised {why}": n for why, n in verdicts.items() if why != "right"}
    s["dropped"]["over the target"] = s["revised_correct"] - len(kept) if kept else 0
    s["dropped"]["no room to revise"] = sum(row["no_room"] for row in inits)
    return s


def enough(summary, target):
    """Whether D_revision will do: it is from wrong -> right tuples that the teacher learns to correct."""
    few = " (few: the teacher may only copy; see docs/real.md)" if summary["wrong_to_right"] < 300 else ""
    line = (f"D_revision: {summary['wrong_to_right']} wrong -> right tuples{few}; "
            f"{100 * (summary['revised_accuracy_of_wrong'] or 0):.1f} % of the revisions of wrong answers "
            f"are right; {100 * (summary['no_answer_revised'] or 0):.1f} % of all revisions have no answer")
    if summary["kept"] < target:
        line += f"\nnote: --target {target} was not reached; all problems gave {summary['kept']} tuples"
    return line


# ---------------------------------------------------------------------------------------------------- main


def parse_args():
    parser = argparse.ArgumentParser(description="Collect D_revision (SRT, phase 1a), or evaluate: --eval.")
    add = parser.add_argument
    add("--model", required=True, help="Hugging Face folder or hub name")
    add("--data", required=True, help=".jsonl, .json, .parquet or hub name[:config][@split]")
    add("--out", required=True, help="folder for responses, d_revision, summary.json")
    add("--mode", type=verify.mode_flag, default="math", help=verify.MODE_HELP)
    add("--range", dest="range_", metavar="A:B", help="rows of the data, others in a phase")
    add("--max_problems", type=natural, help="at most so many problems")
    add("--eval", action="store_true", help="keep nothing: measure only")
    # how much
    add("--num_responses", type=natural, default=1, help="y_init per problem")
    add("--num_revisions", type=within(int, 0), help="per y_init; default: 3, with --eval 0")
    add("--revise_correct", type=int, choices=(0, 1), default=1, help="1: right y_init too")
    add("--target", type=within(int, 0), default=6000, help="tuples to keep; 0: no limit")
    # sampling
    add("--temperature", type=within(float, 0), default=1.0)
    add("--top_p", type=share, default=0.9)
    add("--max_tokens", type=natural, default=16384, help="per response")
    add("--seed", type=int, default=0)
    add("--phrases", type=verify.phrases_flag, help=verify.PHRASES_HELP)
    # engine
    add("--engine", type=engine_name, choices=("vllm", "hf"), help="default: vllm if there")
    add("--dtype", choices=("bfloat16", "float32"), help="default: float32 on a cpu")
    add("--vllm_memory", type=share, default=0.85, help="share of the GPU's memory for vLLM")
    add("--judge_seconds", type=positive, default=5.0, help="of a verdict; for code, a test")
    add("--unsafe_no_sandbox", action="store_true", help=verify.UNSAFE)
    add("--fresh", action="store_true", help="start over; an old --out is renamed")
    args = run.parse(parser)
    if args.num_revisions is None:
        args.num_revisions = 0 if args.eval else 3
    if args.eval:
        args.target = 0
    return args


def main():
    args = parse_args()
    ranks = run.launch()
    tokenizer = verify.load_tokenizer(args.model)
    phrases = verify.phrases_of(args.model, args.phrases)
    judge = verify.Judge(args.mode, limit=args.judge_seconds, sandbox=not args.unsafe_no_sandbox)
    problems, dropped = verify.load_problems(args.data, judge, args.range_, args.max_problems)
    prompts = [verify.chat_ids(tokenizer, problem) for problem in problems]
    longest = check_lengths(args.model, prompts, args.max_tokens)
    run.open_out(args, ranks, FREE)
    if run.finished(args.out, "responses.jsonl", target=args.target):
        judge.close()
        return dist.destroy_process_group()
    dtype = getattr(torch, args.dtype or ("bfloat16" if ranks.device.type == "cuda" else "float32"))
    max_len = longest + (2 if args.num_revisions else 1) * args.max_tokens + 64
    sampler = make_sampler(args.engine, args.model, tokenizer, max_len, ranks.device, dtype, args.vllm_memory)
    run.say(f"{len(problems)} problems ({sum(dropped.values())} dropped), {ranks.world} rank(s) on "
            f"{ranks.device.type}, {type(sampler).__name__} {dtype}, P_r {'|'.join(phrases)}")

    if ranks.rank == 0:  # a killed run may have left half a line
        merge(args.out, problems)
    dist.barrier()
    done = read_rows(args.out)  # what an earlier run of the same command has finished
    file = open(os.path.join(args.out, f"responses.rank{ranks.rank}.jsonl"), "a")
    progress = Progress(ranks, len(problems), None if args.eval else args.target)
    waiting, judging = deque(), set()  # requests that the sampler has not taken yet; verdicts to come
    stopped = lambda: ranks.store.add("stop", len(caught)) > 0  # as soon as any rank has had a signal

    async def work():
        """One of many alike: problem after problem, until none is left or the target is reached."""
        while not args.target or ranks.store.add("kept", 0) < args.target:
            i = ranks.store.add("taken", 1) - 1
            if i >= len(problems):
                return
            await asyncio.gather(*(attempt(problems[i], prompts[i], k) for k in range(args.num_responses)))

    async def attempt(problem, x, k):
        """Steps 1 to 5 for the k-th y_init of a problem."""
        init = await respond("y_init", problem, x, {
            "kind": "init", "id": problem.id, "problem": problem.problem,
            "answer": problem.answer if isinstance(problem.answer, str) else None, "mode": problem.mode,
            "sample": k})
        r = init["y_init_correct"]
        if init["no_room"] or (r and not args.revise_correct):
            return
        ids, told = seen(x, init), {"kind": "revision", "id": problem.id, "sample": k, "p_r": phrases[r]}
        revised = await asyncio.gather(*(respond("y_revised", problem, ids, {**told, "revision": n})
                                         for n in range(args.num_revisions)))
        ranks.store.add("kept", sum(row["y_revised_correct"] for row in revised))

    def seen(x, init):
        """What y_revised is sampled after."""
        return verify.revision_ids(tokenizer, x, init["y_init_tokens"], init["y_init_correct"], phrases)

    async def respond(y, problem, ids, row):
        """`row` with a response after `ids`, sampled, judged and written, now or by an earlier run."""
        if row_key(row) in done:
            progress.judged(y, done[row_key(row)])
            return done[row_key(row)]
        sampled = asyncio.get_running_loop().create_future()
        seed = request_seed(args.seed, *(part for part in row_key(row) if part != -1))
        waiting.append(Request(sampled, ids, seed))
        sample = await sampled
        row[y] = tokenizer.decode(sample.ids, skip_special_tokens=True)
        judged = asyncio.wrap_future(judge.submit(problem, row[y]))
        judging.add(judged)
        judged.add_done_callback(judging.discard)
        verdict = await judged
        row |= {f"{y}_correct": verdict.correct, f"{y}_verdict": verdict.reason,
                f"{y}_tokens": sample.ids, TRUNCATED[y]: sample.truncated}
        if y == "y_init":
            row["no_room"] = bool(args.num_revisions) and len(seen(ids, row)) >= sampler.max_len
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()
        progress.judged(y, row, len(sample.ids))
        return row

    caught, started = run.catch_signals(), time.time()
    workers = [work() for _ in range(min(sampler.max_seqs, math.ceil(len(problems) / ranks.world)))]
    tokens = serve(workers, waiting, judging, stopped, sampler, max_tokens=args.max_tokens,
                   temperature=args.temperature, top_p=args.top_p, logprobs=False)
    seconds = time.time() - started
    progress.show("\n")
    file.close()
    tokens_of = [None] * ranks.world
    dist.all_gather_object(tokens_of, tokens)

    if stopped():
        run.say(f"stopped by a signal: what is judged is in {args.out}; the same command goes on there")
    elif ranks.rank == 0:
        rows, kept = merge(args.out, problems), None
        if not args.eval:
            kept = [row for row in tuples(rows) if row["y_revised_correct"]][: args.target or None]
            write_rows(os.path.join(args.out, "d_revision.jsonl"), kept)
        found = {**summarise(rows, kept, args.num_responses, phrases), "seconds": round(seconds, 1),
                 "tokens_per_second": round(sum(tokens_of) / seconds, 1), "tokens_per_rank": tokens_of}
        summary = {**vars(args), "engine": type(sampler).__name__, "phrases": phrases,
                   "problems_dropped": dict(dropped), **found}
        run.write_atomically(os.path.join(args.out, "summary.json"), json.dumps(summary, indent=1) + "\n")
        for name, value in found.items():
            print(f"{name:28s} {round(value, 4) if isinstance(value, float) else value}")
        if not args.eval and args.num_revisions:
            print(enough(found, args.target))
    close(judge, sampler)


if __name__ == "__main__":
    main()
