"""
How a program is judged: a response's last fenced block runs on each test of its problem, in a sandbox.

Model-written code is hostile. It runs under bubblewrap as nobody, with every namespace unshared: no network,
no process of the host, a read-only /usr, a small tmpfs, nothing else. Each test has its own sandbox, and a
compiled program travels through memory, never over the host's disk. What goes in is the program and the input
of one test. The expected output and the verdict stay outside: there is nothing to read, patch or forge.
"""
import ast
import contextlib
import glob
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import tempfile
import textwrap
import time
from collections import namedtuple

INSTRUCTION = ("Please reason step by step, and put your final program, in Python or C++, in one fenced code "
               "block that names its language.")
# How the result of a function is written in JSON, by the driver and by `gold`: each value a word of its own.
SPELLING = {"sort_keys": True, "indent": 0, "separators": (" ,", " : ")}


def gold(row):
    """
    (tests, None) or (None, why there are none) of a row. tests: cases, a list of [input, expected output];
    entry_point, None or the function to call, then each input is JSON [entry_point, args, kwargs] and each
    output JSON; seconds and tolerance, None where the problem does not state them.
    """
    if row.get("generated_checker") or row.get("checker"):
        return None, "several outputs are right (it has a checker of its own)"
    if row.get("input_mode") == "file":
        return None, "its programs read files"
    entry = row.get("entry_point") or None
    if entry and not re.fullmatch(r"([A-Za-z_]\w*\(\)\.)?[A-Za-z_]\w*", str(entry)):
        return None, "field 'entry_point' names no function"
    if row.get("starter_code") and not entry:
        return None, "no 'entry_point' names the function that is asked for"
    cases, why = [], "no tests"
    for name in filter(row.get, ("official_tests", "tests", "public_test_cases", "examples", "input_output")):
        try:
            found = read_cases(row[name], entry)
        except (ValueError, SyntaxError, TypeError, KeyError, RecursionError, MemoryError):
            found = []
        why = f"field '{name}' gives no test"
        if not found and name != "examples":  # those are often prose, which is no reason to drop the row
            return None, why
        cases += [case for case in found if case not in cases]
    seconds, tolerance = row.get("time_limit"), row.get("tolerance")
    seconds = min(seconds, 60.0) if isinstance(seconds, (int, float)) and seconds > 0 else None
    if type(tolerance) not in (int, float) or not 0 <= tolerance < 1:  # nor nan
        text = " ".join(str(row.get(name)) for name in ("problem", "question", "prompt", "output_format"))
        error = re.search(r"(?:absolute|relative)[^.]{,40}error[^.]{,80}?"
                          r"(?:10 *(?:\^|<sup>)? *\{? *[-−–] *|1[eE]-)(\d+)", text)
        tolerance = 10.0 ** -int(error[1]) if error else None
    tests = {"cases": cases, "entry_point": entry, "seconds": seconds, "tolerance": tolerance}
    return (tests, None) if cases else (None, why)


def read_cases(value, entry):
    """[[input, expected], ...] of a field: a list of {input, output}, two columns, or the JSON of either."""
    value = json.loads(value) if isinstance(value, str) else value
    if isinstance(value, dict):
        if value.get("fn_name") and not entry:  # a function's arguments and result, not lines
            return []
        columns = [value.get(name, value.get(name + "s")) for name in ("input", "output")]
        pairs = zip(*([x] if isinstance(x, str) else x for x in columns), strict=True)
    else:
        pairs = [(case["input"], case["output"]) for case in value]
    if entry:
        typed = isinstance(value, dict) and value.get("fn_name")  # of TACO and APPS: a text is no JSON there
        return [[json.dumps([entry, *arguments(given)]),
                 json.dumps(result if typed and isinstance(given, list) else literal(result), **SPELLING)]
                for given, result in pairs]
    pairs = [["\n".join(map(str, x if isinstance(x, list) else [x])) for x in pair] for pair in pairs
             if not {type(None), dict} & {*map(type, pair)}]
    return [pair for pair in pairs if not pair[0].rstrip().endswith("...")]


