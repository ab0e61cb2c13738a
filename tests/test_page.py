"""The page of kl.py: what it holds, hostile text, characters in pieces, its size; in a browser, if any."""
import html.parser
import json
import math
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import REPO, run

import kl
import verify
from tests import page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"alert('owned')\">&amp;<!--"
SUMMARY = {"kl": "reverse", "phrases": ["a", "b"]}
SUMMARY |= {name: {"responses": 3, "kl": 0.5, "kl_by_bucket": [0.05] * 20} for name in ("right", "wrong")}


class Words:
    """A tokenizer of these bytes: byte-level BPE as far as the page asks; the last token is special."""

    def __init__(self, words):
        letter = {b: c for c, b in page.BYTE_OF.items()}
        self.words, self.names = words, ["".join(letter[b] for b in word) for word in words] + ["<|im_end|>"]
        self.added_tokens_decoder = {len(words): "<|im_end|>"}

    def decode(self, ids):
        return b"".join(self.words[i] for i in ids).decode("utf-8", "replace")

    def convert_ids_to_tokens(self, i):
        return self.names[i] if i < len(self.names) else None


def response(ids, right=True, kl=None, problem="1+1=?", **more):
    """What kl.py hands over for a response: made-up numbers."""
    row = {"id": "p0", "sample": 0, "problem": problem, "answer": "2", "y_init_correct": right,
           "y_init_tokens": ids}
    five = [[(i, 0.9), (0, 0.06), (1, 0.03), (0, 0.01), (1, 1e-6)] for i in ids]
    return {**row, **more}, kl or [0.1] * len(ids), [-0.1234] * len(ids), [-2.0] * len(ids), five, five


def embedded(path):
    """The block of JSON of a heatmap.html."""
    return json.loads(re.search(r'application/json" id="data">(.*?)</script>', path.read_text())[1])


