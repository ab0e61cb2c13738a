"""
README.md and docs/*.md against the project: commands parse by the script's own parser, names exist, links
lead somewhere. What is looked at: fenced blocks, and what stands between backticks.
"""
import argparse
import functools
import importlib
import re
import shlex
import sys
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = ["verify.py", "srt.py", "sft.py", "kl.py", "distill.py"]
FOLDERS = (".", "common", "verifiers", "tests")
SOURCES = [*(path for folder in FOLDERS for path in ROOT.glob(f"{folder}/*.py")), ROOT / "Makefile"]
TEXT = "\n".join(path.read_text() for path in SOURCES if path.name != "test_docs.py")
WORDS = set(re.findall(r"\w+", TEXT))
OTHERS = "pip ", "srun ", "sysctl ", "apt-get ", "docker ", "tensorboard "  # commands that are not ours
# of torchrun
OTHER_FLAGS = set("--nproc_per_node --nnodes --node_rank --master_addr --master_port --standalone".split())
OWN_FILES = {"my_reward.py", "x.py"}  # stand for the reader's own, for any script
OTHER_WORDS = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "WANDB_PROJECT"}
MADE_PAGES = {"samples.md"}  # a script writes it


# ----------------------------------------------------------------------------------------- what is in a page


def fences(page):
    """The inside of each fenced block, continued lines joined."""
    found = re.findall(r"^```\w*\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [block.replace("\\\n", " ") for block in found]


def spans(page):
    """What stands between backticks outside of fenced blocks; in a table | is written \\|."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [span.replace("\\|", "|").replace("\n", " ") for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]


def words_of(line, variables):
    """A line in words, comments gone, variables that the block sets expanded; [] where it is no command."""
    line = re.sub(r"\$\{?(\w+)\}?", lambda m: variables.get(m[1], m[0]), line)
    try:
        return shlex.split(line, comments=True)
    except ValueError:  # an apostrophe: prose, or what a script prints
        return []


def script_of(word):
    """The path of a script within the project, or None: srt.py, tests/toy.py, bench_step.py."""
    places = (word, f"tests/{word}")
    return next((p for p in places if word.endswith(".py") and (ROOT / p).is_file()), None)


def commands(page):
    """[(command line, script, its arguments, whether they are all there)] of a page."""
    lines = []
    for block in fences(page):
        variables = {}
        for line in block.splitlines():
            words = words_of(line, variables)
            if words and all("=" in word for word in words):
                variables |= (word.rstrip(";").split("=", 1) for word in words)
            lines.append((line, words, True))
    lines += [(span, words_of(span, {}), re.match(r"python |torchrun ", span)) for span in spans(page)]
    found = []
    for line, words, whole in lines:
        at = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
        starts = words[:1] and words[0] in ("python", "torchrun", "run", ".venv/bin/python", words[at or 0])
        if at is None or not starts or words[at] in OWN_FILES or len(words) == 1:
            continue
        arguments = words[at + 1:]
        ends = next((i for i, word in enumerate(arguments) if word in ("...", ">", "|", "||", "&&")), None)
        whole = bool(whole) and "..." not in arguments and "..." not in words[:at]
        found.append((line.strip(), words[at], arguments[:ends], whole))
    return found


# --------------------------------------------------------------------------------------------------- parsers


@functools.cache
def parser_of(script):
    """The parser that a script makes, caught where it would read the command line; None if it makes none."""
    class Caught(Exception):
        pass

    def parse_args(parser, *_):
        raise Caught(parser)

    if "argparse" not in (ROOT / script).read_text():
        return None
    module = importlib.import_module(Path(script).stem)
    with mock.patch.object(argparse.ArgumentParser, "parse_args", parse_args):
        with pytest.raises(Caught) as caught:
            getattr(module, "parse_args", module.main)()
    parser, = caught.value.args
    parser.allow_abbrev = False
    return parser


def complaint(script, arguments, whole):
    """What is wrong with the arguments of a script, or None. whole=False: what is missing may be missing."""
    if script_of(script) is None:
        return "there is no such script"
    parser = parser_of(script_of(script))
    if parser is None:
        return f"it takes no flags, given {arguments}" if any(a.startswith("-") for a in arguments) else None
    required = [action for action in parser._actions if action.required]

    def error(message):
        raise argparse.ArgumentTypeError(message)

    try:
        with mock.patch.object(parser, "error", error):
            for action in required:
                action.required = whole
            parser.parse_args(arguments)
    except argparse.ArgumentTypeError as e:
        return str(e) if whole or "expected one argument" not in str(e) else None
    finally:
        for action in required:
            action.required = True


@functools.cache
def all_flags():
    scripts = [*SCRIPTS, *(f"tests/{path.name}" for path in (ROOT / "tests").glob("bench_*.py")),
               "tests/chaos.py", "tests/toy.py"]
    actions = [action for script in scripts for action in parser_of(script)._actions]
    return {flag for action in actions for flag in action.option_strings}


# ----------------------------------------------------------------------------------------------------- names


def unknown(span):
    """Why what stands between backticks names something that is not there, or None."""
    flags = set(re.findall(r"(?<!\S)--[a-z]\w*", span)) - OTHER_FLAGS
    if not span.startswith(OTHERS) and flags - all_flags():
        return f"no script has {', '.join(flags - all_flags())}"
    if match := re.match(r"make ([a-z]+)", span):
        return None if re.search(rf"^{match[1]}:", TEXT, re.MULTILINE) else f"the Makefile has no {match[1]}"
    if match := re.fullmatch(r"(verify|srt|sft|kl|distill)\.([A-Za-z_][\w.]*)(\(.*\))?", span):
        if match[2] != "py":
            try:
                functools.reduce(getattr, match[2].split("."), importlib.import_module(match[1]))
            except AttributeError as e:
                return str(e)
            return None
    if match := re.fullmatch(r"([A-Za-z_]\w*)\(.*\)", span):
        defined = re.search(rf"^\s*(def|class) {match[1]}\b", TEXT, re.MULTILINE)
        return None if defined else f"no file defines {match[1]}"
    if re.fullmatch(r"[\w./-]+\.(py|md|txt|toml|diff|png)", span) and span not in OWN_FILES | MADE_PAGES:
        there = any((ROOT / folder / span).exists() for folder in (*FOLDERS, "docs"))
        made = Path(span).name in TEXT  # heatmap.html and buckets.png are written by a script
        return None if there or (made and not span.endswith((".py", ".md"))) else "no such file"
    if re.fullmatch(r"[\w./-]+\.(jsonl|json|html)", span):
        return None if Path(span).name in TEXT else "no script writes or names it"
    if re.fullmatch(r"[A-Za-z_]\w*", span) and span not in OTHER_WORDS:
        return None if span in WORDS else "no source has this word"


def slugs(page):
    """The anchors that a page's headings have on GitHub."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if re.match(r"https?:", target):
            continue
        if not path.exists() or (anchor and anchor not in slugs(path)):
            yield target


# ----------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_parse(page):
    wrong = [(line, why) for line, script, arguments, whole in commands(page)
             if (why := complaint(script, arguments, whole))]
    assert not wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_exist(page):
    assert not [(span, why) for span in spans(page) if (why := unknown(span))]
    targets = [m[1] for block in fences(page) for m in re.finditer(r"^make ([a-z]+)", block, re.MULTILINE)]
    assert not [target for target in targets if unknown(f"make {target}")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    assert not list(broken_links(page))


def test_commands_are_found():
    """The pages are read at all: the 4B run is four commands, SLURM's three."""
    count = lambda name: sum(whole for *_, whole in commands(ROOT / name))
    assert count("README.md") >= 4 and count("docs/running.md") >= 3


def test_the_own_reward_works(tmp_path):
    """The verifier of docs/verdicts.md, as it stands there, and the verdicts that the page gives it."""
    import verify
    source, = (block for block in fences(ROOT / "docs/verdicts.md") if "INSTRUCTION =" in block)
    (tmp_path / "my_reward.py").write_text(source)
    verifier = verify.load_verifier(str(tmp_path / "my_reward.py"))
    assert verifier.gold({"value": 250}) == (250, None) and verifier.gold({})[0] is None
    says = {"It is about 249.": "right", "247": "wrong", "First 250, then 1,250": "wrong",
            "I do not know": "no answer", "well " * 200 + "250": "too long"}
    assert {response: verifier.judge(250, response, {}) for response in says} == says


def test_the_first_page_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 90