def arguments(given):
    """(args, kwargs) of a function test's input: a list, 'nums = [1], k = 2', or a value per line."""
    if isinstance(given, list):
        return given, {}
    if re.match(r"\s*[A-Za-z_]\w*\s*=", given):
        call = ast.parse(f"f({given})", mode="eval").body
        return [], {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    return [literal(line) for line in given.splitlines() if line.strip()], {}


def literal(text):
    """What JSON or Python text says, as JSON holds it; anything but text is itself."""
    try:
        return json.loads(text) if isinstance(text, str) else text
    except json.JSONDecodeError:
        return json.loads(json.dumps(ast.literal_eval(text)))


# names: of the fence. tool: must be installed. compile: a shell line that leaves `program` where it runs.
# processes: with threads; runtimes that need many also reserve more address space than they use.
Language = namedtuple("Language", "names tool file compile run processes")
LANGUAGES = (
    Language("python python3 py", "python3", "main.py", "", "python3 -I main.py", 16),
    Language("cpp c++ cc cxx", "g++", "a.cpp", "g++ -O2 -std=c++17 -o program a.cpp", "./program", 16),
    Language("c", "gcc", "a.c", "gcc -O2 -std=c17 -o program a.c -lm", "./program", 16),
    Language("rust rs", "rustc", "a.rs", "rustc -O --edition 2021 -o program a.rs", "./program", 16),
    Language("go golang", "go", "a.go", "go build -o program a.go", "./program", 64),
    Language("java", "javac", "Main.java", "", "java -Xmx512m -Xss64m -XX:+UseSerialGC Main.java", 64),
)
COMPILE_SECONDS, ALL_TESTS = 20.0, 20  # all tests of a program may take so many times the limit of one
# A fenced block: its language and the lines until the next fence, which must be a bare one.
BLOCK = re.compile(r"^[ \t]*```[ \t]*([^\s`]+)(?=\s)[^`\n]*\n((?:(?![ \t]*```).*\n)*)[ \t]*```[ \t]*$", re.M)
NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d{1,3})?")
# Calls a function on a test's arguments. Its result has a descriptor of its own, where nothing printed goes.
DRIVER = f"""import builtins, json, os, sys
out = os.dup(1)
os.dup2(2, 1)
sys.setrecursionlimit(100000)
given = dict()
exec("import bisect, collections, functools, heapq, itertools, math, operator, random, re, string, sys\\n"
     "from bisect import *; from collections import *; from functools import *; from heapq import *\\n"
     "from itertools import *; from math import *; from typing import *", given)
solution = sys.modules["solution"] = type(sys)("solution")
names = vars(solution)
names["__builtins__"] = given | vars(builtins)  # what the program defines itself is in names; pow takes three
exec(compile(open("main.py").read(), "main.py", "exec"), names)
entry, args, kwargs = json.load(sys.stdin)
call = "Solution()." + entry if entry.isidentifier() and entry not in names else entry
result = json.dumps(eval(call, names)(*args, **kwargs))
os.write(out, json.dumps(json.loads(result), **{SPELLING}).encode())
""".encode()


def last_program(response):
    """(Language, source) of the last closed fenced block that names a known, installed language, or None."""
    if "<think>" in response and "</think>" not in response:
        return None
    blocks = BLOCK.findall(response.rpartition("</think>")[2].replace("\r\n", "\n"))
    return next(((language, textwrap.dedent(source))
                 for name, source in reversed(blocks) for language in LANGUAGES
                 if name.lower() in language.names.split() and shutil.which(language.tool, path=PATH)), None)


def judge(gold, response, limits):
    """'right', 'wrong', 'timeout' or 'no answer': the last program on all tests, until one fails."""
    found = last_program(response)
    if found is None:
        return "no answer"
    (language, source), seconds = found, gold["seconds"] or limits["seconds"]
    files, shell = {language.file: source.encode("utf-8", "replace")}, language.run
    if gold["entry_point"]:  # a call of a Python function, for which other languages have no file main.py
        files["driver.py"], shell = DRIVER, "python3 -I driver.py"
    if language.compile:
        make, processes = f"{{ {language.compile}; }} >/dev/null && cat program", max(32, language.processes)
        ended, program = run_program(make, files, "", limits, COMPILE_SECONDS, processes)
        if ended != "ok":
            return ended
        files = {"program": program}
    deadline = time.monotonic() + ALL_TESTS * seconds
    for given, expected in gold["cases"]:
        if time.monotonic() > deadline:
            return "timeout"
        ended, output = run_program(shell, files, given, limits, seconds, language.processes)
        if ended != "ok":
            return ended
        if not same_output(output.decode("utf-8", "replace"), expected, gold["tolerance"]):
            return "wrong"
    return "right"


def longest(gold, limits):
    """Seconds that `judge` may take: to compile, for all tests, and for one that begins at their end."""
    return COMPILE_SECONDS + 10 + (ALL_TESTS + 1) * (gold["seconds"] or limits["seconds"])


