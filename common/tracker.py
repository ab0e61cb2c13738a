"""
--tracker: a copy of metrics.jsonl and flags.json in TensorBoard or Weights & Biases, by rank 0. The files are
the record: a tracker that fails is named once, and the run goes on without it. Both packages are optional.
"""
import argparse
import contextlib
import importlib.util
import json
import os
import secrets
import sys

from common.run import say, write_atomically

TRACKER_HELP = "also give the metrics to this package; wandb takes its settings from WANDB_MODE and the like"


def tracker_name(text):
    """The argparse type of --tracker: a name that is none is left to choices."""
    spec = importlib.util.find_spec(text) if text in TRACKERS else None
    if text in TRACKERS and (spec is None or spec.origin is None):  # a mere folder ./wandb has no origin
        raise argparse.ArgumentTypeError(f"{text} is not installed; pip install {text}, or do without")
    return text


def numbers_of(row):
    """What a tracker can draw of a row: its numbers, true and false as 1 and 0; no text and no None."""
    return {name: int(value) if isinstance(value, bool) else value
            for name, value in row.items() if isinstance(value, (int, float))}


class TensorBoard:
    """
    Events in out/tensorboard. Each part of a run hides all that is there (purge_step) and writes the rows of
    the parts before it again, so every step is there once, whatever a killed part had written.
    """

    def __init__(self, out, flags):
        from torch.utils.tensorboard import SummaryWriter
        self.writer = SummaryWriter(os.path.join(out, "tensorboard"), purge_step=0)
        self.writer.add_text("flags", f"```\n{json.dumps(flags, indent=1)}\n```", 0)

    def send(self, row):
        for name, value in numbers_of(row).items():
            self.writer.add_scalar(name, value, row["step"])
        self.writer.flush()  # a kill would lose what waits

    def close(self, failed=False):
        self.writer.close()


class Wandb:
    """
    One run of wandb for all parts of a run here: its id is in out/wandb_id.txt. The server says from which
    step on it has no rows, and refuses earlier ones; offline there is none, and each part has every row.
    """

    def __init__(self, out, flags):
        import wandb
        path = os.path.join(out, "wandb_id.txt")
        if not os.path.exists(path):
            write_atomically(path, secrets.token_hex(4) + "\n")
        with open(path) as f:
            run_id = f.read().strip()
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", "300")  # s; without it a dead network holds the GPUs,
        os.environ.setdefault("WANDB_LOGIN_TIMEOUT", "60")  # and a question for the key in a terminal
        self.run = wandb.init(id=run_id, resume="allow", dir=out, name=os.path.basename(os.path.abspath(out)),
                              config=flags, allow_val_change=True, settings=wandb.Settings(console="off"))
        if self.run.disabled:
            raise RuntimeError("wandb has no key, or is switched off")
        self.run.define_metric("*", step_metric="step")
        self.first = self.run.step

    def send(self, row):
        if row["step"] >= self.first:
            self.run.log(numbers_of(row), step=row["step"], commit=True)

    def close(self, failed=False):
        self.run.finish(exit_code=int(failed))


TRACKERS = {"wandb": Wandb, "tensorboard": TensorBoard}


class Tracker:
    """A tracker that cannot end a run. rows: of metrics.jsonl, made by earlier parts of the run."""

    def __init__(self, name, out, rows):
        self.name, self.to, hook = name, None, sys.excepthook
        with self.harmless():
            with open(os.path.join(out, "flags.json")) as f:
                self.to = TRACKERS[name](out, json.load(f))
            for row in rows:
                self.to.send(row)

        def uncaught(*error):  # wandb's own would print a traceback before our line, also where it has failed
            hook(*error)
            self.close(failed=True)

        sys.excepthook = uncaught if self.to else hook

    def send(self, row):
        with self.harmless():
            if self.to:
                self.to.send(row)

    def close(self, failed=False):
        with self.harmless():
            if self.to:
                self.to.close(failed)

    @contextlib.contextmanager
    def harmless(self):
        try:
            yield
        except Exception as e:  # a network, a server, a package of others: none is worth a run
            self.to = None
            say(f"warning: --tracker {self.name} has failed ({e!r}): the run goes on without it, and "
                "metrics.jsonl has every row")
