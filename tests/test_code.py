"""
Code verdicts: what counts as a program, how tests are decoded, how outputs are compared, and that hostile programs end
as wrong within their limit and leave the host as it was: its processes, files and memory are counted before and after.
"""
import glob
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import verify  # noqa: E402

pytestmark = pytest.mark.usefixtures("only_sandbox")


def sandbox_works():
    try:
        verify.check_sandbox()
    except SystemExit as e:
        return str(e)
    return None


NO_SANDBOX = sandbox_works()
sandboxed = pytest.mark.skipif(NO_SANDBOX is not None, reason=str(NO_SANDBOX))
PYTHON, CPP, C, RUST, GO, JAVA = verify.LANGUAGES


def fenced(source, language="python"):
    return f"Here is my program.\n```{language}\n{source}\n```\nIt works."


def problem(*cases, entry_point=None, tolerance=None, seconds=None):
    tests = {"cases": [list(c) for c in cases], "entry_point": entry_point, "tolerance": tolerance, "seconds": seconds}
    return verify.Problem("p", "Add.", None, "code", "stdin", tests)


ADD = problem(("1 2\n", "3\n"), ("10 -4\n", "6\n"))


@pytest.fixture(scope="module")
def judge():
    with verify.Judge(workers=2, limit=2.0) as judge:
        yield judge


# ------------------------------------------------------------------------------------------------------ extraction


@pytest.mark.parametrize("response, language, source", [
    (fenced("print(1)"), PYTHON, "print(1)\n"),
    (fenced("print(1)") + fenced("print(2)"), PYTHON, "print(2)\n"),
    (fenced("int main(){}", "C++"), CPP, "int main(){}\n"),
    (fenced("print(1)") + "\nOutput:\n```\n3\n```\n", PYTHON, "print(1)\n"),  # a block of no known language
    ("<think>" + fenced("print(0)") + "</think>" + fenced("print(1)"), PYTHON, "print(1)\n"),
    (fenced("print(1)").replace("\n", "\r\n"), PYTHON, "print(1)\n"),
    (fenced("print(1)") + "\n```python\nprint(2", PYTHON, "print(1)\n"),  # the last one is not closed
    ("```python\nprint(0)\n```python\nprint(1)\n```", PYTHON, "print(1)\n"),
    ("1. so:\n   ```py\n   print(1)\n   ```", PYTHON, "   print(1)\n"),
])
def test_last_program(response, language, source):
    assert verify.last_program(response) == (language, source)


@pytest.mark.parametrize("response", ["", "print(1)", "```\nprint(1)\n```", "```python\nprint(1)", "```brainfuck\n+\n```",
                                      "<think>" + fenced("print(1)"), "<think>" + fenced("print(1)") + "</think> done"])
def test_no_program(response):
    assert verify.last_program(response) is None
    assert ask_none(response) == verify.Verdict(False, "no answer")


def ask_none(response):
    """A verdict that needs no worker."""
    return verify.Judge.verdict(None, ADD, response)


def test_extraction_is_linear():
    started = time.time()
    verify.last_program("```py\n" * 100_000)
    verify.last_program("`" * 1_000_000)
    assert time.time() - started < 5


def test_a_language_without_its_tool_is_not_known(monkeypatch):
    monkeypatch.setattr(verify, "installed", lambda language: language is PYTHON)
    assert verify.last_program(fenced("int main(){}", "cpp")) is None


# ------------------------------------------------------------------------------------------------- tests of problems

PAIRS = [{"input": "1 2\n", "output": "3\n"}, {"input": "5 5\n", "output": "10\n"}]
CASES = [["1 2\n", "3\n"], ["5 5\n", "10\n"]]


@pytest.mark.parametrize("field", ["examples", "official_tests", "tests", "public_test_cases"])
@pytest.mark.parametrize("value", [PAIRS, json.dumps(PAIRS), {"input": ["1 2\n", "5 5\n"], "output": ["3\n", "10\n"]},
                                   json.dumps({"inputs": ["1 2\n", "5 5\n"], "outputs": ["3\n", "10\n"]})])
def test_pairs_are_decoded(field, value):
    tests, why = verify.code_tests({field: value})
    assert tests["cases"] == CASES and why is None and tests["entry_point"] is None


