"""The recogniser that knows the words, and the person whose words it hears."""

import numpy as np
import pytest
import soxr
from rehearsal.call import HUMAN_VOICE, recorded_voice
from rehearsal.callers.twilio import SAMPLE_RATE, TwilioCaller, from_mulaw, to_mulaw
from rehearsal.engines.engine import Heard, Word

from benchmarks.known_words import KnownWordsRecogniser, Phrase, phrases_of
from benchmarks.person import Echo, Saying, babble, rms, white_noise, without_words

pytestmark = pytest.mark.anyio

WORDS = ("he", "might", "even", "have", "been", "made", "amiable", "himself")
BEGINS = (0.21, 0.38, 0.64, 0.92, 1.07, 1.33, 1.65, 2.27)
LAST_ENDS = 2.9
PAUSE_BEFORE = 6


@pytest.fixture(scope="module")
def human() -> tuple[Phrase, ...]:
    """The shipped sentence, cut before "amiable"."""
    voice = recorded_voice(HUMAN_VOICE)
    words = [
        Word(text, begin, end)
        for text, begin, end in zip(WORDS, BEGINS, [*BEGINS[1:], LAST_ENDS], strict=True)
    ]
    return phrases_of(voice.pcm, voice.sample_rate, words, [PAUSE_BEFORE])


async def listen(
    recogniser: KnownWordsRecogniser, saying: Saying, noise_rms: float = 0.0
) -> tuple[list[tuple[float, Heard]], list[Heard]]:
    """Feed a saying and a second of silence as a phone would; results with the time fed so far."""
    said = np.frombuffer(saying.pcm + bytes(2 * saying.sample_rate), dtype="<i2")
    samples = soxr.resample(said, saying.sample_rate, SAMPLE_RATE).astype(np.float32)
    samples += np.random.default_rng(0).normal(0.0, noise_rms, len(samples))
    phone = from_mulaw(to_mulaw(samples.astype("<i2").tobytes()))
    told: list[tuple[float, Heard]] = []
    for at in range(0, len(phone), 320):
        told += [
            (at / 2 / SAMPLE_RATE, heard) for heard in await recogniser.feed(phone[at : at + 320])
        ]
    return told, await recogniser.finalize()


@pytest.mark.parametrize(("share", "is_known"), [(0.9, True), (0.2, False)])
async def test_a_word_that_is_nearly_said_is_known_where_a_pause_is_finalized_in_it(
    human: tuple[Phrase, ...], share: float, is_known: bool
):
    recogniser = KnownWordsRecogniser(human, SAMPLE_RATE)
    phrase, last = human[-1], human[-1].words[-1]
    said_s = last.start_s + share * (last.end_s - last.start_s)
    said = np.frombuffer(phrase.pcm, dtype="<i2")[: round(said_s * phrase.sample_rate)]
    phone = soxr.resample(said, phrase.sample_rate, SAMPLE_RATE).tobytes()
    for at in range(0, len(phone), 320):
        await recogniser.feed(phone[at : at + 320])
    [final] = await recogniser.finalize()
    words = [word.text for word in phrase.words]
    assert final.text == " ".join(words if is_known else words[:-1])


async def test_an_ear_hears_the_words_it_knows_when_they_are_said(human: tuple[Phrase, ...]):
    """Over a telephone, with a pause and with noise 10 dB below the voice."""
    for pause_s, noise_db in ((0.6, None), (0.0, None), (0.3, 10)):
        noise = rms(human) * 10 ** (-noise_db / 20) if noise_db else 0.0
        recogniser = KnownWordsRecogniser(human, SAMPLE_RATE, final_s=0.3, pause_s=60.0)
        told, [final] = await listen(recogniser, Saying(human, pause_s), noise)
        assert final.is_final and final.known_after_s == 0.3
        assert final.text == " ".join(WORDS)
        assert final.start_s == pytest.approx(BEGINS[0], abs=0.03)
        assert final.start_s + final.duration_s == pytest.approx(LAST_ENDS + pause_s, abs=0.05)
        # No word before it was said, and all of them soon after the last.
        for at, heard in told:
            said = [begin for begin in BEGINS if begin + (begin >= BEGINS[6]) * pause_s <= at]
            assert len(heard.text.split()) <= len(said)
        whole = next(at for at, heard in told if heard.text == final.text)
        assert whole - (LAST_ENDS + pause_s) < 0.3


async def test_what_is_not_said_or_has_no_words_is_not_heard(human: tuple[Phrase, ...]):
    cough = without_words(human[0], 0.9)
    assert np.abs(np.frombuffer(cough.pcm, dtype="<i2")).max() > 3000
    for saying in (Saying((cough,)), Saying(human[1:])):
        _, final = await listen(KnownWordsRecogniser(human, SAMPLE_RATE, pause_s=60.0), saying)
        assert [heard.text for heard in final] == [saying.text]


def test_surroundings_are_as_loud_as_they_are_told_to_be(human: tuple[Phrase, ...]):
    caller = TwilioCaller("ws://127.0.0.1:1/ws")
    for sound in (white_noise(100.0), babble(human, 100.0)):
        heard = np.concatenate([sound(caller, second, SAMPLE_RATE) for second in range(3)])
        assert np.sqrt(np.mean(heard**2)) == pytest.approx(100.0, rel=0.2)
    bot = np.arange(800, dtype="<i2")
    caller.heard.add(bot.tobytes(), at=50.0)
    echo = Echo(below_db=20.0, delay_s=0.25)
    heard = np.concatenate([echo(caller, 50.24 + n * 0.02, 160) for n in range(7)])
    assert np.abs(heard[80:880] - bot / 10).max() < 0.01
    assert not heard[:80].any() and not heard[880:].any()
