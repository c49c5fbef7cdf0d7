"""Voice activity detection that also tells what it is about to conclude.

Silero says that somebody speaks after 0.2 s of a voice it is sure of, and that they are silent as
much later. People notice both sooner: a first soft sound, a short pause.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable

import numpy as np
from pipecat.audio.vad.silero import SileroVADAnalyzer
from pipecat.audio.vad.vad_analyzer import VADState

# Three of the detector's windows: enough to answer what reads like a whole sentence. Of the gaps
# between words, three in half a minute of the benchmark's sentences are as long.
HUSH_SECONDS = 0.09
# To Silero a voice goes on for up to 0.15 s after its last sound. What has fallen by so much from
# the loudest of the last seconds is silence, or as good as that. The pause itself stays Silero's:
# one sentence of the benchmark's has such a silence of 0.2 s between two words.
FALLEN_DB = 25.0
LOUDEST_FALLS_DB_PER_SECOND = 10.0
# So much like a voice, 0 to 1, is the first soft sound of most words, for which Silero asks 0.7.
SUSPICION = 0.3

# Of eleven words after a pause three were no voice to Silero for 0.2 to 0.3 s, "four" and "is" the
# longest; all were this loud within 0.1 s. 0 dB is the loudest a sample can be.
AUDIBLE_DB = -50.0
LOUDER_DB = 10.0
# What is no voice by then is a noise.
ONSET_SECONDS = 0.35
# The line's own noise is what is heard most of the time: known again so soon after it grew.
NOISE_RISES_DB_PER_SECOND = 20.0

# People who talk around the caller never stop all at once: of the last seconds, the softest fifth
# of the windows is theirs, and Silero takes it for a voice. What is the caller's is louder by so
# much. In the babble of six voices 20 dB below the benchmark's nine sentences, Silero alone took it
# for the caller 82 % of the time before a sentence, with this 21 %; at 10 dB below 100 % and 28 %,
# and the pause behind the sentence, which it had not noticed in 4 s, is noticed after 0.2 s as on a
# quiet line, where nothing is changed by this.
AROUND_SECONDS = 5.0
AROUND_SHARE = 0.2
AROUND_VOICE = 0.5
ABOVE_AROUND_DB = 7.5
# Some consonants are soft: the loudest of so many windows counts.
SMOOTH_WINDOWS = 3

# Silero, which takes a millisecond, is waited for this long, and for no longer than half of what
# the sound lasts: the other half is for the rest of the call.
LAG_SECONDS = 0.01
# More than this is not made up for: a process that stood still for a second catches up in small
# pieces, for in one large piece Silero would overlook a short word.
DEBT_SECONDS = 0.1


def loudness_db(samples: np.ndarray) -> float:
    """Return how loud mono PCM16 is, in dB below the loudest that it can be."""
    level = float(np.sqrt(np.mean(np.square(samples / 32768.0)))) if samples.size else 0.0
    return 20.0 * float(np.log10(max(level, 1e-6)))


class Onset:
    """Tells the beginning of a sound, which may become a voice, from silence and from noise."""

    def __init__(self) -> None:
        """Nothing is known of the line's noise: it is taken for silent."""
        self._noise_db = AUDIBLE_DB - LOUDER_DB
        self._loud_seconds = 0.0
        self._was_loud = False

    def heard(self, level_db: float, seconds: float) -> bool:
        """Take how loud a window of some 30 ms is; say whether a sound has just begun."""
        is_loud = level_db >= max(AUDIBLE_DB, self._noise_db + LOUDER_DB)
        self._noise_db = min(level_db, self._noise_db + NOISE_RISES_DB_PER_SECOND * seconds)
        # A gap of one window, as in a plosive, does not end a sound.
        is_sound = is_loud or self._was_loud
        self._was_loud = is_loud
        self._loud_seconds = self._loud_seconds + seconds if is_sound else 0.0
        return 0.0 < self._loud_seconds <= ONSET_SECONDS


class Hush:
    """Tells by the loudness how long the caller has been silent."""

    def __init__(self) -> None:
        """Nothing was heard yet."""
        self._loudest_db = AUDIBLE_DB
        self._soft_seconds = 0.0

    def heard(self, level_db: float, seconds: float, *, is_voice: bool) -> float:
        """Take how loud a window of some 30 ms is, and whether it sounds like a voice.

        Returns:
            For how long it has been silent, seconds.
        """
        self._loudest_db -= LOUDEST_FALLS_DB_PER_SECOND * seconds
        if is_voice:
            # A click may be louder than who speaks after it.
            self._loudest_db = max(self._loudest_db, level_db)
        is_soft = level_db < self._loudest_db - FALLEN_DB
        self._soft_seconds = self._soft_seconds + seconds if is_soft else 0.0
        return self._soft_seconds


