"""
Code verdicts: what counts as a program, how tests are decoded, how outputs are compared, and that hostile
programs end as wrong within their limit and leave the host as it was: its processes, files and memory are
counted before and after.
"""
import errno
import glob
import importlib.util
import json
import os
import re
import resource
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from textwrap import dedent

import pytest

ROOT = Path(__file__).parents[1]
FILE = ROOT / "verifiers" / "code.py"
sys.path.insert(0, str(ROOT))

import verify  # noqa: E402

spec = importlib.util.spec_from_file_location("verifier_code", FILE)
code = importlib.util.module_from_spec(spec)
spec.loader.exec_module(code)

pytestmark = pytest.mark.usefixtures("only_sandbox")
LIMITS = {"seconds": 2.0, "memory": 1.0, "sandbox": True}


def sandbox_works():
    try:
        code.check(LIMITS)
    except SystemExit as e:
        return str(e)
    return None


NO_SANDBOX = sandbox_works()
sandboxed = pytest.mark.skipif(NO_SANDBOX is not None, reason=str(NO_SANDBOX))
PYTHON, CPP, C, RUST, GO, JAVA = code.LANGUAGES


def fenced(source, language="python"):
    return f"Here is my program.\n```{language}\n{source}\n```\nIt works."


def gold_of(*cases, entry_point=None, tolerance=None, seconds=None):
    """The gold of a problem: what `gold` makes of its row."""
    cases = [list(case) for case in cases]
    return {"cases": cases, "entry_point": entry_point, "tolerance": tolerance, "seconds": seconds}


ADD = gold_of(("1 2\n", "3\n"), ("10 -4\n", "6\n"))
ADDS = "print(sum(map(int, input().split())))"
PROBLEM = verify.Problem("p", "Add.", ADD, "code")


@pytest.fixture(scope="module")
def pool():
    with verify.Judge("code", workers=2, limit=2.0) as judge:
        yield judge


# ------------------------------------------------------------------------------------------------- extraction


@pytest.mark.parametrize("response, language, source", [
    (fenced("print(1)"), PYTHON, "print(1)\n"),
    (fenced("print(1)") + fenced("print(2)"), PYTHON, "print(2)\n"),
    (fenced("int main(){}", "C++"), CPP, "int main(){}\n"),
    (fenced("print(1)") + "\nOutput:\n```\n3\n```\n", PYTHON, "print(1)\n"),  # a block of no known language
    ("<think>" + fenced("print(0)") + "</think>" + fenced("print(1)"), PYTHON, "print(1)\n"),
    (fenced("print(1)").replace("\n", "\r\n"), PYTHON, "print(1)\n"),
    (fenced("print(1)") + "\n```python\nprint(2", PYTHON, "print(1)\n"),  # the last one is not closed
    ("```python\nprint(0)\n```python\nprint(1)\n```", PYTHON, "print(1)\n"),
    ("1. so:\n   ```py\n   print(1)\n   ```", PYTHON, "print(1)\n"),  # in a list
    ("1. so:\n   ```py\n   if 1:\n       print(1)\n   ```", PYTHON, "if 1:\n    print(1)\n"),
])
def test_last_program(response, language, source):
    assert code.last_program(response) == (language, source)


@pytest.mark.parametrize("response", [
    "", "print(1)", "```\nprint(1)\n```", "```python\nprint(1)", "```brainfuck\n+\n```", fenced("1", "aiken"),
    "<think>" + fenced("print(1)"), "<think>" + fenced("print(1)") + "</think> done",
])
def test_no_program(response):
    assert code.last_program(response) is None
    assert code.judge(ADD, response, LIMITS) == "no answer"


def test_extraction_is_linear():
    started = time.time()
    code.last_program("```py\n" * 100_000)
    code.last_program("`" * 1_000_000)
    code.last_program("```" + "a" * 1_000_000)
    code.last_program("```py" + " " * 1_000_000)
    assert time.time() - started < 5


def test_a_language_without_its_tool_is_not_known(monkeypatch):
    monkeypatch.setattr(code.shutil, "which", lambda tool, path=None: tool if tool == "python3" else None)
    assert code.last_program(fenced("int main(){}", "cpp")) is None
    assert code.last_program(fenced("print(1)"))[0] is PYTHON


# ------------------------------------------------------------------------------------------ tests of problems

PAIRS = [{"input": "1 2\n", "output": "3\n"}, {"input": "5 5\n", "output": "10\n"}]
CASES = [["1 2\n", "3\n"], ["5 5\n", "10\n"]]


@pytest.mark.parametrize("field", ["examples", "official_tests", "tests", "public_test_cases"])
@pytest.mark.parametrize("value", [
    PAIRS, json.dumps(PAIRS), {"input": ["1 2\n", "5 5\n"], "output": ["3\n", "10\n"]},
    json.dumps({"inputs": ["1 2\n", "5 5\n"], "outputs": ["3\n", "10\n"]}),
])
def test_pairs_are_decoded(field, value):
    tests, why = code.gold({field: value})
    assert tests["cases"] == CASES and why is None and tests["entry_point"] is None


def test_two_columns_of_one_test_are_not_read_letter_by_letter():
    tests, _ = code.gold({"tests": {"input": "1 2\n", "output": "abc\n"}})
    assert tests["cases"] == [["1 2\n", "abc\n"]]


def test_all_fields_count_and_none_twice():
    tests, _ = code.gold({"examples": PAIRS[:1], "official_tests": PAIRS})
    assert sorted(tests["cases"]) == sorted(CASES)


@pytest.mark.parametrize("more", [{"entry_point": None}, {"entry_point": "", "starter_code": ""}])
def test_empty_columns_are_none(more):
    assert code.gold({"tests": PAIRS, **more})[0] == gold_of(*CASES)


