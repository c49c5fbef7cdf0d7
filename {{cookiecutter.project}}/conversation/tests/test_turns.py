"""Who has the turn: interruptions, backchannels, a protected greeting, keys pressed on a phone."""

import asyncio
from collections import deque
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from harness import SECONDS, Harness, run_harness, skip_where_the_recogniser_ends_turns
from pipecat.frames.frames import (
    BotStartedSpeakingFrame,
    BotStoppedSpeakingFrame,
    Frame,
    InterimTranscriptionFrame,
    InterruptionFrame,
    LLMContextFrame,
    LLMMessagesAppendFrame,
    ProposedUserStartedSpeakingFrame,
    ProposedUserStoppedSpeakingFrame,
    StartFrame,
    TranscriptionFrame,
    TTSAudioRawFrame,
    TTSTextFrame,
    UserBackchannelFrame,
    UserSpeakingFrame,
    VADUserStartedSpeakingFrame,
    VADUserStoppedSpeakingFrame,
)
from pipecat.pipeline.pipeline import Pipeline
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.processors.aggregators.llm_response_universal import LLMContextAggregatorPair
from pipecat.processors.frame_processor import FrameDirection, FrameProcessor
from pipecat.services.cartesia.turns.stt import CartesiaTurnsSTTService
from pipecat.services.deepgram.flux.stt import DeepgramFluxSTTService
from pipecat.tests.utils import SleepFrame, run_test
from pipecat.turns.user_stop import EagerUserTurnStopStrategy, ExternalUserTurnStopStrategy
from pipecat.utils.text.base_text_aggregator import TextType

from conversation import hold, turns
from conversation.caller_words import CallerWords
from conversation.floor import Floor
from conversation.hold import Hold
from conversation.line_clock import LineClock
from conversation.turn_end import PauseUserTurnStopStrategy
from conversation.turns import InterruptionUserTurnStartStrategy, is_backchannel, params
from conversation.vad import HushVADAnalyzer
from rehearsal.callers.twilio import TwilioCaller
from rehearsal.callers.webrtc import WebRTCCaller
from rehearsal.engines.engine import Heard, ToolCall
from rehearsal.engines.scripted import Answer, Script, ScriptedRecogniser

pytestmark = pytest.mark.anyio

BOTH_TRANSPORTS = pytest.mark.parametrize("transport", ["twilio", "webrtc"])
STORY = " ".join(["Once upon a time there was a telephone that would not stop ringing."] * 3)
RECORDED = "Welcome, this call is recorded."
# As long as people's are, and such that the voice activity detector hears it on a phone too:
# OpenAI is told by it when to recognise what was said.
MHM = "mh" + "m" * 11

# 0.45 s of voice without a word, such that the voice activity detector hears it every time.
COUGH = "d" + "a" * 14
GOODBYE = "Goodbye, and thank you."
PERSON = Script(
    greeting="Hello.",
    hears=("What time is it?", "", "", "That is all."),
    answers=(
        Answer(heard="time", says="Nine o'clock."),
        Answer(told="say it again", says="Pardon?"),
        Answer(heard="where", says="In Main Street."),
        Answer(heard="when", says="From nine to five."),
        Answer(heard="all", says=GOODBYE, calls=(ToolCall("end_call", {"goodbye": "Bye-bye."}),)),
        Answer(told="cut you off", says="Sorry."),
    ),
)

INTERRUPTIONS = 3
# aiortc 1.16 plays nothing to this caller before it has 4 packets of 20 ms.
HELD_BACK_SECONDS = {"twilio": 0.0, "webrtc": 0.08}


