r"""
How a mathematical answer is judged: the inside of a response's last \boxed{} against the gold answer. Lists,
names (`x =`), brackets and units are taken apart; math-verify reads the rest, and compares what has no value.
"""
import random
import re
import sys
import math_verify
import sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig as Config, latex2sympy

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
UNREADABLE = (ValueError, TypeError, AttributeError, ArithmeticError, RecursionError, NotImplementedError)
sys.set_int_max_str_digits(20_000)

SPELLINGS = [(re.compile(a), b) for a, b in (  # in this order; words and units come into \text{}
    ("−", "-"), ("π", r"\\pi "), ("√", r"\\sqrt "), ("∞", r"\\infty "), ("×", r"\\times "),
    (r"\\[()\[\]]|\\(?:left|right|displaystyle|boldsymbol|underline)(?![a-z])", ""),  # \( \left(
    (r"(?<![\w^_.}])(\d+) ?(?=\()|(?<=\)) ?(?=\()", r"\1 \\cdot "),  # 3(4): to the parser a mixed number
    (r"(\\[dt]?binom ?\{[^{}]*\} ?\{[^{}]*\}) ?(?=[\d(]|\\[dt]?binom)", r"\1 \\cdot "),
    (r"\\\$|(?<!\\)\$(?=\s*\d[^$]*$)", r"\\text{dollar}"), (r"\$", ""),  # \$5 and $5 are money, $x$ is not
    (r"(?<=\d)(?:\{,\}|,?\\[,!] ?|\\ |~)(?=\d{3}(?!\d))", ""),  # 10{,}000 10,\!000 10\,000
    (r"(?<![\d.,(\[{])\d{1,3}(?:,\d{3})+(?![\d)\]}]|,\d)", lambda m: m[0].replace(",", "")),  # not (10,000)
    (r"(?<!\\)\\(?:[,;:! ]|q?quad(?![a-z]))|[~\s]+", " "), (r"\+ ?\\infty", r"\\infty "),  # 2\,x +\infty
    (r"(\\(?:[dt]?frac|binom|log_|sqrt(?: ?\[\w+\])?)) ?(\w|\\pi)", r"\1{\2}"),  # \frac12 \log_2 3 \sqrt[3] 2
    (r"(\\(?:[dt]?frac|binom) ?\{(?:[^{}]|\{[^{}]*\})*\}) ?(\w|\\pi)", r"\1{\2}"),  # \frac{1}2
    (r"(?<![\w.])(\d+(?:\.\d+)?)[eE]([+-]?\d+)(?!\w)", r"\1 \\cdot 10^{\2}"),  # 4.5e33
    (r"(?<![\d.])(\d*)\.(\d+)(?![\d.])", lambda m: rf"\frac{{{m[1]}{m[2]}}}{{1{'0' * len(m[2])}}}"),  # 0.5
    (r"°|\^ ?\{? ?\\circ ?\}?|\\degree(?![a-z])", r"\\text{degree}"), (r"\\?%", r"\\text{percent}"),
    (r"(?<=\d)_ ?\{? ?(\d+) ?\}?", r"\\text{base \1}"), (r"'|\^ ?\{?\\prime ?\}?", "_{prime}"),  # 101_2 y'
    (r"\\(?:operatorname\*?|text\w*|math(?:rm|bf|it)|mbox) ?(?=\{)", r"\\text"),
    (r"\\text\{([^A-Za-z{}(]+)", r"\1\\text{"), (r"\\text\{ *\}", ""), (r"\\([gG])amma(?![a-z])", r" X_\1 "),
    (r",? *(?:\\text\{ *for (?:all|any|every)\b|\\forall).*$", ""),  # 2x \text{ for all } x
    (r"_ ?\{? ?\\(?:text ?\{)?(\w+)\}? ?\}?", r"_{\1}"), (r"^ ?\w ?\\in(?![a-z])|^ *=", ""),  # x_{\max} x \in
    (r"∅|\\varnothing|\\emptyset|\\\{ ?\\\}", r"\\text{empty}"), (r"^ *\\text\{[( ]*(\w)[). ]*\}$", r"\1"),
    (r"(?<![A-Za-z\\_])(?<![_t]\{)I(?![A-Za-z])", " X_I "),  # to the parser imaginary
    (r"(?<=[\d}]) ?((?:[cmk]m|kg|ft|mph|[a-z]{4,})(?:[ /][a-z]+)*)(?=[.,;\^ ]|$)", r"\\text{\1}"),  # 5 cm
    (r",? *\\text\{ ?(?:and|or) ?\}|(?<![\\A-Za-z{])(?:and|or)(?![A-Za-z])", ","),  # 2 or 3
    (r"(^|,) *([A-Za-z][A-Za-z .'-]{0,79}[A-Za-z])(?=[ .]*(?:,|$))", r"\1\\text{\2}"),  # yes
    (r"^[^():]+:[^()]+$", lambda m: f"({m[0].replace(':', ',')})"))]  # 3:4
