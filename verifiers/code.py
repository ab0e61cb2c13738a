"""
The verdict on a program: the last fenced block of a response against tests, in a sandbox.
"""
import ast
import contextlib
import functools
import glob
import json
import math
import os
import platform
import re
import select
import shlex
import shutil
import signal
import struct
import subprocess
import tempfile
import time
from typing import NamedTuple

INSTRUCTION = ("Please reason step by step, and put your final program, in Python or C++, in one fenced code block that names "
               "its language.")
PROBLEM_FIELDS = ("problem", "question", "prompt")


def fail(message):
    raise SystemExit(f"error: {message}")


def gold(row):
    """(tests, None) or (None, why there are none) of a row of a data set."""
    return code_tests(row)


def judge(gold, response, limits):
    """'right', 'wrong', 'no answer' or 'timeout'."""
    program = last_program(response)
    if program is None:
        return "no answer"
    return judge_program(*program, gold, limits["seconds"], limits["memory"], limits["sandbox"])


def longest(gold, limits):
    """Seconds that a verdict may take."""
    return COMPILE_SECONDS + 10 + (ALL_TESTS + 1) * (gold["seconds"] or limits["seconds"])


def check(limits):
    """Ends the program where programs cannot be judged here."""
    if limits["sandbox"]:
        check_sandbox()


# ------------------------------------------------------------------------------------------------ programs and tests
# Model-written code is hostile. It runs under bubblewrap as nobody, with every namespace unshared: no network, no host
# process in sight, a read-only /usr, a small tmpfs, nothing else. One sandbox per test; the compiled program travels
# through memory, so that nothing is ever on the host's disk. What goes in is the program and one test's input. The
# expected output and the verdict stay outside, so there is nothing to read, patch or forge.


class Language(NamedTuple):
    names: tuple  # of the fence
    tool: str  # that must be installed
    file: str
    compile: str  # shell line that leaves `program` in the working directory; "" if there is nothing to compile
    run: str
    processes: int = 16  # threads included; runtimes with many also reserve more address space than they use


LANGUAGES = (
    Language(("python", "python3", "py"), "python3", "main.py", "", "python3 -I main.py"),
    Language(("cpp", "c++", "cc", "cxx"), "g++", "main.cpp", "g++ -O2 -std=c++17 -o program main.cpp", "./program"),
    Language(("c",), "gcc", "main.c", "gcc -O2 -std=c17 -o program main.c -lm", "./program"),
    Language(("rust", "rs"), "rustc", "main.rs", "rustc -O --edition 2021 -o program main.rs", "./program"),
    Language(("go", "golang"), "go", "main.go", "GOCACHE=/tmp/go HOME=/tmp go build -o program main.go", "./program", 64),
    Language(("java",), "javac", "Main.java", "", "java -Xmx512m -Xss64m -XX:+UseSerialGC Main.java", 64),
)
SANDBOX_PATH = "/usr/local/go/bin:/usr/local/bin:/usr/bin"
OUTPUT_BYTES, TMPFS_BYTES = 64 << 20, 128 << 20  # of any one file, of which the output is one; of all files
COMPILE_SECONDS = 20.0
ALL_TESTS = 20  # all tests of a program together may take so many times the limit of one
# Calls entry_point on one test's arguments. Its result goes out by a descriptor of its own; what is printed does not.
DRIVER = """import json, os, sys
out = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
sys.setrecursionlimit(100000)
names = {"__name__": "solution"}
exec("import bisect, collections, functools, heapq, itertools, math, operator, random, re, string, sys\\n"
     "from bisect import *; from collections import *; from functools import *; from heapq import *\\n"
     "from itertools import *; from math import *; from typing import *", names)
exec(compile(open("main.py").read(), "main.py", "exec"), names)
entry, args, kwargs = json.load(sys.stdin)
if entry.isidentifier() and entry not in names:
    entry = "Solution()." + entry
json.dump(eval(entry, names)(*args, **kwargs), out)
out.flush()
"""


class Run(NamedTuple):
    ended: str  # ok (exit status 0), failed, timeout, memory
    output: bytes


# A fenced block: its language and the lines until the next fence, which must be a bare one.
BLOCK = re.compile(r"^[ \t]*```[ \t]*([^\s`]+)[^`\n]*\n((?:(?![ \t]*```).*\n)*)[ \t]*```[ \t]*$", re.MULTILINE)


def last_program(response):
    """(Language, source) of the last closed fenced block that names a known, installed language, or None."""
    if "<think>" in response and "</think>" not in response:
        return None
    for name, source in reversed(BLOCK.findall(response.rpartition("</think>")[2].replace("\r\n", "\n"))):
        for language in LANGUAGES:
            if name.lower() in language.names and installed(language):
                return language, source
    return None