class VoicesAround:
    """Tells the caller's voice from those of people who talk around them, all at once."""

    def __init__(self) -> None:
        """Nobody is around yet."""
        self._recent = deque[float](maxlen=SMOOTH_WINDOWS)
        self._windows = deque[tuple[float, float]]()

    def drown(self, level_db: float, confidence: float, seconds: float) -> bool:
        """Take how loud a window is, and how like a voice, 0 to 1; say whether it is theirs."""
        self._recent.append(level_db)
        self._windows.append((sum(self._recent) / len(self._recent), confidence))
        if len(self._windows) * seconds > AROUND_SECONDS:
            self._windows.popleft()
        softest = sorted(self._windows)[: max(1, int(len(self._windows) * AROUND_SHARE))]
        if sum(like for _, like in softest) < AROUND_VOICE * len(softest):
            return False
        return max(self._recent) < softest[0][0] + ABOVE_AROUND_DB


class HushVADAnalyzer(SileroVADAnalyzer):
    """Silero, which tells of a first sound and of a short silence before it is sure of either."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Load the model; take the time from `clock`, in seconds. Nothing was heard yet."""
        super().__init__()
        self._clock = clock
        self._may_wait = 0.0
        self._on_hush: Callable[[bool], None] = _nobody
        self._on_sound: Callable[[bool], None] = _nobody
        self._onset = Onset()
        self._around = VoicesAround()
        self._hush = Hush()
        self._silent_seconds = 0.0
        self._stopping_seconds = 0.0
        self._is_hushed = False
        self._may_be_voice = False
        self._held = b""
        self._analysis: asyncio.Future[VADState] | None = None
        self._analysed_seconds = 0.0
        self._listened_seconds = 0.0
        self._state = VADState.QUIET

    def listened(self) -> float:
        """Return how many seconds of sound it knows of by now whether there was a voice in it."""
        return self._listened_seconds

    def tell(self, *, on_hush: Callable[[bool], None], on_sound: Callable[[bool], None]) -> None:
        """Call `on_hush` with True after HUSH_SECONDS of a pause, with False when they go on.

        `on_sound` is called all the time, with whether there is a sound that is or may become a
        voice.
        """
        self._on_hush, self._on_sound = on_hush, on_sound

    def voice_confidence(self, buffer: bytes) -> float:
        """Say how much one window of mono PCM16 is like a voice, 0 to 1."""
        # It is an array of one.
        confidence = float(np.max(super().voice_confidence(buffer)))
        level_db = loudness_db(np.frombuffer(buffer, np.int16))
        seconds = len(buffer) / 2 / self.sample_rate
        if self._around.drown(level_db, confidence, seconds):
            confidence = 0.0
        is_voice = confidence >= self.params.confidence
        self._silent_seconds = self._hush.heard(level_db, seconds, is_voice=is_voice)
        is_onset = self._onset.heard(level_db, seconds)
        self._may_be_voice = is_onset or confidence >= SUSPICION
        return confidence

    async def analyze_audio(self, buffer: bytes) -> VADState:
        """Listen to mono PCM16."""
        state = await self._state_after(buffer)
        self._on_sound(self._may_be_voice or state is not VADState.QUIET)
        # While Silero lags nothing is known of the last piece.
        seconds = 0.0 if self._analysis else len(buffer) / 2 / self.sample_rate
        is_stopping = state is VADState.STOPPING
        self._stopping_seconds = self._stopping_seconds + seconds if is_stopping else 0.0
        is_hushed = self._is_hushed
        if is_stopping or state is VADState.SPEAKING:
            is_hushed = max(self._silent_seconds, self._stopping_seconds) >= HUSH_SECONDS
        if is_hushed != self._is_hushed:
            self._is_hushed = is_hushed
            self._on_hush(is_hushed)
        return state

    async def cleanup(self) -> None:
        """The call is over."""
        if self._analysis:
            self._analysis.cancel()
        await super().cleanup()

    async def _state_after(self, buffer: bytes) -> VADState:
        """Return what Silero makes of the sound so far, or of all but the last if it lags.

        Pipecat passes sound on before all else, and waits for this: where each piece took longer
        than it lasts, no word and no answer would ever get through the call. On a busy machine a
        wait takes longer than it was told to, and is made up for by the next ones.
        """
        self._held += buffer
        window = 2 * self.num_frames_required()
        if not self._analysis and len(self._held) >= window:
            # In a thread: all that is there, and no part of a window, of which nothing follows.
            whole = len(self._held) // window * window
            heard, self._held = self._held[:whole], self._held[whole:]
            self._analysed_seconds = len(heard) / 2 / self.sample_rate
            self._analysis = asyncio.ensure_future(super().analyze_audio(heard))
        self._may_wait = min(self._may_wait + len(buffer) / 4 / self.sample_rate, LAG_SECONDS)
        if self._analysis and self._may_wait > 0.0:
            began = self._clock()
            await asyncio.wait({self._analysis}, timeout=self._may_wait)
            self._may_wait = max(self._may_wait - (self._clock() - began), -DEBT_SECONDS)
        if self._analysis and self._analysis.done():
            self._state = self._analysis.result()
            self._analysis = None
            self._listened_seconds += self._analysed_seconds
        return self._state


def _nobody(_is_so: bool) -> None:
    """Is told, and does nothing."""
