"""
A run's processes and folder: what every script does before and after its own work.

  processes   launch() -> Ranks; from_rank_0(); leave(); catch_signals(); say(), fail(), plain_errors():
              what a user reads
  folder      make_out(); open_out() keeps other runs and other flags out of it; finish(), finished()
  files       write_atomically(); read_object(); read_jsonl(), need(): rows, and an error that names file,
              line and field
  flags       parse(), and types for argparse: within(), natural, positive, share

Nothing here imports torch before launch(): verify.py does without.
"""
import argparse
import atexit
import contextlib
import fcntl
import gc
import glob
import hashlib
import json
import os
import re
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from verifiers.pool import PROJECT, load_verifier


class Ranks(NamedTuple):
    rank: int
    world: int
    device: object  # torch.device of this rank
    store: object  # a key-value store that all ranks share


def launch():
    """Joins the process group of torchrun, or makes one of this process alone; returns its Ranks."""
    import torch
    import torch.distributed as dist
    import transformers
    transformers.utils.logging.disable_progress_bar()  # of loading weights: it would break the step lines
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    store, rank, world = next(dist.rendezvous("env://")) if "RANK" in os.environ else (dist.HashStore(), 0, 1)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=dist.PrefixStore("group", store),
                            rank=rank, world_size=world)
    if world == 1:  # an error ends it too, or NCCL warns of that; with more ranks it would wait for them
        atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
    atexit.register(gc.unfreeze)  # vLLM and training freeze; triton's bindings would report it as leaked
    plain_errors()
    return Ranks(rank, world, device, dist.PrefixStore("shared", store))


def plain_errors():
    """From here on an uncaught error that a user can mend ends the program with a line, as fail() does."""
    shown = sys.excepthook  # under torchrun torch's: a traceback with the rank before each line

    def excepthook(kind, error, trace):
        line = mendable(error)
        print(f"error: {line}", file=sys.stderr, flush=True) if line else shown(kind, error, trace)

    sys.excepthook = excepthook


def mendable(error):
    """
    A line on an uncaught error that a user can mend (full disk, broken file, out of memory), or that a user
    or another rank has made; else None.
    """
    if isinstance(error, KeyboardInterrupt):  # once a run has begun, it catches the signal
        return "stopped by Ctrl-C; the same command starts again"
    import torch
    from safetensors import SafetensorError
    from torch.distributed.checkpoint.api import CheckpointException
    if isinstance(error, CheckpointException):  # what broke it, on whichever rank
        error = next(iter(error.failures.values()))[0]
    text = str(error).partition("\n")[0]
    if re.search("Connection (closed|reset) by peer|Broken pipe", text) and "gloo" in text:
        return f"rank {os.environ.get('RANK')} has lost another rank, whose own error says why"
    if isinstance(error, torch.OutOfMemoryError):
        return f"{text}; lower --micro_tokens (training) or --vllm_memory (sampling), and start it again"
    saving = "inline_container.cc" in text  # of torch.save, which does not say why
    if isinstance(error, (OSError, SafetensorError)) or saving:
        full = " (is the disk full?)" if saving else ""
        return f"{text}; mend this{full}: nothing whole is lost, and the same command goes on"


def from_rank_0(make, *args, **how):
    """
    What make(*args, **how) returns on rank 0, on every rank: where limits of time decide, or a disk that
    several nodes share, each could find another. The others wait for it, no longer than torch lets them (30
    minutes).
    """
    import torch
    import torch.distributed as dist
    made = [None if dist.get_rank() else make(*args, **how)]
    dist.broadcast_object_list(made, device=torch.device("cpu"))
    return made[0]


def leave():
    """Ends the process group, all ranks at once: gloo's threads abort a process that goes in their midst."""
    import torch.distributed as dist
    dist.barrier()
    dist.destroy_process_group()


def catch_signals():
    """From here on SIGTERM and SIGINT only fill the list that this returns: the caller stops where it can."""
    caught = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: caught.append(signal.Signals(number).name))
    return caught


