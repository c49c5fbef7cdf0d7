"""Voice activity detection that also tells what it is about to conclude.

Silero says that somebody speaks after 0.2 s of a voice it is sure of, and that they are silent as
much later. People notice both sooner: a first soft sound, a short pause.
"""

from collections.abc import Callable

import numpy as np
from pipecat.audio.vad.silero import SileroVADAnalyzer
from pipecat.audio.vad.vad_analyzer import VADState

# Shorter than the pause after which the detector says that the caller is silent, longer than the
# gaps between words: enough to answer what reads like a whole sentence.
HUSH_SECONDS = 0.1
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


class Onset:
    """Tells the beginning of a sound, which may become a voice, from silence and from noise."""

    def __init__(self) -> None:
        """Nothing is known of the line's noise: it is taken for silent."""
        self._noise_db = AUDIBLE_DB - LOUDER_DB
        self._loud_seconds = 0.0
        self._was_loud = False

    def heard(self, samples: np.ndarray, seconds: float) -> bool:
        """Take a window of mono PCM16 of some 30 ms; say whether a sound has just begun."""
        level = float(np.sqrt(np.mean(np.square(samples / 32768.0)))) if samples.size else 0.0
        level_db = 20.0 * float(np.log10(max(level, 1e-6)))
        is_loud = level_db >= max(AUDIBLE_DB, self._noise_db + LOUDER_DB)
        self._noise_db = min(level_db, self._noise_db + NOISE_RISES_DB_PER_SECOND * seconds)
        # A gap of one window, as in a plosive, does not end a sound.
        is_sound = is_loud or self._was_loud
        self._was_loud = is_loud
        self._loud_seconds = self._loud_seconds + seconds if is_sound else 0.0
        return 0.0 < self._loud_seconds <= ONSET_SECONDS


class HushVADAnalyzer(SileroVADAnalyzer):
    """Silero, which tells of a first sound and of a short silence before it is sure of either."""

    def __init__(self, on_hush: Callable[[bool], None], on_sound: Callable[[bool], None]) -> None:
        """Call `on_hush` with True when a pause of HUSH_SECONDS has begun, with False when it ends.

        `on_sound` is called all the time, with whether there is a sound that is or may become a
        voice.
        """
        super().__init__()
        self._on_hush = on_hush
        self._on_sound = on_sound
        self._onset = Onset()
        self._quiet_seconds = 0.0
        self._is_hushed = False
        self._may_be_voice = False

    def voice_confidence(self, buffer: bytes) -> float:
        """Say how much one window of mono PCM16 is like a voice, 0 to 1."""
        confidence = super().voice_confidence(buffer)
        samples = np.frombuffer(buffer, np.int16)
        is_onset = self._onset.heard(samples, samples.size / self.sample_rate)
        self._may_be_voice = is_onset or bool(confidence >= SUSPICION)
        return confidence

    async def analyze_audio(self, buffer: bytes) -> VADState:
        """Listen to mono PCM16."""
        state = await super().analyze_audio(buffer)
        self._on_sound(self._may_be_voice or state is not VADState.QUIET)
        is_stopping = state is VADState.STOPPING
        seconds = len(buffer) / 2 / self.sample_rate
        self._quiet_seconds = self._quiet_seconds + seconds if is_stopping else 0.0
        is_hushed = self._quiet_seconds >= HUSH_SECONDS
        if is_hushed != self._is_hushed:
            self._is_hushed = is_hushed
            self._on_hush(is_hushed)
        return state