def test_lists_of_lines_are_joined():
    assert code.gold({"tests": [{"input": [1, "2"], "output": ["a", "b"]}]})[0]["cases"] == [["1\n2", "a\nb"]]


def test_official_tests_that_cannot_be_read_drop_the_problem():
    """Examples alone would call wrong programs right; examples that are prose do no harm."""
    unread = {"official_tests": "[1, 2", "examples": PAIRS}
    assert code.gold(unread) == (None, "field 'official_tests' gives no test")
    cut = {"official_tests": [{"input": "1 2 ...", "output": "3"}], "examples": PAIRS}
    assert code.gold(cut) == (None, "field 'official_tests' gives no test")
    assert code.gold({"official_tests": PAIRS, "examples": "see above"})[0]["cases"] == CASES


def test_a_number_is_the_text_that_it_is_printed_as():
    tests = [{"input": 3, "output": 4.5}, {"input": "5", "output": [6, "7"]}, {"input": "8", "output": None}]
    assert code.gold({"tests": tests})[0]["cases"] == [["3", "4.5"], ["5", "6\n7"]]


NONE = "field 'tests' gives no test"


@pytest.mark.parametrize("row, why", [
    ({}, "no tests"), ({"tests": []}, "no tests"), ({"tests": ""}, "no tests"), ({"tests": None}, "no tests"),
    ({"tests": "rubbish"}, NONE), ({"tests": "[1, 2"}, NONE), ({"tests": [{"input": "1"}]}, NONE),
    ({"tests": [1]}, NONE), ({"tests": {"input": ["1"], "output": []}}, NONE), ({"tests": 5}, NONE),
    ({"tests": [{"input": "1 2 ...", "output": "3"}]}, NONE),
    ({"tests": PAIRS, "generated_checker": "def check(): ..."},
     "several outputs are right (it has a checker of its own)"),
    ({"tests": PAIRS, "input_mode": "file"}, "its programs read files"),
    ({"tests": PAIRS, "entry_point": "import os"}, "field 'entry_point' names no function"),
    ({"tests": PAIRS, "starter_code": "def f(a):"}, "no 'entry_point' names the function that is asked for"),
    ({"input_output": '{"fn_name": "add", "inputs": [[1, 2]], "outputs": [[3]]}'},
     "field 'input_output' gives no test"),
    ({"tests": "assert candidate(1) == 3", "entry_point": "f"}, NONE),
    ({"tests": [{"input": "x = open('x')", "output": "3"}], "entry_point": "f"}, NONE),
])
def test_no_test_drops_the_problem(row, why):
    assert code.gold(row) == (None, why)


@pytest.mark.parametrize("value", [
    [{"input": "nums = [2,7], target = 9", "output": "[0, 1]"}],
    [{"input": "[2,7]\n9", "output": "[0,1]"}],
    [{"input": [[2, 7], 9], "output": [0, 1]}],
    json.dumps([{"input": "nums = [2,7], target = 9", "output": "[0, 1]"}]),
])
def test_function_tests_are_decoded(value):
    tests, _ = code.gold({"tests": value, "entry_point": "twoSum"})
    ((given, expected),) = tests["cases"]
    entry, args, kwargs = json.loads(given)
    assert entry == "twoSum" and json.loads(expected) == [0, 1]
    assert args + list(kwargs.values()) == [[2, 7], 9]


def test_results_beside_typed_arguments_are_typed():
    """TACO and APPS: a text among them is a text, digits or not; elsewhere it is JSON or Python."""
    columns = {"fn_name": "f", "inputs": [["11", "123"], ["a", "b"]], "outputs": ["134", "ab"]}
    tests, _ = code.gold({"input_output": json.dumps(columns), "entry_point": "f"})
    assert [json.loads(expected) for _, expected in tests["cases"]] == ["134", "ab"]
    lines = {"fn_name": "f", "inputs": ["11\n123"], "outputs": ["134"]}  # LiveCodeBench: all of it is text
    tests, _ = code.gold({"input_output": json.dumps(lines), "entry_point": "f"})
    assert tests["cases"] == [['["f", [11, 123], {}]', "134"]]


def test_tolerance_and_time_limit_come_from_the_problem():
    text = "Print x. Your absolute or relative error must not exceed $10^{-6}$."
    tests, _ = code.gold({"tests": PAIRS, "problem": text, "time_limit": 1.5})
    assert tests["tolerance"] == 1e-6 and tests["seconds"] == 1.5
    assert code.gold({"tests": PAIRS, "tolerance": 0.01})[0]["tolerance"] == 0.01
    assert code.gold({"tests": PAIRS, "problem": "Print x.", "output_format": text})[0]["tolerance"] == 1e-6
    assert code.gold({"tests": PAIRS, "problem": "Print x."})[0]["tolerance"] is None
    for spelled in ("10 - 6", "10^-6", "10<sup>-6</sup>", "1e-6", "1E-6"):
        row = {"tests": PAIRS, "problem": text.replace("10^{-6}", spelled)}
        assert code.gold(row)[0]["tolerance"] == 1e-6
    for odd in (float("nan"), float("inf"), True, -1.0, "1e-6"):  # then the text counts
        assert code.gold({"tests": PAIRS, "problem": text, "tolerance": odd})[0]["tolerance"] == 1e-6


def test_a_gold_survives_json():
    tests, _ = code.gold({"tests": PAIRS, "problem": "x"})
    assert json.loads(json.dumps(tests)) == tests


# ---------------------------------------------------------------------------------------------------- outputs