@functools.cache
def installed(language):
    """Whether a language's tool is where the sandbox sees it."""
    return shutil.which(language.tool, path=SANDBOX_PATH) is not None


# Calls that a program may not make, by machine: those that keep memory which no process maps, where the memory limit
# does not see it (memfd_create, shmget, msgget, semget, mq_open, add_key, request_key, keyctl, memfd_secret), and doors
# that kernel bugs tend to have (bpf, perf_event_open, userfaultfd, io_uring_setup).
FORBIDDEN = {
    "x86_64": (0xC000003E, (319, 29, 68, 64, 240, 248, 249, 250, 447, 321, 298, 323, 425)),
    "aarch64": (0xC00000B7, (279, 194, 186, 190, 180, 217, 218, 219, 447, 280, 241, 282, 425)),
}


def seccomp_filter():
    """The bytes of a BPF program by which FORBIDDEN calls, and all calls of another architecture, fail with EPERM."""
    arch, numbers = FORBIDDEN[platform.machine()]
    load, equal, at_least, result = 0x20, 0x15, 0x35, 0x06  # operation codes
    rest = len(numbers)
    program = [(load, 0, 0, 4), (equal, 0, rest + 3, arch), (load, 0, 0, 0), (at_least, rest + 1, 0, 0x40000000)]
    program += [(equal, rest - i, 0, number) for i, number in enumerate(numbers)]
    program += [(result, 0, 0, 0x7FFF0000), (result, 0, 0, 0x00050001)]  # allowed; EPERM
    return b"".join(struct.pack("HBBI", *step) for step in program)


def run_program(shell, files, stdin=b"", seconds=5.0, memory=1.0, processes=16, sandbox=True):
    """
    Runs a shell line over files ({name: bytes}) in a sandbox of its own and returns Run, with all its processes gone.

    Limits: `seconds` of wall time and of CPU per process; `processes`, threads included; `memory` GiB, as resident memory
    of all together (looked at every 20 ms) and, up to 32 processes, as address space of each; the size of files, the output
    among them, and of the temporary file system. sandbox=False: no protection at all, only the limits. Raises
    RuntimeError where the sandbox itself does not start.
    """
    limits = f"prlimit --core=0 --nofile=256 --fsize={OUTPUT_BYTES} --cpu={math.ceil(seconds) + 1}"
    if processes <= 32:
        limits += f" --as={int(memory * 2**30)} --stack={int(memory * 2**28)}"
    with contextlib.ExitStack() as stack:
        def in_memory(data):
            file = stack.enter_context(os.fdopen(os.memfd_create("data"), "wb+"))
            file.write(data)
            file.seek(0)
            return file.fileno()

        fds = {name: in_memory(data) for name, data in files.items()}
        info, how = in_memory(b""), {}
        if sandbox:
            seccomp = in_memory(seccomp_filter())
            command = [shutil.which("bwrap"), "--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent",
                       "--new-session", "--as-pid-1",  # when the shell ends, the kernel ends every process that is left
                       "--uid", "65534", "--gid", "65534", "--hostname", "sandbox", "--cap-drop", "ALL", "--clearenv",
                       "--setenv", "PATH", SANDBOX_PATH, "--setenv", "LANG", "C.UTF-8", "--info-fd", str(info),
                       "--seccomp", str(seccomp), "--ro-bind", "/usr", "/usr", "--symlink", "usr/bin", "/bin",
                       "--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev"]
            for name in filter(os.path.islink, ("/lib", "/lib32", "/lib64", "/libx32")):
                command += ["--symlink", "usr" + name, name]
            for path in ["/etc/ld.so.cache", "/etc/alternatives", *glob.glob("/etc/java-*")]:
                command += ["--ro-bind-try", path, path]
            command += ["--size", str(TMPFS_BYTES), "--tmpfs", "/tmp", "--chdir", "/tmp"]
            for name, fd in fds.items():
                command += ["--perms", "0755", "--file", str(fd), "/tmp/" + name]
            command += ["--remount-ro", "/"]
            limits += f" --nproc={processes}"
            how = {"env": {}, "cwd": "/", "pass_fds": [*fds.values(), info, seccomp]}
            if os.geteuid() == 0:  # the process limit does not hold for root, not even inside a user namespace
                how |= {"user": 65534, "group": 65534, "extra_groups": []}
        else:
            command, how = [], {"cwd": stack.enter_context(tempfile.TemporaryDirectory())}
            for name, data in files.items():
                with open(os.path.join(how["cwd"], name), "wb", opener=lambda p, flags: os.open(p, flags, 0o755)) as f:
                    f.write(data)
        command += ["sh", "-c", f"{limits} sh -c {shlex.quote(shell)}; exit $?"]
        output, ended = in_memory(b""), None
        process = subprocess.Popen(command, stdin=in_memory(stdin), stdout=output, stderr=subprocess.DEVNULL, **how)
        try:
            over, deadline = os.pidfd_open(process.pid), time.monotonic() + seconds
            stack.callback(os.close, over)
            while not ended and not select.select([over], [], [], 0.02)[0]:
                if time.monotonic() > deadline:
                    ended = "timeout"
                elif resident(process.pid) > memory * 2**30:
                    ended = "memory"
        finally:
            while process.poll() is None:  # it ends once all below it have: the kernel sees to those of the sandbox
                kill(descendants(process.pid)[1:])
                time.sleep(0.002)
        if sandbox and process.returncode and not ended and not os.fstat(info).st_size:
            raise RuntimeError("bubblewrap did not start")
        return Run(ended or ("failed" if process.returncode else "ok"), os.pread(output, OUTPUT_BYTES, 0))