def make_out(out):
    """Makes the folder --out; ends the program where nothing can be written there."""
    try:
        os.makedirs(out, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as e:
        fail(f"--out {out}: {e.strerror}; give a folder that can be written")


HASHED = {  # what else flags.json holds beside flags
    "verifier": "the verifier's source (its hash)", "code": "the code of the scripts (its hash)",
    "rows": "what the files of data give (its hash)"}


def open_out(args, ranks, free, product, data, **wanted):
    """
    Makes --out, with the flags of the run and hashes of the scripts, of the verifier and of `data` (the
    problems, or what else the run is made of) in its flags.json. What differs from a run that is in it is
    named; the program ends if that is the verifier, the data, or a flag that is not among `free` (a string of
    names). One that an older flags.json lacked had its default. True, and says so, if that run has ended
    (`finished`): nothing is to be done then, and its flags stay.
    """
    defaults = vars(args).pop("defaults")
    if ranks.rank == 0:
        make_out(args.out)
        hold(args.out)
        if args.fresh and os.listdir(args.out):
            inside = os.path.join(os.path.realpath(args.out), "")
            for name in ("model", "teacher", "data", "val"):
                if os.path.realpath(getattr(args, name, None) or "/").startswith(inside):
                    fail(f"--{name} lies in --out {args.out}, which --fresh would rename; give another --out")
            old = f"{args.out.rstrip('/')}.old-{time.strftime('%Y%m%d-%H%M%S')}"
            os.rename(args.out, old)
            print(f"--fresh: {args.out} is now {old}")
            os.makedirs(args.out)
            hold(args.out)
        flags = dict(vars(args))
        del flags["out"], flags["fresh"]
        read = lambda paths: (Path(path).read_bytes() for path in sorted(paths))
        flags["code"] = digest(read(glob.glob(f"{PROJECT}/*.py") + glob.glob(f"{PROJECT}/common/*.py")))
        flags["rows"] = digest(data)
        if "mode" in flags:
            flags["verifier"] = digest(read([load_verifier(args.mode).__file__]))
        path = os.path.join(args.out, "flags.json")
        begun = os.path.exists(path) and bool(set(os.listdir(args.out)) - {"flags.json", "flags.json.tmp"})
        before = {**flags, **defaults, **read_object(path)} if begun else flags
        changed = [name for name in flags if before[name] != flags[name]]
        text = lambda names: ", ".join(
            f"{HASHED.get(name, '--' + name)} {before[name]} -> {flags[name]}" for name in names)
        if fixed := [name for name in changed if name not in {*free.split(), "code"}]:
            fail(f"--out {args.out} was made with other flags: {text(fixed)}; give the old ones, another "
                 "--out, or --fresh, which renames the old folder and starts over")
        if changed:
            print(f"flags changed since this run began: {text(changed)}", flush=True)
        ended = finished(args.out, product, **wanted)
        if not ended:
            write_atomically(path, json.dumps(flags, indent=1) + "\n")
    ended = from_rank_0(lambda: ended)
    if ended:
        say(f"{os.path.join(args.out, product)} is there already: nothing to do (--fresh starts over)")
    return ended


def digest(parts):
    """A hash of bytes, or of objects by how Python writes them, 12 characters."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part if isinstance(part, bytes) else repr(part).encode())
    return whole.hexdigest()[:12]


def hold(folder):
    """Keeps other runs out of a folder while this process lives. One just killed is given 5 s to go."""
    handle = os.open(folder, os.O_RDONLY)  # never closed
    for _ in range(50):
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.1)
        except OSError:  # a file system without locks
            return
    fail(f"--out {folder}: another run is at work there; wait for it, stop it, or give another --out")


def finished(out, product, **wanted):
    """Whether a run has ended here: summary.json, which it writes last, has these values."""
    summary, product = (os.path.join(out, name) for name in ("summary.json", product))
    there = os.path.exists(summary) and os.path.exists(product)
    return there and wanted.items() <= read_object(summary).items()


def begin(args, ranks):
    """A run that goes on has not finished until it has again: takes what it writes at its end away."""
    for name in ("summary.json", "d_revision.jsonl") if ranks.rank == 0 else ():
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(args.out, name))


def finish(args, ranks, found):
    """Writes summary.json, flags and what was found: the last file of a run, which finished() looks for."""
    if ranks.rank == 0:
        text = json.dumps(vars(args) | found, indent=1) + "\n"
        write_atomically(os.path.join(args.out, "summary.json"), text)


def say(message):
    """Prints on one rank, also before there is a process group."""
    if os.environ.get("RANK", "0") == "0":
        print(message, flush=True)


def fail(message):
    """Bad input: ends the program with one line that says what was found and what to do."""
    sys.exit(f"error: {message}")  # not by raise: wandb would take that for a good end


def write_atomically(path, content):
    """Writes a file, text or bytes, at once or not at all."""
    with open(path + ".tmp", "wb") as f:
        f.write(content if isinstance(content, bytes) else content.encode())
    os.replace(path + ".tmp", path)


def read_object(path):
    """The JSON object that a file in --out holds; ends the program where it holds none."""
    try:
        with open(path, "rb") as f:
            found = json.load(f)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        fail(f"{path} holds no JSON object; give another --out, or --fresh, which renames the old folder")
    return found


def read_jsonl(path, torn_ok=False):
    """Yields (line number, row) of a .jsonl file. torn_ok: skips half a last line, left by a killed run."""
    if not os.path.isfile(path):
        fail(f"{path} is not there, or no file; a .jsonl file is wanted")
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            if not line.strip() or (torn_ok and not line.endswith(b"\n")):
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))  # some editors write a mark before it
            except (ValueError, RecursionError) as e:
                fail(f"{path}:{number}: not JSON in UTF-8 ({e}); mend or remove this line")
            if not isinstance(row, dict):
                fail(f"{path}:{number}: a JSON object is wanted, found {type(row).__name__}")
            yield number, row


def need(row, path, line, **fields):
    """Ends the program, naming file, line and field, where a row has not these fields with these types."""
    for name, kind in fields.items():
        if not isinstance(row.get(name), kind):
            found = f"found {type(row[name]).__name__}" if name in row else "it is missing"
            fail(f"{path}:{line}: field '{name}' should be {kind.__name__}, {found}")


def parse(parser):
    """The flags of the command line; args.defaults: what they are if not given, which open_out takes away."""
    args = parser.parse_args()
    args.defaults = {name: parser.get_default(name) for name in vars(args)}
    return args


def within(kind, low, high=sys.maxsize, above=False):
    """An argparse type: a number within [low, high], or with `above` in (low, high]."""
    def number(text):
        value = kind(text)
        if not low <= value <= high or (above and value == low):  # nan neither
            most = f" and at most {high}" if high < sys.maxsize or value > high else ""
            raise argparse.ArgumentTypeError(f"{text} is not {'above' if above else 'at least'} {low}{most}")
        return value
    number.__name__ = kind.__name__  # argparse says "invalid int value" where it is none
    return number


natural, positive, share = within(int, 1), within(float, 0, above=True), within(float, 0, 1, above=True)
