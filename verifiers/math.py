"""
The verdict on a mathematical answer: the last \\boxed{} of a response against the gold answer.
"""
import functools
import random
import re
import sys
from typing import NamedTuple

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
ANSWER_FIELDS = ("answer", "final_answer", "solution", "output")


def gold(row):
    """(gold answer, None) or (None, why it cannot be used) of a row of a data set."""
    answer, why = gold_answer(row)
    if answer is not None and gold_kind(answer) == "bad":
        return None, "gold cannot be parsed"
    return answer, why


def judge(gold, response, limits):
    """'right', 'wrong' or 'no answer'."""
    answer = last_boxed(response)
    if answer is None:
        return "no answer"
    return "wrong" if len(answer) > 10_000 else right_answer(gold, answer)  # nobody's final answer is that long


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


def gold_answer(row):
    """(gold answer, None) or (None, why there is none) of a row of a data set, whatever its fields are called."""
    for name in ANSWER_FIELDS:
        value = row.get(name)
        if isinstance(value, list):
            value = ", ".join(str(v) for v in value)
        if isinstance(value, (bool, dict)):
            return None, f"field '{name}' is {type(value).__name__}"
        if value is None or not str(value).strip():
            continue
        text = str(value)
        if "####" in text:  # GSM8K
            text = text.rsplit("####", 1)[1]
        elif last_boxed(text) is not None:
            text = last_boxed(text)
        elif name == "solution" or "\n" in text.strip():
            return None, f"no final answer in '{name}'"
        return text.strip(), None
    return None, "no answer"


# -------------------------------------------------------------------------------------------------- math answers
# An answer is tidied, read as a tree of Parts (a tuple of values, a set of tuples, text, ...), and compared part by part.
# Values are read by latex2sympy, the parser of math-verify; two are equal if they agree to 40 digits, at several points
# where there are variables. math-verify's own comparison is not used: it rounds to six decimals (1e-9 = 2e-9), takes any
# equation for any value, and reads words as products of letters, so that anagrams are equal.


class Part(NamedTuple):
    kind: str  # value, text, choice, equation; list, set, union (in any order); tuple, interval, matrix, row (in this one)
    parts: tuple  # of Part; for the first four kinds (expression,), (words,), (letter,), (expression that is zero,)
    mark: str = ""  # the unit of a value, the brackets of a tuple or interval
    name: str = ""  # x of `x = 3` and `x \in [3, 4]`


UNICODE = str.maketrans(dict(zip("−–×·÷π∞≤≥≠∪∩∈±°²³½¼¾，（）：θ√≈∅€£", (
    r"-|-|\times |\cdot |/|\pi |\infty |\le |\ge |\ne |\cup |\cap |\in |\pm |^\circ |^2|^3|\frac{1}{2}|\frac{1}{4}|"
    r"\frac{3}{4}|,|(|)|:|\theta |\sqrt |\approx |\{\}|⟦euro⟧|⟦pound⟧").split("|"))))