def descendants(pid):
    """The ids of a process and of all that descend from it."""
    found = [pid]
    for pid in found:
        for path in glob.glob(f"/proc/{pid}/task/*/children"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError), open(path) as f:  # it may have ended meanwhile
                found += map(int, f.read().split())
    return found


def resident(pid):
    """Bytes of resident memory of a process and all its descendants; what they share is counted for each."""
    pages = 0
    for pid in descendants(pid):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/{pid}/statm") as f:
            pages += int(f.read().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def kill(pids):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def check_sandbox():
    """Ends the program with what to install or allow if bubblewrap cannot be used here."""
    refuse = "; --unsafe_no_sandbox would run model-written programs WITH ALL YOUR RIGHTS"
    if not shutil.which("bwrap") or not os.path.exists("/usr/bin/prlimit") or not installed(LANGUAGES[0]):
        fail(f"--mode code needs bubblewrap, prlimit and python3: apt-get install bubblewrap util-linux python3{refuse}")
    if platform.machine() not in FORBIDDEN:
        fail(f"--mode code: the sandbox knows {' and '.join(FORBIDDEN)}, this machine is {platform.machine()}{refuse}")
    with contextlib.suppress(RuntimeError):
        if run_program("cat", {}, b"ok", seconds=10).output == b"ok":
            if not installed(LANGUAGES[1]):
                print("note: no g++ here, so no program in C++ counts as an answer; apt-get install g++")
            return
    fail("--mode code: bubblewrap is installed but makes no sandbox here; it must be 0.8 or newer and may need user "
         "namespaces allowed (sysctl kernel.apparmor_restrict_unprivileged_userns=0; for a container docker run "
         f"--security-opt seccomp=unconfined --security-opt systempaths=unconfined){refuse}")


def judge_program(language, source, tests, seconds, memory, sandbox):
    """'right', 'wrong' or 'timeout' of a program on its tests, one sandbox for each; the first that fails decides."""
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)  # programs have a limit of their own
    language, entry, seconds = Language(*language), tests["entry_point"], tests["seconds"] or seconds
    files, shell = {language.file: source.encode("utf-8", "replace")}, language.run
    if entry:  # a call of a Python function, for which other languages have no file main.py
        files["driver.py"], shell = DRIVER.encode(), "python3 -I driver.py"
    if language.compile:
        run = run_program(f"{{ {language.compile}; }} >/dev/null && cat program", files, b"", COMPILE_SECONDS, memory,
                          max(32, language.processes), sandbox)
        if run.ended != "ok":
            return "timeout" if run.ended == "timeout" else "wrong"
        files = {"program": run.output}
    deadline = time.monotonic() + ALL_TESTS * seconds
    for given, expected in tests["cases"]:
        if time.monotonic() > deadline:
            return "timeout"
        run = run_program(shell, files, given.encode("utf-8", "replace"), seconds, memory, language.processes, sandbox)
        if run.ended == "timeout":
            return "timeout"
        output = run.output.decode("utf-8", "replace")
        if run.ended != "ok" or not same_output(output, expected, tests["tolerance"], is_json=bool(entry)):
            return "wrong"
    return "right"


NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d{1,3})?")