def after_load(path, drawn, hash=""):
    """The page's DOM as chromium has it, with `drawn`: on a busy machine it may be dumped before that."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000", "--dump-dom",
             "--window-size=1400,1400"]
    command = [CHROMIUM, *flags, f"file://{path}{hash}"]
    for _ in range(5):
        dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
        if drawn in dom:
            break
    return dom


# ---------------------------------------------------------------------------------------- what it holds


def test_hostile_text(tmp_path):
    """No text of a model, problem or id leaves the block of JSON, which has nothing that could end it."""
    words = Words([HOSTILE.encode(), b"'\"", "\u2028".encode()])
    shown = [response([0, 1, 2, 3], problem=HOSTILE, id=HOSTILE, answer=HOSTILE)]
    page.write(tmp_path, {**SUMMARY, "phrases": [HOSTILE, HOSTILE]}, shown, words)
    text = (tmp_path / "heatmap.html").read_text()
    block = re.search(r'id="data">(.*?)</script>', text)[1]
    assert not set("<>&") & set(block) and "\u2028" not in text
    data = embedded(tmp_path / "heatmap.html")
    r, = data["responses"]
    assert HOSTILE in data["words"] and r["problem"] == r["id"] == r["answer"] == HOSTILE
    rest = text.replace(block, "")
    assert "owned" not in rest and "innerHTML" not in rest and "document.write" not in rest
    tags = []
    parser = html.parser.HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.append(tag)
    parser.feed(text)
    assert tags.count("script") == 2 and "img" not in tags


def test_no_network(tmp_path):
    page.write(tmp_path, SUMMARY, [response([0, 1])], Words([b"a"]))
    data = embedded(tmp_path / "heatmap.html")
    text = (tmp_path / "heatmap.html").read_text().replace(data["picture"], "")
    assert data["picture"]
    assert not [word for word in ("http", "url(", "src=", "@import", "fetch", "//cdn") if word in text]
    assert text.isascii() and "prefers-color-scheme:dark" in text


def test_the_numbers(tmp_path):
    """In 1/1000 nat and 1/10000, special tokens first, the largest KL in order."""
    shown = [response([0, 1, 2], kl=[0.25, 7.5, 0.0]), response([1, 0, 2], False, kl=[1.5, -1e-9, 9.0])]
    data = page.page_data(shown, Words([b"a", b" b\n"]))
    assert data["words"] == ["<|im_end|>", "a", " b\n"] and data["special"] == 1
    assert data["top"] == [[1, 2], [0, 1], [1, 0], [0, 0], [0, 2], [1, 1]]
    r = data["responses"][0]
    assert r["tokens"] == [1, 2, 0] and r["kl"] == [250, 7500, 0]
    assert r["p"] == [-123] * 3 and r["q"] == [-2000] * 3
    assert r["likely"][0] == [1, 9000, 1, 600, 2, 300, 1, 100, 2, 0] * 2 and r["whole"] == {}
    assert [r["right"] for r in data["responses"]] == [True, False]


def test_characters_in_pieces():
    """A character that tokens cut stands once, where it begins; bytes that make none are named."""
    e, han = "\u00e9".encode(), "\u5b57".encode()
    assert page.cut_characters([b"a", e, b"b"]) == {}
    pieces = [b"a" + han[:1], han[1:2], han[2:] + b"c", b"d"]
    assert page.cut_characters(pieces) == {0: "a\u5b57", 1: "", 2: "c"}
    assert page.cut_characters([han[:1], "<|im_end|>", han[1:]]) == {}  # a special token is no part of one
    assert page.cut_characters([han[:2], b"", han[2:]]) == {0: "\u5b57", 1: "", 2: ""}
    words = Words([b" " + han[:2], han[2:], b"\xff", "\ufffd".encode()])
    assert [page.spell(words, i) for i in range(5)] == [*words.words, "<|im_end|>"]
    assert page.spell(words, 7) == "<no token 7>"  # the head has more rows than the tokenizer words
    data = page.page_data([response([0, 1, 2, 3])], words)
    assert data["words"] == [" \udce5\udcad", "\udc97", "\udcff", "\ufffd"]
    assert data["responses"][0]["whole"] == {0: " \u5b57", 1: ""}


def test_size(tmp_path):
    """20 responses of 300 tokens: well under 1.5 MB."""
    words = Words([b" word%d" % i for i in range(2000)])
    ids = lambda k: [(37 * k + 13 * i) % 2000 for i in range(300)]
    shown = [response(ids(k), k % 2 == 0) for k in range(20)]
    page.write(tmp_path, SUMMARY, shown, words)
    assert os.path.getsize(tmp_path / "heatmap.html") < 1_000_000


def test_no_picture_is_no_failure(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(page, "draw_buckets", lambda *_: 1 / 0)
    page.write(tmp_path, SUMMARY, [response([0])], Words([b"a"]))
    assert "buckets.png was not drawn" in capsys.readouterr().out and os.listdir(tmp_path) == ["heatmap.html"]


def test_buckets():
    """Shares of 20 equal slices of the sorted tokens: flat for equal values, one loud token in the first."""
    assert kl.buckets(torch.ones(7)) == pytest.approx([0.05] * 20)
    loud = torch.zeros(40)
    loud[13] = 2.0
    assert kl.buckets(loud)[0] == pytest.approx(1.0) and sum(kl.buckets(torch.rand(33))) == pytest.approx(1.0)
    assert kl.buckets(torch.tensor([3.0, 1.0]))[9:11] == pytest.approx([0.075, 0.025])
    assert kl.buckets(torch.zeros(3)) == [0.0] * 20


# ---------------------------------------------------------------------------------------- the script


@pytest.fixture(scope="module")
def responses(guesser, tmp_path_factory):
    """Six answers to the guesser's problems, two of them right."""
    tokenizer, rows = verify.load_tokenizer(guesser), []
    for i in range(6):
        text = f" \\boxed{{{3 + i % 3}}}"
        ids = tokenizer.encode(text, add_special_tokens=False) + tokenizer.end_ids[:1]
        rows.append({"kind": "init", "id": f"p{i}", "sample": 0, "problem": f"{i}+1=?", "answer": "3",
                     "mode": "math", "y_init": text, "y_init_tokens": ids, "y_init_correct": i % 3 == 0})
    path = tmp_path_factory.mktemp("responses") / "responses.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_kl_says_whether_the_phrase_is_heard(guesser, responses, tmp_path):
    """The guesser answers 3, 4 or 5; told that it was wrong, 3: the phrases' contrast sits on the number."""
    args = ["--student", guesser, "--teacher", guesser, "--responses", responses, "--out", tmp_path]
    said = run("kl.py", *args)
    s = json.load(open(tmp_path / "summary.json"))
    assert (s["right"]["responses"], s["wrong"]["responses"]) == (2, 4) and "contrast" in said.stdout
    assert s["wrong"]["contrast"] < -0.3 and s["right"]["contrast"] > 0.1 and s["wrong"]["abs_contrast"] > 0.3
    assert s["wrong"]["contrast_by_bucket"][0] > 0.15  # one token of five or so
    assert sum(s["wrong"]["kl_by_bucket"]) == pytest.approx(1.0, abs=1e-4)
    assert 0 < s["wrong"]["copied"] < 1  # the frame around the number is certain either way
    assert os.path.getsize(tmp_path / "buckets.png") > 5000 and f"see {tmp_path}/heatmap.html" in said.stdout

    data = embedded(tmp_path / "heatmap.html")
    assert [r["right"] for r in data["responses"]].count(True) == 2 and len(data["responses"]) == 6
    assert data["words"][:data["special"]].count("<|im_end|>") == 1
    for r in data["responses"]:
        text = "".join(data["words"][t] for t in r["tokens"])
        assert text == f" \\boxed{{{3 + int(r['id'][1]) % 3}}}<|im_end|>" and r["answer"] == "3"
        number = next(t for t, word in enumerate(r["tokens"]) if data["words"][word] in "345")
        likely = r["likely"][number]
        assert max(range(len(r["kl"])), key=r["kl"].__getitem__) == number or r["right"]
        assert {data["words"][n] for n in likely[:6:2]} == {"3", "4", "5"}
        for t, token in enumerate(r["tokens"]):  # the two columns of numbers agree where the token is listed
            for side, logs in ((r["likely"][t][:10], r["p"]), (r["likely"][t][10:], r["q"])):
                for n, chance in zip(side[::2], side[1::2]):
                    assert n != token or chance / 1e4 == pytest.approx(math.exp(logs[t] / 1e3), abs=1e-3)


