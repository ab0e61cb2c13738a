"""
Runs of the three scripts, killed with SIGKILL at random moments and started again until done; what they end with must
equal what an uninterrupted run ends with: the same rows, the same weights bit for bit.

    python tests/chaos.py --runs 30 --seed 0        # under torchrun, as users start it; about 15 minutes on 2 cores

`Forked` starts the ranks by fork from a process that has imported everything: no different for the script, but ten times
faster, for tests/test_survive.py.
"""
import argparse
import filecmp
import gc
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
REPO = Path(__file__).parents[1]
sys.path[:0] = [str(REPO), str(REPO / "tests")]

import torch
from conftest import make_rows, read, write_problems

import distill
import kl
import sft
import srt
import verify
from common.sampler import HFSampler

SCRIPTS = {"verify.py": verify, "srt.py": srt, "sft.py": sft, "kl.py": kl, "distill.py": distill}
HFSampler.__init__.__defaults__ = (4,)  # small batches, so that rows come in one after another as with vLLM

# A process's first backward pass starts threads for the devices there are, and its forks can make no pass then. Here are none; once
# torch.compile or FSDP has run, torch's CUDA build counts some even where no GPU can be seen.
if not torch.cuda.is_available():
    torch.ones((), requires_grad=True).backward()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Forked:
    """
    The ranks of one run as forks of this process; `wait` ends the others when one fails, as torchrun does. stdout goes to
    the file `log`, stderr to log.err. patch(rank) is called in each rank before its main; per_node: ranks of a node.
    """

    def __init__(self, script, args, nproc, log, patch=lambda rank: None, per_node=None):
        assert not torch.distributed.is_initialized(), "a process group cannot be forked"
        gc.collect()  # nor one that is garbage: a fork that collects it waits for threads that it has not
        port, self.pids, self.codes = free_port(), [], {}
        for rank in range(nproc):
            pid = os.fork()
            if pid == 0:
                self.child(script, args, rank, nproc, port, str(log), patch, per_node or nproc)
            self.pids.append(pid)

    def child(self, script, args, rank, nproc, port, log, patch, per_node):
        code = 1
        try:
            for number, path in ((1, log), (2, log + ".err")):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
            sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
            os.setsid()
            if nproc > 1:
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank % per_node), WORLD_SIZE=str(nproc),
                                  LOCAL_WORLD_SIZE=str(per_node), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            patch(rank)
            sys.argv = [str(script), *map(str, args)]
            main = SCRIPTS[script].main if script in SCRIPTS else script
            main()
            code = 0
        except SystemExit as e:
            code = 0 if e.code is None else e.code if isinstance(e.code, int) else print(e.code, file=sys.stderr) or 1
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def kill(self, who):
        for pid in self.pids if who == "all" else [self.pids[who]]:
            if pid not in self.codes:
                os.kill(pid, signal.SIGKILL)

    def wait(self, seconds=120):
        """True if every rank ended well within this time."""
        end = time.time() + seconds
        while len(self.codes) < len(self.pids):
            for pid in set(self.pids) - set(self.codes):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
            if any(self.codes.values()) or time.time() > end:
                self.kill("all")
                end = time.time() + 5
            time.sleep(0.02)
        return not any(self.codes.values())