def same_output(output, expected, tolerance=None):
    """
    Whether two outputs are the same line by line, trailing blanks ignored. With a tolerance, numbers may
    differ by so much, absolutely or relatively; without one, 1, 1.0 and true are three things.
    """
    if len(output) > 10 * len(expected) + 2**20:  # it could fill the memory in lines and words
        return False
    mine, theirs = ([line.rstrip() for line in text.rstrip().splitlines()] for text in (output, expected))
    if mine == theirs or tolerance is None:
        return mine == theirs
    mine, theirs = ([word for line in lines for word in (*line.split(), "\n")] for lines in (mine, theirs))
    return len(mine) == len(theirs) and all(
        a == b or (NUMBER.fullmatch(a) and NUMBER.fullmatch(b)
                   and abs(float(a) - float(b)) <= tolerance * max(1, abs(float(b))) < float("inf"))
        for a, b in zip(mine, theirs))


PATH = "/usr/local/go/bin:/usr/local/bin:/usr/bin"  # of the sandbox
OUTPUT_BYTES, TMPFS_BYTES = 64 << 20, 128 << 20  # of any one file, of which the output is one; of all files
BUBBLEWRAP = f"""
    --unshare-all --unshare-user --disable-userns --cap-drop ALL --uid 65534 --gid 65534 --hostname sandbox
    --die-with-parent --new-session --as-pid-1 --clearenv --setenv PATH {PATH} --setenv LANG C.UTF-8
    --ro-bind /usr /usr --symlink usr/bin /bin --symlink usr/lib /lib --symlink usr/lib64 /lib64 --chdir /tmp
    --ro-bind-try /etc/ld.so.cache /etc/ld.so.cache --ro-bind-try /etc/alternatives /etc/alternatives
    {" ".join(f"--ro-bind {path} {path}" for path in glob.glob("/etc/java-*"))} --setenv HOME /tmp
    --proc /proc --dev /dev --ro-bind /dev/null /dev/zero --remount-ro /dev
    --size {TMPFS_BYTES} --tmpfs /tmp --remount-ro /""".split()
# By machine: its number in ELF; forbidden calls; mmap; socket and socketpair. Forbidden are those that keep
# memory which no process maps, where no limit sees it (memfd_create, shmget, msgget, semget, mq_open,
# add_key, request_key, keyctl, memfd_secret, vmsplice), and doors that kernel bugs tend to have (bpf,
# perf_event_open, userfaultfd, io_uring_setup).
CALLS = {
    "x86_64": (62, (319, 29, 68, 64, 240, 248, 249, 250, 447, 278, 321, 298, 323, 425), 9, (41, 53)),
    "aarch64": (183, (279, 194, 186, 190, 180, 217, 218, 219, 447, 75, 280, 241, 282, 425), 222, (198, 199)),
}
FAMILIES = (1, 2, 10, 16)  # AF_UNIX, AF_INET, AF_INET6, AF_NETLINK: AF_VSOCK is of no network namespace


def seccomp_filter():
    """A BPF program: forbidden calls, those of other architectures, and other sockets fail with EPERM."""
    machine, forbidden, mmap, sockets = CALLS[os.uname().machine]
    load, mask, equal, at_least = 0x20, 0x54, 0x15, 0x35  # operations; then steps to skip: if so, if not
    allow, refuse = (0x06, 0, 0, 0x7FFF0000), (0x06, 0, 0, 0x00050001)
    program = [(load, 0, 0, 4), (equal, 1, 0, 0xC0000000 | machine), refuse]  # another is 32-bit x86, or Arm
    program += [(load, 0, 0, 0), (at_least, 0, 1, 1 << 30), refuse]  # from here on the calls are of x32
    for number in forbidden:
        program += [(equal, 0, 1, number), refuse]
    # Memory with MAP_SHARED and MAP_ANONYMOUS, or of /dev/zero, can be kept while resident in no process.
    program += [(equal, 0, 5, mmap), (load, 0, 0, 40), (mask, 0, 0, 0x21), (equal, 0, 1, 0x21), refuse, allow]
    program += [(equal, 2, 0, sockets[0]), (equal, 1, 0, sockets[1]), allow]
    program += [(load, 0, 0, 16)]  # the first argument, a family: 32 bits of it, as the kernel takes it
    for family in FAMILIES:
        program += [(equal, 0, 1, family), allow]
    return b"".join(struct.pack("HBBI", *step) for step in [*program, refuse])


