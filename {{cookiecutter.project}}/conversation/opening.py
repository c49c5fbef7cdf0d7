"""Who picked up a call that the bot placed, and what to do about it.

A person who says hello hears CALL_GREETING; so does somebody or something that asks who is calling.
A voicemail gets the message of voicemail.md after its beep. Silence, a phone menu and a fax machine
are hung up on. Until it is known who is there, the LLM is not asked.

`Listener` tells them apart by what is heard: words, pauses and tones. It is told of these and asked
often, and does no I/O. How often it is right, and how soon: benchmarks/README.md of the template.
"""

import asyncio
import re
from collections.abc import Callable, Coroutine
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from loguru import logger
from pipecat.frames.frames import (
    Frame,
    InputAudioRawFrame,
    InterimTranscriptionFrame,
    LLMContextFrame,
    LLMRunFrame,
    TranscriptionFrame,
    TTSSpeakFrame,
    VADUserStartedSpeakingFrame,
    VADUserStoppedSpeakingFrame,
)
from pipecat.processors.frame_processor import FrameDirection, FrameProcessor

import config
from conversation.endings import LAST_WORD_SECONDS, instruction
from conversation.floor import Floor
from conversation.recovery import TTS_ATTEMPTS

if TYPE_CHECKING:
    from pipecat.pipeline.worker import PipelineWorker

    from conversation.endings import Ending
    from conversation.recovery import Recovery
    from telephony.errand import Errand

VOICEMAIL_FILE = Path(__file__).parents[1] / "voicemail.md"
# Where CALL_GREETING does not say what to say.
GREET = "Your call was answered. Greet them, and say who you are and why you call, briefly."

# All from pick-up. Nobody has said hello: the bot begins.
HELLO_SECONDS = 2.0
# Nobody has made a sound: the bot hangs up.
NOBODY_SECONDS = 10.0
# Later words and tones are those of a conversation.
LISTEN_SECONDS = 30.0
# The longest greeting of a voicemail that is waited for.
GREETING_SECONDS = 60.0
# How long it is quiet after a person's "Hello?", after a longer sentence, which may be the first of
# a greeting, and after a question that wants an answer.
HELLO_QUIET_SECONDS = 0.4
SENTENCE_QUIET_SECONDS = 1.2
# After a sound of which no word has been recognised yet.
WORDLESS_QUIET_SECONDS = 2.0
QUESTION_QUIET_SECONDS = 0.8
HELLO_WORDS, HELLO_CHARACTERS = 3, 24
# Some voicemails have no beep.
NO_BEEP_SECONDS = 3.0
# The longest message.
MESSAGE_SECONDS = 60.0

# A beep, and what a fax machine answers with (ITU-T T.30: 2100 Hz, for 2.6 to 4 s).
BEEP_SECONDS, BEEP_HZ = 0.15, (350, 2400)
FAX_SECONDS, FAX_HZ = 1.0, (2050, 2150)