# Words, units, currency and percent stand in ⟦⟧ after this.
SPELLINGS = [(re.compile(a), b) for a, b in (
    (r"\\[()\[\]]|\\(?:left|right|[bB]igg?[lr]?|displaystyle|boldsymbol|underline)(?![A-Za-z])", ""),  # \left( \) \big|
    (r"\\\$|(?<!\\)\$(?=\s*\d[^$]*$)", "⟦dollar⟧"), (r"\$", ""),  # \$5 and $5 are money, $x$ is not
    (r"(?<=\d)(?:\{,\}|,\\!|\\[,! ]|~)(?=\d{3}(?!\d))", ""),  # 10{,}000 10,\!000 10\,000
    (r"(?<!\\)\\(?:[,;:! ]|q?quad(?![a-z]))|[~\s]+|\\\\(?=\s*$)", " "),  # \, \quad ~
    (r"\\[dtc]frac(?![a-z])", r"\\frac"), (r"\\lbrace(?![a-z])", r"\\{"), (r"\\rbrace(?![a-z])", r"\\}"),
    (r"\\langle(?![a-z])", "("), (r"\\rangle(?![a-z])", ")"), (r"\\approx(?![a-z])", "="),
    (r"\\(?:varnothing|emptyset)(?![a-z])", r"\\{\\}"), (r"\{([^{}]*)\\choose([^{}]*)\}", r"\\binom{\1}{\2}"),
    (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"), (r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{"),  # \frac12 \frac1{2}
    (r"(\\frac\s*\{[^{}]*\})\s*(\d)", r"\1{\2}"), (r"\\sqrt\s*(\w)", r"\\sqrt{\1}"),  # \frac{1}2 \sqrt2
    (r"(?<![\\A-Za-z])sqrt\(([^()]*)\)", r"\\sqrt{\1}"), (r"\+\s*\\infty", r"\\infty "),  # sqrt(2) +\infty
    (r"\*\*", "^"), (r"\*", r"\\cdot "), (r"\\?%", "⟦percent⟧"),
    (r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![a-z])", "⟦degree⟧"),  # 30^\circ 30^{\circ}
    (r"(\\(?:sin|cos|tan)\W*)(\d+)\s*⟦degree⟧", r"\1(\2\\pi/180)"),  # \sin 30^\circ
    (r"(?<=\d)_\s*\{?\s*(\d+)\s*\}?", r"⟦base \1⟧"), (r"\\operatorname\*?\s*\{(\w+)\}", r"\1"),  # 101_2 101_{2}
)]
TEXT = re.compile(r"\\(text\w*|math\w+|mbox)\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
WORD = re.compile(r"(?<![\\A-Za-z⟦])(?<!\\begin\{)(?<!\\end\{)[A-Za-z]{2,}(?![^⟦]*⟧)")
FUNCTIONS = set("sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp max min gcd pi theta infty".split())
UNITS = {name: names.split()[0] for names in (
    "cm centimeter centimetre|mm millimeter millimetre|m meter metre|km kilometer kilometre|g gram|kg kilogram|mg milligram|"
    "s sec second|min minute|h hr hour|day|ft foot feet|in inch inches|mi mile|yd yard|l liter litre|ml milliliter|"
    "dollar usd|euro eur|pound gbp lb|cent|degree deg|percent pct|rad radian|unit|mph").split("|") for name in names.split()}
# What may stand on the left of `x = 3`: x, AB, f(x), x_1, |AB|, \angle ABC, words, (x, y).
NAME = re.compile(r"\|?(?:\\(?:angle|overline|vec|triangle) *)*\{?"
                  r"(?:[A-Za-z]|[A-Z]{2,3}|⟦[^⟧]*⟧( ?⟦[^⟧]*⟧)*|\\(?!pi)[A-Za-z]{2,7}) *\}?"
                  r"(?:_\{?\\?\w+ *\}?|')*(?:\^\{-1\})?(?:\([^()]{1,12}\))?\|?|\([A-Za-z](?:_\w)?(?:, ?[A-Za-z](?:_\w)?)+\)")
# What latex2sympy reads otherwise: mixed numbers, powers of ten, endless decimals; and x_{\max}, E_1, \gamma, x'.
QUIRKS = [(re.compile(a), b) for a, b in (
    (r"(?<=\d),(?=\d{3}(?!\d))", ""),  # (1,000)
    (r"^(-?)(\d+) ?(?:\\frac\{(\d+)\}\{(\d+)\}|(?<= )(\d+)/(\d+))$",
     lambda m: rf"{m[1]}\frac{{{int(m[2]) * int(m[4] or m[6]) + int(m[3] or m[5])}}}{{{m[4] or m[6]}}}"),
    (r"(?<![\w\\.])(\d+(?:\.\d+)?)[eE]([+-]?\d+)(?!\w)", r"\1 \\cdot 10^{\2}"),
    (r"(\d*\.(\d*))\\overline ?\{?(\d+)\}?",
     lambda m: rf"({m[1]}0+\frac{{{m[3]}}}{{{10 ** len(m[3]) - 1}\cdot 10^{{{len(m[2])}}}}})"),
    (r"_\{ ?\\(\w+) ?\}", r"_{\1}"), (r"(?<![\\A-Za-z])([eE])_\{?(\w+)\}?", r"X_{\1\2}"),
    (r"\\gamma(?![a-z])", r" X_{gamma} "), (r"([A-Za-z])(?:\^ ?\{?\\prime ?\}?|')", r"\1_{prime}"),
)]


def tidy(answer):
    """One spelling of an answer's LaTeX."""
    answer = answer.translate(UNICODE)
    for pattern, new in SPELLINGS:
        answer = pattern.sub(new, answer)
    while TEXT.search(answer):
        answer = TEXT.sub(marked_words, answer)
    answer = re.sub(r"_\s*\{?\s*⟦(\w+)⟧\s*\}?", r"_{\1}", answer)  # x_{\text{max}}
    return re.sub(r"\s+", " ", WORD.sub(bare_word, answer))


def marked_words(match):
    """The inside of \\text{} and the like, its words in ⟦⟧; a letter in bold or in italics is a variable."""
    if re.fullmatch(r"[A-Za-z]" if match[1] not in ("text", "mathrm") else "[dei]", match[2].strip()):
        return match[2]
    return re.sub(r"(?<!⟦)\b[A-Za-z][A-Za-z']*(?![^⟦]*⟧)", r"⟦\g<0>⟧", match[2])


def bare_word(match):
    """A run of letters outside \\text{}: a function, a product of two or three variables in a formula, or a word."""
    word, before, after = match[0], match.string[:match.start()].rstrip()[-1:], match.string[match.end():].lstrip()[:1]
    if word in FUNCTIONS:
        return word if before in tuple("_{") else f"\\{word} "  # x_{max}
    in_formula = re.fullmatch(r"[\d^_{}/+=|-]", before) or re.fullmatch(r"[\d^_}/+=|(\\-]", after)
    return word if in_formula and len(word) < 4 and word not in UNITS else f"⟦{word}⟧"


def split(text, separator):
    """[piece, separator, piece, ...] of text at the separators outside all brackets; [] if its brackets do not match."""
    pieces, depth, at = [], 0, 0
    for m in re.finditer(rf"(\\begin|\\\{{|[(\[{{])|(\\end|\\\}}|[)\]}}])|{separator}", text):
        depth += bool(m[1]) - bool(m[2])
        if depth < 0:
            return []
        if depth == 0 and not m[2]:
            pieces += [text[at: m.start()].strip(), m[0]]
            at = m.end()
    return [] if depth else [*pieces, text[at:].strip()]


def read(text):
    """The Part of a tidied answer. Raises ValueError where there is none."""
    text = text.strip().rstrip(".;, ")
    if m := re.fullmatch(r"\(? ?([A-J]) ?[).:]?", text.replace("⟦", "").replace("⟧", "").strip()):
        return Part("choice", (m[1],))
    if text[:1] not in ("(", "[") and text[:2] != r"\{":  # 10,000 and 1, 10,000 but not (10,000)
        text = re.sub(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d|,\d)", lambda m: m[0].replace(",", ""), text)
    pieces = split(text, r"[,;]|⟦and⟧|⟦or⟧")[::2]
    if len(pieces) > 1:
        return Part("list", tuple(map(read, filter(None, pieces))))
    if m := re.fullmatch(r"\\begin\{([pbB]matrix|array)\}(?:\{[lcr| ]*\})?(.*)\\end\{\1\}", text):
        rows = [row.split("&") for row in re.split(r"\\\\(?:\[[^\]]*\])?", m[2]) if row.strip()]
        return Part("matrix", tuple(Part("row", tuple(map(read, row))) for row in rows))
    pieces = split(text, r"=|\\in(?![a-z])")
    if len(pieces) == 3 and NAME.fullmatch(pieces[0]):
        return read(pieces[2])._replace(name=pieces[0].replace(" ", ""))
    if len(pieces) == 3 and pieces[1] == "=":
        return Part("equation", (expression(pieces[0]) - expression(pieces[2]),))
    pieces = split(text, r"\\cup(?![a-z])")[::2]
    if len(pieces) > 1:
        return Part("union", tuple(map(read, pieces)))
    m = re.fullmatch(r"(\\\{|[(\[{])(.*?)(\\\}|[)\]}])", text)
    if pieces := split(m[2], "[,;]")[::2] if m else []:
        parts, brackets = tuple(map(read, filter(None, pieces))), m[1] + m[3]
        if brackets == r"\{\}":
            return Part("set", parts)
        if len(parts) == 1 and brackets in ("{}", "()", "[]"):
            return parts[0]
        if len(parts) > 1:
            return Part("tuple" if brackets == "()" else "interval", parts, brackets)
    if r"\pm" in text:
        return Part("list", (read(text.replace(r"\pm", "+")), read(text.replace(r"\pm", "-"))))
    return read_value(text)


def read_value(text):
    """A value with its unit in front or behind, or text."""
    m = re.fullmatch(r"(-?) ?((?:⟦(?:dollar|euro|pound)⟧)?)([^⟦⟧]*?)"
                     r"((?:[ /]*\{?⟦[^⟧]*⟧\}?(?: ?\^ ?\{?-?\d\}?)?|\s*\\cdot)*)", text)
    if m and m[3].strip():  # after a number any words may stand, after x only measures
        unit, value = unit_of(m[2] + m[4]), m[1] + m[3].strip()
        if re.search(r"\d|\\pi|\\sqrt", value) or all(w.partition("^")[0] in UNITS for w in unit.split()):
            return Part("value", (expression(value),), unit)
    words = re.sub(r"^(?:the|a|an) ", "", re.sub(r"[^\w+-]+", " ", text).strip().lower())
    if re.search(r"[\\^=]", text) or len(words) > 80 or words in ("", "nan", "inf", "null", "undefined"):
        raise ValueError(f"neither mathematics nor text: {text[:40]}")
    return Part("text", (words,))


def unit_of(text):
    """Words of a unit in one spelling: 'square centimeters' -> 'cm^2'."""
    text = re.sub(r"[⟦⟧{}/]|\\cdot|\b(?:of|the|per)\b", " ", text).lower()
    text = re.sub(r"\bcubic\s+(\w+)", r"\1^3", re.sub(r"\b(?:square|sq)\s+(\w+)", r"\1^2", re.sub(r"\s*\^\s*", "^", text)))
    return " ".join(sorted(UNITS.get(word, UNITS.get(word.rstrip("s"), word.rstrip("s"))) + power
                           for word, power in re.findall(r"(\w+)(\S*)", text)))


@functools.lru_cache(4096)
def expression(text):
    """A sympy expression of one LaTeX value, decimals as fractions. Raises ValueError where it has none."""
    import sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
    for pattern, new in QUIRKS:
        text = pattern.sub(new, text)
    if re.fullmatch(r"-? ?(?:\d+\.?\d*|\.\d+)", text):
        return sympy.Rational(text.replace(" ", "").rstrip("."))
    if re.fullmatch(r"-? ?\\infty ?", text):
        return -sympy.oo if text[0] == "-" else sympy.oo
    if re.search(r"\\infty|[⟦⟧&;\"?@#]|\.\.|\d\s+\.?\d|[^\x00-\x7f]", text):
        raise ValueError(f"no expression: {text[:40]}")
    try:
        parsed = latex2sympy(text, is_real=None, normalization_config=None,
                             conversion_config=ConversionConfig(lowercase_symbols=False))
        if not isinstance(parsed, sympy.Expr) or parsed.has(sympy.zoo, sympy.nan):
            raise ValueError(f"no expression: {text[:40]}")
        parsed = parsed.xreplace({f: sympy.Rational(str(f)) for f in parsed.atoms(sympy.Float)})
        applied = parsed.atoms(sympy.core.function.AppliedUndef)  # f(x) of an unknown f is a variable as any other
        parsed = parsed.xreplace({f: sympy.Symbol(str(f).replace(" ", "")) for f in applied})
        parsed = parsed.xreplace({s: sympy.I for s in parsed.free_symbols if str(s) == "i"})
        return parsed if parsed.free_symbols else parsed.doit()  # 2^{200}+1 is an integer, to the last digit
    except MemoryError:
        raise
    except Exception as e:  # its grammar raises bare Exceptions
        raise ValueError(f"no expression: {text[:40]}") from e


def samples(e, f):
    """
    Yields the values of two expressions to 50 digits, where both are finite: at three points if there are variables (the
    same for the same names in every call, one of them negative), else once.
    """
    import sympy
    symbols = e.free_symbols | f.free_symbols
    for scale in (7, -71, 500) if symbols else (1,):  # large for floors, small for x^{200}+1
        at = {s: sympy.Rational(random.Random(f"{s} {scale}").randint(100, 999), scale) for s in symbols}
        x, y = e.subs(at).evalf(50), f.subs(at).evalf(50)
        if all(value.is_number and value.is_finite for value in (x, y)):
            yield x, y


def agree(x, y):
    """Whether two numbers of 50 digits are the same number."""
    return bool(abs(x - y) <= max(1e-40 * max(abs(x), abs(y)), 1e-100))


def equal(e, f):
    """Whether two expressions have one value."""
    if e == f or e.is_infinite or f.is_infinite or (e.is_Rational and f.is_Rational):
        return e == f
    points = 0
    for points, (x, y) in enumerate(samples(e, f), 1):
        if not agree(x, y):
            return False
    return points > bool(e.free_symbols or f.free_symbols)


def same_value(gold, answer):
    """
    A unit may be left out; given on both sides it must be the same one (no conversion). 50 % is 50 or 0.5; a gold without
    percent takes p % as p/100, and as p where gold is over 1.
    """
    (e,), (f,) = gold.parts, answer.parts
    if gold.mark == "percent" and not answer.mark:
        return equal(e, f) or equal(e, 100 * f)
    if answer.mark == "percent" and not gold.mark:
        return equal(e, f / 100) or bool(e.is_Rational and e > 1 and equal(e, f))
    return (not gold.mark or not answer.mark or gold.mark == answer.mark) and equal(e, f)


def says_zero(part):
    """What an equation says is zero; None for a part of another kind."""
    if part.name and part.kind == "value":
        return expression(part.name) - part.parts[0]
    return part.parts[0] if part.kind == "equation" else None


def same_equation(e, f):
    """Whether two equations say the same: what is zero in one is a constant times that in the other."""
    if e is None or f is None or not e.free_symbols or e.free_symbols != f.free_symbols:
        return False
    pairs = [(x, y) for x, y in samples(e, f) if x and y]
    return len(pairs) > 1 and all(agree(x * pairs[0][1], y * pairs[0][0]) for x, y in pairs[1:])


def pair_up(gold, answer):
    """Whether each gold part has an answer part of its own, in any order, and none is left."""
    left = list(answer)
    for g in gold:
        match = next((i for i, a in enumerate(left) if same(g, a)), None)
        if match is None:
            return False
        del left[match]
    return not left


def same(gold, answer):
    """Whether a Part is a right answer to a gold one."""
    kinds = {gold.kind, answer.kind}
    if "equation" in kinds or (gold.name and answer.name and gold.name != answer.name):  # else a name may be left out
        return same_equation(says_zero(gold), says_zero(answer))
    if kinds <= {"list", "set"} or kinds == {"union"}:
        names = {part.name for part in gold.parts}  # of x = 2, y = 3 no name may be left out
        return (len(names) < 2 or names == {part.name for part in answer.parts}) and pair_up(gold.parts, answer.parts)
    if gold.kind == "choice":  # the letter alone, in either case
        return [str(part) for part in answer.parts] in ([gold.parts[0]], [gold.parts[0].lower()])
    if len(kinds) > 1:
        return False
    if gold.kind == "value":
        return same_value(gold, answer)
    if gold.kind == "text":
        return gold.parts == answer.parts
    return gold.mark == answer.mark and len(gold.parts) == len(answer.parts) and all(map(same, gold.parts, answer.parts))


# What sympy and the reading raise for what they cannot take. MemoryError is not among them: it ends the worker.
UNREADABLE = (ValueError, TypeError, AttributeError, ArithmeticError, RecursionError, NotImplementedError)


def gold_kind(gold):
    """The kind of a gold answer ('number', 'tuple', ...), for the report; 'bad' if it cannot be judged against."""
    try:
        part = read(tidy(gold))
    except UNREADABLE:
        return "bad"
    return part.kind if part.kind != "value" else "number" if part.parts[0].is_Rational else "expression"


def right_answer(gold, answer):
    """'right' if the inside of a \\boxed{} is a right answer to a gold one, else, or if it cannot be read, 'wrong'."""
    try:
        gold, answer = tidy(gold), tidy(answer)
        return "right" if gold == answer or same(read(gold), read(answer)) else "wrong"
    except UNREADABLE:
        return "wrong"


sys.set_int_max_str_digits(20_000)
expression("2x")  # imports the parser
