"""What is taken out of the texts of a call before anything is written or sent.

    RoarkObserver(..., redact=True)          cards and phone numbers; or ROARK_REDACT=1
    RoarkObserver(..., redact=my_function)   a function from text to text

The function gets every turn's text as a whole, and every text and number in what tools are called
with, return and fail with, and in the identity of a phone call. Example, for names of patients:

    def redact(text: str) -> str:
        return PATIENTS.sub("[patient]", card_and_phone_numbers(text))

The recording is not redacted: a bot that must not keep what was said must not record.
"""

import re

_WORDS = "zero|oh|one|two|three|four|five|six|seven|eight|nine|double|triple"
_DIGIT = rf"(?:\d|\b(?:{_WORDS})\b)"
_DATE = r"\d{4}-\d\d-\d\d"
# Keys pressed in groups are told as "DTMF: 4111 DTMF: 1111".
_BETWEEN = r"(?:[\s().,-]{0,3}|#?\s*DTMF:\s*)"
# Digits as they are written or spelled out, with what stands between the digits of one number.
_NUMBER = re.compile(
    rf"(?<!\d)(?!{_DATE})\+?\(?{_DIGIT}(?:{_BETWEEN}{_DIGIT}){{6,}}", re.IGNORECASE
)

PHONE_DIGITS = range(7, 16)
CARD_DIGITS = range(13, 20)


def card_and_phone_numbers(text: str) -> str:
    """Replace payment card and phone numbers, in digits or spelled out, by what they are."""
    return _NUMBER.sub(lambda found: _name_of(found[0]), text)


def _name_of(number: str) -> str:
    digits = [int(digit) for digit in re.findall(r"\d", number)]
    if len(digits) in CARD_DIGITS and _is_card(digits):
        return "[card]"
    # Shorter than a card, or spelled out: most likely to be called.
    return "[phone]" if len(digits) in PHONE_DIGITS else "[number]"


def _is_card(digits: list[int]) -> bool:
    """Luhn's check, which every card number passes and one other number in ten."""
    doubled = [digit * 2 - 9 * (digit > 4) for digit in digits[-2::-2]]
    return (sum(doubled) + sum(digits[-1::-2])) % 10 == 0
