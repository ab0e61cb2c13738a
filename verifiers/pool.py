"""
How a verifier is loaded, and asked: in worker processes, under limits of time and memory.

A verifier is one file, which imports nothing of the project, with
  INSTRUCTION                     text after the problem in the user message
  gold(row)                       (gold, None) or (None, why there is none); gold: anything JSON can hold
  judge(gold, response, limits)   'right', which is reward 1, or another word: 'wrong', 'no answer', ...
and, where it needs them,
  longest(gold, limits)           seconds that `judge` may take; without it limits["seconds"]
  check(limits)                   ends the program, before anything is loaded, where something is missing
limits: "seconds" (--judge_seconds), "memory" (GiB a program may have), "sandbox" (not --unsafe_no_sandbox).
"""
import contextlib
import ctypes
import functools
import glob
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
import traceback
import types
from collections import deque

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

@functools.cache
def load_verifier(mode):
    """The module of a --mode: 'math', 'code', or a path that ends in .py. Ends the program if it is none."""
    path = mode if mode.endswith(".py") else os.path.join(PROJECT, "verifiers", f"{mode}.py")
    name = "verifier_" + os.path.basename(path)[:-3]
    module = sys.modules[name] = types.ModuleType(name)
    module.__file__ = path
    module.check = lambda limits: None  # these two are optional
    module.longest = lambda gold, limits: limits["seconds"]
    try:
        with open(path, encoding="utf-8") as f:  # its source: what Python has cached of it may be older
            exec(compile(f.read(), path, "exec"), module.__dict__)
        if not isinstance(module.INSTRUCTION, str):
            raise TypeError("INSTRUCTION is no text")
        for name in ("gold", "judge", "longest", "check"):
            if not callable(getattr(module, name)):
                raise TypeError(f"{name} is no function")
    except Exception as e:  # whatever a user's file may raise
        raise SystemExit(f"error: --mode {mode} (or the mode of a row): {path} cannot be used: "
                         f"{type(e).__name__}: {e}; give math, code, or a path of your own: a .py file with "
                         "INSTRUCTION, gold and judge") from e
    return module


