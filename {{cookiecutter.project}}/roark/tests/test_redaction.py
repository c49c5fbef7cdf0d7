"""Card and phone numbers do not leave the process; everything else does."""

import pytest

from roark.redaction import card_and_phone_numbers


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("My card is 4111 1111 1111 1111, thanks.", "My card is [card], thanks."),
        ("5555-5555-5555-4444", "[card]"),
        ("Call +1 (415) 555-0132.", "Call [phone]."),
        ("030 1234567", "[phone]"),
        ("It is four one five, five five five, oh one three two.", "It is [number]."),
        ("It is four one double five 5 5 5 oh.", "It is [number]."),
        ("1234 5678 9012 3456", "[number]"),
        ("DTMF: 4111 DTMF: 1111 DTMF: 1111 DTMF: 1111#", "DTMF: [card]#"),
    ],
)
def test_numbers_of_cards_and_phones_are_replaced(said, kept):
    assert card_and_phone_numbers(said) == kept


@pytest.mark.parametrize(
    "said",
    [
        "A table for 2 at 19:30 on the 21st of November 2026.",
        '{"from": "2026-11-21T19:30:00", "until": "2026-11-22"}',
        "Between 100 and 200 people, one or two of them late.",
        "DTMF: 1# DTMF: 22# DTMF: 333#",
        "Order 12345 costs 1,299.50 dollars.",
        "",
    ],
)
def test_dates_amounts_and_counts_stay(said):
    assert card_and_phone_numbers(said) == said
