"""
Where responses come from: two engines, vLLM and transformers, with one interface.

  stream(pull, ...)       yields a Sample as soon as it is finished; `pull()` gives the next Request, or
                          None for now; logprobs=False where the caller needs none: vLLM is faster then
  generate(prompts, ...)  the Samples of a list of prompts, in order
  load(named_tensors)     new weights, named as in the checkpoint
  max_seqs, max_len       how many are sampled at once; tokens of prompt and response together

make_sampler() makes the one that --engine names; serve() runs coroutines that ask it for samples; close()
ends a script that has one.
"""
import argparse
import asyncio
import contextlib
import gc
import importlib.util
import os
import zlib
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

import verify
from common.run import fail
from common.training import load_weights


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
        self.model = load_weights(model, dtype=dtype).to(device).eval()
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

    def __init__(self, model, tokenizer, max_len, device, dtype, memory=0.85, max_seqs=512):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process: weights go in by reference
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        # it would be compiled for minutes, and is not used where requests have seeds
        os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
        os.environ.setdefault("FLASHINFER_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
        from vllm import LLM
        self.max_len = min(max_len, verify.context_length(model))
        self.max_seqs, self.on_cpu, self.asleep = max_seqs, device.type == "cpu", False
        self.end_ids = tokenizer.end_ids
        # on a CPU chunked prefill and a request's seed do not go together (vLLM 0.32), and nothing can sleep
        whole_prompts = dict(enable_chunked_prefill=False, max_num_batched_tokens=max(8192, self.max_len))
        # CUDA graphs for steps without prompts, as most are in `stream`, and nothing to compile: up in half
        # the time, and faster. FULL, also for steps with prompts, samples wrongly (0.32, FlashAttention 3)
        graphs = dict(enable_sleep_mode=True, compilation_config=dict(
            mode=0, cudagraph_mode="FULL_DECODE_ONLY", max_cudagraph_capture_size=max_seqs))
        try:
            self.llm = LLM(
                model, tensor_parallel_size=1, max_model_len=self.max_len, max_num_seqs=max_seqs, seed=0,
                dtype=str(dtype).removeprefix("torch."), gpu_memory_utilization=memory,
                generation_config="vllm", enforce_eager=self.on_cpu, use_tqdm_on_load=False,
                distributed_executor_backend="external_launcher" if dist.get_world_size() > 1 else None,
                **(whole_prompts if self.on_cpu else graphs))
        except (AssertionError, RuntimeError, ValueError) as e:  # also where another process frees some
            if "memory" not in str(e):
                raise
            fail(f"--vllm_memory {memory} does not do for vLLM: {' '.join(str(e).split())}")

    def stream(self, pull, max_tokens, temperature=1.0, top_p=1.0, logprobs=True):
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind
        engine, flying, counter = self.llm.llm_engine, {}, 0
        while True:
            # prompts in groups, once 1/16 of the places are free: CUDA graphs serve only steps without any
            wanted = self.max_seqs if len(flying) <= self.max_seqs * 15 // 16 else 0
            while len(flying) < wanted and (request := pull()) is not None:
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
        if self.on_cpu:
            # this back end repacks weights after loading; a reload undoes and redoes that, but for the packed
            # copy of a tied head, which would keep the old weights
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": named_tensors})
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


def check_lengths(model, problems, prompts, max_tokens, flag="--data"):
    """
    The longest prompt's length; ends the program where the model cannot take it, or never --max_tokens. flag:
    what named the problems.
    """
    limit = verify.context_length(model)
    longest, name = max((len(ids), problem.id) for ids, problem in zip(prompts, problems, strict=True))
    if max_tokens > limit:
        fail(f"--max_tokens {max_tokens}: --model {model} takes {limit} tokens with the prompt; lower it")
    if longest >= limit:
        fail(f"{flag}: the prompt of problem {name!r} has {longest} tokens but --model {model} takes "
             f"{limit}; drop it with {verify.range_of(flag)}")
    return longest


def request_seed(*parts):
    """A 31-bit seed from what identifies a sample, the same whatever the process and the number of ranks."""
    return zlib.crc32("|".join(map(str, parts)).encode()) & 0x7FFFFFFF


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

        try:
            while not everything.done() and not stopped():
                for sample in sampler.stream(pull, **how):
                    sample.request.key.set_result(sample)
                    runner.run(asyncio.sleep(0))  # it is judged now, also where no new prompt is asked for
                    tokens += len(sample.ids)
                    if everything.done() or stopped():
                        break  # what is half-sampled is asked for again, with the same seeds
                if judging:  # a copy, here and below: `judging` may lose its last one before the wait begins
                    runner.run(asyncio.wait({*judging}, return_when=asyncio.FIRST_COMPLETED))
            runner.run(asyncio.sleep(0))
            while judging and not everything.done():  # what is sampled is judged and written
                runner.run(asyncio.wait({*judging}))
        finally:  # also where the sampler breaks
            everything.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                runner.run(asyncio.wait_for(everything, None))  # raises what broke one
    return tokens


def close(sampler):
    """Ends a script's engine and its process group, which vLLM may have taken down already."""
    gc.unfreeze()  # what vLLM and training have frozen goes with it
    dist.barrier()
    sampler.close()
    if dist.is_initialized():
        dist.destroy_process_group()