def same_output(output, expected, tolerance=None, is_json=False):
    """
    Whether two outputs, or results of a function in JSON, are the same line by line, trailing blanks ignored. With a
    tolerance, their numbers may differ by so much, absolutely or relatively; without one, 1, 1.0 and true are three things.
    """
    if is_json:
        try:  # in one spelling, each value a word of its own
            output, expected = (json.dumps(json.loads(text), sort_keys=True, indent=0, separators=(" ,", " : "))
                                for text in (output, expected))
        except (ValueError, RecursionError):
            return False
    mine, theirs = ([line.rstrip() for line in text.rstrip().splitlines()] for text in (output, expected))
    if mine == theirs or tolerance is None:
        return mine == theirs
    mine, theirs = ([line.split() for line in lines] for lines in (mine, theirs))
    return list(map(len, mine)) == list(map(len, theirs)) and all(
        a == b or (NUMBER.fullmatch(a) and NUMBER.fullmatch(b)
                   and abs(float(a) - float(b)) <= tolerance * max(1, abs(float(b))))
        for x, y in zip(mine, theirs) for a, b in zip(x, y))


# What the rows of data sets call their tests.
TEST_FIELDS = ("official_tests", "tests", "public_test_cases", "examples", "input_output")


def code_tests(row):
    """
    (tests, None) or (None, why there are none) of a row. tests: cases, a list of [input, expected output]; entry_point,
    None or the function to call, then each input is JSON [entry_point, args, kwargs] and each output JSON; seconds and
    tolerance, None where the problem does not state them.
    """
    if row.get("generated_checker") or row.get("checker"):
        return None, "several outputs are right (it has a checker of its own)"
    if row.get("input_mode") == "file":
        return None, "its programs read files"
    entry = row.get("entry_point")
    if entry is not None and not re.fullmatch(r"(?:[A-Za-z_]\w*\(\)\.)?[A-Za-z_]\w*", str(entry)):
        return None, "field 'entry_point' names no function"
    cases, why = [], "no tests"
    for field in filter(row.get, TEST_FIELDS):
        try:
            found = read_cases(row[field], entry)
        except (ValueError, SyntaxError, TypeError, KeyError, RecursionError, MemoryError):
            found = []
        cases += [case for case in found if case not in cases]
        why = why if found else f"field '{field}' gives no test"
    statement = str(next(filter(None, map(row.get, PROBLEM_FIELDS)), "")) + str(row.get("output_format") or "")
    stated = re.search(r"(?:absolute|relative)[^.]{0,40}error[^.]{0,80}?(?:10 *\^ *\{? *[-−–] *|1e-)(\d+)", statement)
    tolerance, seconds = row.get("tolerance"), row.get("time_limit")
    if not isinstance(tolerance, (int, float)):
        tolerance = 10.0 ** -int(stated[1]) if stated else None
    seconds = min(seconds, 60.0) if isinstance(seconds, (int, float)) and seconds > 0 else None
    tests = {"cases": cases, "entry_point": entry, "seconds": seconds, "tolerance": tolerance}
    return (tests, None) if cases else (None, why)


def read_cases(value, entry):
    """[[input, expected], ...] of one field: a list of {input, output}, two columns, or the JSON of either."""
    if isinstance(value, str):
        value = json.loads(value)
    if isinstance(value, dict):
        inputs, outputs = (value.get(name, value.get(name + "s")) for name in ("input", "output"))
        inputs, outputs = ([x] if isinstance(x, str) else x for x in (inputs, outputs))
        value = [{"input": i, "output": o} for i, o in zip(inputs, outputs, strict=True)]
    pairs = [(case["input"], case["output"]) for case in value]
    if entry:
        return [[json.dumps([entry, *arguments(given)]), json.dumps(literal(expected))] for given, expected in pairs]
    lines = [["\n".join(map(str, x)) if isinstance(x, list) else x for x in pair] for pair in pairs]
    return [pair for pair in lines if {type(x) for x in pair} == {str} and not pair[0].rstrip().endswith("...")]  # cut short


def arguments(given):
    """(args, kwargs) of a function test's input: a list, 'nums = [1], k = 2', or a value per line."""
    if isinstance(given, list):
        return given, {}
    if re.match(r"\s*[A-Za-z_]\w*\s*=", given):
        return [], {k.arg: ast.literal_eval(k.value) for k in ast.parse(f"f({given})", mode="eval").body.keywords}
    return [literal(line) for line in given.splitlines() if line.strip()], {}


def literal(text):
    """A value from its JSON or Python text; anything but text is itself."""
    try:
        return json.loads(text) if isinstance(text, str) else text
    except json.JSONDecodeError:
        return ast.literal_eval(text)