def test_two_columns_of_one_test_are_not_read_letter_by_letter():
    assert verify.code_tests({"tests": {"input": "1 2\n", "output": "abc\n"}})[0]["cases"] == [["1 2\n", "abc\n"]]


def test_all_fields_count_and_none_twice():
    tests, _ = verify.code_tests({"examples": PAIRS[:1], "official_tests": PAIRS})
    assert sorted(tests["cases"]) == sorted(CASES)


@pytest.mark.parametrize("row, why", [
    ({}, "no tests"), ({"tests": []}, "no tests"), ({"tests": ""}, "no tests"), ({"tests": None}, "no tests"),
    ({"tests": "rubbish"}, "field 'tests' gives no test"), ({"tests": "[1, 2"}, "field 'tests' gives no test"),
    ({"tests": [{"input": "1"}]}, "field 'tests' gives no test"), ({"tests": [1]}, "field 'tests' gives no test"),
    ({"tests": {"input": ["1"], "output": []}}, "field 'tests' gives no test"), ({"tests": 5}, "field 'tests' gives no test"),
    ({"tests": [{"input": "1 2 ...", "output": "3"}]}, "field 'tests' gives no test"),
    ({"tests": PAIRS, "generated_checker": "def check(): ..."}, "several outputs are right (it has a checker of its own)"),
    ({"tests": PAIRS, "input_mode": "file"}, "its programs read files"),
    ({"tests": PAIRS, "entry_point": "import os"}, "field 'entry_point' names no function"),
    ({"tests": "assert candidate(1) == 3", "entry_point": "f"}, "field 'tests' gives no test"),
    ({"tests": [{"input": "x = open('x')", "output": "3"}], "entry_point": "f"}, "field 'tests' gives no test"),
])
def test_no_test_drops_the_problem(row, why):
    assert verify.code_tests(row) == (None, why)


@pytest.mark.parametrize("value", [
    [{"input": "nums = [2,7], target = 9", "output": "[0, 1]"}],
    [{"input": "[2,7]\n9", "output": "[0,1]"}],
    [{"input": [[2, 7], 9], "output": [0, 1]}],
    json.dumps([{"input": "nums = [2,7], target = 9", "output": "[0, 1]"}]),
])
def test_function_tests_are_decoded(value):
    tests, _ = verify.code_tests({"tests": value, "entry_point": "twoSum"})
    ((given, expected),) = tests["cases"]
    entry, args, kwargs = json.loads(given)
    assert entry == "twoSum" and json.loads(expected) == [0, 1]
    assert args + list(kwargs.values()) == [[2, 7], 9]


def test_tolerance_and_time_limit_come_from_the_problem():
    row = {"tests": PAIRS, "problem": "Print x. Your absolute or relative error must not exceed $10^{-6}$.", "time_limit": 1.5}
    tests, _ = verify.code_tests(row)
    assert tests["tolerance"] == 1e-6 and tests["seconds"] == 1.5
    assert verify.code_tests({"tests": PAIRS, "tolerance": 0.01})[0]["tolerance"] == 0.01
    assert verify.code_tests({"tests": PAIRS, "problem": "Print x."})[0]["tolerance"] is None


# ---------------------------------------------------------------------------------------------------------- outputs


@pytest.mark.parametrize("output, expected, tolerance, same", [
    ("3\n", "3", None, True), ("3 \n\n\n", "3\n", None, True), ("1\n2\n", "1\r\n2\r\n", None, True), ("1 2", "1\n2", None, False),
    ("3.0", "3", None, False), ("0.3333333", "0.3333334", None, False), ("0.3333333", "0.3333334", 1e-6, True),
    ("0.33", "0.3333334", 1e-6, False), ("1000000.5", "1000000", 1e-6, True), ("nan", "0.5", 1e-6, False),
    ("inf", "0.5", 1e-6, False), ("1e999", "0.5", 1e-6, False), ("yes 0.5", "yes 0.5000001", 1e-6, True),
    ("no 0.5", "yes 0.5", 1e-6, False), ("0.5 0.5", "0.5", 1e-6, False), ("", "", None, True), ("", "3", None, False),
    ("3\n3", "3", None, False), (" 3", "3", None, False), ("a\n\nb", "a\nb", None, False),
])
def test_same_text(output, expected, tolerance, same):
    assert verify.same_output(output, expected, tolerance) == same