@pytest.mark.parametrize("output, expected, tolerance, same", [
    ("3\n", "3", None, True), ("3 \n\n\n", "3\n", None, True), ("1\n2\n", "1\r\n2\r\n", None, True),
    ("1 2", "1\n2", None, False), ("3.0", "3", None, False), ("0.3333333", "0.3333334", None, False),
    ("0.3333333", "0.3333334", 1e-6, True), ("0.33", "0.3333334", 1e-6, False),
    ("1000000.5", "1000000", 1e-6, True), ("nan", "0.5", 1e-6, False), ("inf", "0.5", 1e-6, False),
    ("1e999", "0.5", 1e-6, False), ("yes 0.5", "yes 0.5000001", 1e-6, True),
    ("no 0.5", "yes 0.5", 1e-6, False), ("0.5 0.5", "0.5", 1e-6, False), ("", "", None, True),
    ("", "3", None, False), ("3\n3", "3", None, False), (" 3", "3", None, False),
    ("a\n\nb", "a\nb", None, False), ("1 2", "1\n2", 1e-6, False),
    ("1\n\n2", "1\n2", 1e-6, False), ("1  2", "1 2", 1e-6, True), ("1  2", "1 2", None, False),
    ("7", "1" + "0" * 400, 1e-6, False), ("1" + "0" * 400, "1" + "0" * 400, 1e-6, True),  # infinite as floats
])
def test_same_text(output, expected, tolerance, same):
    assert code.same_output(output, expected, tolerance) == same


def test_a_long_number_is_read_once():
    started, digits = time.time(), "1" * 1_000_000
    assert not code.same_output(digits + "x", "1" * 100_000 + "2", 1e-6)
    assert not code.same_output(digits + "." + digits, "1", 1e-6)
    assert time.time() - started < 2