# What only one of them says, in the eight languages of phrases/. Without case.
ASKS_NAME = re.compile(
    r"(say|state|record) your name|see if (this|the) person|try to connect you|"
    r"(nennen|sagen) sie .{0,20}namen|diga su nombre|(dites|indiquez) votre nom|"
    r"(dica|pronunci) il suo nome|(zeg|noem) .{0,10}uw naam|(diga|indique) o seu nome|"
    r"お名前.{0,8}(おっしゃ|お話し)",
    re.IGNORECASE,
)
LEAVE_MESSAGE = re.compile(
    r"leave .{0,30}(message|your name)|(after|at) the (tone|beep)|voice ?mail|mailbox|"
    r"record your message|can('t|not| not) (come|get) to the phone|take your call|"
    r"(person|party|customer|subscriber|number) you.{0,30}(un|not )available|"
    r"nach dem .{0,8}ton|hinterlassen sie|nachricht hinterlassen|anrufbeantworter|"
    r"nicht erreichbar|(deje|dejar) .{0,8}mensaje|después de(l| la) (tono|señal)|buzón|"
    r"laiss(er|ez) .{0,15}message|après le (bip|signal)|messagerie|répondeur|"
    r"lasci(a|ate|are)? .{0,10}messaggio|dopo il (segnale|bip|tono)|segreteria|"
    r"na de (piep|toon)|laat .{0,20}bericht|spreek .{0,20}\bin\b|"
    r"deixe .{0,12}mensagem|(após|depois d)o (sinal|bip|tom)|caixa postal|"
    r"発信音|メッセージを(お|残)|留守番電話|電話に出ることができ",
    re.IGNORECASE,
)
ASKS_WHO = re.compile(
    r"who('s| is| am i| are you)\b.{0,10}(call|speak)|(reason|purpose) (for|of) .{0,6}call|"
    r"why you('re| are) calling|what .{0,10}(about|regarding)\b|"
    r"(grund|anlass) (ihres|des) anruf|wer (ist|ruft|spricht) d|worum geht|"
    r"quién (llama|habla)|motivo de (su|la) llamada|"
    r"qui (est à|appelle)|(motif|raison) de .{0,8}appel|"
    r"chi (parla|chiama)|motivo della|wie (belt|bent u)|reden van|quem (fala|está)|motivo da|"
    r"どちら様|ご用件",
    re.IGNORECASE,
)
MENU = re.compile(
    r"press (\d|zero|one|two|three|four|five|nine|star|pound|hash)|dial (\d|zero|one|two)|"
    r"main menu|(drücken|wählen) sie (die|bitte die|\d|eins|zwei)|"
    r"(pulse|marque|oprima) (el |la )?(\d|uno|dos|cero|tecla)|"
    r"(appuyez sur|tapez) (la |le )?(\d|un|deux|zéro|touche)|"
    r"(prema|digiti) (il |lo )?(\d|uno|due|zero|tasto)|toets (een|\d)|"
    r"(pressione|prima|marque) (o |a )?(\d|um|dois|zero|tecla)|番を押",
    re.IGNORECASE,
)


class Who(StrEnum):
    """Who, or what, picked up."""

    PERSON = "a person"
    SCREENING = "somebody who asks who is calling"
    VOICEMAIL = "a voicemail"
    MENU = "a phone menu"
    FAX = "a fax machine"
    NOBODY = "nobody who speaks"


# Talks to whoever is there; a voicemail may still follow.
TALKS = (Who.PERSON, Who.SCREENING)