@pytest.mark.parametrize("output, expected, tolerance, same", [
    ("[0, 1]", "[0,1]", None, True), ("true", "1", None, False), ("1.0", "1", None, False), ("[1.0000001]", "[1]", 1e-5, True),
    ('"a"', '"a"', None, True), ("", "null", None, False), ("null", "null", None, True), ("[" * 10**5, "[]", None, False),
    ('{"a": 1}', '{"a": 1}', None, True), ("NaN", "0", 1e-5, False), ("[1] [1]", "[1]", None, False),
])
def test_same_result(output, expected, tolerance, same):
    assert verify.same_output(output, expected, tolerance, is_json=True) == same


# ------------------------------------------------------------------------------------------------------------ verdicts

CPP_ADD = "#include <iostream>\nint main() { long a, b; std::cin >> a >> b; std::cout << a + b << std::endl; }"
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
    (fenced("print(sum(map(int, input().split())))"), "right"),
    (fenced("a, b = map(int, input().split())\nprint(a - b)"), "wrong"),
    (fenced("print(3)"), "wrong"),  # right on the first test only
    (fenced("print(sum(map(int, input().split())))\nraise SystemExit(1)"), "wrong"),
    (fenced("this is no Python"), "wrong"),
    (fenced(CPP_ADD, "cpp"), "right"),
    (fenced(CPP_ADD.replace("a + b", "a * b"), "cpp"), "wrong"),
    (fenced("int main() { return undeclared; }", "cpp"), "wrong"),
    (fenced("int main() { for (;;); }", "cpp"), "timeout"),
])
def test_verdicts(judge, response, reason):
    assert judge([ADD], [response]) == [verify.Verdict(reason == "right", reason)]


@sandboxed
@pytest.mark.parametrize("language", OTHERS, ids=lambda language: language.names[0])
def test_other_languages(judge, language):
    if not verify.installed(language):
        pytest.skip(f"{language.names[0]}: its compiler is not in {verify.SANDBOX_PATH}")
    slow = problem(*ADD.tests["cases"], seconds=10)
    right, wrong = judge([slow, problem(("1 2", "4"), seconds=10)], [fenced(OTHERS[language], language.names[0])] * 2)
    assert right.reason == "right" and wrong.reason == "wrong"


@sandboxed
@pytest.mark.parametrize("source, reason", [
    ("class Solution:\n    def twoSum(self, nums: List[int], target: int):\n        print('debug')\n        return [0, 1]", "right"),
    ("def twoSum(nums, target):\n    return (0, 1)", "right"),
    ("def twoSum(nums, target):\n    return [1, 0]", "wrong"),
    ("def twoSum(nums, target):\n    print([0, 1])", "wrong"),
    ("class Same(list):\n    def __eq__(self, other): return True\ndef twoSum(nums, target):\n    return Same()", "wrong"),
    ("def other(): pass", "wrong"),
    ("import os\ndef twoSum(nums, target):\n    os._exit(0)", "wrong"),
])
def test_function_problems(judge, source, reason):
    tests, _ = verify.code_tests({"tests": [{"input": "nums = [2,7], target = 9", "output": "[0, 1]"}], "entry_point": "twoSum"})
    assert judge([verify.Problem("p", "", None, "code", "function", tests)], [fenced(source)])[0].reason == reason


# -------------------------------------------------------------------------------------------------------------- attacks
# Each program prints what it found if its attack works. The expected output is none of these, and each verdict must be
# wrong within its limit, with nothing left behind.