def test_a_flood_of_output_is_not_read():
    """64 MB of short words would be gigabytes as Python's strings."""
    started, flood = time.time(), "1 " * (32 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert not code.same_output(flood, "1", 1e-6) and not code.same_output("1\n" * (32 << 20), "1")
    assert time.time() - started < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10


@sandboxed
@pytest.mark.parametrize("result, expected, tolerance, same", [
    ("[0, 1]", "[0,1]", None, True), ("True", "1", None, False), ("1.0", "1", None, False),
    ("[1.0000001]", "[1]", 1e-5, True), ("[1.0000001, 2]", "[1, 2, 3]", 1e-5, False),
    ("'a'", '"a"', None, True), ("'0.5'", "0.5", 1e-5, False),
    ("os._exit(0)", "null", None, False), ("None", "null", None, True), ("{'a': 1}", '{"a": 1}', None, True),
    ("float('nan')", "0", 1e-5, False), ("{2: 1, 10: 2}", '{"2": 1, "10": 2}', None, True),
    ("{2: 1, 10: 2}", "{10: 2, 2: 1}", None, True), ("((1, 2),)", "[[1, 2]]", None, True),
    ("'a\\nb '", '"a\\nb "', None, True), ("'a\\nb '", '"a\\nb"', None, False), ("{1}", "[1]", None, False),
    ("write('[' * 10**5)", "[]", None, False), ("write('[1] [1]')", "[1]", None, False),
    ("write('[1]') and [1]", "[1]", None, False),
])
def test_same_result(result, expected, tolerance, same):
    """write: to all descriptors that are open, as a program would that looks for the one of the result."""
    source = f"""
        import os
        def write(text):
            for fd in range(1, 20):
                try: os.write(fd, text.encode())
                except OSError: pass
            return True
        def f(): return {result}
    """
    row = {"tests": [{"input": [], "output": expected}], "entry_point": "f", "tolerance": tolerance}
    reason = code.judge(code.gold(row)[0], fenced(dedent(source)), LIMITS)
    assert reason == ("right" if same else "wrong")


# --------------------------------------------------------------------------------------------------- verdicts

CPP_ADD = """
#include <iostream>
int main() { long a, b; std::cin >> a >> b; std::cout << a + b << std::endl; }
"""
OTHERS = {
    C: "#include <stdio.h>\nint main() { int a, b; scanf(\"%d %d\", &a, &b); printf(\"%d\\n\", a + b); }",
    RUST: "use std::io::*; fn main() { let mut s = String::new(); stdin().read_to_string(&mut s).unwrap();"
          " println!(\"{}\", s.split_whitespace().map(|x| x.parse::<i64>().unwrap()).sum::<i64>()); }",
    GO: "package main\nimport \"fmt\"\nfunc main() { var a, b int; fmt.Scan(&a, &b); fmt.Println(a + b) }",
    JAVA: "import java.util.*;\nclass Solution { public static void main(String[] x) {"
          " Scanner s = new Scanner(System.in); System.out.println(s.nextInt() + s.nextInt()); } }",
}


@sandboxed
@pytest.mark.parametrize("response, reason", [
    (fenced(ADDS), "right"),
    (fenced("a, b = map(int, input().split())\nprint(a - b)"), "wrong"),
    (fenced("print(3)"), "wrong"),  # right on the first test only
    (fenced(ADDS + "\nraise SystemExit(1)"), "wrong"),
    (fenced("this is no Python"), "wrong"),
    (fenced(CPP_ADD, "cpp"), "right"),
    (fenced(CPP_ADD.replace("a + b", "a * b"), "cpp"), "wrong"),
    (fenced("int main() { return undeclared; }", "cpp"), "wrong"),
    (fenced("int main() { for (;;); }", "cpp"), "timeout"),
])
def test_verdicts(pool, response, reason):
    assert pool([PROBLEM], [response]) == [verify.Verdict(reason == "right", reason)]
    assert code.judge(ADD, response, LIMITS) == reason


@sandboxed
@pytest.mark.parametrize("language", OTHERS, ids=lambda language: language.names)
def test_other_languages(pool, language):
    if not shutil.which(language.tool, path=code.PATH):
        pytest.skip(f"{language.names}: its compiler is not in {code.PATH}")
    right, wrong = (verify.Problem("p", "Add.", gold_of(*cases, seconds=10), "code")
                    for cases in (ADD["cases"], [("1 2", "4")]))
    verdicts = pool([right, wrong], [fenced(OTHERS[language], language.names.split()[0])] * 2)
    assert [verdict.reason for verdict in verdicts] == ["right", "wrong"]


GCD = [{"input": "4\n6", "output": "2"}]


@sandboxed
@pytest.mark.parametrize("source, reason", [
    ("pass", "wrong"), ("from math import gcd", "right"),
    ("def gcd(a, b): return a if not b else gcd(b, a % b)", "right"),
    ("class Solution:\n    def gcd(self, a, b): return a if not b else self.gcd(b, a % b)", "right"),
    ("class Solution:\n    def gcd(self, a, b): return gcd(a, b) * pow(a, 0, 7)", "right"),
    ("from __future__ import annotations\nfrom dataclasses import dataclass\n"
     "@dataclass\nclass A:\n    x: int\ndef gcd(a, b): return A(2).x", "right"),
])
def test_the_imports_before_a_program_are_not_its_own(source, reason):
    """What the driver has imported too is the program's to define; pow is Python's, of three arguments."""
    assert code.judge(code.gold({"tests": GCD, "entry_point": "gcd"})[0], fenced(source), LIMITS) == reason


TWO_SUM = [{"input": "nums = [2,7], target = 9", "output": "[0, 1]"}]


@sandboxed
@pytest.mark.parametrize("source, reason", [
    ("class Solution:\n    def twoSum(self, nums: List[int], target: int):\n        print('debug')\n"
     "        return [0, 1]", "right"),
    ("def twoSum(nums, target):\n    return (0, 1)", "right"),
    ("def twoSum(nums, target):\n    return [1, 0]", "wrong"),
    ("def twoSum(nums, target):\n    print([0, 1])", "wrong"),
    ("class Same(list):\n    def __eq__(self, other): return True\n"
     "def twoSum(nums, target):\n    return Same()", "wrong"),
    ("def other(): pass", "wrong"),
    ("import os\ndef twoSum(nums, target):\n    os._exit(0)", "wrong"),
    ("import json\njson.dumps = lambda *a, **k: 'true'\n"
     "def twoSum(nums, target):\n    return [0, 1]", "wrong"),
])
def test_function_problems(source, reason):
    tests, _ = code.gold({"tests": TWO_SUM, "entry_point": "twoSum"})
    assert code.judge(tests, fenced(source), LIMITS) == reason


@sandboxed
def test_a_function_in_another_language_is_wrong():
    tests, _ = code.gold({"tests": TWO_SUM, "entry_point": "twoSum"})
    assert code.judge(tests, fenced(CPP_ADD, "cpp"), LIMITS) == "wrong"


# ---------------------------------------------------------------------------------------------------- attacks
# Each program prints what it found if its attack works. The expected output is none of these, each must end
# as wrong within its limit, with nothing left behind. @ROOT, @HOME, @TMP, @PORT, @MARKER are filled in.


def host():
    """
    What a program could leave behind, besides processes: (files, bytes of memory that no process holds) of
    this machine. A process takes its own memory with it; what can outlive it lies in the kernel or in a file
    system made of memory.
    """
    folders = ("/tmp", "/dev/shm", "/var/tmp", str(ROOT), str(ROOT / "tests"), os.path.expanduser("~"))
    files = {f for d in folders for f in glob.glob(d + "/*") + glob.glob(d + "/.[!.]*")}
    text = Path("/proc/meminfo").read_text()
    return files, sum(int(re.search(rf"{name}:\s+(\d+)", text)[1]) * 1024 for name in ("Shmem", "SUnreclaim"))


def sandbox_processes():
    """Processes on this machine that run under bubblewrap or were started by it."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            name = Path(f"/proc/{pid}/cmdline").read_bytes()
            status = Path(f"/proc/{pid}/status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if b"bwrap" in name.split(b"\0")[0] or len(re.search(r"NSpid:(.*)", status)[1].split()) > 1:
            found.append((pid, name))
    return found


MARKER = "a-file-of-the-host"
ATTACKS = {
    "socket": """
        import socket
        s = socket.create_connection(('1.1.1.1', 53), 1)
        print('escaped')""",
    "loopback": """
        import socket
        s = socket.create_connection(('127.0.0.1', @PORT), 1)
        print('escaped')""",
    "vsock": """
        import socket
        s = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        s.settimeout(1)
        print('escaped')""",
    "shadow": "print('escaped', open('/etc/shadow').read())",
    "passwd": "print('escaped', open('/etc/passwd').read())",
    "home": "import os\nprint('escaped', os.listdir('@HOME'))",
    "project": "print('escaped', open('@ROOT/verify.py').read())",
    "environment": """
        import os
        if 'SECRET' in os.environ: print('escaped')
        else: raise SystemExit(1)""",
    "proc of the parent": """
        import os
        for p in filter(str.isdigit, os.listdir('/proc')):
            for f in ('environ', 'cmdline'):
                t = open(f'/proc/{p}/{f}').read()
                if 'SECRET' in t or 'worker' in t: print('escaped', t)
        raise SystemExit(1)""",
    "proc root": """
        import os
        for p in filter(str.isdigit, os.listdir('/proc')):
            try: l = os.listdir(f'/proc/{p}/root')
            except OSError: continue
            if 'home' in l or 'root' in l: print('escaped')
        raise SystemExit(1)""",
    "write outside": """
        wrote = 0
        for f in ('/x', '/usr/x', '/usr/bin/python3', '/etc/x', '/home/x', '/dev/shm/x', '/var/tmp/x',
                  '@ROOT/x', '@TMP/@MARKER'):
            try: open(f, 'w').write('escaped'); wrote += 1
            except OSError: pass
        if wrote: print('escaped')
        raise SystemExit(1)""",
    "fork bomb": """
        import os
        while True:
            try: os.fork()
            except OSError: pass""",
    "forks that allocate": """
        import os
        for i in range(4): os.fork()
        x = bytearray(900 << 20)
        while True: x[::4096] = x[::4096]""",
    "10 GB": "x = bytearray(10 << 30)\nprint('escaped')",
    "endless output": "import sys\nwhile True: sys.stdout.write('3\\n' * 100000)",
    "endless loop": "while True: pass",
    "sleeping": "import time\ntime.sleep(1000)",
    "closed output, then sleeping": "import os, time\nos.close(1)\nos.close(2)\ntime.sleep(1000)",
    "daemon": """
        import os, time
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                time.sleep(1000)
            os._exit(0)
        print('escaped')""",
    "killing the parent": """
        import os, signal
        for p in (1, os.getppid(), -1):
            try: os.kill(p, signal.SIGKILL)
            except OSError: pass
        print('escaped')""",
    "exit before output": "raise SystemExit(0)",
    "many guesses": "for i in range(10000): print(i)",
    "a verdict of its own": "print('PASSED')\nprint('True')\nprint('1')\nprint('right')",
    "symlink": """
        import os
        os.symlink('/etc/shadow', 'link')
        os.symlink('@TMP/@MARKER', 'to')
        try: open('to', 'w').write('x')
        except OSError: pass
        print(open('link').read(), 'escaped')""",
    "hard link": """
        import os
        os.link('/usr/bin/python3', 'python')
        open('python', 'ab').write(b'escaped')
        print('escaped')""",
    "disk": """
        i = 0
        while True:
            f = open(f'file{i}', 'wb')
            i += 1
            f.write(bytes(32 << 20))
            f.flush()
            if i > 100: print('escaped')""",
    "many files": """
        i = 0
        while True:
            open(f'file{i}', 'wb').close()
            i += 1""",
    "user namespace": """
        import ctypes
        print('escaped' if ctypes.CDLL(None).unshare(0x10000000) == 0 else 1 / 0)""",
    "descriptors": """
        import os
        for fd in range(3, 100):
            try: os.fstat(fd)
            except OSError: continue
            t = os.readlink(f'/proc/self/fd/{fd}')
            if 'main.py' not in t and '/proc' not in t: print('escaped', t)
        raise SystemExit(1)""",
    "shared memory segments": """
        import ctypes
        print('escaped' if ctypes.CDLL(None).shmget(0, 1 << 20, 0o1600) >= 0 else 1 / 0)""",
    "shared memory, resident in no process": """
        import mmap
        m = mmap.mmap(-1, 600 << 20)
        for i in range(0, 600 << 20, 4096):
            m[i] = 1
            if not i % (50 << 20): m.madvise(mmap.MADV_DONTNEED)
        print('escaped')""",
    "shared memory of /dev/zero": """
        import mmap, os
        m = mmap.mmap(os.open('/dev/zero', os.O_RDWR), 600 << 20)
        print('escaped')""",
    "pages given to a pipe": """
        import ctypes, os
        page = ctypes.create_string_buffer(4096)
        piece = (ctypes.c_size_t * 2)(ctypes.addressof(page), 4096)
        print('escaped' if ctypes.CDLL(None).vmsplice(os.pipe()[1], piece, 1, 0) == 4096 else 1 / 0)""",
    "memory that no process maps": """
        import os
        fds = []
        for i in range(200):
            fds.append(os.memfd_create('x'))
            os.write(fds[-1], bytes(32 << 20))
        print('escaped')""",
}
TIMEOUTS = {"fork bomb", "endless loop", "sleeping", "closed output, then sleeping", "many files"}
ENDINGS = {attack: {"timeout" if attack in TIMEOUTS else "wrong"} for attack in ATTACKS}
ENDINGS["forks that allocate"] = {"wrong", "timeout"}  # a busy machine gives them no GiB in a second


def source_of(attack, port=9, tmp=tempfile.gettempdir()):
    source = dedent(ATTACKS[attack]).strip()
    for name, value in {"@ROOT": ROOT, "@HOME": os.path.expanduser("~"), "@TMP": tmp, "@PORT": port,
                        "@MARKER": MARKER}.items():
        source = source.replace(name, str(value))
    return source


def run_python(source, seconds, shell="python3 -I main.py"):
    return code.run_program(shell, {"main.py": dedent(source).encode()}, "1 2\n", LIMITS, seconds)


def judge_here(source, language="python", expected="3", seconds=1.0):
    """A verdict given in this process, so that the sandbox's processes are its children."""
    return code.judge(gold_of(("1 2\n", expected)), fenced(source, language), {**LIMITS, "seconds": seconds})


@sandboxed
@pytest.mark.parametrize("attack", ATTACKS)
def test_attack(attack, monkeypatch):
    monkeypatch.setenv("SECRET", "SECRET")
    marker = Path(tempfile.gettempdir()) / MARKER
    marker.write_text("untouched")
    listener = socket.create_server(("127.0.0.1", 0))
    try:
        source = source_of(attack, port=listener.getsockname()[1])
        check_attack(lambda: judge_here(source), ENDINGS[attack])
        assert marker.read_text() == "untouched"
    finally:
        listener.close()
        marker.unlink()


def check_attack(run, endings, limit=1.0):
    """
    Ended so within the limit, and no process, file or memory is left. What leaks leaks in each of up to ten
    runs; what other users of this machine take or write meanwhile does not show in all.
    """
    for last in [*[False] * 9, True]:
        assert sandbox_processes() == []
        files, held = host()
        started = time.time()
        assert run() in endings
        assert time.time() - started < limit + 4
        assert sandbox_processes() == []
        files_after, held_after = host()
        new, gone = files_after - files, (held_after - held) >> 20
        if not new and gone < 300:
            return
        assert not last, f"left behind: the files {new}, {gone} MB of memory"
        time.sleep(1)


LOOKING = ["environment", "proc of the parent", "proc root", "write outside", "descriptors"]
# These may end well or print; that nothing is left of them is what test_attack sees.
HARMLESS = TIMEOUTS | {*LOOKING, "exit before output", "endless output", "many guesses",
                       "a verdict of its own", "daemon", "killing the parent"}


@sandboxed
@pytest.mark.parametrize("attack", sorted(set(ATTACKS) - HARMLESS))
def test_attack_fails_before_it_says_so(attack):
    """What a wrong verdict alone cannot show: the program never came to print that it had escaped."""
    ended, output = run_python(source_of(attack, tmp="/tmp"), 1.0)
    assert ended != "ok" and b"escaped" not in output


@sandboxed
@pytest.mark.parametrize("attack", LOOKING)
def test_attack_finds_nothing(attack, monkeypatch):
    """These look around and print what they find; they end with a status of their own if there is nothing."""
    monkeypatch.setenv("SECRET", "SECRET")
    source = source_of(attack, tmp="/var")  # its own /tmp it may write to
    assert run_python(source, 2.0, "python3 -I main.py || echo status $?") == ("ok", b"status 1\n")


TEMPLATES = """
template<int a, int b> struct X { static const long v = X<a-1, b>::v + X<a, b-1>::v + X<a-1, b-1>::v; };
template<int a> struct X<a, 0> { static const long v = 1; };
template<int b> struct X<0, b> { static const long v = 1; };
template<int... n> struct Y { static const long v = Y<n..., sizeof...(n)>::v; };
int main() { return Y<0>::v; }
"""


@sandboxed
@pytest.mark.parametrize("source", [TEMPLATES, "#include \"/dev/zero\"\nint main() {}",
                                    "char x[3ul << 30] = {1};\nint main() {}"],
                         ids=["templates", "endless include", "huge object"])
def test_compiler_bomb(source, monkeypatch):
    monkeypatch.setattr(code, "COMPILE_SECONDS", 2.0)
    assert sandbox_processes() == []
    started = time.time()
    assert judge_here(source, "cpp") in ("wrong", "timeout")
    assert time.time() - started < 6 and sandbox_processes() == []


@sandboxed
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become an ordinary user")
@pytest.mark.parametrize("attack", ["fork bomb", "10 GB", "daemon", "sleeping"])
def test_attack_on_an_ordinary_user(attack):
    """The same from a process that is not root; the system's Python: root's may lie where no other looks."""
    command = "import sys, verifier; print(verifier.judge(*eval(sys.argv[1])))"
    judged = repr((gold_of(("1 2", "3")), fenced(source_of(attack)), {**LIMITS, "seconds": 1.0}))
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        shutil.copy(FILE, folder + "/verifier.py")

        def run():
            done = subprocess.run(["/usr/bin/python3", "-B", "-c", command, judged], capture_output=True,
                                  text=True, timeout=20, cwd=folder, user=1234, group=1234, extra_groups=[])
            assert done.returncode == 0, done.stderr
            return done.stdout.strip()

        check_attack(run, ENDINGS[attack])


@sandboxed
def test_killing_the_judge_leaves_nothing():
    """A judge that is killed from outside takes its worker's sandbox with it."""
    command = ("import sys; code = {}; exec(open(sys.argv[1]).read(), code); print('ready', flush=True)\n"
               "limits = {'seconds': 60.0, 'memory': 1.0, 'sandbox': True}\n"
               "files = {'main.py': b'while True: pass'}\n"
               "code['run_program']('python3 -I main.py', files, '', limits, 60.0)")
    process = subprocess.Popen([sys.executable, "-c", command, FILE], stdout=subprocess.PIPE)
    process.stdout.readline()
    deadline = time.time() + 5
    while not any(name.startswith(b"python3") for _, name in sandbox_processes()) and time.time() < deadline:
        time.sleep(0.02)
    assert len(sandbox_processes()) >= 3  # bubblewrap, the shell, the program
    process.kill()
    process.wait()
    nothing_is_left()


def nothing_is_left(seconds=2):
    deadline = time.time() + seconds
    while sandbox_processes() and time.time() < deadline:
        time.sleep(0.02)
    assert sandbox_processes() == []


@sandboxed
def test_expected_outputs_stay_outside(monkeypatch):
    """Nothing of the expected output is in the command line, the files or the input of the sandbox."""
    seen = []
    run = code.run_program
    monkeypatch.setattr(code, "run_program", lambda *a, **k: seen.append((a, k)) or run(*a, **k))
    assert judge_here("print(open('main.py').read())", expected="THE EXPECTED OUTPUT") == "wrong"
    assert len(seen) == 1 and "THE EXPECTED OUTPUT" not in repr(seen)


@sandboxed
def test_a_program_that_is_slow_on_every_test_cannot_hold_a_worker_for_long(monkeypatch):
    monkeypatch.setattr(code, "ALL_TESTS", 3)
    tests = gold_of(*[("", "3\n")] * 100, seconds=0.5)
    started = time.time()
    assert code.judge(tests, fenced("import time\ntime.sleep(0.3)\nprint(3)"), LIMITS) == "timeout"
    assert time.time() - started < min(8, code.longest(tests, LIMITS))


@sandboxed
def test_the_limit_of_a_worker_is_not_that_of_its_programs():
    """A worker has 4 GiB of address space; a Java virtual machine reserves more, but uses little."""
    command = ("import sys, resource; code = {}; exec(open(sys.argv[1]).read(), code)\n"
               "resource.setrlimit(resource.RLIMIT_AS, (1 << 30, resource.RLIM_INFINITY))\n"
               "limits = {'seconds': 9.0, 'memory': 1.0, 'sandbox': True}\n"
               "files = {'main.py': b'import mmap; print(len(mmap.mmap(-1, 8 << 30, 0x4022)))'}\n"
               "for processes in 16, 64:\n"
               "    print(code['run_program']('python3 -I main.py', files, '', limits, 9.0, processes))")
    done = subprocess.run([sys.executable, "-c", command, FILE], capture_output=True, text=True, timeout=30)
    assert done.stdout.splitlines() == [str(("wrong", b"")), str(("ok", b"%d\n" % (8 << 30)))], done.stderr


@sandboxed
def test_the_pool_goes_on_after_attacks(pool):
    responses = [fenced("while True: pass"), fenced(source_of("fork bomb")), fenced(ADDS)]
    assert [v.reason for v in pool([PROBLEM] * 3, responses)] == ["timeout", "timeout", "right"]
    assert sandbox_processes() == []


@sandboxed
def test_a_worker_that_is_stopped_at_any_moment_leaves_nothing():
    """Also while bubblewrap sets up, where its child, not yet bound to die with it, would live on alone."""
    request = json.dumps([60, "judge", [ADD, fenced("while True: pass"), LIMITS]]) + "\n"
    with verify.Judge("code", workers=1) as judge:
        for moment in range(0, 32, 2):
            worker = judge.workers.start()
            worker.stdin.write(request.encode())
            worker.stdin.flush()
            time.sleep(moment / 1000)
            judge.workers.stop(worker)
            nothing_is_left(seconds=5)


# ---------------------------------------------------------------------------------------------------- sockets
# No network namespace shuts AF_VSOCK, and families that nobody needs (AF_ALG, AF_PACKET, AF_BLUETOOTH, ...)
# lead to drivers with faults: they fail with EPERM, whether or not the kernel knows them.

AF_UNIX, AF_INET, AF_INET6, AF_NETLINK = ALLOWED = 1, 2, 10, 16
AF_PACKET, AF_BLUETOOTH, AF_ALG, AF_VSOCK = 17, 31, 38, 40


@sandboxed
def test_sockets_of_other_families_are_refused():
    ended, output = run_python("""
        import ctypes, errno, json, os
        from socket import *
        def outcome(make, *how):
            try:
                make(*how)
                return 'open'
            except OSError as e:
                return errno.errorcode[e.errno]
        seen = {f: sorted({outcome(make, f, t) for make in (socket, socketpair) for t in (1, 2, 3, 4, 5, 10)})
                for f in range(64)}
        libc = ctypes.CDLL(None, use_errno=True)  # of a family's 64 bits the kernel reads 32
        number = 41 if os.uname().machine == 'x86_64' else 198  # of the call: socket
        libc.syscall(number, ctypes.c_ulong(AF_VSOCK + (1 << 32)), 1, 0)
        seen['high bits'] = [errno.errorcode[ctypes.get_errno()]]
        print(json.dumps(seen))
    """, 5.0)
    assert ended == "ok"
    seen = json.loads(output)
    for family in (AF_VSOCK, AF_ALG, AF_PACKET, AF_BLUETOOTH, "high bits"):
        assert seen.pop(str(family)) == ["EPERM"]
    for family in (AF_UNIX, AF_INET, AF_NETLINK):
        assert "open" in seen.pop(str(family))
    seen.pop(str(AF_INET6))
    assert set(map(tuple, seen.values())) == {("EPERM",)}


@sandboxed
def test_sockets_of_the_allowed_families_work():
    """A program may talk to itself."""
    source = """
        import socket
        a, b = socket.socketpair()
        a.sendall(b'pair')
        print(b.recv(10))
        places = {socket.AF_UNIX: '/tmp/here', socket.AF_INET: ('127.0.0.1', 0), socket.AF_INET6: ('::1', 0)}
        for family, at in places.items():
            server, client = socket.socket(family), socket.socket(family)
            server.bind(at)
            server.listen()
            client.connect(server.getsockname())
            client.sendall(b'hello')
            print(server.accept()[0].recv(10))
        socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0).bind((0, 0))
        print('netlink')
    """
    if not socket.has_dualstack_ipv6():
        source = source.replace(", socket.AF_INET6: ('::1', 0)", "")
    ended, output = run_python(source, 5.0)
    assert ended == "ok" and set(output.split()) == {b"b'pair'", b"b'hello'", b"netlink"}


@sandboxed
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="these are doors of x86_64")
@pytest.mark.skipif(not shutil.which(C.tool, path=code.PATH), reason="no gcc in the sandbox")
def test_calls_of_32_bits_and_of_x32_are_refused():
    """By int 0x80 a program reaches the calls of i386, socketcall too; by numbers from 2^30 on, x32's."""
    source = dedent("""
        #include <stdio.h>
        #include <errno.h>
        #include <unistd.h>
        long int80(long call, long a, long b) {
            long result;
            __asm__ volatile("int $0x80" : "=a"(result) : "a"(call), "b"(a), "c"(b), "d"(0) : "memory");
            return result;
        }
        int main(int count, char **_) {
            if (count > 1) {  /* socket of AF_VSOCK, of AF_INET, socketcall, getpid */
                long results[] = {int80(359, 40, 1), int80(359, 2, 1), int80(102, 1, 0), int80(20, 0, 0)};
                for (int i = 0; i < 4; i++) printf("%ld ", results[i]);
            } else {
                int calls[] = {41, 39};  /* socket, getpid */
                for (int i = 0; i < 2; i++) {
                    long result = syscall(calls[i] | 0x40000000, 40, 1, 0);
                    printf("%ld %d ", result, errno);
                }
            }
        }""")
    ended, output = code.run_program("gcc -o a a.c && ./a", {"a.c": source.encode()}, "", LIMITS, 10.0, 32)
    assert (ended, output) == ("ok", b"-1 1 -1 1 ")  # errno: EPERM
    ended, output = code.run_program("gcc -o a a.c && ./a 80", {"a.c": source.encode()}, "", LIMITS, 10.0, 32)
    assert (ended, output) in [("ok", b"-1 -1 -1 -1 "), ("wrong", b"")]  # -EPERM; a kernel without such calls


