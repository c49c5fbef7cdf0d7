"""What the LLM writes, as the voice is to say it: nothing is lost, and nothing is unspeakable."""

import random
import re

import pytest

from spoken_text import LANGUAGES, for_voice

WORDS = ["yes", "no", "Ada", "open", "naïve", "café", "O'Neill", "Straße", "はい"]
MARKUP = [
    *(
        "{}",
        "**{}**",
        "*{}*",
        "__{}__",
        "_{}_",
        "***{}***",
        "~~{}~~",
        "`{}`",
        "[{}](https://a.b/c)",
    ),
    *("\n# {}\n", "\n- {}\n", "\n* {}\n", "\n> {}\n", "\n```text\n{}\n```\n", "\n---\n{}"),
    *(
        "\n| {} | {} |\n|---|---|\n| {} | {} |\n",
        "😀 {} 👍🏽",
        "{} → {}",
        "**{}, {}**",
        "\n  - **{}**: {}\n",
    ),
]
TEXTS = 3000


def test_no_word_is_lost_and_no_markup_is_left() -> None:
    chance = random.Random(13)
    for _ in range(TEXTS):
        said: list[str] = []

        def word(said: list[str] = said) -> str:
            said.append(chance.choice(WORDS))
            return said[-1]

        written = " ".join(
            re.sub(r"\{\}", lambda _: word(), chance.choice(MARKUP))
            for _ in range(chance.randrange(1, 6))
        )
        spoken = for_voice(written, "en")
        assert re.findall(r"[\w']+", spoken) == said, written
        assert not set(spoken) & set("*_~`#|[]→😀👍🏽>"), written


@pytest.mark.parametrize(
    ("language", "written", "spoken"),
    [
        ("en", "It is ~~no~~ yes, $4,000.50.", "It is no yes, four thousand dollars, fifty cents."),
        ("en", "$5 or $0.99, 50% off", "five dollars or ninety-nine cents, fifty percent off"),
        (
            "en",
            "Room 12 has 1,234 seats.",
            "Room twelve has one thousand, two hundred and thirty-four seats.",
        ),
        ("en", "in 2026, 3.5 miles", "in twenty twenty-six, three point five miles"),
        ("en", "(415) 555-0100", "4 1 5, 5 5 5, 0 1 0 0"),
        ("en-GB", "file__name_x", "file underscore underscore name underscore x"),
        (
            "de",
            "4.000,50 € und 3,5 %",
            "viertausend Euro und fünfzig Cent und drei Komma fünf Prozent",
        ),
        ("de", "+49 30 12345", "plus 4 9, 3 0, 1 2 3 4 5"),
        ("de", "am 3. Mai", "am 3. Mai"),
        ("fr", "12 345 places à 5 €", "douze mille trois cent quarante-cinq places à cinq euros"),
        ("es", "1.500 personas", "mil quinientos personas"),
        ("it", "21 posti", "ventuno posti"),
        ("it", "3,5 % di 0,25", "tre virgola cinque per cento di zero virgola due cinque"),
        ("de", "2,50000000000000001", "zwei Komma fünf" + 15 * " null" + " eins"),
        ("es", "1" + 41 * "0" + ".", "1" + 41 * " 0" + "."),
        ("pt", "1" + 20 * ".000", "1" + 60 * " 0"),
        ("en", "$1" + 400 * "0" + ".50", "$1" + 400 * " 0" + ".5 0"),
        ("nl", "€ 12,50", "twaalf euro, vijftig cent"),
        ("pt-BR", "50%", "cinquenta por cento"),
        # Read by every voice, and no words that people agree on.
        ("en", "10:30 on 11/26/2026, 2026-11-26", "10:30 on 11/26/2026, 2026-11-26"),
        ("en", "version 1.2.3, A4, 2*3, 5-6, 1990-2000", "version 1.2.3, A4, 2*3, 5-6, 1990-2000"),
        ("en", "21° © press * now", "twenty-one° © press * now"),
        ("ja", "**はい**、$5です。", "はい、$5です。"),
        ("en", "See https://example.com.", "See example.com."),
        ("en", "See http://www.example.com/a/b?c=d, please", "See example.com, please"),
        ("en", "(www.example.co.uk)", "(example.co.uk)"),
    ],
)
def test_numbers_are_spoken_as_people_say_them(language: str, written: str, spoken: str) -> None:
    assert for_voice(written, language) == spoken


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_digit_is_left_of_a_plain_number_in_any_language(language: str) -> None:
    for number in [*range(0, 2100, 7), 12345, 1000000]:
        assert not re.search(r"\d", for_voice(f"a {number} b", language))


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_number_is_too_large_or_too_exact_to_be_spoken(language: str) -> None:
    """What raises is not spoken at all."""
    thousands, point, *_ = LANGUAGES[language]
    for digits in (*range(1, 90), 310, 5000):
        number = "1" + digits * "7"
        grouped = "1" + min(digits, 310) * f"{thousands[0]}777"
        for written in (number, grouped, f"1{point}{number}", f"{number}{point}{number}"):
            for text in (written, f"{written} %", f"${written}", f"{written} €"):
                spoken = for_voice(f"a {text} b", language)
                assert spoken.startswith("a ") and spoken.endswith(" b")
                if left := re.findall(r"\d", spoken):
                    assert left == re.findall(r"\d", written), (
                        "in words or in digits, and all of it"
                    )