def test_kl_cuts_as_phase_2_does(guesser, responses, tmp_path):
    """y so that x, y, the longer P_r, y fits the model; a y without any room is left out."""
    tokenizer, rows = verify.load_tokenizer(guesser), [json.loads(line) for line in open(responses)]
    rows[0]["y_init_tokens"] = rows[0]["y_init_tokens"][:2] * 750
    rows[1]["problem"] = "1+" * 500 + "1=?"
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = ["--student", guesser, "--teacher", guesser, "--responses", tmp_path / "long.jsonl"]
    said = run("kl.py", *args, "--out", tmp_path / "out").stdout
    assert "2 of 6 y_init were cut" in said and "1024 tokens" in said
    x = verify.chat_ids(tokenizer, verify.Problem.of_row(rows[0]))
    P_r = max(len(verify.control_ids(tokenizer, told, verify.PHRASES["qwen"])) for told in (False, True))
    shown = {r["id"]: len(r["tokens"]) for r in embedded(tmp_path / "out/heatmap.html")["responses"]}
    assert len(shown) == 5 and shown["p0"] == (1024 - len(x) - P_r) // 2


def test_without_the_tests_folder(guesser, responses, tmp_path):
    """kl.py and what it imports, alone in a folder: the table, summary.json, a line instead of the page."""
    alone = tmp_path / "alone"
    for folder in ("common", "verifiers"):
        shutil.copytree(REPO / folder, alone / folder)
    for name in ("kl.py", "verify.py"):
        shutil.copy(REPO / name, alone)
    args = ["--student", guesser, "--teacher", guesser, "--responses", responses, "--out", tmp_path / "out"]
    done = subprocess.run([sys.executable, alone / "kl.py", *map(str, args)], capture_output=True, text=True,
                          cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^wrong +4 ", done.stdout, re.M)
    assert f"heatmap.html was not written: {alone / 'tests/page.py'} is not there" in done.stdout
    assert os.listdir(tmp_path / "out") == ["summary.json"]


# ---------------------------------------------------------------------------------------- in a browser


@pytest.mark.skipif(not CHROMIUM, reason="no chromium")
def test_in_a_browser(tmp_path):
    """The script runs to its end, hostile text stays text, signs and pieces are drawn, links work."""
    han = "\u5b57".encode()
    bidi = "\u202e".encode()
    words = Words([HOSTILE.encode(), b" the", b".\n", b"\t", han[:1], han[1:], b"\xff", bidi, b"word "])
    far = [1] * 3000 + [2]
    kl = [0.1] * 2900 + [5.0] + [0.1] * 101
    shown = [response([*range(10)], problem=HOSTILE), response([*far, 8], False, kl)]
    page.write(tmp_path, SUMMARY, shown, words)
    dom = after_load(tmp_path / "heatmap.html", 'h">\u5b57</span>')
    assert 'data-ready="yes"' in dom and "<title>Where the teacher disagrees</title>" in dom
    assert dom.count("&lt;/script&gt;&lt;script&gt;document.title") >= 3
    assert "data:image/png" in dom and "<img src=x" not in dom
    for sign in ('<i class="n">', '<i class="t">', 'data-c="U+202E"', r'data-c="\xFF"', 'h">\u5b57</span>'):
        assert sign in dom
    assert '<span class="k0 r6 h"></span>' in dom  # the second piece; 2 - .123 nats are 6 steps of .3

    dom = after_load(tmp_path / "heatmap.html", "token 2901 of 3002", "#r1t2900")
    assert 'class="k10 r6 s now"> the</span>' in dom and "token 2901 of 3002" in dom
    assert dom.count('<span class="k0 r6 s"> the</span>') < 2900  # the blocks far away are plain text