def decide(program, architecture, call, *arguments):
    """What a BPF program (bytes) says on a call, as the kernel runs it: 'allow' or 'EPERM'."""
    data = struct.pack("iIQ6Q", call, architecture, 0, *arguments, *[0] * (6 - len(arguments)))
    steps, at, word = list(struct.iter_unpack("HBBI", program)), 0, None
    while True:
        operation, if_so, if_not, value = steps[at]
        at += 1
        if operation == 0x06:  # return
            return {0x7FFF0000: "allow", 0x00050000 | errno.EPERM: "EPERM"}[value]
        if operation == 0x20:  # load
            word = struct.unpack_from("I", data, value)[0]
        elif operation == 0x54:  # and
            word &= value
        else:  # jump if equal, or if not below
            at += if_so if {0x15: word == value, 0x35: word >= value}[operation] else if_not


@pytest.mark.parametrize("machine, architecture, others, read, sockets, mmap, forbidden", [
    ("x86_64", 0xC000003E, [0x40000003, 0xC00000B7], 0, (41, 53), 9, [319, 278]),
    ("aarch64", 0xC00000B7, [0x40000028, 0xC000003E], 63, (198, 199), 222, [279, 75]),
])
def test_the_filter(machine, architecture, others, read, sockets, mmap, forbidden, monkeypatch):
    """On both machines, step by step: the sandbox itself shows that of one alone."""
    monkeypatch.setattr(code.os, "uname", lambda: os.uname_result(["Linux", "x", "6", "1", machine]))
    program = code.seccomp_filter()
    assert decide(program, architecture, read, 40) == "allow"  # its first argument is a descriptor
    assert {decide(program, architecture, call) for call in forbidden} == {"EPERM"}  # memfd_create, vmsplice
    for call in sockets:
        allowed = [family for family in range(100) if decide(program, architecture, call, family) == "allow"]
        assert allowed == list(ALLOWED)
        assert decide(program, architecture, call, 40 + (1 << 32)) == "EPERM"
        assert decide(program, architecture, call, 2**32 - 1) == "EPERM"
    shared, validated, private, anonymous, no_reserve = 1, 3, 2, 0x20, 0x4000
    for kind in (shared, validated, private):
        said = [decide(program, architecture, mmap, 0, 1 << 30, 3, kind | more)
                for more in (0, no_reserve, anonymous, anonymous | no_reserve)]
        assert said == ["allow"] * 2 + ["allow" if kind == private else "EPERM"] * 2
    for call in range(500):
        assert decide(program, architecture, call + (1 << 30), 1) == "EPERM"
        assert all(decide(program, other, call, 1) == "EPERM" for other in others)


