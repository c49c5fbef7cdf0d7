"""What the LLM writes, as the voice is to say it: no markup, no emoji, numbers as people say them.

Models write for eyes now and then, whatever the prompt says, and voices read "$4,000.50", a
telephone number or a table each in its own way. No word is lost. The record and the LLM's memory
keep what was written: Pipecat matches what was spoken with it.
"""

import re
import unicodedata
from collections.abc import Callable
from contextlib import suppress
from decimal import Decimal
from functools import cache
from typing import Any

# Languages whose numbers are put into words, with: the thousands separator, the decimal one, and
# what people call "+", "%", "_" and the decimal one. Numbers in other languages are left to the
# voice.
LANGUAGES = {
    "en": (",", ".", "plus", "percent", "underscore", "point"),
    "de": (".", ",", "plus", "Prozent", "Unterstrich", "Komma"),
    "es": (".", ",", "más", "por ciento", "guion bajo", "punto"),
    "fr": ("\u202f\u00a0 ", ",", "plus", "pour cent", "tiret bas", "virgule"),
    "it": (".", ",", "più", "per cento", "trattino basso", "virgola"),
    "nl": (".", ",", "plus", "procent", "underscore", "komma"),
    "pt": (".", ",", "mais", "por cento", "sublinhado", "vírgula"),
}
CURRENCIES = {"$": "USD", "€": "EUR", "£": "GBP"}
# A year from here on stands alone, without separators: "twenty twenty-six".
YEARS = range(1100, 2100)

LINK = re.compile(r"(?:https?://|www\.)(?:www\.)?([\w.-]*\w)(?:[/?#:](?:\S*[^\s.,;:!?)])?)?")
LABELLED_LINK = re.compile(r"!?\[([^\]]+)\]\([^)]*\)")
FENCE = re.compile(r"^[ \t]*(?:```+|~~~+)[ \t]*\w*[ \t]*$", re.MULTILINE)
RULE = re.compile(
    r"^[ \t]*(?:[-*_][ \t]*){3,}$|^[ \t]*\|?(?:[ \t]*:?-{2,}:?[ \t]*\|)+[ \t:-]*$", re.MULTILINE
)
LINE_MARK = re.compile(r"^[ \t]*(?:#{1,6}|>+|[-+*•])[ \t]+", re.MULTILINE)
ROW = re.compile(r"^[ \t]*\|(.+?)\|?[ \t]*$", re.MULTILINE)
# Around words; between digits and alone it is a sign ("2*3", "press *").
STARS = re.compile(r"(?<!\d)\*+(?=\w)|(?<=[\w.,;:!?)\"'])\*+(?!\d)|\*{2,}")
OUTER_UNDERSCORES = re.compile(r"(?<!\w)_+(?=[^\W_])|(?<=[^\W_])_+(?!\w)")
# Perhaps a telephone number: with "+", or at least seven digits. Not a date, a time or an amount.
PHONE = re.compile(r"(?<![\w.,:/$€£-])(\+\d|\(?\d)[\d() /-]{5,}\d(?![\w%€£$]|[.,:/]\d)")
# A date, years from to, a round number.
NO_PHONE = re.compile(
    r"\d{4}-\d{1,2}-\d{1,2}|\d{1,2}[/-]\d{1,2}[/-]\d{2,4}|\d{4} ?[-/ ] ?\d{4}|\d+000"
)
# As French writes large numbers.
SPACED = re.compile(r"[1-9]\d{0,2}(?: \d{3})+")


def for_voice(text: str, language: str) -> str:
    """Write `text`, in the language with the code `language` such as "pt-BR", for a voice."""
    text = LINK.sub(r"\1", LABELLED_LINK.sub(r"\1", text))
    text = _without_markup(text)
    text = "".join(" " if _is_picture(sign) else sign for sign in text)
    language = language.partition("-")[0]
    if language in LANGUAGES:
        text = _with_words_for_numbers(text, language)
    return re.sub(r"(?<=\S)  +(?=\S)", " ", text)


def _without_markup(text: str) -> str:
    text = RULE.sub("", FENCE.sub("", text))
    text = ROW.sub(lambda row: re.sub(r"[ \t]*\|[ \t]*", ", ", row[1].strip()) + ".", text)
    text = LINE_MARK.sub("", text)
    text = text.replace("`", "").replace("~~", "")
    return OUTER_UNDERSCORES.sub("", STARS.sub("", text))


def _is_picture(sign: str) -> bool:
    """Whether this is an emoji, an arrow or what joins emoji; "°" and "©" are none."""
    if sign < "\u2190":
        return sign == "\u200d"
    return unicodedata.category(sign) in ("So", "Sk", "Sm", "Co") or "\ufe00" <= sign <= "\ufe0f"


