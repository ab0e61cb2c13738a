r"""
How a mathematical answer is judged: the inside of a response's last \boxed{} against the gold answer.

Lists, names (`x =`), brackets and units are taken apart here, the rest is read by math-verify's parser. Formulas are
equal if they have one value at three points; what has no value (sets, inequalities) math-verify compares.
"""
import functools
import random
import re
import sys

import math_verify
import sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
from sympy.core.evalf import PrecisionExhausted

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
ANSWER_FIELDS = ("answer", "final_answer", "solution", "output")
# What sympy and the reading raise for what they cannot take. MemoryError is not among them: it ends the worker.
UNREADABLE = (ValueError, TypeError, AttributeError, ArithmeticError, RecursionError, NotImplementedError)
CASED = ConversionConfig(lowercase_symbols=False)
sys.set_int_max_str_digits(20_000)

SPELLINGS = [(re.compile(a), b) for a, b in (  # words and units come into \text{}
    ("−|–", "-"), ("π", r"\\pi "), ("√", r"\\sqrt "), ("∞", r"\\infty "), ("°", r"^\\circ "), ("×", r"\\times "),
    (r"\\geqslant", r"\\ge "), (r"\\leqslant", r"\\le "), (r"∅|\\varnothing|\\emptyset|\\\{ ?\\\}", r"\\text{empty}"),
    (r"\\[()\[\]]|\\(?:left|right|displaystyle|boldsymbol|underline)(?![a-z])", ""), (r"\*\*", "^"), (r"\*", r"\\cdot "),
    (r"\\\$|(?<!\\)\$(?=\s*\d[^$]*$)", r"\\text{dollar}"), (r"\$", ""),  # \$5 and $5 are money, $x$ is not
    (r"(?<=\d)(?:\{,\}|,?\\[,!] ?|\\ |~)(?=\d{3}(?!\d))", ""),  # 10{,}000 10,\!000 10\,000
    (r"(?<![\d.,(\[{])\d{1,3}(?:,\d{3})+(?![\d)\]}]|,\d)", lambda m: m[0].replace(",", "")),  # 10,000, not (10,000)
    (r"(?<!\\)\\(?:[,;:! ]|q?quad(?![a-z]))|[~\s]+", " "), (r"\+ ?\\infty", r"\\infty "), (r"\\[dtc]frac", r"\\frac"),
    (r"(\\(?:frac|binom|sqrt(?: ?\[\w+\])?)) ?(\w|\\pi)", r"\1{\2}"),  # \frac12 \binom 5 2 \sqrt[3] 2
    (r"(\\(?:frac|binom) ?\{(?:[^{}]|\{[^{}]*\})*\}) ?(\w|\\pi)", r"\1{\2}"),  # \frac{1}2
    (r"(?<![\w.])(\d+(?:\.\d+)?)[eE]([+-]?\d+)(?!\w)", r"\1 \\cdot 10^{\2}"),  # 4.5e33
    (r"\^ ?\{? ?\\circ ?\}?|\\degree(?![a-z])", r"\\text{degree}"), (r"\\?%", r"\\text{percent}"),
    (r"(?<=\d)_ ?\{? ?(\d+) ?\}?", r"\\text{base \1}"), (r"'|\^ ?\{?\\prime ?\}?", "_{prime}"),  # 101_2 y'
    (r"\\(?:operatorname\*?|text\w*|math(?:rm|bf|it)|mbox) ?(?=\{)", r"\\text"),
    (r"\\text\{([^A-Za-z{}]*)\}", r"\1"), (r"_ ?\{? ?\\(?:text ?\{)?(\w+)\}? ?\}?", r"_{\1}"),  # \text{5} x_{\text{max}}
    (r"(?<=[\d}]) ?((?:[cmk]m|kg|ft|mph|[a-z]{4,})(?:[ /][a-z]+)*)(?=[.,;\^ ]|$)", r"\\text{\1}"),  # 5 cm, 12 apples
    (r",? ?\\text\{ ?(?:and|or) ?\}|(?<![\\A-Za-z{])(?:and|or)(?![A-Za-z])", ","), (r"^ ?\w ?\\in(?![a-z])", ""),  # x \in [0,1]
    (r"(?<![\\A-Za-z_{])(sin|cos|tan|ln|log|exp|pi)(?![a-z])", r"\\\1 "),
    (r"^ ?(\w) ?= ?([^,=]+), ?(?!\1)(\w) ?= ?([^,=]+)$", lambda m:  # y = 2, x = 1
     "({},{})=({},{})".format(*sorted(m.group(1, 3)), *(m.group(2, 4) if m[1] < m[3] else m.group(4, 2)))),
)]
# x = 3, f(x) = 3, \angle ABC = 3, (x, y) = (3, 4)
NAME = re.compile(r"(\|?(?:\\angle )?(?:\\text\{[^{}]*\}|\\?[A-Za-z]+)(?:_\{\w+ ?\}|_\w)*(?:\([^()]{1,9}\))?\|?|"
                  r"\([A-Za-z](?:, ?[A-Za-z])+\)) ?(?:=|\\approx) ?([^=]+)")
BRACKETS = re.compile(r"([(\[])((?!.*\\c[au]p).*[,;].*)([)\]])")
TEXT = re.compile(r"(?!\W*(?:text)?\W*(?:nan|inf|null)\W*$)(?:[A-Za-z][A-Za-z .'-]{1,80}|\\text\{[^{}]{1,80}\}|\(?[A-J]\)?)")
UNIT = r"(?:[ /]*\\text\{[^{}]*\}(?: ?\^ ?\{?-?\d\}?)?)*"
MEASURED = re.compile(rf"((?:\\text\{{dollar\}})?) ?((?:(?!\\text).)+?)({UNIT})")  # \text{dollar}5, 5\text{ cm}^2
NO_VALUE = re.compile(r"[\d^+*/] ?\{?\\infty|\\infty ?[\^+*/-]|[;\"?@#]|\.\.|:.*:|\d +\.?\d|[^\x00-\x7f]|(?<![\\A-Za-z{])[A-Za-z]{4}")