def run_program(shell, files, stdin, limits, seconds, processes=16):
    """
    Runs a shell line over files ({name: bytes}) in a sandbox of its own. Returns, when all its processes are
    gone, 'ok', 'timeout' or 'wrong' (another exit status than 0, too much memory), and its output (bytes).

    Limits: `seconds` of wall time and of CPU per process; `processes`, with threads; limits["memory"] GiB of
    resident memory for all (looked at every 5 ms) and, up to 32 processes, of address space for each; the
    size of files, the output among them, and of the tmpfs. limits["sandbox"] False: no protection but these.
    Raises RuntimeError where the sandbox does not start.
    """
    memory, sandbox = int(limits["memory"] * 2**30), limits["sandbox"]
    bounds = (f"--core=0 --nofile=256 --fsize={OUTPUT_BYTES} --cpu={int(seconds) + 2} --stack={memory // 4}"
              f" --as={memory if processes <= 32 else 'unlimited'}" + f" --nproc={processes}" * sandbox)
    with contextlib.ExitStack() as stack:
        def in_memory(data):
            descriptor = os.memfd_create("data")
            stack.callback(os.close, descriptor)
            os.pwrite(descriptor, data, 0)
            return descriptor
        given, output, info = in_memory(stdin.encode("utf-8", "replace")), in_memory(b""), in_memory(b"")
        inside = {name: in_memory(data) for name, data in files.items()}
        if sandbox:
            seccomp = in_memory(seccomp_filter())
            start = [shutil.which("bwrap"), *BUBBLEWRAP, "--info-fd", str(info), "--seccomp", str(seccomp)]
            for name, descriptor in inside.items():
                start += ["--perms", "0755", "--file", str(descriptor), f"/tmp/{name}"]
            how = {"env": {}, "cwd": "/", "pass_fds": [info, seccomp, *inside.values()]}
            if os.geteuid() == 0:  # the process limit does not hold for root, not even in a user namespace
                how |= {"user": 65534, "group": 65534, "extra_groups": []}
        else:
            start, how = [], {"cwd": stack.enter_context(tempfile.TemporaryDirectory())}
            for name, descriptor in inside.items():
                shell = f"install /proc/{os.getpid()}/fd/{descriptor} {name}; {shell}"
        start += ["sh", "-c", f'prlimit {bounds} sh -c "$0"; exit $?', shell]
        process = subprocess.Popen(start, stdin=given, stdout=output, stderr=subprocess.DEVNULL, **how)
        stack.callback(process.kill)  # should anything fail below
        ended, deadline = None, time.monotonic() + seconds
        while process.poll() is None:  # it ends when all below it have; for a sandbox the kernel sees to that
            ids, resident = tree(process.pid)
            late, large = time.monotonic() > deadline, resident > memory
            ended = ended or ("timeout" if late else "wrong" if large else None)
            for pid in ids[1:] if ended else []:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.005)
        if sandbox and process.returncode and not ended and not os.fstat(info).st_size:
            raise RuntimeError("bubblewrap did not start")
        return ended or ("wrong" if process.returncode else "ok"), os.pread(output, OUTPUT_BYTES, 0)


def tree(pid):
    """The ids of a process and of all below it; the bytes they have in memory, shared ones once for each."""
    ids, pages, gone = [pid], 0, contextlib.suppress(FileNotFoundError, ProcessLookupError)
    for pid in ids:
        with gone, open(f"/proc/{pid}/statm") as f:
            pages += int(f.read().split()[1])
        for path in glob.glob(f"/proc/{pid}/task/*/children"):
            with gone, open(path) as f:
                ids += map(int, f.read().split())
    return ids, pages * os.sysconf("SC_PAGE_SIZE")


def check(limits):
    """Ends the program with what to install or allow where programs should run in a sandbox but cannot."""
    if not limits["sandbox"]:
        return
    tools = [shutil.which("bwrap"), shutil.which("prlimit", path=PATH), shutil.which("python3", path=PATH)]
    why = "it needs bubblewrap, prlimit and python3: apt-get install bubblewrap util-linux python3"
    if all(tools):
        with contextlib.suppress(RuntimeError):
            if os.uname().machine in CALLS and run_program("cat", {}, "ok", limits, 10.0) == ("ok", b"ok"):
                if os.environ.get("RANK", "0") == "0" and not shutil.which("g++", path=PATH):
                    print("note: no g++ here, so no program in C++ counts; apt-get install g++", flush=True)
                return
        why = (f"bubblewrap makes no sandbox here; it must be 0.8 or newer, on {' or '.join(CALLS)}, and may "
               "need user namespaces (sysctl kernel.apparmor_restrict_unprivileged_userns=0; docker run "
               "--security-opt seccomp=unconfined --security-opt systempaths=unconfined)")
    raise SystemExit(f"error: --mode code: {why}; "
                     "--unsafe_no_sandbox would run model-written programs WITH ALL YOUR RIGHTS")