def _with_words_for_numbers(text: str, language: str) -> str:
    underscore = LANGUAGES[language][4]
    text = re.sub(r"(?<=\w)_(?=\w)|(?<=_)_(?=\w)|(?<=\w)_(?=_)", f" {underscore} ", text)
    pieces: list[str] = []
    done = 0
    for found in PHONE.finditer(text):
        if _is_phone(found[0], language):
            pieces += [
                _quantities(text[done : found.start()], language),
                _phone(found[0], language),
            ]
            done = found.end()
    return "".join([*pieces, _quantities(text[done:], language)])


def _quantities(text: str, language: str) -> str:
    thousands, point, _, percent, _, _ = LANGUAGES[language]
    group = f"[{re.escape(thousands)}]"
    # Added up: doubled braces, as an f-string has them, are the generator's own.
    number = r"\d{1,3}(?:" + group + r"\d{3})+(?!\d)" + rf"(?:{re.escape(point)}\d+)?"
    number += rf"|\d+(?:{re.escape(point)}\d+)?"
    # Not within a word, a date, a time or a version.
    alone = rf"(?<![\w.,:/*-])({number})(?![\w:/*-]|[.,]\d)"
    if language == "de":
        # "3. Mai" is the third.
        alone += r"(?!\.\s+\w)"
    signs = "".join(map(re.escape, CURRENCIES))

    def value(written: str) -> Decimal:
        return Decimal(re.sub(group, "", written).replace(point, "."))

    def spelled(
        say: Callable[[re.Match[str]], str],
        otherwise: Callable[[re.Match[str]], str] = lambda found: found[0],
    ) -> Callable[[re.Match[str]], str]:
        def spell(found: re.Match[str]) -> str:
            # num2words ends at another number in each language, with another error, and what raises
            # here is not spoken at all.
            with suppress(Exception):
                return say(found)
            return otherwise(found)

        return spell

    def one_by_one(found: re.Match[str]) -> str:
        return re.sub(r"\d(?=\d)", r"\g<0> ", re.sub(group, "", found[0]))

    def amount(found: re.Match[str]) -> str:
        sign = found["before"] or found["after"]
        return _amount(value(found["number"]), CURRENCIES[sign], language)

    def share(found: re.Match[str]) -> str:
        return f"{_number(value(found[1]), language)} {percent}"

    def plain(found: re.Match[str]) -> str:
        if re.fullmatch(r"\d{4}", found[1]) and int(found[1]) in YEARS:
            return _words(int(found[1]), language, to="year")
        return _number(value(found[1]), language)

    money = rf"(?P<before>[{signs}])[ \u00a0]?(?P<number>{number})(?!\w|[.,]\d)(?P<after>)"
    text = re.sub(money, spelled(amount), text)
    money = rf"(?P<before>)(?<![\w.,:/-])(?P<number>{number})[ \u00a0\u202f]?(?P<after>[{signs}])"
    text = re.sub(money, spelled(amount), text)
    text = re.sub(rf"{alone}[ \u00a0\u202f]?%", spelled(share), text)
    # Also what none of the others could spell: digits, beside their sign.
    return re.sub(alone, spelled(plain, one_by_one), text)


def _is_phone(written: str, language: str) -> bool:
    is_number = NO_PHONE.fullmatch(written) or (language == "fr" and SPACED.fullmatch(written))
    return not is_number and ("+" in written or len(re.findall(r"\d", written)) >= 7)


def _phone(written: str, language: str) -> str:
    # Digits stay digits, one by one: voices say them right, and the record can take them out.
    plus = f"{LANGUAGES[language][2]} " if written.startswith("+") else ""
    return plus + ", ".join(" ".join(group) for group in re.findall(r"\d+", written))


def _amount(value: Decimal, currency: str, language: str) -> str:
    value = value.quantize(Decimal("0.01"))
    both = _words(value, language, to="currency", currency=currency, separator="|")
    whole, cents = both.split("|")
    if value == int(value):
        return whole
    if value < 1:
        return cents.strip()
    return _words(value, language, to="currency", currency=currency)


def _number(value: Decimal, language: str) -> str:
    whole = _words(int(value), language)
    if value == int(value):
        return whole
    # Digit by digit, as people do: num2words knows no decimals in Italian, and in the others only
    # those of a float.
    decimals = f"{value:f}".partition(".")[2]
    said = [_words(int(digit), language) for digit in decimals]
    return " ".join([whole, LANGUAGES[language][5], *said])


@cache
def _words(value: int | Decimal, language: str, to: str = "cardinal", **how: Any) -> str:
    # Only a call needs it, and it takes a quarter of a second.
    from num2words import num2words

    return num2words(value, lang=language, to=to, **how)