class Torchrun:
    """The same under torchrun."""

    def __init__(self, script, args, nproc, log):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(nproc), __file__, "--child",
             script, *map(str, args)], stdout=open(log, "a"), stderr=subprocess.STDOUT)

    def ranks(self):
        """{rank: pid} of those that have started."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        found = {}
        for pid in children:
            for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                if entry.startswith(b"RANK="):
                    found[int(entry[5:])] = int(pid)
        return found

    def kill(self, who):
        try:
            pids = self.ranks()
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            return
        if who == "all":
            self.process.kill()  # first, or it would end the others in its own way
        for pid in pids.values() if who == "all" else [pids[who]] if who in pids else []:
            os.kill(pid, signal.SIGKILL)

    def wait(self, seconds=120):
        return self.process.wait(seconds) == 0


def make_inputs(folder):
    """A tiny model, 24 problems and a D_revision."""
    import toy
    model = toy.tiny_qwen3(str(folder / "model"))
    problems = write_problems(folder / "problems.jsonl", 24)
    rows = make_rows(verify.load_tokenizer(model), problems)
    srt.write_rows(str(folder / "d.jsonl"), rows)
    return {
        "srt.py": ["--model", model, "--data", problems, "--max_tokens", 24, "--engine", "hf", "--num_revisions", 2],
        "sft.py": ["--model", model, "--data", folder / "d.jsonl", "--batch", 3, "--lr", "1e-3", "--objective", "two-stage", "--stage2_size", 10,
                   "--epochs", 2, "--save_every", 2],
        "distill.py": ["--model", model, "--data", problems, "--steps", 5, "--batch", 4, "--lr", "1e-3", "--warmup", 1,
                       "--max_tokens", 24, "--engine", "hf", "--save_every", 1, "--val", problems, "--val_every", 2,
                       "--val_samples", 1],
    }


def go(script, args, folder, nproc=1, ok=True, seconds=100, **how):
    """Runs a script to its end; returns (stdout, stderr)."""
    log = Path(folder) / f"log-{time.time_ns()}"
    began, run = time.time(), Forked(script, args, nproc, log, **how)
    done = run.wait(seconds)
    out, err = log.read_text(), Path(f"{log}.err").read_text()
    assert done == ok and time.time() - began < seconds, f"{run.codes}\n{out[-2000:]}\n{err[-4000:]}"
    return out, err


def equal(script, a, b):
    """What the run in folder a ended with is what the run in b did."""
    if script == "srt.py":
        keys = [srt.row_key(row) for row in read(b / "responses.jsonl")]
        same = ["responses.jsonl", "d_revision.jsonl"]
        extra = len(keys) == len(set(keys)) and not list(b.glob("responses.rank*"))
    else:
        same = ["final/model.safetensors"] + [f"best/{path.name}/model.safetensors" for path in a.glob("best/*")]
        same += [path.name for path in a.glob("samples.md")]
        losses = [[(row["step"], row["loss"]) for row in read(out / "metrics.jsonl")] for out in (a, b)]
        extra = losses[0] == losses[1]
    return extra and all(filecmp.cmp(a / name, b / name, shallow=False) for name in same)


def chaos(start, folder, script, args, nproc, kills, rng, length):
    """One run with so many kills. length: seconds of an uninterrupted one. Returns [(who, second)]."""
    out, log, blows = folder / "out", folder / "log", []
    while True:
        run = start(script, [*args, "--out", out], nproc, log)
        if len(blows) == kills:
            if not run.wait():
                raise RuntimeError(f"{script} does not go on after {blows}:\n{log.read_text()[-3000:]}")
            return blows
        who, second = rng.choice([0, nproc - 1, "all"]), rng.uniform(0.05, 1.0) * length
        time.sleep(second)
        run.kill(who)
        run.wait()
        blows.append((who, second))


def table(start, folder, runs, kills, nproc, rng):
    """Yields a line per run: (script, [(who, second)], equal?, seconds)."""
    inputs = make_inputs(folder)
    whole, lengths = {}, {}
    for script, args in inputs.items():
        whole[script], began = folder / f"whole-{script}", time.time()
        run = start(script, [*args, "--out", whole[script]], nproc, folder / "log")
        assert run.wait(), (folder / "log").read_text()[-3000:]
        lengths[script] = time.time() - began
    for number in range(runs):
        script, began = list(inputs)[number % 3], time.time()
        place = folder / str(number)
        place.mkdir()
        blows = chaos(start, place, script, inputs[script], nproc, kills, rng, lengths[script])
        yield script, blows, equal(script, whole[script], place / "out"), time.time() - began


def main():
    parser = argparse.ArgumentParser(description="Kill, resume, compare.")
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--kills", type=int, default=1, help="of each run")
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fork", action="store_true", help="without torchrun, faster")
    args = parser.parse_args()
    print(f"seed {args.seed}, {args.nproc} ranks, {'forked' if args.fork else 'torchrun'}\n{'run':>3} {'script':10} {'equal':5} "
          f"{'seconds':>7}  killed: rank @ second", flush=True)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        lines = table(Forked if args.fork else Torchrun, Path(folder), args.runs, args.kills, args.nproc, random.Random(args.seed))
        for number, (script, blows, same, seconds) in enumerate(lines):
            failed += not same
            print(f"{number:3d} {script:10} {'yes' if same else 'NO':5} {seconds:7.1f}  "
                  + ", ".join(f"{who} @ {second:.1f}" for who, second in blows), flush=True)
    print(f"{args.runs} runs, {failed} not equal")
    sys.exit(failed > 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        sys.argv = sys.argv[2:]
        SCRIPTS[sys.argv[0]].main()
    else:
        main()