class Listener:
    """Tells who picked up from what is heard.

    A person says something short and waits. A machine talks, and is known by its words or its beep,
    also after it was taken for a person: greetings have pauses.

    Attributes:
        who: Who picked up, as far as is known.
        is_spoken_to: Whether the bot is speaking to them; nobody hangs up in mid-sentence.
    """

    def __init__(self, *, clock: Callable[[], float]) -> None:
        """Begin when the call is picked up; `clock` counts seconds."""
        self.who: Who | None = None
        self.is_spoken_to = False
        self._clock = clock
        self._picked_up_at = clock()
        self._is_speaking = self._has_fallen_silent = False
        self._heard_at: float | None = None
        self._final = self._interim = ""
        self._heeded_characters = 0
        self._beep_at: float | None = None
        self._is_fax = False

    @property
    def is_quiet_from_the_start(self) -> bool:
        """Whether nothing has been heard yet, for long enough that the bot should begin."""
        return (
            self.who is None
            and self._heard_at is None
            and self._clock() - self._picked_up_at >= HELLO_SECONDS
        )

    @property
    def wants_message(self) -> bool:
        """Whether a voicemail is done with its greeting."""
        now = self._clock()
        if self.who is not Who.VOICEMAIL:
            return False
        is_late = now - self._picked_up_at >= GREETING_SECONDS
        return self._beep_at is not None or is_late or self._quiet_seconds(now) >= NO_BEEP_SECONDS

    def speech_began(self, ago: float = 0.0) -> None:
        """There is a voice, since `ago` seconds."""
        self._is_speaking = True
        self._heard_at = self._clock() - ago

    def speech_ended(self, ago: float = 0.0) -> None:
        """The voice fell silent, `ago` seconds before now."""
        self._is_speaking, self._has_fallen_silent = False, True
        self._heard_at = self._clock() - ago

    def words(self, text: str, *, is_final: bool) -> None:
        """These words were recognised; what is not final is replaced by what comes next."""
        if is_final:
            self._final, self._interim = f"{self._final} {text}".strip(), ""
        else:
            self._interim = text
        # Words that come late were spoken before.
        if self._heard_at is None:
            self._heard_at = self._clock()

    def tone(self, hz: float, seconds: float) -> None:
        """A steady tone of this frequency has lasted so long; when it ends, the last of it."""
        if FAX_HZ[0] <= hz <= FAX_HZ[1] and seconds >= FAX_SECONDS and not self._said:
            self._is_fax = True

    def tone_ended(self, hz: float, seconds: float) -> None:
        """A steady tone has ended."""
        if seconds >= BEEP_SECONDS and BEEP_HZ[0] <= hz <= BEEP_HZ[1]:
            self._beep_at = self._clock()

    def look(self) -> Who | None:
        """Return who picked up, as far as is known by now; None while it is not."""
        now = self._clock()
        is_early = now - self._picked_up_at < LISTEN_SECONDS
        if self.who is None or (self.who in TALKS and is_early):
            self.who = self._told(now) or self.who
        return self.who

    @property
    def word_count(self) -> int:
        """How many words of theirs have been recognised."""
        return len(self._recognised.split())

    @property
    def _recognised(self) -> str:
        return f"{self._final} {self._interim}".strip()

    @property
    def _said(self) -> str:
        # Without the question that was answered already, of which the last version comes later.
        return self._recognised[self._heeded_characters :].strip()

    def _quiet_seconds(self, now: float) -> float:
        return 0.0 if self._is_speaking or self._heard_at is None else now - self._heard_at

    def _told(self, now: float) -> Who | None:
        said, quiet = self._said, self._quiet_seconds(now)
        if self._is_fax:
            return Who.FAX
        if ASKS_NAME.search(said):
            if quiet < QUESTION_QUIET_SECONDS:
                return None
            # Where it beeped that was for the name. A voicemail may follow.
            self._beep_at, self._heeded_characters = None, len(self._recognised)
            return Who.SCREENING
        if self._beep_at is not None:
            return Who.VOICEMAIL
        if LEAVE_MESSAGE.search(said):
            return Who.VOICEMAIL
        if self.who:
            return None
        for known, who in ((ASKS_WHO, Who.SCREENING), (MENU, Who.MENU)):
            if known.search(said):
                return who if quiet >= QUESTION_QUIET_SECONDS else None
        if self._heard_at is None:
            is_late = now - self._picked_up_at >= NOBODY_SECONDS
            return Who.NOBODY if is_late and not self.is_spoken_to else None
        is_short = len(said.split()) <= HELLO_WORDS and len(said) <= HELLO_CHARACTERS
        # Words can be here before the voice activity detector has said that there is a voice.
        is_hello = is_short and self._has_fallen_silent
        patience = HELLO_QUIET_SECONDS if is_hello else SENTENCE_QUIET_SECONDS
        return Who.PERSON if quiet >= (patience if said else WORDLESS_QUIET_SECONDS) else None


class Tones:
    """Finds steady tones in mono PCM16: a beep, a fax. Voices and music move."""

    WINDOW_SECONDS = 0.04
    # Of the sound's energy in the tone; how far its frequency may wander.
    SHARE, WANDERS_HZ = 0.85, 40.0
    QUIET_RMS = 150.0

    def __init__(self, listener: Listener) -> None:
        """Tell `listener` of them."""
        self._listener = listener
        self._rest = b""
        self._hz = self._seconds = 0.0

    def feed(self, pcm: bytes, sample_rate: int) -> None:
        """Listen to the next piece of audio."""
        pcm = self._rest + pcm
        size = 2 * round(self.WINDOW_SECONDS * sample_rate)
        whole = len(pcm) - len(pcm) % size
        self._rest = pcm[whole:]
        for start in range(0, whole, size):
            hz = self._steady(np.frombuffer(pcm[start : start + size], "<i2"), sample_rate)
            if hz and (not self._seconds or abs(hz - self._hz) <= self.WANDERS_HZ):
                self._hz = hz
                self._seconds += self.WINDOW_SECONDS
                self._listener.tone(self._hz, self._seconds)
            elif self._seconds:
                self._listener.tone_ended(self._hz, self._seconds)
                self._seconds = 0.0

    def _steady(self, samples: np.ndarray[Any, np.dtype[np.int16]], sample_rate: int) -> float:
        """The frequency of the one tone in a window; 0.0 where there is none."""
        sound = samples.astype(np.float64)
        sound -= sound.mean()
        if np.sqrt(np.mean(sound**2)) < self.QUIET_RMS:
            return 0.0
        energy = np.abs(np.fft.rfft(sound * np.hanning(len(sound)))) ** 2
        peak = int(np.argmax(energy))
        share = energy[max(0, peak - 2) : peak + 3].sum() / energy.sum()
        return peak * sample_rate / len(sound) if share >= self.SHARE else 0.0


