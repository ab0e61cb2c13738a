r"""
The page that kl.py writes: heatmap.html, one file that asks the network for nothing, and buckets.png.

It shows, for ten right and ten wrong responses, where the teacher disagrees. All that depends on the data
stands in one block of JSON in which <, > and & are escaped, and reaches the page as text, never as HTML. A
response of 8,000 tokens stays light: its text is laid out in blocks of about 150 tokens, plain text at first;
a block that comes near the window gets an element per token. All listeners sit on the document.
"""
import base64
import io
import json
import os

from common import run

TOP = 30  # tokens in the list of the largest KL
BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]  # byte-level BPE writes these as themselves,
BYTE_OF = {chr(b): b for b in BYTES}
BYTE_OF |= {chr(256 + i): b for i, b in enumerate(sorted({*range(256)} - {*BYTES}))}  # the others from 256 on


def write(out, summary, shown, tokenizer):
    """
    Writes heatmap.html and buckets.png to the folder `out`; returns the line that says so.

    summary: what kl.py writes to summary.json. shown: a tuple for each response: its row of responses.jsonl,
    then lists over its T tokens: KL, log p of the student and of the teacher (nats), and the likeliest tokens
    of the student and of the teacher, [(id, probability), ...] each. tokenizer: spells the ids.
    """
    png = io.BytesIO()
    try:
        draw_buckets(summary, png)
    except Exception as e:  # the numbers are written by now: no picture is no reason to fail
        print(f"buckets.png was not drawn: {e!r}")
    else:
        run.write_atomically(os.path.join(out, "buckets.png"), png.getvalue())
    data = {**page_data(shown, tokenizer), "summary": summary,
            "picture": base64.b64encode(png.getvalue()).decode()}
    path = os.path.join(out, "heatmap.html")
    run.write_atomically(path, html(data))
    return f"see {path}"


def html(data):
    """The page, ASCII: the escaped JSON of `data` in the middle of PAGE."""
    text = json.dumps(data, separators=(",", ":"))
    for c in "<>&":  # so that no text of a model ends the script element or begins another
        text = text.replace(c, f"\\u{ord(c):04x}")
    before, after = PAGE.split("DATA", 1)
    return before + text + after


def page_data(shown, tokenizer):
    """
    What the page's script reads:

      words      the text of each token that occurs, once; a byte that is no whole character is U+DC00 + byte
      special    how many of them, at the front, are special tokens
      top        [response, token] of the tokens with the largest KL
      responses  {id, sample, problem, answer, right, tokens, kl, p, q, likely, whole}: tokens are indices
                 into words; kl, p, q (log-probabilities) in 1/1000 nat; likely: for each token the student's
                 five, then the teacher's, as index and probability in 1/10000; whole: {token: what is shown
                 in its place} where a character is cut by tokens: the whole where it begins, else nothing
    """
    ids = {i for _, _, _, _, *likely in shown for side in likely for five in side for i, _ in five}
    ids |= {i for row, *_ in shown for i in row["y_init_tokens"]}
    spelled = {i: spell(tokenizer, i) for i in ids}
    order = sorted(ids, key=lambda i: (isinstance(spelled[i], bytes), i))
    index = {i: n for n, i in enumerate(order)}
    responses = []
    for row, kl, p, q, *likely in shown:
        y = row["y_init_tokens"]
        milli = lambda values: [round(1000 * value) for value in values]
        five = lambda five: [n for i, chance in five for n in (index[i], round(10000 * chance))]
        responses.append({
            "id": row["id"], "sample": row["sample"], "problem": row["problem"],
            "answer": None if row.get("answer") is None else str(row["answer"]),
            "right": row["y_init_correct"], "tokens": [index[i] for i in y], "kl": milli(kl), "p": milli(p),
            "q": milli(q), "likely": [five(a) + five(b) for a, b in zip(*likely)],
            "whole": cut_characters([spelled[i] for i in y])})
    ranked = sorted(((kl, r, t) for r, (_, values, *_) in enumerate(shown) for t, kl in enumerate(values)),
                    key=lambda each: (-each[0], each[1:]))
    return {"words": [text_of(spelled[i]) for i in order],
            "special": sum(isinstance(word, str) for word in spelled.values()),
            "top": [[r, t] for _, r, t in ranked[:TOP]], "responses": responses}