by_name = lambda m: "({},{})=({},{})".format(
    *sorted(m.group(1, 3)), *(m.group(2, 4) if m[1] < m[3] else m.group(4, 2)))
PAIR = re.compile(r"^ ?(\w) ?= ?([^,=]+), ?(?!\1)(\w) ?= ?([^,=]+)$")  # y = 2, x = 1 against (1, 2)
NAME = re.compile(r"(\|?(?:\\angle )?(?:\\text\{[^{}]*\}|\\?[A-Za-z]+)(?:_\{\w+ ?\}|_\w)*(?:\([^()]{1,9}\))?"
                  r"\|?|\([A-Za-z](?:, ?[A-Za-z])+\)) ?(?:=|\\approx) ?([^=]+)")  # x_1 = f(x) = (x, y) =
BRACKETS = re.compile(r"([(\[])((?!.*\\c[au]p).*[,;].*)([)\]])")  # of a tuple or interval
# what the parser would take for another value: arithmetic with infinity, a ratio, two numbers, a bare word
NO_VALUE = r"[\d^+*/] ?\{?\\infty|\\infty ?[\^+*/-]|[;:\"?#.]|\d +\d|[^\x00-\x7f]|(?<![\\A-Za-z{])[A-Za-z]{4}"
# (a dollar sign) (a value) (its units); the value is empty where there is none
MEASURED = re.compile(rf"((?:\\text\{{dollar\}})?)((?:(?!\\text|{NO_VALUE}).)*?)"
                      r"((?:[ /]*\\text\{[^{}]*\}(?:\^\{?-?\d\}?)?)*)")

def gold(row):
    """(gold answer, None) of a row, whatever its fields are called, or (None, why there is none)."""
    for name in ("answer", "final_answer", "solution", "output"):
        value = row.get(name)
        parts = [part for part in (value if isinstance(value, list) else [value]) if part is not None]
        text = ", ".join(map(str, parts))
        if isinstance(value, (bool, dict, bytes)):
            return None, f"field '{name}' is {type(value).__name__}"
        if not text.strip():
            continue
        if "####" in text:  # GSM8K
            text = text.rsplit("####", 1)[1]
        elif last_boxed(text) is not None:
            text = last_boxed(text)
        elif name == "solution" or "\n" in text.strip():
            return None, f"no final answer in '{name}'"
        readable = judge(text, f"\\boxed{{{text}}}", None) == "right"
        return (text.strip(), None) if readable else (None, "gold cannot be parsed")
    return None, "no answer"

def judge(gold, response, limits):
    """'right', 'wrong' (also where either cannot be read), or 'no answer' where no box is complete."""
    answer = last_boxed(response)
    if answer is None or len(answer) > 10_000:
        return "wrong" if answer else "no answer"
    for pattern, new in SPELLINGS:
        gold, answer = pattern.sub(new, gold), pattern.sub(new, answer)
    gold, answer = (PAIR.sub(by_name, a) if b.lstrip()[:1] == "(" else a
                    for a, b in ((gold, answer), (answer, gold)))
    try:
        return "right" if same(gold, answer) else "wrong"
    except UNREADABLE:  # not MemoryError: it ends the worker
        return "wrong"