def host():
    """
    What a program could leave behind, besides processes: (files, bytes of memory that no process holds) of this machine.
    A process takes its own memory with it; what can outlive it lies in the kernel or in a file system made of memory.
    """
    files = {f for d in ("/tmp", "/dev/shm", "/var/tmp", str(ROOT), str(ROOT / "tests"), os.path.expanduser("~"))
             for f in glob.glob(d + "/*") + glob.glob(d + "/.[!.]*")}
    meminfo = Path("/proc/meminfo").read_text()
    return files, sum(int(re.search(rf"{name}:\s+(\d+)", meminfo)[1]) * 1024 for name in ("Shmem", "SUnreclaim"))


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
    "socket": "import socket\ns = socket.create_connection(('1.1.1.1', 53), 1)\nprint('escaped')",
    "loopback": "import socket\ns = socket.create_connection(('127.0.0.1', {port}), 1)\nprint('escaped')",
    "shadow": "print('escaped', open('/etc/shadow').read())",
    "passwd": "print('escaped', open('/etc/passwd').read())",
    "home": "import os\nprint('escaped', os.listdir('{home}'))",
    "project": "print('escaped', open('{root}/verify.py').read())",
    "environment": "import os\nif 'SECRET' in os.environ: print('escaped')\nelse: raise SystemExit(1)",
    "proc of the parent": "import os\nfor p in os.listdir('/proc'):\n    if p.isdigit():\n"
                          "        for f in ('environ', 'cmdline'):\n"
                          "            t = open(f'/proc/{{p}}/{{f}}').read()\n"
                          "            if 'SECRET' in t or 'worker' in t: print('escaped', t)\nraise SystemExit(1)",
    "proc root": "import os\nfor p in filter(str.isdigit, os.listdir('/proc')):\n"
                 "    try: l = os.listdir(f'/proc/{{p}}/root')\n    except OSError: continue\n"
                 "    if 'home' in l or 'root' in l: print('escaped')\nraise SystemExit(1)",
    "write outside": "wrote = 0\nfor f in ('/x', '/usr/x', '/usr/bin/python3', '/etc/x', '/home/x', '/dev/shm/x', '/var/tmp/x',\n"
                     "          '{root}/x', '{tmp}/{marker}'):\n    try: open(f, 'w').write('escaped'); wrote += 1\n"
                     "    except OSError: pass\nif wrote: print('escaped')\nraise SystemExit(1)",
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "forks that allocate": "import os\nfor i in range(4): os.fork()\nx = bytearray(900 << 20)\nwhile True: x[::4096] = x[::4096]",
    "10 GB": "x = bytearray(10 << 30)\nprint('escaped')",
    "endless output": "import sys\nwhile True: sys.stdout.write('3\\n' * 100000)",
    "endless loop": "while True: pass",
    "sleeping": "import time\ntime.sleep(1000)",
    "closed output, then sleeping": "import os, time\nos.close(1)\nos.close(2)\ntime.sleep(1000)",
    "daemon": "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(1000)\n    os._exit(0)\n"
              "print('escaped')",
    "killing the parent": "import os, signal\nfor p in (1, os.getppid(), -1):\n    try: os.kill(p, signal.SIGKILL)\n"
                          "    except OSError: pass\nprint('escaped')",
    "exit before output": "raise SystemExit(0)",
    "many guesses": "for i in range(10000): print(i)",
    "a verdict of its own": "print('PASSED')\nprint('True')\nprint('1')",
    "symlink": "import os\nos.symlink('/etc/shadow', 'link')\nos.symlink('{tmp}/{marker}', 'to')\n"
               "try: open('to', 'w').write('x')\nexcept OSError: pass\nprint(open('link').read(), 'escaped')",
    "hard link": "import os\nos.link('/usr/bin/python3', 'python')\nopen('python', 'ab').write(b'escaped')\nprint('escaped')",
    "disk": "i = 0\nwhile True:\n    f = open(f'file{{i}}', 'wb')\n    i += 1\n    f.write(bytes(32 << 20))\n    f.flush()\n"
            "    if i > 100: print('escaped')",
    "many files": "i = 0\nwhile True:\n    open(f'file{{i}}', 'wb').close()\n    i += 1",
    "user namespace": "import ctypes\nlibc = ctypes.CDLL(None)\nprint('escaped' if libc.unshare(0x10000000) == 0 else 1 / 0)",
    "descriptors": "import os\nfor fd in range(3, 100):\n    try: os.fstat(fd)\n    except OSError: continue\n"
                   "    t = os.readlink(f'/proc/self/fd/{{fd}}')\n    if 'main.py' not in t and '/proc' not in t: print('escaped', t)\n"
                   "raise SystemExit(1)",
    "shared memory segments": "import ctypes\nlibc = ctypes.CDLL(None)\n"
                              "print('escaped' if libc.shmget(0, 1 << 20, 0o1600) >= 0 else 1 / 0)",
    "memory that no process maps": "import os\nfds = []\nfor i in range(200):\n    fds.append(os.memfd_create('x'))\n"
                                   "    os.write(fds[-1], bytes(32 << 20))\nprint('escaped')",
}
TIMEOUTS = {"fork bomb", "endless loop", "sleeping", "closed output, then sleeping", "many files"}
ENDINGS = {attack: {"timeout" if attack in TIMEOUTS else "wrong"} for attack in ATTACKS}
ENDINGS["forks that allocate"] = {"wrong", "timeout"}  # on a busy machine the second may be over before they have their GiB