@pytest.fixture
async def harness(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The bot and its world; whatever the caller says, the bot tells a long story."""
    monkeypatch.setenv("LANGUAGE", "en")
    async with run_harness(monkeypatch, tmp_path) as harness:
        harness.engine.script = Script.parse(
            {"greeting": STORY, "hears": ["Mhm.", "Stop, please."], "answers": [{"says": STORY}]}
        )
        yield harness


def user_messages(harness: Harness) -> list[str]:
    return [m["content"] for m in harness.engine.asked[-1] if m["role"] == "user"]


@pytest.mark.slow
@pytest.mark.timed
@BOTH_TRANSPORTS
async def test_mhm_does_not_cut_the_bot_and_an_interruption_does_within_300_ms(
    harness: Harness, transport: str
) -> None:
    """The median of three interruptions: one may fall into a pause of the machine.

    Where it is busy with something else for longer there are up to nine.
    """
    seconds: list[float] = []
    async with harness.caller(transport) as caller:
        await caller.hear(within=SECONDS)
        mhm = await harness.say(caller, MHM)
        assert mhm.end - mhm.start > 0.3
        # The scripted recogniser takes what comes within a second for the same stretch of speech.
        await asyncio.sleep(1.2)
        # By what it says, not by its sound: on a busy machine that has holes.
        assert " ".join(harness.engine.spoken).count("Once") <= 3, "the bot was cut, and began anew"
        assert caller.heard.utterances[-1].end > mhm.end + 0.5, "the bot was cut"
        while len(seconds) < INTERRUPTIONS or (
            median(seconds[-INTERRUPTIONS:]) >= 0.3 and len(seconds) < 3 * INTERRUPTIONS
        ):
            interruption = await harness.say(caller, "whatever the script hears")
            answer = await caller.hear(since=interruption.end, within=SECONDS)
            cut_at = max(u.end for u in caller.heard.utterances if u.start < answer.start)
            seconds.append(cut_at - interruption.start - HELD_BACK_SECONDS[transport])
            await asyncio.sleep(0.5)
    await harness.over()
    # Two of them may be one turn, where the machine was too slow to answer in between.
    assert " ".join(user_messages(harness)) == " ".join(["Stop, please."] * len(seconds))
    skip_where_the_recogniser_ends_turns()
    assert median(seconds[-INTERRUPTIONS:]) < 0.3, seconds


@pytest.mark.slow
@pytest.mark.timed
async def test_a_caller_who_coughs_and_types_is_answered_each_time_once_and_in_order(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness.engine.script = PERSON
    monkeypatch.setenv("SILENCE_SECONDS", "20")
    async with harness.caller("webrtc") as caller:
        assert isinstance(caller, WebRTCCaller)
        await harness.hear_said(caller, "Hello.")

        # A cough while the LLM thinks does not cost the answer, nor a second request.
        harness.server("llm").faults.slow_s = 1.5
        said = await harness.say(caller)
        llm = harness.server("llm")
        await harness.providers.log.until(lambda: len(llm.requests) == 2, within_s=SECONDS)
        # Which may be before the turn is over.
        async with asyncio.timeout(SECONDS):
            while not any(one.get("type") == "user-stopped-speaking" for one in caller.messages):
                await asyncio.sleep(0.02)
        cough = await harness.say(caller, COUGH)
        answer = await caller.hear(since=said.end, within=SECONDS)
        assert cough.start < answer.start < cough.end + 3.0
        await harness.hear_said(caller, "Nine o'clock.")
        assert len(harness.engine.asked) == 2
        llm.faults.slow_s = 0.0

        # A cough into the silence is asked about.
        skip_where_the_recogniser_ends_turns()
        cough = await harness.say(caller, COUGH)
        question = await caller.hear(since=cough.end, within=SECONDS)
        assert question.start - cough.end < 6.0
        await harness.hear_said(caller, "Pardon?")

        # What is typed is answered aloud, or, if the client wants that, to be read.
        type_text(caller, "Where are you?")
        await harness.hear_said(caller, "In Main Street.")
        asked = len(harness.engine.asked)
        type_text(caller, "When are you open?", audio_response=False)
        async with asyncio.timeout(SECONDS):
            while not any("five" in str(message) for message in caller.messages):
                await asyncio.sleep(0.02)
        assert len(harness.engine.asked) == asked + 1

        # A goodbye in the answer that ends the call is the only one.
        await harness.say(caller)
        await asyncio.wait_for(caller.ended.wait(), SECONDS)
    await harness.over()
    assert harness.received.ended
    spoken = [text.strip() for text in harness.spoken]
    assert " ".join(spoken) == f"Hello. Nine o'clock. Pardon? In Main Street. {GOODBYE}"
    transcript = harness.received.ended["transcript"]
    assert [turn["content"] for turn in transcript if turn["role"] == "user"] == [
        *("What time is it?", "Where are you?", "When are you open?", "That is all.")
    ]
    starts = [turn["audioOffsetMs"] for turn in transcript]
    assert starts == sorted(starts)
    assert harness.record["ending"]["reason"] == "agent-ended"


def type_text(caller: WebRTCCaller, text: str, *, audio_response: bool = True) -> None:
    """Send what RTVI's clients send when the caller types."""
    options = {"run_immediately": True, "audio_response": audio_response}
    data = {"content": text, "options": options}
    caller.send({"label": "rtvi-ai", "type": "send-text", "id": "typed", "data": data})


@pytest.mark.parametrize("protected", [True, False])
async def test_a_protected_greeting_is_said_to_its_end(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, protected: bool
) -> None:
    # So long that even a busy machine has time to interrupt it.
    greeting = RECORDED if protected else " ".join([STORY] * 3)
    harness.engine.script = Script.parse({"greeting": greeting, "hears": ["Stop."], "answers": []})
    monkeypatch.setenv("PROTECT_GREETING", "1" if protected else "")
    async with harness.caller("twilio") as caller:
        await caller.hear(within=SECONDS)
        await harness.say(caller, "whatever")
        await caller.hear_out(quiet=0.5, within=SECONDS)
    await harness.over()
    assert harness.received.ended
    said = harness.received.ended.get("transcript", [])
    heard = " ".join(turn["content"] for turn in said if turn["role"] == "assistant")
    # What comes after it, if the caller is answered before they hang up, is no part of it.
    assert heard.startswith(greeting) is protected


async def test_keys_reach_the_llm_as_text(harness: Harness) -> None:
    harness.engine.script = Script.parse({"greeting": "Hello.", "answers": [{"says": "Noted."}]})
    async with harness.caller("twilio") as caller:
        assert isinstance(caller, TwilioCaller)
        await caller.hear(within=SECONDS)
        await caller.hear_out(quiet=0.4, within=SECONDS)
        for key in "42#":
            await caller.press(key)
        await harness.providers.log.until(
            lambda: "Noted." in " ".join(harness.spoken), within_s=SECONDS
        )
    await harness.over()
    assert user_messages(harness) == ["DTMF: 42#"]


@pytest.mark.parametrize("text", ["Mhm.", "Mm-hmm.", "Uh-huh!", "Yeah, okay.", "I see."])
def test_listening_noises_are_backchannels(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("LANGUAGE", "en")
    assert is_backchannel(text)


@pytest.mark.parametrize("text", ["", "No.", "Stop.", "Yeah, but wait.", "DTMF: 1"])
def test_anything_else_is_none(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("LANGUAGE", "en")
    assert not is_backchannel(text)


class Line:
    """The strategy under test, what it did, and a clock to set."""

    def __init__(self, *, is_proposed: bool = False) -> None:
        self.now = 100.0
        self.turns = 0
        self.pushed: list[Frame] = []
        self.broadcast: list[type[Frame]] = []
        self.floor = Floor(clock=lambda: self.now)
        self.floor.is_greeting = False
        self.strategy = InterruptionUserTurnStartStrategy(
            self.floor, LineClock(clock=lambda: self.now), is_proposed=is_proposed
        )
        self.strategy.add_event_handler("on_user_turn_started", self._on_turn)
        self.strategy.add_event_handler("on_push_frame", self._on_push)
        self.strategy.add_event_handler("on_broadcast_frame", self._on_broadcast)

    async def _on_turn(self, *_: object) -> None:
        self.turns += 1
        await self.strategy.handle_user_turn_started()

    async def _on_push(self, _strategy: object, frame: Frame, _direction: object) -> None:
        self.pushed.append(frame)

    async def _on_broadcast(self, _strategy: object, kind: type[Frame], **_: object) -> None:
        self.broadcast.append(kind)

    async def hears(self, *frames: Frame, after: float = 0.0) -> int:
        """Let `after` seconds pass, then the frames; return the turns started so far."""
        self.now += after
        for frame in frames:
            await self.strategy.process_frame(frame)
        return self.turns


def heard(text: str) -> TranscriptionFrame:
    return TranscriptionFrame(text=text, user_id="", timestamp="")


VAD_STARTED = VADUserStartedSpeakingFrame(start_secs=0.2)


class Sounds(Floor):
    """A floor whose caller makes a sound until it has been looked at so often."""

    looks = 0
    until = 3

    def __init__(self) -> None:
        super().__init__()
        self.is_greeting = False

    @property
    def caller_sounds(self) -> bool:
        self.looks += 1
        return self.looks <= self.until

    @caller_sounds.setter
    def caller_sounds(self, _is_sound: bool) -> None:
        pass


def set_event() -> asyncio.Event:
    event = asyncio.Event()
    event.set()
    return event


AUDIO = TTSAudioRawFrame(bytes(640), 16000, 1)
WORD = TTSTextFrame("Yes.", TextType.SENTENCE)


async def test_an_answer_does_not_begin_while_the_caller_makes_a_sound_and_goes_on_if_they_do() -> (
    None
):
    floor = Sounds()
    await run_test(
        Hold(floor, set_event()),
        frames_to_send=[WORD, AUDIO],
        expected_down_frames=[TTSTextFrame, TTSAudioRawFrame],
    )
    assert floor.looks == floor.until + 1


async def test_an_answer_held_back_is_dropped_by_the_interruption() -> None:
    floor = Sounds()
    floor.until = 1_000_000
    await run_test(
        Hold(floor, set_event()),
        frames_to_send=[WORD, AUDIO, SleepFrame(0.05), InterruptionFrame()],
        expected_down_frames=[InterruptionFrame],
    )


async def test_a_sound_that_does_not_end_holds_no_answer_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hold, "LONGEST_HOLD_SECONDS", 0.01)
    floor = Sounds()
    floor.until = 1_000_000
    await run_test(
        Hold(floor, set_event()), frames_to_send=[AUDIO], expected_down_frames=[TTSAudioRawFrame]
    )


async def test_the_next_calls_models_are_loaded_before_it_and_no_two_calls_share_any(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded: list[HushVADAnalyzer] = []

    def load() -> HushVADAnalyzer:
        loaded.append(HushVADAnalyzer())
        return loaded[-1]

    monkeypatch.setattr(turns, "_spare", deque(maxlen=1))
    monkeypatch.setattr(turns, "HushVADAnalyzer", load)
    for _ in range(2):
        turns.prepare()
    assert len(loaded) == 1
    of_calls = [params(Floor()).vad_analyzer for _ in range(2)]
    assert of_calls == loaded
    assert len(loaded) == 2


async def test_what_is_ready_before_the_client_can_play_it_waits_and_is_not_lost() -> None:
    client_ready = asyncio.Event()
    asyncio.get_running_loop().call_later(0.05, client_ready.set)
    waits = Hold(Floor(), client_ready)
    was_ready: list[bool] = []

    @waits.event_handler("on_after_push_frame")
    async def on_after_push_frame(_hold: Hold, frame: Frame) -> None:
        if isinstance(frame, TTSAudioRawFrame):
            was_ready.append(client_ready.is_set())

    await run_test(waits, frames_to_send=[AUDIO], expected_down_frames=[TTSAudioRawFrame])
    assert was_ready == [True]


async def test_while_the_bot_is_silent_the_first_sound_takes_the_turn() -> None:
    assert await Line().hears(VAD_STARTED) == 1


async def test_while_the_bot_speaks_a_sound_alone_does_not() -> None:
    line = Line()
    assert await line.hears(BotStartedSpeakingFrame(), VAD_STARTED, UserSpeakingFrame()) == 0
    assert await line.hears(VADUserStoppedSpeakingFrame(), heard("Mhm."), after=0.3) == 0
    assert [type(frame) for frame in line.pushed] == [UserBackchannelFrame]


async def test_a_word_that_means_something_takes_the_turn_at_once() -> None:
    word = InterimTranscriptionFrame(text="Stop", user_id="", timestamp="")
    assert await Line().hears(BotStartedSpeakingFrame(), VAD_STARTED, word) == 1


async def test_speech_that_goes_on_takes_the_turn_without_a_word_recognised() -> None:
    line = Line()
    await line.hears(BotStartedSpeakingFrame(), VAD_STARTED)
    assert await line.hears(UserSpeakingFrame(), after=0.2) == 0
    assert await line.hears(UserSpeakingFrame(), after=0.25) == 1


async def test_a_sound_that_is_over_is_not_speech_that_goes_on() -> None:
    line = Line()
    await line.hears(BotStartedSpeakingFrame(), VAD_STARTED)
    line.floor.caller_is_hushed = True
    assert await line.hears(UserSpeakingFrame(), after=0.5) == 0


async def test_a_voice_that_had_no_words_cuts_the_bot_off_once_and_words_still_do() -> None:
    line = Line()
    interim = InterimTranscriptionFrame(text="Where are you?", user_id="", timestamp="")
    await line.hears(interim)
    await line.strategy.handle_user_turn_stopped()
    turns = line.turns
    for is_first in (True, False, False):
        # A television: it goes on, and into what the bot begins to say.
        await line.hears(BotStartedSpeakingFrame(), VAD_STARTED)
        turns += is_first
        assert await line.hears(UserSpeakingFrame(), after=0.5) == turns
        await line.hears(VADUserStoppedSpeakingFrame(), after=2.0)
        await line.strategy.handle_user_turn_stopped()
    assert await line.hears(interim, after=0.1) == turns + 1


@pytest.mark.parametrize(
    ("frame", "after", "turns"),
    [
        (VADUserStoppedSpeakingFrame(), 0.3, 0),
        # The detector goes on for 0.2 s after a cough of 0.5.
        (UserSpeakingFrame(), 0.5, 0),
        (UserSpeakingFrame(), 0.65, 1),
        (InterimTranscriptionFrame(text="Oh", user_id="", timestamp=""), 0.1, 1),
        # Never both at once.
        (BotStartedSpeakingFrame(), 0.1, 1),
    ],
)
async def test_while_the_bot_owes_an_answer_a_short_sound_without_words_does_not_take_the_turn(
    frame: Frame, after: float, turns: int
) -> None:
    line = Line()
    line.floor.bot_owes()
    assert await line.hears(VAD_STARTED) == 0
    assert await line.hears(frame, after=after) == turns


async def test_speech_into_the_end_of_the_bots_takes_the_turn() -> None:
    line = Line()
    await line.hears(BotStartedSpeakingFrame(), VAD_STARTED)
    assert await line.hears(BotStoppedSpeakingFrame(), after=0.1) == 1


@pytest.mark.parametrize(
    ("recognised_after", "seconds_before", "answers"), [(0.1, 0.4, 1), (0.8, 0.4, 0), (0.1, 3.0, 0)]
)
async def test_a_yeah_just_before_the_bot_falls_silent_is_an_answer(
    monkeypatch: pytest.MonkeyPatch,
    recognised_after: float,
    seconds_before: float,
    answers: int,
) -> None:
    monkeypatch.setenv("LANGUAGE", "en")
    line = Line()
    await line.hears(BotStartedSpeakingFrame(), VAD_STARTED, VADUserStoppedSpeakingFrame())
    await line.hears(heard("Yeah."), after=recognised_after)
    await line.hears(BotStoppedSpeakingFrame(), after=seconds_before)
    messages = [frame for frame in line.pushed if isinstance(frame, LLMMessagesAppendFrame)]
    assert len(messages) == answers


@pytest.mark.parametrize(
    ("text", "takes_turn"), [("Hello?", False), ("Is anybody there?", False), ("No.", True)]
)
async def test_a_hello_before_or_into_the_greeting_is_answered_by_it(
    monkeypatch: pytest.MonkeyPatch, text: str, takes_turn: bool
) -> None:
    monkeypatch.setenv("LANGUAGE", "en")
    line = Line()
    line.floor.is_greeting = True
    line.floor.bot_owes()
    assert bool(await line.hears(VAD_STARTED, heard(text))) is takes_turn
    line = Line()
    line.floor.is_greeting = True
    interim = InterimTranscriptionFrame(text=text, user_id="", timestamp="")
    await line.hears(BotStartedSpeakingFrame(), VAD_STARTED, interim, VADUserStoppedSpeakingFrame())
    # Its last words may come when the greeting is over.
    turns = await line.hears(BotStoppedSpeakingFrame(), heard(text), after=0.4)
    assert bool(turns) is takes_turn
    assert not any(isinstance(frame, LLMMessagesAppendFrame) for frame in line.pushed)


async def test_what_the_bot_begins_to_say_in_the_callers_turn_is_broken_off() -> None:
    """It was on its way when the caller began."""
    line = Line()
    await line.hears(VAD_STARTED, BotStartedSpeakingFrame())
    assert line.broadcast == [InterruptionFrame]
    await line.strategy.handle_user_turn_stopped()
    await line.hears(VADUserStoppedSpeakingFrame(), BotStartedSpeakingFrame())
    assert line.broadcast == [InterruptionFrame]


async def test_the_bots_own_words_are_dropped_and_then_its_own_sound_does_not_cut_it_off() -> None:
    line = Line()
    line.floor.bot_said("We are open from nine to five today.")
    line.floor.bot_heard()
    sent = [heard("open from nine to five"), heard("Stop, please.")]
    down, _ = await run_test(CallerWords(line.floor), frames_to_send=sent)
    assert [f.text for f in down if isinstance(f, TranscriptionFrame)] == ["Stop, please."]
    assert line.floor.hears_itself

    await line.hears(BotStartedSpeakingFrame(), VAD_STARTED)
    assert await line.hears(UserSpeakingFrame(), after=1.0) == 0
    assert await line.hears(BotStoppedSpeakingFrame(), VAD_STARTED, after=0.1) == 0
    assert await line.hears(BotStartedSpeakingFrame(), heard("Stop, please.")) == 1


async def test_what_is_the_bots_own_is_so_when_the_recogniser_is_certain_and_then_no_more() -> None:
    now = 0.0

    class Later(CallerWords):
        async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
            nonlocal now
            now += 0.4 if isinstance(frame, TranscriptionFrame | InterimTranscriptionFrame) else 0.0
            await super().process_frame(frame, direction)

    floor = Floor(clock=lambda: now)
    floor.bot_said("I wrote it down for Tuesday.")
    floor.bot_heard()
    floor.bot_silent()
    guess = InterimTranscriptionFrame(text="tuesday", user_id="", timestamp="")
    sent = [guess, heard("Tuesday."), heard("Tuesday.")]
    down, _ = await run_test(Later(floor), frames_to_send=sent)
    assert len([frame for frame in down if isinstance(frame, TranscriptionFrame)]) == 1


def goodbye(*, is_final: bool = False) -> Line:
    """A line on which the bot is saying goodbye."""
    line = Line()
    line.floor.is_saying_goodbye, line.floor.is_final = True, is_final
    return line


@pytest.mark.parametrize("text", ["Bye.", "Thank you, bye bye!", "Okay, thanks.", "You too."])
async def test_a_goodbye_returned_or_a_cough_does_not_cut_the_bots(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("LANGUAGE", "en")
    line = goodbye()
    await line.hears(BotStartedSpeakingFrame(), VAD_STARTED)
    assert await line.hears(UserSpeakingFrame(), heard(text), after=1.0) == 0
    assert await line.hears(BotStoppedSpeakingFrame()) == 0
    assert await line.hears(VAD_STARTED) == 0
    assert not any(isinstance(frame, LLMMessagesAppendFrame) for frame in line.pushed)


async def test_a_sentence_into_the_goodbye_takes_the_turn_unless_nothing_can_answer_it() -> None:
    sentence = heard("Wait, what about Tuesday?")
    assert await goodbye().hears(BotStartedSpeakingFrame(), sentence) == 1
    assert await goodbye(is_final=True).hears(BotStartedSpeakingFrame(), sentence) == 0


@pytest.mark.slow
@pytest.mark.parametrize("speculates", [True, False])
async def test_an_answer_begun_before_the_turn_has_ended_is_given_once_and_runs_a_tool_once(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, speculates: bool
) -> None:
    skip_where_the_recogniser_ends_turns()
    monkeypatch.setenv("SPECULATE", "" if speculates else "0")
    # Time enough to begin the answer in, on a busy machine too.
    monkeypatch.setenv("PATIENCE_SECONDS", "1.0")
    goodbye = {"goodbye": GOODBYE}
    ends: list[bool] = []
    finalize = PauseUserTurnStopStrategy.trigger_user_turn_finalized

    async def note(strategy: PauseUserTurnStopStrategy, **how: Any) -> None:
        ends.append(how.get("confirms_speculation", False))
        await finalize(strategy, **how)

    monkeypatch.setattr(PauseUserTurnStopStrategy, "trigger_user_turn_finalized", note)
    harness.engine.script = Script.parse(
        {
            "greeting": "Hello.",
            "hears": ["Can you hear me?", "Goodbye."],
            "answers": [
                {"heard": "hear me", "says": "Yes, I can."},
                {"heard": "goodbye", "calls": [{"name": "end_call", "arguments": goodbye}]},
            ],
        }
    )
    async with harness.caller("twilio") as caller:
        await caller.hear(within=SECONDS)
        await caller.hear_out(quiet=0.4, within=SECONDS)
        await harness.say(caller, "as long as a question is")
        await harness.hear_said(caller, "Yes, I can.")
        await harness.say(caller, "as long as a goodbye is")
        await asyncio.wait_for(caller.ended.wait(), SECONDS)
    await harness.over()
    assert harness.spoken == ["Hello.", "Yes, I can.", GOODBYE]
    # A tool is not run before the turn has ended, so that answer is asked for again. An answer to
    # what is half a sentence, where the other half is late, is one more that nobody hears.
    assert ends == [speculates, False]
    asked = len(harness.engine.asked)
    assert asked >= 4 if speculates else asked == 3
    assert harness.record["ending"]["reason"] == "agent-ended"


@pytest.mark.slow
async def test_what_was_answered_is_known_though_the_recogniser_never_confirmed_it(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_where_the_recogniser_ends_turns()

    async def nothing(_recogniser: ScriptedRecogniser) -> list[Heard]:
        return []

    monkeypatch.setattr(ScriptedRecogniser, "finalize", nothing)
    harness.engine.script = PERSON
    async with harness.caller("twilio") as caller:
        await harness.hear_greeting(caller)
        await harness.say(caller)
        await harness.hear_said(caller, "Nine o'clock.")
    await harness.over()
    assert harness.spoken == ["Hello.", "Nine o'clock."]
    said = [(turn["role"], turn["text"]) for turn in harness.record["turns"]]
    assert said == [
        ("assistant", "Hello."),
        ("user", "What time is it?"),
        ("assistant", "Nine o'clock."),
    ]


@pytest.mark.parametrize("service", [DeepgramFluxSTTService, CartesiaTurnsSTTService])
@pytest.mark.parametrize("is_eager", [False, True])
async def test_a_recogniser_that_ends_turns_itself_is_believed_and_ours_stands_before_it(
    monkeypatch: pytest.MonkeyPatch,
    service: type[DeepgramFluxSTTService | CartesiaTurnsSTTService],
    is_eager: bool,
) -> None:
    monkeypatch.setenv("LANGUAGE", "en")
    floor = Floor()
    floor.is_greeting = False
    own = params(floor, service(api_key="rehearsal", enable_eager_end_of_turn=is_eager))
    strategies = own.user_turn_strategies
    assert strategies and strategies.stop
    kind = EagerUserTurnStopStrategy if is_eager else ExternalUserTurnStopStrategy
    assert [type(strategy) for strategy in strategies.stop] == [kind]

    context = LLMContext()
    caller = LLMContextAggregatorPair(context, user_params=own).user()
    begins, ends = ProposedUserStartedSpeakingFrame(), ProposedUserStoppedSpeakingFrame()
    sent = [begins, heard("Is it nine?"), ends, SleepFrame(0.1)]
    down, _ = await run_test(caller, frames_to_send=sent)
    # No detector of ours was asked, which would have waited for one of its own.
    assert sum(isinstance(frame, LLMContextFrame) for frame in down) == 1
    assert context.get_messages() == [{"role": "user", "content": "Is it nine?"}]

    line = Line(is_proposed=True)
    assert await line.hears(BotStartedSpeakingFrame(), begins, heard("Mhm."), ends) == 0
    assert await line.hears(begins, heard("Stop."), after=1.0) == 1
    assert await Line(is_proposed=True).hears(VAD_STARTED) == 0


class Lagging(FrameProcessor):
    """A recogniser in a process that lags: whatever it has heard comes at once."""

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        await super().process_frame(frame, direction)
        await self.push_frame(frame, direction)
        if isinstance(frame, StartFrame):
            await asyncio.sleep(0.05)
            first = InterimTranscriptionFrame(text="Is", user_id="", timestamp="")
            for words in (first, heard("Is it nine?")):
                await self.push_frame(words)


async def test_the_last_words_of_a_turn_are_not_dropped_by_the_interruption_of_its_first() -> None:
    context = LLMContext()
    floor = Floor()
    caller = LLMContextAggregatorPair(context, user_params=params(floor)).user()
    line = Pipeline([Lagging(), CallerWords(floor), caller])
    await run_test(line, frames_to_send=[SleepFrame(1.5)])
    assert context.get_messages() == [{"role": "user", "content": "Is it nine?"}]