# ---------------------------------------------------------------------------------------------------- refusal


def test_without_bubblewrap_it_refuses(monkeypatch):
    monkeypatch.setattr(code.shutil, "which", lambda *a, **k: None)
    with pytest.raises(SystemExit, match="^error: .*apt-get install bubblewrap") as e:
        code.check(LIMITS)
    assert "\n" not in str(e.value) and "WITH ALL YOUR RIGHTS" in str(e.value)
    assert code.check({**LIMITS, "sandbox": False}) is None


@sandboxed
@pytest.mark.parametrize("broken", ["the machine", "bubblewrap"])
def test_where_there_is_no_sandbox_it_refuses(broken, monkeypatch):
    if broken == "the machine":
        monkeypatch.setattr(code.os, "uname", lambda: os.uname_result(["Linux", "x", "6", "1", "riscv64"]))
    else:
        monkeypatch.setattr(code, "BUBBLEWRAP", ["--bind", "/nowhere", "/nowhere"])
    with pytest.raises(SystemExit, match="^error: .*0.8 or newer, on x86_64 or aarch64") as e:
        code.check(LIMITS)
    assert "\n" not in str(e.value) and "WITH ALL YOUR RIGHTS" in str(e.value)


def test_unsafe_no_sandbox_says_so_and_judges(capsys):
    with verify.Judge("code", workers=1, limit=4.0, sandbox=False) as judge:
        assert "MODEL-WRITTEN PROGRAMS RUN WITH ALL YOUR RIGHTS" in capsys.readouterr().out
        responses = [fenced(ADDS), fenced("print(0)"), fenced("while True: pass"), "no program"]
        reasons = [v.reason for v in judge([PROBLEM] * 4, responses)]
        assert reasons == ["right", "wrong", "timeout", "no answer"]


def test_it_stands_alone():
    """A verifier imports nothing of the project."""
    imported = set(re.findall(r"^(?:import|from) (\w+)", FILE.read_text(), re.MULTILINE))
    assert imported <= set(sys.stdlib_module_names)