@sandboxed
@pytest.mark.parametrize("attack", ATTACKS)
def test_attack(attack, monkeypatch):
    monkeypatch.setenv("SECRET", "SECRET")
    marker = Path(tempfile.gettempdir()) / MARKER
    marker.write_text("untouched")
    listener = socket.create_server(("127.0.0.1", 0))
    try:
        source = ATTACKS[attack].format(port=listener.getsockname()[1], home=os.path.expanduser("~"), root=ROOT,
                                        tmp=tempfile.gettempdir(), marker=MARKER)
        check_attack(lambda: judge_here(source), ENDINGS[attack])
        assert marker.read_text() == "untouched"
    finally:
        listener.close()
        marker.unlink()


def judge_here(source, language=PYTHON, expected="3", seconds=1.0):
    """A verdict given in this process, so that the sandbox's processes are its children."""
    return verify.judge_program(language, source, problem(("1 2\n", expected)).tests, seconds, 1.0, True)


def check_attack(run, endings, limit=1.0):
    """Ended so within the limit, and no process, file or memory is left. What leaks memory leaks it in each of three runs;
    what other users of this machine take or write meanwhile does not show in all."""
    for last in (False, False, True):
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


# These may end well or print; that nothing is left of them is what test_attack sees.
HARMLESS = TIMEOUTS | {"environment", "proc of the parent", "proc root", "write outside", "descriptors", "exit before output",
                       "endless output", "many guesses", "a verdict of its own", "daemon", "killing the parent"}


@sandboxed
@pytest.mark.parametrize("attack", sorted(set(ATTACKS) - HARMLESS))
def test_attack_fails_before_it_says_so(attack):
    """What a wrong verdict alone cannot show: the program never came to print that it had escaped."""
    source = ATTACKS[attack].format(port=9, home=os.path.expanduser("~"), root=ROOT, tmp="/tmp", marker=MARKER)
    ran = verify.run_program("python3 -I main.py", {"main.py": source.encode()}, b"1 2\n", 1.0)
    assert ran.ended != "ok" and b"escaped" not in ran.output


@sandboxed
@pytest.mark.parametrize("attack", ["environment", "proc of the parent", "proc root", "write outside", "descriptors"])
def test_attack_finds_nothing(attack, monkeypatch):
    """These look around and print what they find; they end with a status of their own if there is nothing."""
    monkeypatch.setenv("SECRET", "SECRET")
    source = ATTACKS[attack].format(root=ROOT, tmp="/var", marker=MARKER)  # its own /tmp it may write to
    ran = verify.run_program("python3 -I main.py || echo status $?", {"main.py": source.encode()}, b"1 2\n", 2.0)
    assert ran == verify.Run("ok", b"status 1\n")


@sandboxed
@pytest.mark.parametrize("source", [
    # templates that unfold for ever, an include of an endless file, a huge initialised array
    "template<int a, int b> struct X { static const long v = X<a - 1, b>::v + X<a, b - 1>::v + X<a - 1, b - 1>::v; };\n"
    "template<int a> struct X<a, 0> { static const long v = 1; }; template<int b> struct X<0, b> { static const long v = 1; };\n"
    "template<int... n> struct Y { static const long v = Y<n..., sizeof...(n)>::v; };\nint main() { return Y<0>::v; }",
    "#include \"/dev/zero\"\nint main() {}",
    "char x[3ul << 30] = {1};\nint main() {}",
], ids=["templates", "endless include", "huge object"])
def test_compiler_bomb(source, monkeypatch):
    monkeypatch.setattr(verify, "COMPILE_SECONDS", 2.0)
    assert sandbox_processes() == []
    started = time.time()
    assert judge_here(source, CPP) in ("wrong", "timeout")
    assert time.time() - started < 6 and sandbox_processes() == []