def worker(mode, memory):
    """
    The judge's worker process, until stdin ends. A JSON line in: [seconds it may take, 'gold' or 'judge',
    arguments]; a line out: {"value": what the verifier returned} or {"crash": traceback of what it raised}.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # they may go to all processes of a run; the Judge decides
        signal.signal(number, signal.SIG_IGN)
    own, most = int(memory * 2**30), resource.getrlimit(resource.RLIMIT_AS)[1]  # a batch system may set that
    own = own if most == resource.RLIM_INFINITY else min(own, most)
    resource.setrlimit(resource.RLIMIT_AS, (own, most))
    ctypes.CDLL(None).prctl(1, signal.SIGCONT)  # PR_SET_PDEATHSIG: should the parent die in `stop`
    requests, replies, null = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w"), os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1):  # what a verifier, or a program that it starts, reads and prints
        os.dup2(null, descriptor)
    verifier, me = load_verifier(mode), os.getpid()
    print("ready", file=replies, flush=True)
    for line in requests:
        seconds, function, arguments = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, seconds + 1)  # ends the process, should the parent be gone
        try:
            value = getattr(verifier, function)(*arguments)
            if os.getpid() != me:
                os._exit(1)  # a fork that `judge` has left behind
            is_pair = isinstance(value, (tuple, list)) and len(value) == 2 and value.count(None) == 1
            if not (isinstance(value, str) if function == "judge" else is_pair):
                wanted = "a word" if function == "judge" else "(gold, None) or (None, why)"
                raise TypeError(f"`{function}` returned {value!r}, {wanted} is wanted")
            reply = json.dumps({"value": value})
        except MemoryError:  # ends the process
            raise
        except (Exception, SystemExit):
            reply = json.dumps({"crash": traceback.format_exc(limit=-3)[-3000:].strip()})
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(reply, file=replies, flush=True)


def descendants(pid):
    """The ids of a process and of all that descend from it."""
    found = [pid]
    for pid in found:
        for path in glob.glob(f"/proc/{pid}/task/*/children"):
            with contextlib.suppress(OSError), open(path) as f:  # it may have ended
                found += map(int, f.read().split())
    return found


def signal_all(pids, number):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def halted(pid):
    """Whether a process is stopped or gone."""
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rpartition(")")[2].split()[0] in "TtZX"
    except OSError:
        return True


class Workers:
    """
    Processes that ask a verifier, one question at a time; any thread may use them. There is one at first; a
    thread that finds none idle starts another, so that there are as many as threads have asked at once. One
    that takes too long is stopped. memory: GiB of address space of each. Ends the program if none starts.
    """

    def __init__(self, mode, memory):
        self.mode, self.memory, self.closed = mode, memory, False
        self.shown = set()  # by tell
        self.all = set()
        self.idle = deque([self.start()])

    def ask(self, function, arguments, seconds):
        """(what a function of the verifier returns, None), or (None, 'timeout' or 'crash')."""
        try:
            process = self.idle.pop()
        except IndexError:
            process = self.start()
        try:
            process.stdin.write((json.dumps([seconds, function, arguments], default=str) + "\n").encode())
            process.stdin.flush()
            line = self.read(process, seconds)
        except BrokenPipeError:  # it is dead, and what it was to be asked goes with it
            line = b""
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        if line:
            self.idle.append(process)
        else:
            self.stop(process)
        reply = json.loads(line or "{}")
        if "value" in reply:
            return reply["value"], None
        if line is not None and not self.closed:
            self.tell(function, reply.get("crash"))
        return None, "timeout" if line is None else "crash"

    def tell(self, function, crash):
        """Shows the first traceback of a function of the verifier, and the first end without one (None)."""
        if (function, bool(crash)) not in self.shown:
            self.shown.add((function, bool(crash)))
            effect = "drops the row" if function == "gold" else "counts as wrong"
            how = crash or "its process ended without a word: out of memory?"
            print(f"--mode {self.mode}: `{function}` crashed, which {effect}; the first time:\n{how}",
                  file=sys.stderr, flush=True)

    def start(self):
        """A new worker, its imports made, in a session of its own: Ctrl-C does not reach it."""
        for _ in range(2):  # a signal to all processes of a job may kill one that is not yet deaf to it
            process = subprocess.Popen(
                # -P: math.py and code.py, which lie here, would hide the standard library's
                [sys.executable, "-P", os.path.abspath(__file__), self.mode, str(self.memory)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            self.all.add(process)
            if not self.closed and self.read(process, 300):
                return process
            self.stop(process)
            if self.closed:
                return process
        raise SystemExit(f"error: --mode {self.mode}: a worker of the judge does not start, in {self.memory} "
                         f"GiB; this shows why: {' '.join(process.args)}")

    def read(self, process, seconds):
        """A line of a worker, b"" if it is dead, None if it takes too long."""
        ready = select.poll()  # select() takes no descriptor over 1023
        ready.register(process.stdout, select.POLLIN)
        if not ready.poll(1000 * seconds):
            return None
        line = process.stdout.readline()
        return line if line.endswith(b"\n") else b""

    def stop(self, process):
        """Kills a worker and all below it; two threads may do so at once."""
        held = []  # stopped, until none is left that can start another, and then killed together:
        while process.poll() is None and (new := [p for p in descendants(process.pid) if p not in held]):
            signal_all(new, signal.SIGSTOP)  # bubblewrap, killed alone while it sets up, leaves a child
            deadline = time.monotonic() + 0.2  # one that waits for a child to start does not stop
            while not all(map(halted, new)) and time.monotonic() < deadline:
                time.sleep(0.001)
            held += new
        signal_all(held, signal.SIGKILL)
        process.wait()
        self.all.discard(process)

    def close(self):
        """Stops all, those too that are being asked; one that starts meanwhile is stopped by its thread."""
        self.closed = True  # first: who starts one now finds it dead, or this does
        for process in self.all.copy():
            self.stop(process)


if __name__ == "__main__":
    sys.path.insert(0, PROJECT)  # as in the scripts
    worker(sys.argv[1], float(sys.argv[2]))
