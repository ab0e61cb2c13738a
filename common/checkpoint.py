"""
What training leaves on disk: models, and states to go on from. Each folder is written beside its place and
renamed when it is whole.

  models    save_model(): a folder for transformers and vLLM; keep_best(): those that validated best
  states    training_state(): every tensor that a run needs; Saver: saves them while training goes on, and at
            a signal; load_state(): reads the newest that is whole
"""
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from common import run, training
from common.run import fail

STEP = "step-" + 6 * "[0-9]"  # the folder of a step, as glob has it

# --------------------------------------------------------------------------------------------------- models


def replace_folder(tmp, path):
    """Renames a whole folder into place, where another may be; rank 0 alone calls it. See mend."""
    old = f"{path}.old"
    shutil.rmtree(old, ignore_errors=True)
    if os.path.exists(path):
        os.rename(path, old)
    os.rename(tmp, path)
    shutil.rmtree(old, ignore_errors=True)


def mend(folder):
    """What a kill has left here: halves go, and what was to be replaced, and was not, goes back."""
    for half in folder.glob("*.tmp"):
        shutil.rmtree(half)
    for old in folder.glob("*.old"):
        place = old.with_suffix("")
        shutil.rmtree(old) if place.exists() else old.rename(place)


def save_model(path, model, tokenizer, phrases, dtype):
    """A folder that transformers and vLLM load as it is, the phrases in its config. All ranks call it."""
    from safetensors.torch import save_file
    tensors = {name: tensor.cpu().contiguous() for name, tensor in training.full_tensors(model, dtype)
               if dist.get_rank() == 0}
    if dist.get_rank() == 0:
        tmp = path + ".tmp"
        os.makedirs(tmp, exist_ok=True)
        save_file(tensors, os.path.join(tmp, "model.safetensors"), metadata={"format": "pt"})
        model.config.update({"sdzero_phrases": phrases, "dtype": dtype})
        for part in (model.config, tokenizer):
            part.save_pretrained(tmp)
        # save_pretrained refuses much that from_pretrained takes: a temperature without do_sample
        Path(tmp, "generation_config.json").write_text(model.generation_config.to_json_string())
        replace_folder(tmp, path)
    dist.barrier()


def keep_best(out, best, step, accuracy, save, keep=3):
    """Saves out/best/step-N if it is among the `keep` best. best: [[accuracy, step]], best first."""
    name = "step-{:06d}".format
    # not this step, which a finished run that goes on validates again, nor one that has gone for a better
    # one of steps that a kill has taken
    there = run.from_rank_0(lambda: [
        b for b in best if b[1] != step and os.path.isdir(os.path.join(out, "best", name(b[1])))])
    ranked = sorted(there + [[accuracy, step]], key=lambda b: (-b[0], b[1]))[:keep]
    if [accuracy, step] in ranked:
        save(os.path.join(out, "best", name(step)))
    if dist.get_rank() == 0:
        stay = {name(kept) for _, kept in ranked}
        for folder in Path(out, "best").glob(f"{STEP}*"):  # also what a kill has left
            if folder.name not in stay:
                shutil.rmtree(folder)
    return ranked


# --------------------------------------------------------------------------------------------------- states


def training_state(model, optimizer, teacher=None):
    """Every tensor that a run needs to go on, by name, sharded as it is. dcp loads into them in place."""
    tensors = {}
    for name, p in model.named_parameters():
        if not optimizer.state[p]:  # AdamW makes it at its first step; a run that resumes needs it before
            optimizer.state[p] = {"step": torch.zeros((), device=p.device),
                                  "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        tensors |= {name: p.detach(), **{f"{name}.{key}": value for key, value in optimizer.state[p].items()}}
    if teacher is not None:
        tensors |= {f"teacher.{name}": p.detach() for name, p in teacher.named_parameters()}
    return tensors


class Saver:
    """
    Saves out/state/step-N every `every` steps and after the last; the newest two stay. The loop waits only
    while its tensors are copied to CPU memory; a thread writes the copy, with collectives of its own.
    Catches SIGTERM and SIGINT from here on: after_step saves once and tells the loop to stop.
    """

    def __init__(self, out, every, device):
        self.folder, self.every, self.device = Path(out, "state"), every, device
        self.caught, self.group = run.catch_signals(), dist.new_group(backend="gloo")
        self.thread, self.writing, self.copies = ThreadPoolExecutor(1), None, {}

    def after_step(self, step, tensors, progress, last=False):
        """
        All ranks call it after each step. tensors(): what training_state gives; progress: what else to keep.
        True if the loop must stop here, its state whole. Raises what broke the write before, as wait() does.
        """
        stop = torch.tensor(len(self.caught), device=self.device)
        dist.all_reduce(stop)  # one rank's signal stops all ranks after the same step
        if stop or last or step % self.every == 0:
            self.save(step, tensors(), progress)
        if stop:
            self.wait()
            run.say(f"stopped by a signal after step {step}; saved: the same command goes on from there")
        return bool(stop)

    def save(self, step, tensors, progress):
        self.wait()
        if not self.copies:
            self.copies = {name: torch.empty_like(tensor, device="cpu") for name, tensor in tensors.items()}
        with torch.no_grad():
            for name, tensor in tensors.items():
                self.copies[name].copy_(tensor)
        writer = StateWriter(self.folder / f"step-{step:06d}", json.dumps(progress))
        self.writing = self.thread.submit(dcp.save, self.copies, storage_writer=writer,
                                          process_group=self.group)

    def wait(self):
        """Returns when what was saved is whole; raises what broke it, on every rank."""
        if self.writing:
            self.writing.result()
            self.writing = None


class StateWriter(dcp.FileSystemWriter):
    """Writes a state beside its place, renames it when whole. What breaks on one rank, dcp raises on all."""

    def __init__(self, place, progress):
        super().__init__(f"{place}.tmp", per_thread_copy_ahead=0)  # or its thread would open GPU 0
        self.place, self.progress = place, progress

    def finish(self, metadata, results):  # called on rank 0, when all ranks have written
        super().finish(metadata, results)
        Path(self.path, "progress.json").write_text(self.progress)
        replace_folder(self.path, self.place)
        for old in states(self.place.parent)[:-2]:
            shutil.rmtree(old)


def states(folder):
    """Whole states in out/state, oldest first."""
    return sorted(Path(folder).glob(STEP))


def steps_made(out):
    """The step of the newest state."""
    return max((int(state.name.partition("-")[2]) for state in states(Path(out, "state"))), default=0)


def load_state(out, tensors):
    """Reads the newest whole state into tensors(), by any number of ranks. Its progress; None without one."""
    folder = Path(out, "state")
    found, ended = run.from_rank_0(
        lambda: (mend(folder) or states(folder), os.path.exists(os.path.join(out, "final"))))
    if not found:
        if ended:
            fail(f"--out {out} has a final/ but no state/ to go on from; give another --out, or --fresh")
        return None
    try:
        dcp.load(tensors(), checkpoint_id=found[-1])
        return json.loads((found[-1] / "progress.json").read_text())
    except (OSError, ValueError, dcp.CheckpointException) as e:
        error = next(iter(e.failures.values()))[0] if isinstance(e, dcp.CheckpointException) else e
        fail(f"the state {found[-1]} cannot be read ({error!r}); remove this folder, and the same command "
             "goes on from the state before it")