class Opening:
    """The first half minute of a call that the bot placed.

    Attributes:
        ears: Hear words and tones; stand before the user aggregator, which takes the words.
        gate: Hears voices, and keeps what the LLM is not to answer from it; stands before the LLM.
    """

    def __init__(self, errand: "Errand", floor: Floor, *, to_say: str = "") -> None:
        """Prepare for the call that is made for `errand`.

        Args:
            errand: Whom the bot calls, and why.
            floor: Of the call.
            to_say: What the LLM is told to say besides, where CALL_GREETING is blank.
        """
        self._to_say = to_say
        self.ears = _Ears()
        self.gate = _Gate()
        self._floor = floor
        self._greeting = errand.fill_in(config.setting("CALL_GREETING"))
        message = config.text(VOICEMAIL_FILE) if VOICEMAIL_FILE.exists() else ""
        self._message = errand.fill_in(message).strip()
        self._listener: Listener | None = None
        self._who: Who | None = None
        self._voice_failed = asyncio.Event()
        self._has_spoken = self._leaves_message = self._answers_first_words = False
        self._words_when_greeted = 0
        self._turns_when_asked: int | None = None
        self._looks_since_asked = 0
        self._looks_without_turn = 0
        self._tasks: set[asyncio.Task[None]] = set()

    def picked_up(self, worker: "PipelineWorker", ending: "Ending", recovery: "Recovery") -> None:
        """Begin to listen: somebody, or something, has picked up."""
        self._worker, self._ending, self._recovery = worker, ending, recovery
        # The time of what is heard, not of this machine, which may stumble.
        listener = Listener(clock=lambda: self.gate.seconds)
        self._listener = self.ears.listener = self.gate.listener = listener
        recovery.look(self._look)

    def how_it_ended(self) -> tuple[str, str]:
        """The reason, one of roark.call.ENDINGS, and its detail, when the other side hangs up."""
        if self._listener is None:
            return "no-answer", "nobody picked up"
        if self._who is Who.VOICEMAIL:
            return "voicemail", "it hung up before the whole message was left"
        if self._who is Who.SCREENING and (
            self._turns_when_asked is None or self._floor.caller_turns <= self._turns_when_asked
        ):
            return "declined", "they asked who is calling, and hung up when they knew"
        return "client-disconnected", "the callee hung up"

    def _look(self) -> None:
        listener = self._listener
        if listener is None or self._ending.has_begun or self._leaves_message:
            return
        if self._who is Who.SCREENING and self._turns_when_asked is None:
            # A turn is over a moment before it is counted; one without words is not.
            self._looks_since_asked += not self._floor.turn_is_open
            if self._looks_since_asked > 1:
                self._turns_when_asked = self._floor.caller_turns
        if listener.is_quiet_from_the_start and not self._has_spoken:
            self._start(self._greet())
        listener.is_spoken_to = self._floor.bot_speaks or self._floor.answer_is_due
        who = listener.look()
        if who and who is not self._who:
            self._who = who
            logger.info(f"Picked up by {who}")
            self._act(who)
        if who is Who.VOICEMAIL and listener.wants_message and not self._leaves_message:
            self._leaves_message = True
            self._start(self._leave_message())
        if self.gate.is_closed and who in TALKS:
            # The turn of their first words has been answered by the greeting.
            self._looks_without_turn += not self._floor.turn_is_open
            if self._looks_without_turn > 2:
                self.gate.is_closed = False
                # Whoever went on in the same turn has said more than the greeting has answered.
                has_more = listener.word_count > self._words_when_greeted + 1
                if (self._answers_first_words or has_more) and self.gate.has_held:
                    self._start(self._worker.queue_frame(LLMRunFrame()))

    def _act(self, who: Who) -> None:
        match who:
            case Who.PERSON if self._has_spoken:
                self._answers_first_words = True
            case Who.PERSON:
                self._start(self._greet())
            case Who.SCREENING:
                self._start(self._greet())
            case Who.VOICEMAIL:
                self.gate.is_closed = self.ears.is_deaf = True
                # Nothing but the message, and nobody interrupts that.
                self._floor.is_saying_goodbye = self._floor.is_final = True
                self._recovery.leave_to(self._voice_failed.set)
                if not self._message:
                    detail = "a voicemail answered, and voicemail.md is empty"
                    self._start(self._ending.now("voicemail", detail))
                elif self._has_spoken:
                    self._start(self.ears.broadcast_interruption())
            case Who.NOBODY:
                detail = f"somebody picked up, and nobody spoke for {NOBODY_SECONDS:g} s"
                self._start(self._ending.now("no-answer", detail))
            case Who.MENU | Who.FAX:
                self._start(self._ending.now("failed", f"{who} answered"))

    async def _greet(self) -> None:
        self._has_spoken = True
        if self._listener:
            self._words_when_greeted = self._listener.word_count
            self.ears.answered_words = self._words_when_greeted
        if self._greeting:
            frame = TTSSpeakFrame(self._greeting, append_to_context=True)
        else:
            self.gate.lets_pass = 1
            frame = instruction(f"{GREET} {self._to_say}".strip())
        await self._worker.queue_frame(frame)

    async def _leave_message(self) -> None:
        for attempt in range(TTS_ATTEMPTS):
            if attempt:
                await self._recovery.break_off()
            if self._ending.has_begun:
                return
            if await self._says_message():
                await self._ending.now("voicemail", "the message of voicemail.md was left")
                return
        await self._ending.now("error", "the voicemail's message could not be said")

    async def _says_message(self) -> bool:
        """Say the message; whether it was heard, and the voice did not fail before its end."""
        self._voice_failed.clear()
        await self._worker.queue_frame(TTSSpeakFrame(self._message, append_to_context=True))
        heard = asyncio.create_task(self._is_heard())
        failed = asyncio.create_task(self._voice_failed.wait())
        await asyncio.wait([heard, failed], return_when=asyncio.FIRST_COMPLETED)
        failed.cancel()
        if self._voice_failed.is_set():
            heard.cancel()
            return False
        return heard.result()

    async def _is_heard(self) -> bool:
        is_through = await self._worker.flush_pipeline(MESSAGE_SECONDS)
        await asyncio.sleep(LAST_WORD_SECONDS)
        # A voice that says nothing lets all through.
        return is_through and not self._floor.is_answering

    def _start(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _Ears(FrameProcessor):
    """Tells the listener what is heard; once `is_deaf`, lets no more words through.

    Attributes:
        answered_words: So many of the first words are answered by the greeting; where the last of
            them come late, they are not to interrupt it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_deaf = False
        self.answered_words = 0
        self._listener: Listener | None = None
        self._tones: Tones | None = None

    @property
    def listener(self) -> Listener | None:
        return self._listener

    @listener.setter
    def listener(self, listener: Listener) -> None:
        self._listener, self._tones = listener, Tones(listener)

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        await super().process_frame(frame, direction)
        if listener := self._listener:
            match frame:
                case InputAudioRawFrame() if self._tones:
                    self._tones.feed(frame.audio, frame.sample_rate)
                case TranscriptionFrame() | InterimTranscriptionFrame():
                    is_final = not isinstance(frame, InterimTranscriptionFrame)
                    listener.words(frame.text, is_final=is_final)
                    if self.is_deaf or listener.word_count <= self.answered_words:
                        return
                case _:
                    pass
        await self.push_frame(frame, direction)


class _Gate(FrameProcessor):
    """Keeps requests from the LLM while `is_closed`, but for the next `lets_pass`.

    Tells the listener when there is a voice, and counts time for it: here sound and what the voice
    activity detector made of it come in one order, however late they are.

    Attributes:
        seconds: How much sound has been looked at for a voice.
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_closed = True
        self.has_held = False
        self.lets_pass = 0
        self.seconds = 0.0
        self.listener: Listener | None = None

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        await super().process_frame(frame, direction)
        if (listener := self.listener) and direction is FrameDirection.DOWNSTREAM:
            match frame:
                case InputAudioRawFrame():
                    self.seconds += frame.num_frames / frame.sample_rate
                case VADUserStartedSpeakingFrame():
                    listener.speech_began(frame.start_secs)
                case VADUserStoppedSpeakingFrame():
                    listener.speech_ended(frame.stop_secs)
                case _:
                    pass
        is_request = isinstance(frame, LLMContextFrame) and direction is FrameDirection.DOWNSTREAM
        if is_request and self.is_closed:
            if not self.lets_pass:
                self.has_held = True
                return
            self.lets_pass -= 1
        await self.push_frame(frame, direction)