def spell(tokenizer, i):
    """The bytes of a token; a str for a special one, or for an id that only pads the head."""
    token = tokenizer.convert_ids_to_tokens(i)
    if token is None or i in tokenizer.added_tokens_decoder:
        return token or f"<no token {i}>"
    text = tokenizer.decode([i])
    if "\ufffd" not in text:
        return text.encode("utf-8", "surrogatepass")
    if all(c in BYTE_OF for c in token):  # a part of a character, byte-level BPE
        return bytes(BYTE_OF[c] for c in token)
    if token.startswith("<0x"):  # one byte, SentencePiece
        return bytes.fromhex(token[3:5])
    return text.encode()


def text_of(word):
    """Bytes as text in which a byte b that belongs to no whole character stands as U+DC00 + b."""
    return word if isinstance(word, str) else word.decode("utf-8", "surrogateescape")


def cut_characters(words):
    """
    {token: its text on the page} for the tokens (bytes; str: special) that share a character with another:
    a character stands whole where it begins, a token without a beginning is empty.
    """
    whole, starts = {}, [0]
    for word in words:
        starts.append(starts[-1] + len(b"\0" if isinstance(word, str) else word))  # \0: no part of any
    data = b"".join(b"\0" if isinstance(word, str) else word for word in words)
    texts, cut, at, t = [""] * len(words), set(), 0, 0
    for c in data.decode("utf-8", "surrogateescape"):
        size = 1 if "\udc80" <= c <= "\udcff" else len(c.encode())
        while starts[t + 1] <= at:
            t += 1
        texts[t] += c
        last = t
        while starts[last + 1] < at + size:
            last += 1
        if last > t:
            cut.update(range(t, last + 1))
        at += size
    for t in sorted(cut):
        whole[t] = texts[t]
    return whole


def draw_buckets(summary, file):
    """A PNG: the mean share of a response's KL in each twentieth of its tokens, the largest first."""
    from matplotlib.figure import Figure
    fig = Figure(figsize=(6, 3.6), layout="constrained")
    ax = fig.subplots()
    for name, colour in (("right", "tab:blue"), ("wrong", "tab:red")):
        if summary[name]["responses"]:
            ax.plot(range(1, 21), summary[name]["kl_by_bucket"], marker="o", ms=3, color=colour,
                    label=f"{name} ({summary[name]['responses']})")
    ax.set(xlabel="tokens of a response, sorted by KL, in 20 equal buckets",
           ylabel="share of the response's KL", title="Self-localisation: where the KL sits")
    ax.set_ylim(bottom=0)
    ax.set_xticks((1, 5, 10, 15, 20))
    ax.legend(title="y_init was")
    fig.savefig(file, dpi=150, format="png")