@sandboxed
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become an ordinary user")
@pytest.mark.parametrize("attack", ["fork bomb", "10 GB", "daemon", "sleeping"])
def test_attack_on_an_ordinary_user(attack):
    """The same from a process that is not root; the system's Python, since root's may lie where others cannot look."""
    code = ("import sys, json; sys.path.insert(0, sys.argv[1]); import verify\n"
            "tests = {'cases': [['1 2', '3']], 'entry_point': None, 'tolerance': None, 'seconds': None}\n"
            "print(verify.judge_program(verify.LANGUAGES[0], sys.argv[2], tests, 1.0, 1.0, True))")
    user = {"user": 1234, "group": 1234, "extra_groups": []}
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        shutil.copy(ROOT / "verify.py", folder)

        def run():
            done = subprocess.run(["/usr/bin/python3", "-B", "-c", code, folder, ATTACKS[attack].format()], capture_output=True,
                                  text=True, timeout=20, **user)
            assert done.returncode == 0, done.stderr
            return done.stdout.strip()

        check_attack(run, ENDINGS[attack])


@sandboxed
def test_killing_the_judge_leaves_nothing():
    """A judge that is killed from outside takes its worker's sandbox with it."""
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import verify\n"
            "print('ready', flush=True)\n"
            "verify.run_program('python3 -I main.py', {'main.py': b'while True: pass'}, b'', 60.0)")
    process = subprocess.Popen([sys.executable, "-c", code, str(ROOT)], stdout=subprocess.PIPE)
    process.stdout.readline()
    deadline = time.time() + 5
    while not any(name.startswith(b"python3") for _, name in sandbox_processes()) and time.time() < deadline:
        time.sleep(0.02)
    assert len(sandbox_processes()) >= 3  # bubblewrap, the shell, the program
    process.kill()
    process.wait()
    deadline = time.time() + 2
    while sandbox_processes() and time.time() < deadline:
        time.sleep(0.02)
    assert sandbox_processes() == []


@sandboxed
def test_expected_outputs_stay_outside(monkeypatch):
    """Nothing of the expected output is in the command line, the files or the input of the sandbox."""
    seen = []
    run = verify.run_program
    monkeypatch.setattr(verify, "run_program", lambda *a, **k: seen.append((a, k)) or run(*a, **k))
    tests = problem(("1 2\n", "THE EXPECTED OUTPUT")).tests
    assert verify.judge_program(PYTHON, "print(open('main.py').read())", tests, 1.0, 1.0, True) == "wrong"
    assert len(seen) == 1 and "THE EXPECTED OUTPUT" not in repr(seen)


@sandboxed
def test_a_program_that_is_slow_on_every_test_cannot_hold_a_worker_for_long(monkeypatch):
    monkeypatch.setattr(verify, "ALL_TESTS", 3)
    tests = problem(*[("", "3\n")] * 100, seconds=0.5).tests
    started = time.time()
    assert verify.judge_program(PYTHON, "import time\ntime.sleep(0.3)\nprint(3)", tests, 1.0, 1.0, True) == "timeout"
    assert time.time() - started < 8


@sandboxed
def test_the_pool_goes_on_after_attacks(judge):
    responses = [fenced("while True: pass"), fenced(ATTACKS["fork bomb"]), fenced("print(sum(map(int, input().split())))")]
    assert [v.reason for v in judge([ADD] * 3, responses)] == ["timeout", "timeout", "right"]
    assert sandbox_processes() == []


# ------------------------------------------------------------------------------------------------------------- refusal


def test_without_bubblewrap_it_refuses(monkeypatch):
    monkeypatch.setattr(verify.shutil, "which", lambda *a, **k: None)
    with pytest.raises(SystemExit, match="apt-get install bubblewrap") as e:
        verify.check_sandbox()
    assert "\n" not in str(e.value) and "WITH ALL YOUR RIGHTS" in str(e.value)


def test_unsafe_no_sandbox_says_so_and_judges(capsys):
    with verify.Judge(workers=1, limit=1.0, sandbox=False) as judge:
        assert "MODEL-WRITTEN PROGRAMS RUN WITH ALL YOUR RIGHTS" in capsys.readouterr().out
        responses = [fenced("print(sum(map(int, input().split())))"), fenced("print(0)"), fenced("while True: pass")]
        assert [v.reason for v in judge([ADD] * 3, responses)] == ["right", "wrong", "timeout"]