def gold(row):
    """(gold answer, None) of a row of a data set, whatever its fields are called, or (None, why it has none)."""
    for name in ANSWER_FIELDS:
        value = row.get(name)
        if isinstance(value, (bool, dict)):
            return None, f"field '{name}' is {type(value).__name__}"
        text = ", ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)
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
    if answer is None:
        return "no answer"
    if len(answer) > 10_000:
        return "wrong"
    for pattern, new in SPELLINGS:
        gold, answer = pattern.sub(new, gold), pattern.sub(new, answer)
    try:
        return "right" if same(gold, answer) else "wrong"
    except UNREADABLE:
        return "wrong"


def last_boxed(text):
    """The inside of the last complete \\boxed{...} or \\fbox{...} (braces balanced), or None; one pass, however long."""
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
    if len(golds) != 1 or len(answers) != 1:  # lists and sets, in any order
        for part in golds:
            match = next((a for a in answers if same(part, a)), None)
            if match is None:
                return False
            answers.remove(match)
        return not answers
    gold, answer = golds + answers
    g, a = NAME.fullmatch(gold), NAME.fullmatch(answer)
    if (g and a and g[1] == a[1]) or (g and "=" not in answer) or (a and "=" not in gold):  # else it may be left out
        return same(g[2] if g else gold, a[2] if a else answer)
    g, a = BRACKETS.fullmatch(gold), BRACKETS.fullmatch(answer)
    if g and a:  # tuples and intervals, in order
        golds, answers = split(g[2]), split(a[2])
        return g[1] + g[3] == a[1] + a[3] and len(golds) == len(answers) and all(map(same, golds, answers))
    if TEXT.fullmatch(gold) or TEXT.fullmatch(answer):
        return plain(gold) == plain(answer)
    g, a = MEASURED.fullmatch(gold), MEASURED.fullmatch(answer)
    if ("=" in gold) != ("=" in answer):
        return False
    e, f, units = value(g[2]), value(a[2]), (plain(g[1] + g[3]), plain(a[1] + a[3]))
    if units == ("percent", ""):
        return equal(e, f) or equal(e, 100 * f)
    if units == ("", "percent"):
        return equal(e, f / 100) or bool(e.is_Rational and e > 1 and equal(e, f))
    return (units[0] == units[1] or "" in units) and equal(e, f)


def split(text):
    """The parts of a list or set, at the commas outside all brackets, in \\pm both signs."""
    depth, marked = 0, ""
    for token in re.findall(r"\\.|.", re.sub(r"^\\\{(.*)\\\}$", r"\1", text.strip().rstrip(" .,;"))):
        depth += (token in ("(", "[", "{", r"\{")) - (token in (")", "]", "}", r"\}"))
        marked += "\n" if token in ",;" and not depth else token
    return [p.replace(r"\pm", sign).strip() for p in marked.split("\n") for sign in ("+-" if r"\pm" in p else "+")]


def plain(text):
    """Text or a unit without \\text{}, spaces, plural s and capitals."""
    text = re.sub(r"\\text|[{}()^. ]|(?<=[a-z]{2})s(?![a-z])", "", text)
    return text.lower() if len(text) > 1 else text


@functools.lru_cache(4096)
def value(text):
    """What math-verify's parser reads, decimals as fractions. Raises ValueError where it reads nothing."""
    if re.fullmatch(r"[+-]? ?(?:\d+\.?\d*|\.\d+)", text):
        return sympy.Rational(text.replace(" ", ""))
    if NO_VALUE.search(text):
        raise ValueError(f"no value: {text[:40]}")
    try:
        read = latex2sympy(text, normalization_config=None, conversion_config=CASED)
        read = read.xreplace({x: sympy.Rational(str(x)) for x in read.atoms(sympy.Float)} | {sympy.Symbol("i"): sympy.I})
    except MemoryError:
        raise
    except Exception as e:  # its grammar raises bare Exceptions
        raise ValueError(f"no value: {text[:40]}") from e
    if isinstance(read, sympy.Eq):  # as an expression that is the same for any multiple of it
        zero = read.lhs - read.rhs
        read = zero / zero.xreplace({s: sympy.Symbol(f"{s} elsewhere") for s in zero.free_symbols})
    if read in (sympy.true, sympy.false) or "=" in text and read.free_symbols == set():
        raise ValueError(f"it says nothing: {text[:40]}")
    return read.doit() if isinstance(read, sympy.Expr) and not read.free_symbols else read


def equal(e, f):
    """Whether two values are the same at three points: large for floors, small for x^{200}+1."""
    told = 0
    for scale in (7, -71, 500) if isinstance(e, sympy.Expr) and isinstance(f, sympy.Expr) else ():
        symbols = e.free_symbols | f.free_symbols
        at = {s: sympy.Rational(random.Random(f"{s} {scale}").randint(100, 999), scale) for s in symbols}
        difference = (e - f).subs(at)
        try:
            zero = difference.evalf(2, strict=True) == 0
        except PrecisionExhausted:  # as far as 100 digits can tell
            zero = abs(difference.evalf(2)) < 1e-80
        if zero == False and difference.is_finite: return False
        told += bool(zero)
    return told > 1 or math_verify.verify(e, f, numeric_precision=50, timeout_seconds=None)
