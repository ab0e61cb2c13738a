r"""
How a mathematical answer is judged: the inside of a response's last \boxed{} against the gold answer.

Lists, names (`x =`), brackets and units are taken apart here. What is left goes through math-verify's parser; numbers and
formulas are equal if they have one value at three points, what has no value there is left to math-verify's comparison.
"""
import functools
import logging
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
sys.set_int_max_str_digits(20_000)
logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time-outs are off

SPELLINGS = [(re.compile(a), b) for a, b in (  # of one thing, and the one used here
    ("−|–", "-"), ("π", r"\\pi "), ("√", r"\\sqrt "), ("∞", r"\\infty "), ("°", r"^\\circ "), ("×", r"\\times "),
    ("≥|\\\\geqslant", r"\\ge "), ("≤|\\\\leqslant", r"\\le "), ("€", r"\\text{euro}"), ("£", r"\\text{pound}"),
    (r"½", r"\\frac{1}{2}"), (r"∅|\\varnothing|\\emptyset", r"\\{\\}"), (r"\\langle", "("), (r"\\rangle", ")"),
    (r"\\[()\[\]]|\\(?:left|right|displaystyle|boldsymbol|underline)(?![a-z])", ""),  # \( \left(
    (r"\\\$|(?<!\\)\$(?=\s*\d[^$]*$)", r"\\text{dollar}"), (r"\$", ""),  # \$5 and $5 are money, $x$ is not
    (r"(?<=\d)(?:\{,\}|,?\\[,!] ?|\\ |~)(?=\d{3}(?!\d))", ""),  # 10{,}000 10,\!000 10\,000
    (r"(?<![\d.,(\[{])\d{1,3}(?:,\d{3})+(?![\d)\]}]|,\d)", lambda m: m[0].replace(",", "")),  # 10,000 but not (10,000)
    (r"(?<!\\)\\(?:[,;:! ]|q?quad(?![a-z]))|[~\s]+", " "), (r"\*\*", "^"), (r"\*", r"\\cdot "), (r"\+ ?\\infty", r"\\infty "),
    (r"\\[dtc]frac", r"\\frac"), (r"(?<![\\A-Za-z])sqrt\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"(\\(?:frac|binom|sqrt(?: ?\[\w+\])?)) ?(\w|\\pi)", r"\1{\2}"),  # \frac12 \binom 5 2 \sqrt[3] 2
    (r"(\\(?:frac|binom) ?\{(?:[^{}]|\{[^{}]*\})*\}) ?(\w|\\pi)", r"\1{\2}"),  # \frac{1}2
    (r"(?<![\w.])(\d+(?:\.\d+)?)[eE]([+-]?\d+)(?!\w)", r"\1 \\cdot 10^{\2}"),  # 4.5e33
    (r"(\\(?:sin|cos|tan)) ?(\d+) ?\^ ?\{? ?\\circ ?\}?", r"\1(\2\\pi/180)"),  # \sin 30^\circ
    (r"\^ ?\{? ?\\circ ?\}?|\\degree(?![a-z])", r"\\text{degree}"), (r"\\?%", r"\\text{percent}"),
    (r"(?<=\d)_ ?\{? ?(\d+) ?\}?", r"\\text{base \1}"),  # 101_2
    (r"\\(?:operatorname\*?|text\w*|math(?:rm|bf|it)|mbox) ?(?=\{)", r"\\text"),
    (r"\\text\{([^A-Za-z{}]*)\}", r"\1"), (r"_ ?\{? ?\\(?:text ?\{)?(\w+)\}? ?\}?", r"_{\1}"),  # \text{5} x_{\text{max}}
    (r"(?<=[\d}]) ?((?:[cmk]m|kg|ft|mph|[a-z]{4,})(?:[ /][a-z]+)*)(?=[.,;\^ ]|$)", r"\\text{\1}"),  # 5 cm, 12 apples
    (r"\\text\{ ?(?:and|or) ?\}|(?<![\\A-Za-z{])(?:and|or)(?![A-Za-z])", ","), (r"^ ?\w ?\\in(?![a-z])", ""),  # x \in [0,1]
    (r"(?<![\\A-Za-z_{])(sin|cos|tan|ln|log|exp|pi)(?![a-z])", r"\\\1 "), (r"'|\^ ?\{?\\prime ?\}?", "_{prime}"),
    (r"(?<![\\A-Za-z])([eE])_\{?(\w+)\}?", r"X_{\1\2}"), (r"\\gamma(?![a-z])", " X_{gamma} "),  # not the numbers e, gamma
)]
# x = 3, f(x) = 3, \angle ABC = 3, (x, y) = (3, 4)
NAME = re.compile(r"(\|?(?:\\angle )?(?:\\text\{[^{}]*\}|\\?[A-Za-z]+)(?:_\{\w+ ?\}|_\w)*(?:\([^()]{1,9}\))?\|?|"
                  r"\([A-Za-z](?:, ?[A-Za-z])+\)) ?(?:=|\\approx) ?([^=]+)")
POINT = re.compile(r"\(([^()]*)\) ?= ?\((.*)\)")
BRACKETS = re.compile(r"([(\[])((?:[^()\[\]]|\([^()]*\)|\[[^\[\]]*\])*[,;](?:[^()\[\]]|\([^()]*\)|\[[^\[\]]*\])*)([)\]])")
CHOICE = re.compile(r"(?:\\text\{)?[( ]*([A-J])[). ]*\}?")
# \text{dollar}5, 5\text{ cm}^2
MEASURED = re.compile(r"((?:\\text\{(?:dollar|euro|pound)\})?) ?((?:(?!\\text)[^A-Za-z]|\\(?!text)[a-z]+|[A-Za-z](?![A-Za-z]{3}))+?)"
                      r"((?:[ /]*\\text\{[^{}]*\}(?: ?\^ ?\{?-?\d\}?)?)*)")
WORTHLESS = re.compile(r"[\d^+*/] ?\{?\\infty|\\infty ?[\^+*/-]|[;\"?@#]|\.\.|\d +\.?\d|[^\x00-\x7f]")


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
        return (text.strip(), None) if is_right(text, text) else (None, "gold cannot be parsed")
    return None, "no answer"


def judge(gold, response, limits):
    """'right', 'wrong', or 'no answer' where no box is complete."""
    answer = last_boxed(response)
    if answer is None:
        return "no answer"
    return "right" if len(answer) <= 10_000 and is_right(gold, answer) else "wrong"


def last_boxed(text):
    """The inside of the last complete \\boxed{...} or \\fbox{...} (braces balanced), or None; one pass, however long."""
    opened, last = [], None  # opened: where the inside of each open brace starts, and whether it is that of a box
    for token in re.finditer(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", text, re.DOTALL):
        if token[0] == "}":
            start, is_box = opened.pop() if opened else (0, False)
            if is_box and (last is None or start > last[0]):
                last = start, token.start()
        elif token[0][-1] == "{" and token[0] != r"\{":
            opened.append((token.end(), len(token[0]) > 1))
    return text[last[0]: last[1]].strip() if last else None


@functools.lru_cache(4096)
def is_right(gold, answer):
    """Whether an answer is right to a gold one; what cannot be read is not, not even to itself."""
    try:
        return same(*(tidy(text) for text in (gold, answer)))
    except UNREADABLE:
        return False


def tidy(text):
    """One spelling of an answer's LaTeX: words and units in \\text{}, no $, commas between answers only."""
    for pattern, new in SPELLINGS:
        text = pattern.sub(new, text)
    return text.strip().rstrip(".;, ")


def same(gold, answer):
    """Whether a tidied answer is right to a gold one. Raises one of UNREADABLE where they cannot be read."""
    gold, answer = spread(gold, answer), spread(answer, gold)
    golds, answers = split(gold), split(answer)
    if len(golds) != 1 or len(answers) != 1:  # lists and sets in any order; of x = 2, y = 3 no name may be left out
        names = [{m[1] for m in map(NAME.fullmatch, parts) if m} for parts in (golds, answers)]
        for part in golds:
            match = next((a for a in answers if same(part, a)), None)
            if match is None:
                return False
            answers.remove(match)
        return not answers and (len(names[0]) < 2 or names[0] == names[1])
    gold, answer = golds + answers
    g, a = NAME.fullmatch(gold), NAME.fullmatch(answer)
    if (g and a and g[1] == a[1]) or (g and "=" not in answer) or (a and "=" not in gold):  # else it may be left out
        return same(g[2] if g else gold, a[2] if a else answer)
    g, a = BRACKETS.fullmatch(gold), BRACKETS.fullmatch(answer)
    if g or a:  # tuples and intervals, in order
        parts = [split(m[2]) for m in (g, a) if m]
        return bool(g and a) and g[1] + g[3] == a[1] + a[3] and len(set(map(len, parts))) == 1 and all(map(same, *parts))
    if ":" in gold and ":" in answer:  # a ratio
        return len(gold.split(":")) == len(answer.split(":")) and all(map(same, gold.split(":"), answer.split(":")))
    if choice := CHOICE.fullmatch(gold):
        found = CHOICE.fullmatch(answer.upper() if len(answer) < 4 else answer)
        return bool(found) and choice[1] == found[1]
    g, a = MEASURED.fullmatch(gold), MEASURED.fullmatch(answer)
    if not g or not a:
        return flat(gold) == flat(answer)
    e, f, units = value(g[2]), value(a[2]), (unit(g[1] + g[3]), unit(a[1] + a[3]))
    if units == ("percent", ""):
        return equal(e, f) or equal(e, 100 * f)
    if units == ("", "percent"):
        return equal(e, f / 100) or bool(e.is_Rational and e > 1 and equal(e, f))
    return (units[0] == units[1] or "" in units) and equal(e, f)


def spread(point, other):
    """'(x, y) = (1, 2)' as 'x=1,y=2' if the other answer is written like that."""
    m = POINT.fullmatch(point)
    return ",".join(map("=".join, zip(split(m[1]), split(m[2])))) if m and len(split(other)) > 1 else point


def split(text):
    """The parts of a list or set, in \\pm both signs. Raises ValueError if its brackets do not match."""
    parts, depth = [""], 0
    for token in re.findall(r"\\.|.", re.sub(r"^\\\{(.*)\\\}$", r"\1", text)):
        depth += (token in ("(", "[", "{", r"\{")) - (token in (")", "]", "}", r"\}"))
        if depth < 0:
            raise ValueError(f"its brackets do not match: {text[:40]}")
        if token in ",;" and not depth:
            parts.append("")
        else:
            parts[-1] += token
    if depth: raise ValueError
    return [p.replace(r"\pm", sign).strip() for p in parts if p.strip() for sign in ("+-" if r"\pm" in p else " ")]


def flat(text):
    """Text without \\text{}, article, spaces (but for those between digits) and capitals of words. ValueError if it is none."""
    text = re.sub(r"\\text\{([^{}]*)\}", lambda m: m[1].strip(" ."), text)
    text = re.sub(r"[A-Za-z]{3,}|[A-Z][a-z]", lambda m: m[0].lower(), text)
    text = re.sub(r"(?<!\d) +| +(?!\d)", "", re.sub(r"^(the|an?) (?=[a-z]{3})", "", text))
    if re.search(r"[\\^=]|^\W*$", text) or len(text) > 80 or text in ("nan", "inf", "null", "undefined"):
        raise ValueError(f"neither mathematics nor text: {text[:40]}")
    return text


def unit(text):
    """'\\text{ Hours}' -> 'hour'"""
    text = re.sub(r"(?<=[a-z]{2})s(?![a-z])", "", text.replace("\\text", "").lower())
    return "".join(re.findall(r"[a-z/]+|-?\d", text))


@functools.lru_cache(4096)
def value(text):
    """What math-verify's parser reads in tidied LaTeX, decimals as fractions. Raises ValueError where it reads nothing."""
    if re.fullmatch(r"[+-]? ?(?:\d+\.?\d*|\.\d+)", text):
        return sympy.Rational(text.replace(" ", ""))
    if text in (r"\infty", r"-\infty"):
        return sympy.oo if text[0] == "\\" else -sympy.oo
    if WORTHLESS.search(text):
        raise ValueError(f"no value: {text[:40]}")
    try:
        read = latex2sympy(text, None, None, normalization_config=None, conversion_config=ConversionConfig(lowercase_symbols=False))
    except MemoryError:
        raise
    except Exception as e:  # its grammar raises bare Exceptions
        raise ValueError(f"no value: {text[:40]}") from e
    if isinstance(read, sympy.logic.boolalg.BooleanAtom):  # 1 < 2
        raise ValueError(f"no value: {text[:40]}")
    read = read.xreplace({x: sympy.Rational(str(x)) for x in read.atoms(sympy.Float)})
    read = read.xreplace({x: sympy.Symbol(str(x)) for x in read.atoms(sympy.core.function.AppliedUndef)})
    read = read.xreplace({x: sympy.I for x in read.free_symbols if str(x) == "i"})
    return read if read.free_symbols or not isinstance(read, sympy.Expr) else read.doit()


def equal(e, f):
    """Whether two values are equal; equations and inequalities may be multiplied by a constant."""
    if isinstance(e, sympy.core.relational.Relational) and isinstance(f, sympy.core.relational.Relational):
        e, f = (r.reversed if isinstance(r, (sympy.Lt, sympy.Le)) else r for r in (e, f))
        kind, e, f = type(e) is type(f), e.lhs - e.rhs, f.lhs - f.rhs
        if not kind or not e.free_symbols or agree(e, 0) is not False or agree(f, 0) is not False:
            return False
        return agree(e * at(f, 13), f * at(e, 13)) is True
    if isinstance(e, sympy.core.relational.Relational) or isinstance(f, sympy.core.relational.Relational):
        return False
    found = agree(e, f) if isinstance(e, sympy.Expr) and isinstance(f, sympy.Expr) else None
    return math_verify.verify(e, f, numeric_precision=50, timeout_seconds=None) if found is None else found


def at(expression, scale):
    """Its value at a point, always the same one for the same names and scale."""
    numbers = {s: random.Random(f"{s} {scale}").randint(100, 999) for s in sympy.sympify(expression).free_symbols}
    return sympy.sympify(expression).subs({s: sympy.Rational(number, scale) for s, number in numbers.items()})


def agree(e, f):
    """Whether two expressions have one value at three points (large for floors, small for x^{200}+1), None if they have none."""
    if getattr(e, 'is_Rational', False) and f.is_Rational: return e == f
    told = 0
    for scale in (7, -71, 500):
        difference = at(e - f, scale)
        try:
            number = difference.evalf(2, strict=True)
        except PrecisionExhausted:  # zero, as far as 100 digits can tell
            number = sympy.S.Zero if abs(difference.evalf(2)) < 1e-40 else sympy.nan
        if number.is_finite and number != 0:
            return False
        told += number == 0
    return True if told > 1 else None