def last_boxed(text):
    """The inside of the last complete \\boxed{} or \\fbox{}, or None; one pass, however long the text."""
    opened, last = [], ()  # opened: where the inside of each open box starts, None for other braces
    for token in re.finditer(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", text, re.DOTALL):
        if token[0] == "}":
            start = opened.pop() if opened else None
            last = max(last, (start, token.start())) if start else last
        elif token[0][-1] == "{" and token[0] != r"\{":
            opened.append(token.end() if len(token[0]) > 1 else None)
    return text[slice(*last)].strip() if last else None

def same(gold, answer):
    """Whether a tidied answer is right to a gold one. Raises one of UNREADABLE where they cannot be read."""
    golds, answers = split(gold), split(answer)
    if len(golds) != 1 or len(answers) != 1:  # lists and sets; of x = 2, y = 3 no name may be missing
        names = [{m[1] for m in map(NAME.fullmatch, parts) if m} for parts in (golds, answers)]
        for part in golds:
            answers.remove(next((a for a in answers if same(part, a)), None))  # ValueError if there is none
        return not answers and (len(names[0]) < 2 or names[0] == names[1])
    gold, answer = golds + answers
    g, a = NAME.fullmatch(gold), NAME.fullmatch(answer)
    if (g and a and g[1] == a[1]) or (g and "=" not in answer) or (a and "=" not in gold):
        return same(g[2] if g else gold, a[2] if a else answer)
    g, a = BRACKETS.fullmatch(gold), BRACKETS.fullmatch(answer)
    if g and a:
        golds, answers = split(g[2]), split(a[2])
        return g[1] + g[3] == a[1] + a[3] and len(golds) == len(answers) and all(map(same, golds, answers))
    g, a = MEASURED.fullmatch(gold), MEASURED.fullmatch(answer)
    unit, other = (re.sub(r"\\text|[{}^. ]|(?<=[a-z]{2})s\b", "", (m[1] + m[3]).lower()) for m in (g, a))
    if not g[2] or not a[2]:  # text
        return unit == other and unit not in ("", "nan", "inf", "null") and g[2] == a[2]
    if unit != other and re.search(r"text\{(?!base)[^{}]*(?<![a-z^{-])\d", g[3] + a[3]):  # 5 \text{ or 6}
        return False
    e, f = value(g[2]), value(a[2])
    if e.free_symbols != f.free_symbols or ("=" in gold) != ("=" in answer) or len({unit, other, ""}) > 2:
        return False
    if unit != other and "percent" in (unit, other):  # 50 % is 0.5, and 50
        return equal(e, 100 * f if unit else f / 100) or (bool(e > 1) and equal(e, f))
    return equal(e, f)

def split(text):
    """The parts of a list or set, at the commas outside all brackets, in \\pm both signs."""
    depth, marked = 0, ""
    for token in re.findall(r"\\.|.", re.sub(r"^\\\{(.*)\\\}$", r"\1", text.strip().rstrip(" .,;"))):
        depth += (token in ("(", "[", "{", r"\{")) - (token in (")", "]", "}", r"\}"))
        marked += "\n" if token in ",;" and not depth else token
    return [p.replace(r"\pm", sign).strip() for p in marked.split("\n") for sign in "+-"[:1 + (r"\pm" in p)]]

@sympy.cacheit
def value(text):
    """What math-verify's parser reads in one value or equation. Raises ValueError where it reads nothing."""
    try:
        read = sympy.Integer(text) if text.isdecimal() else latex2sympy(
            text, normalization_config=None, conversion_config=Config(lowercase_symbols=False))
    except Exception as e:  # its grammar raises bare Exceptions
        raise (e if isinstance(e, MemoryError) else ValueError(f"no value: {text[:40]}")) from e
    functions = read.atoms(sympy.core.function.AppliedUndef, sympy.Derivative)  # f(x), dy/dx
    functions = {f: sympy.Symbol(str(f)) for f in functions}
    read = read.xreplace(functions | {sympy.Symbol("i"): sympy.I})
    if isinstance(read, sympy.Eq):  # as what is the same for any multiple of it, and nan if it is always true
        zero = read.lhs - read.rhs
        read = zero / zero.xreplace({s: sympy.Symbol(f"{s} elsewhere") for s in zero.free_symbols})
    return read.doit() if isinstance(read, sympy.Expr) and not read.free_symbols else read

def equal(e, f):
    """Whether two values agree at three points: large, negative, small for x^{200}+1; floors at 40 whole."""
    told, both = 0, isinstance(e, sympy.Expr) and isinstance(f, sympy.Expr)
    whole = both and (e - f).has(sympy.floor, sympy.ceiling)
    for size in range(40) if whole else (7, -71, 500) if both else ():
        at = {s: random.Random(f"{s} {size}").randint(1, 40) if whole else
              sympy.Rational(random.Random(f"{s} {size}").randint(100, 999), size) for s in e.free_symbols}
        try:
            difference = (e - f).subs(at).evalf(2, strict=True)
        except sympy.core.evalf.PrecisionExhausted:  # zero, as far as 100 digits can tell
            difference = sympy.S.Zero if abs((e - f).subs(at).evalf(2)) < 1e-80 else sympy.nan
        if difference.is_finite and difference != 0:
            return False
        told += difference == 0
    return told > 1 or math_verify.verify(e, f, numeric_precision=50, timeout_seconds=None)