PAGE = r"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<title>Where the teacher disagrees</title>
<style>
:root{color-scheme:light dark;--back:#fff;--ink:#1b1d21;--soft:#666c75;--line:#d9dce1;--card:#f6f7f9;
--red:216 40 40;--blue:30 90 220;--kl:232 120 0;--dot:rgb(0 0 0/.34)}
@media(prefers-color-scheme:dark){:root{--back:#15171b;--ink:#e6e8eb;--soft:#9aa1ab;--line:#343941;
--card:#1d2026;--red:232 60 60;--blue:70 125 255;--kl:214 120 20;--dot:rgb(255 255 255/.4)}
.picture{filter:invert(1) hue-rotate(180deg)}}
*{box-sizing:border-box}i{font-style:normal}
body{margin:0 auto;max-width:100rem;padding:0 1rem 16rem;background:var(--back);color:var(--ink);
font:15px/1.5 system-ui,sans-serif}
h1{font-size:1.35rem;margin:1rem 0 .3rem}h2{font-size:1.05rem;margin:1.6rem 0 .4rem}
h3{font-size:.95rem;margin:0;overflow-wrap:anywhere}p{max-width:60rem;margin:.4rem 0}
a{color:inherit}.soft{color:var(--soft)}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
td,th{padding:.1rem .7rem .1rem 0;text-align:right;font-weight:400;white-space:nowrap}
td:first-child,th:first-child{text-align:left}th{color:var(--soft)}
#bar{position:sticky;top:0;z-index:2;display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;align-items:center;
margin:.8rem -1rem;padding:.4rem 1rem;background:var(--back);border-bottom:1px solid var(--line)}
#key{display:flex;font-size:.8rem;align-items:center;gap:.4rem}
#key b{display:inline-flex;width:9rem}#key i{flex:1;height:1rem}
#sums{display:flex;flex-wrap:wrap;gap:.5rem 2rem;align-items:center;margin:.6rem 0}.wide{max-width:100%}
.picture{max-width:min(100%,26rem);display:block}
#top{padding-left:2.2rem;columns:2 24rem;column-gap:2rem;font-size:.85rem}
#top li{break-inside:avoid;padding-left:.2rem;overflow-wrap:anywhere}
#top a{text-decoration:none}#top a:hover .words{text-decoration:underline}
.words,.text,#tip td:nth-child(2n+1),#tip th{
font-family:ui-monospace,"DejaVu Sans Mono",Menlo,Consolas,monospace}
.words mark{color:inherit;background-color:rgb(var(--kl)/.45)}
#sides{display:grid;grid-template-columns:minmax(0,1fr) minmax(0,1fr);gap:1.5rem}
@media(max-width:800px){#sides{grid-template-columns:minmax(0,1fr)}#key b{width:5rem}}
article{border:1px solid var(--line);border-radius:6px;margin-bottom:1rem}
header{background:var(--card);padding:.5rem .7rem;border-radius:6px 6px 0 0}
.problem{white-space:pre-wrap;overflow-wrap:anywhere;max-height:11rem;overflow:auto;margin:.3rem 0;
unicode-bidi:plaintext}.problem .n,.problem .t{display:none}
.text{font-size:13.5px;line-height:1.75;padding:.5rem .7rem;outline-offset:-2px;tab-size:4}
.block{white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:plaintext;content-visibility:auto}
.block span{padding:.1em 0;cursor:default}.block span:hover{outline:1px solid var(--ink)}
.s{background-image:radial-gradient(circle at .5ch 56%,var(--dot) 1px,transparent 1.4px)}
.w{background-image:radial-gradient(circle at .5ch 56%,var(--dot) 1px,transparent 1.4px);
background-size:1ch 100%}
.n::before,.t::before{color:var(--soft);opacity:.75}.n::before{content:"\21b5"}.t::before{content:"\2192"}
.u,.x{border:1px solid var(--line);border-radius:3px;font-size:.85em}.x{border-color:var(--soft)}
.u::before{content:attr(data-c)}
.h{background-image:repeating-linear-gradient(45deg,var(--dot) 0 1px,transparent 1px 5px)}
.block .h:empty{padding:.1em .35em;margin:0 1px}
.now{outline:2px solid var(--ink);outline-offset:0}
#tip{position:fixed;z-index:3;width:25rem;max-width:100vw;padding:.5rem .7rem;
background:var(--card);font-size:.85rem;
border:1px solid var(--soft);border-radius:6px;pointer-events:none;box-shadow:0 2px 10px rgb(0 0 0/.25)}
#tip table{width:100%;table-layout:fixed}#tip td{overflow:hidden;text-overflow:ellipsis;padding-right:.4rem}
#tip th,#tip td:nth-child(2n+1){text-align:left;white-space:pre}#tip .own{font-weight:700}
#tip td:nth-child(2n){width:5rem}#tip b{overflow-wrap:anywhere;white-space:pre-wrap}
@media(max-width:800px){#tip{left:0!important;right:0;top:auto!important;bottom:0;width:auto;border-radius:0}}
[hidden]{display:none!important}
</style></head><body>
<h1>Where the teacher disagrees</h1>
<p>Each token of y_init is shaded by how far the student, who has read the problem, is from the teacher, who
has also read the whole response and the phrase that says whether it is right. For the numbers point at a
token, tap it, or move from token to token with the arrow keys.</p>
<p class="soft">In the text: a dot is a space at a token's edge, <i class="n"></i> a line break,
<i class="t"></i> a tab; in a box stands a special token, or the number of a sign or byte that cannot be seen;
<span class="h">hatched</span> tokens are parts of one character, which stands where it begins.</p>
<noscript><p>The script of this page draws it: allow it to run.</p></noscript>
<div id="sums"><div class="wide"><table></table></div></div>
<h2></h2><ol id="top"></ol>
<div id="bar"><span>Shade by <label><input type="radio" name="by" value="kl" checked> KL</label>
<label><input type="radio" name="by" value="ratio"> log p<sub>student</sub> &minus; log p<sub>teacher</sub>
</label></span>
<span id="key"></span></div>
<main id="sides" class="kl"></main>
<div id="tip" role="status" hidden></div>
<script type="application/json" id="data">DATA</script>
<script>
"use strict";
const find = query => document.querySelector(query);
const data = JSON.parse(find("#data").textContent), main = find("main"), tip = find("#tip");
const make = (tag, name, ...inside) => {
  const node = document.createElement(tag);
  if (name) node.className = name;
  node.append(...inside);
  return node;
};
const cells = (tag, list) => make("tr", "", ...list.map(cell => make(tag, "", cell)));
const nats = (milli, sign) => (sign && milli > 0 ? "+" : "") + (milli / 1000).toFixed(3);

// ---- text. What cannot be seen, or would turn the order of the text, is drawn; \udc80-\udcff: lone bytes
const UNSEEN = new RegExp("\\n|\\t|^ +| +$|[\\0-\\x1f\\x7f-\\xa0\\xad\\u061c\\u200b\\u200e\\u200f" +
  "\\u2028-\\u202e\\u2060-\\u2069\\ufeff\\ufff9-\\ufffb]|[\\udc80-\\udcff]", "gu");
function draw(node, word) {
  const one = /^ [^ \n]/.test(word) ? 1 : 0;  // the usual space before a word: a background, no element
  if (one) node.classList.add("s");
  let at = 0;
  for (const {0: c, index} of word.matchAll(UNSEEN)) {
    if (index < one) continue;
    if (index > at) node.append(word.slice(at, index));
    at = index + c.length;
    if (c === "\n") node.append(make("i", "n"), c);
    else if (c === "\t") node.append(make("i", "t"), c);
    else if (c[0] === " ") node.append(make("i", "w", c));
    else {
      const code = c.charCodeAt(0), byte = code >= 0xdc80 && code <= 0xdcff;
      const hex = (byte ? code - 0xdc00 : code).toString(16).toUpperCase();
      node.append(make("i", "u"));
      node.lastChild.dataset.c = byte ? "\\x" + hex : "U+" + hex.padStart(4, "0");
    }
  }
  if (at < word.length) node.append(word.slice(at));
  return node;
}
const drawn = (n, tag, name) =>
  draw(make(tag, n < data.special ? name + " x" : name), data.words[n]);
const shown = (R, t) => R.whole[t] ?? data.words[R.tokens[t]];

// ---- blocks: plain text until they come near the window, then an element per token
const level = milli => Math.min(10, Math.round(Math.abs(milli) / 300));  // 10: 3 nats or more
function fill(block) {
  if (block.filled) return;
  block.filled = true;
  const R = data.responses[block.r], spans = [];
  for (let t = block.from; t < block.to; t++) {
    const ratio = R.p[t] - R.q[t];
    const name = `k${level(R.kl[t])} ${ratio > 0 ? "r" : "b"}${level(ratio)}`;
    const cut = t in R.whole;
    const span = cut ? draw(make("span", name + " h"), R.whole[t]) : drawn(R.tokens[t], "span", name);
    span.t = t;
    spans.push(span);
  }
  block.replaceChildren(...spans);
}
const near = new IntersectionObserver(seen => {
  for (const {isIntersecting, target} of seen) if (isIntersecting) { fill(target); near.unobserve(target); }
}, {rootMargin: "1000px"});
function blocksOf(R, r) {
  const blocks = [];
  for (let from = 0, t = 0, text = ""; t < R.tokens.length; t++) {
    const word = shown(R, t), n = t + 1 - from;
    text += word;
    if (!(n >= 150 && word.endsWith("\n")) && n < 1000 && t + 1 < R.tokens.length) continue;
    const block = make("div", "block", text.replace(/[\udc80-\udcff]/gu, "\ufffd"));
    Object.assign(block, {r, from, to: t + 1});
    const lines = Math.ceil(text.length / 60 + text.split("\n").length / 2);
    block.style.containIntrinsicSize = `auto ${24 * lines}px`;
    near.observe(block);
    blocks.push(block);
    from = t + 1;
    text = "";
  }
  return blocks;
}

// ---- the panel of numbers
let now = null;  // {r, t, span}: the token chosen by a tap, a key or a link
function show(r, t, span) {
  const R = data.responses[r], likely = R.likely[t], chance = n => n ? (n / 10000).toFixed(4) : "<.0001";
  const title = make("div", "", drawn(R.tokens[t], "b", "words"));
  if (t in R.whole) {
    let first = t;  // where the character begins
    while (first && R.whole[first] === "") first--;
    title.append(" part of ", draw(make("b", "words"), R.whole[first] ?? ""));
  }
  title.append(make("span", "soft", ` token ${t + 1} of ${R.tokens.length}`));
  const numbers = make("div", "", `KL ${nats(R.kl[t])}, log p student ${nats(R.p[t])}, `
    + `teacher ${nats(R.q[t])}, ` + `difference ${nats(R.p[t] - R.q[t], true)}`);
  const table = make("table", "", cells("th", ["student", "", "teacher", ""]));
  for (let k = 0; k < 10; k += 2)
    table.append(make("tr", "", ...[k, k + 10].flatMap(at => {
      const name = likely[at] === R.tokens[t] ? "own" : "";
      return [make("td", name, drawn(likely[at], "span", "")), make("td", name, chance(likely[at + 1]))];
    })));
  tip.replaceChildren(title, numbers, table);
  tip.hidden = false;
  const box = span.getClientRects()[0] ?? span.getBoundingClientRect();
  const {offsetWidth: w, offsetHeight: h} = tip;
  const below = box.bottom + 8 + h <= innerHeight || box.top - 8 < h;
  tip.style.left = Math.max(4, Math.min(box.left, innerWidth - w - 20)) + "px";
  tip.style.top = (below ? box.bottom + 8 : box.top - 8 - h) + "px";
}
function rest() {  // no pointer on a token: the chosen one, if its text has the focus
  if (now && document.activeElement === now.span.closest(".text")) show(now.r, now.t, now.span);
  else tip.hidden = true;
}
function choose(r, t, where) {
  const block = data.responses[r].blocks.find(block => t < block.to);
  fill(block);
  now?.span.classList.remove("now");
  now = {r, t, span: block.children[t - block.from]};
  now.span.classList.add("now");
  block.parentNode.focus({preventScroll: true});
  if (where) now.span.scrollIntoView({block: where});
  show(r, t, now.span);
}
function jump() {
  const [, r, t] = /^#r(\d+)t(\d+)$/.exec(location.hash) ?? [];
  if (data.responses[r]?.tokens[t] === undefined) return;
  let frames = 20;  // the blocks around get their true heights as they come near
  const settle = () => { choose(+r, +t, "center"); if (--frames) requestAnimationFrame(settle); };
  settle();
}
const token = e => e.target.closest?.(".block span");
document.addEventListener("pointerover", e => {
  if (e.pointerType !== "mouse") return;
  const span = token(e);
  span ? show(span.parentNode.r, span.t, span) : rest();
});
document.addEventListener("click", e => {
  const span = token(e), link = e.target.closest?.("#top a");
  if (span) choose(span.parentNode.r, span.t);
  else if (link && link.hash === location.hash) jump();
  else if (!link) tip.hidden = true;
});
document.addEventListener("focusin", e => {
  if (!e.target.matches?.(".text:focus-visible")) return;
  const r = +e.target.dataset.r;
  if (now?.r !== r) choose(r, 0, "nearest"); else rest();
});
document.addEventListener("focusout", () => { tip.hidden = true; });
document.addEventListener("keydown", e => {
  if (e.key === "Escape") tip.hidden = true;
  if (!now || !e.target.matches?.(".text") || e.altKey || e.ctrlKey || e.metaKey) return;
  const last = data.responses[now.r].tokens.length - 1;
  const t = {ArrowLeft: now.t - 1, ArrowRight: now.t + 1, Home: 0, End: last}[e.key];
  if (t === undefined) return;
  e.preventDefault();
  choose(now.r, Math.max(0, Math.min(last, t)), "nearest");
});
document.addEventListener("scroll", () => { if (!tip.hidden) rest(); }, {passive: true});
addEventListener("hashchange", jump);

// ---- colours, and the switch between them
const rules = [];
for (let n = 1; n <= 10; n++)
  for (const [mode, name, colour] of [["kl", "k", "kl"], ["ratio", "r", "red"], ["ratio", "b", "blue"]])
    rules.push(`.${mode} .${name}${n}{background-color:rgb(var(--${colour})/${(0.065 * n).toFixed(3)})}`);
document.head.append(make("style", "", rules.join("\n")));
function shade(mode) {
  main.className = mode;
  const steps = [...Array(11).keys()];
  const scale = names => make("b", mode, ...names.map(name => make("i", name)));
  find("#key").replaceChildren(...(mode === "kl"
    ? ["0", scale(steps.map(n => "k" + n)), "3 nats or more"]
    : ["teacher likelier", scale([...steps.slice(1).reverse().map(n => "b" + n), ...steps.map(n => "r" + n)]),
       "teacher less likely, by 3 nats or more"]));
}
document.addEventListener("change", e => { if (e.target.name === "by") shade(e.target.value); });

// ---- the page
const sums = data.summary;
const columns = Object.keys({...sums.right, ...sums.wrong}).filter(name => !name.includes("bucket"));
find("#sums table").append(cells("th", ["y_init", ...columns]));
for (const side of ["right", "wrong"]) find("#sums table").append(cells("td", [side, ...columns.map(name =>
  sums[side][name] === undefined ? "" : String(+sums[side][name].toPrecision(4)))]));
if (data.picture) {
  const img = make("img", "picture");
  img.alt = "share of a response's KL in each twentieth of its tokens, the largest first";
  img.src = "data:image/png;base64," + data.picture;
  find("#sums").append(img);
}
for (const right of [true, false]) {
  const side = right ? "right" : "wrong", section = make("section", "", make("h2", "",
    `${side}: ${data.responses.filter(R => R.right === right).length} of ${sums[side].responses} responses`));
  data.responses.forEach((R, r) => {
    if (R.right !== right) return;
    const mean = nats(R.kl.reduce((a, b) => a + b, 0) / R.kl.length);
    const header = make("header", "", draw(make("h3"), R.id),
      make("div", "soft", `sample ${R.sample}, ${R.tokens.length} tokens, mean KL ${mean}`),
      draw(make("div", "problem"), R.problem));
    if (R.answer !== null) header.append(make("div", "", "gold answer: ", draw(make("b"), R.answer)));
    R.blocks = blocksOf(R, r);
    const text = make("div", "text", ...R.blocks);
    Object.assign(text, {tabIndex: 0, role: "group", ariaLabel: `${side} response to ${R.id}`});
    text.dataset.r = r;
    section.append(make("article", "", header, text));
  });
  main.append(section);
}
find("h2").textContent = `The ${data.top.length} tokens with the largest KL, of these responses`;
for (const [r, t] of data.top) {
  const R = data.responses[r], words = make("span", "words"), link = make("a");
  for (let k = Math.max(0, t - 7); k < Math.min(R.tokens.length, t + 5); k++)
    words.append(k in R.whole ? draw(make(k === t ? "mark" : "span"), R.whole[k])
      : drawn(R.tokens[k], k === t ? "mark" : "span", ""));
  link.href = `#r${r}t${t}`;
  const where = make("span", "soft", ` ${R.right ? "right" : "wrong"}, ${R.id} `);
  link.append(make("b", "", nats(R.kl[t])), where, words);
  find("#top").append(make("li", "", link));
}
shade("kl");
jump();
document.documentElement.dataset.ready = "yes";
</script></body></html>
"""
