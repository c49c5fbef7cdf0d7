"""What is said of a call: a state machine from events to the call record.

Everything Roark is told and everything `call.json` holds is decided here. There is no I/O, no
clock and no pipecat: an event is a dict of JSON values, the record is a function of the events,
and so the journal of a killed process replays to the same record.

Every event has `event` (its name) and `at` (epoch nanoseconds of the moment it happened):

    call          call_id, agent_id, agent_name?, agent_prompt?
    started
    anchor        ms: the recording had reached this position at `at`
    chunk         index, ms (recorded so far), sample_rate, num_channels
    sound         role, start_ms, end_ms: a stretch of sound in the recording
    vad           edge, secs: the voice detector decided `secs` after the fact
    user-turn     edge
    turn-guess    complete, probability: what the turn model made of a pause
    transcript    text, spaced, user_id?, language?, service?: "llm" where speech goes to speech
    typed         text, via: "keys" or "text", since?: when the first key was pressed, user_id?
    output        there is an output transport: it tells what of the voice is heard
    bot           edge: the output transport began or ended speech
    say           context, segment, text: a sentence goes to the voice
    voice         context: its first audio was made
    voiced        context, seconds: audio the voice made for the sentence in hand
    words         context, segment, text, spaced, due?: spoken words; `due` when they are heard
    voice-done    context
    interruption
    request       kind: the LLM is to be asked for an "answer", for one to words that may not be all
                  yet ("speculation"), or for a "summary"
    asked         the LLM has begun on a request; one that is held back on its way never gets there
    withdrawn     nobody will hear the answer to those words
    tool          id, name, arguments;  tool-update, tool-result  id, content, error?, failed?
    tool-cancel   id, timed_out
    metric        kind, service, model?, value
    error         processor, message, category?, unusable
    node          name (Pipecat Flows)
    phone         from_number?, to_number?, call_id?, stream_id?, call_domain?, sip_call_id?,
                  sip_headers?
    annotation    values: what the bot attaches to the call
    prices        values: by which its cost is computed (`prices.py`)
    turn-text     turn, text: what a redaction made of a turn
    ending        reason, detail?, rank
    ended
"""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import IntEnum
from math import inf
from typing import Any, ClassVar

from roark.prices import cost_of
from roark.speech import Piece, Speech, join

Event = dict[str, Any]
Redact = Callable[[str], str]

ENDINGS = {
    "client-disconnected": "The caller hung up or the connection was lost.",
    "agent-ended": "The agent ended the call.",
    "transferred": "The caller was handed over to a person.",
    "voicemail": "A call out was answered by a voicemail.",
    "declined": "A call out was refused by whoever picked up.",
    "no-answer": "A call out was not answered, or nobody spoke.",
    "busy": "A call out met a busy line.",
    "failed": "A call out reached nobody to talk to.",
    "idle-timeout": "Nothing was said for too long.",
    "max-duration": "The call reached its time limit.",
    "error": "Something the call needs failed.",
    "signal": "The process was asked to stop.",
    "process-died": "The process died during the call; this is what it had written down.",
    "cancelled": "The pipeline was cancelled and nobody said why.",
    "unknown": "The pipeline stopped and nobody said why.",
}


class Rank(IntEnum):
    """How much a stated ending is worth; among equals the first one counts."""

    FALLBACK = 0
    ASSUMED = 1
    SAID = 2


# No recogniser hears a word this soon after the speech began: such a text is the turn before's.
SOONEST_TRANSCRIPT_NS = 200_000_000
# A text this long after the last speech was spoken too softly for the voice detector.
LATEST_TRANSCRIPT_NS = 5_000_000_000
# Nobody hears the bot, says a word and is transcribed in less: such a text was said before.
REACTION_NS = 500_000_000
# After a pause this long a murmur and what is said next are two turns.
MURMUR_NS = 1_500_000_000
# An interruption is noted where it begins, and is through the pipeline within this.
OVERTAKEN_NS = 500_000_000
# A service begins to count no earlier than this before its request was seen.
REQUEST_NS = 20_000_000
# How far from a detected (start, end) the edge of a sound may be to be the one that was meant, ms.
# A busy machine makes a caller's voice detector late. What a transport tells of the bot encloses
# its sound: silence may lead it and trail it.
NEAR_MS = {
    "user": ((-1000.0, 400.0), (-1000.0, 400.0)),
    "assistant": ((-250.0, inf), (-inf, 250.0)),
}


# What a caller waits for, in this order: the detector to call it a pause, the verdict that it is
# the end, the recogniser's last words, the LLM's first token (of each request before the answer),
# tools, the voice's first byte, the way from there to the caller, and what lies between these.
PARTS = (
    *("pause_ms", "verdict_ms", "transcript_ms"),
    *("llm_ms", "tools_ms", "voice_ms", "line_ms", "rest_ms"),
)


@dataclass
class Making:
    """How an answer is made; times in epoch nanoseconds.

    Parameters:
        requested_at: The LLM was to be asked for it.
        first_tokens: (asked, first token) of each request, the first before any tool.
        said_at: Its first sentence went to the voice.
        voiced_at: Its first audio was made.
        tts_ms: The voice's time to first byte.
    """

    requested_at: int | None = None
    first_tokens: list[tuple[int, int]] = field(default_factory=list)
    said_at: int | None = None
    voiced_at: int | None = None
    tts_ms: float | None = None


@dataclass(eq=False)
class Turn:
    """One speaker's turn; times in epoch nanoseconds as the detectors saw them.

    Parameters:
        announced: The caller's: Pipecat took it for a turn.
        detected: The caller's: the voice detector told of its beginning.
        released_at: The caller's: when it was decided that they were done.
        transcribed_at: The caller's: when its last text came before that.
        end_cause: The caller's: "turn-model" or "timeout", whichever decided that.
        end_probability: The caller's: how sure the turn model was that it ends, 0 to 1.
        paused_at: The caller's: when the voice detector told of the silence it ended with.
        judged_at: The caller's: when the turn model called that its end.
        withdrawn: The caller's: answers begun before its end that nobody heard.
        stt_ttfb_ms: The caller's: the recogniser's time to first byte.
        via: "voice", or where it was not said "keys" or "text".
        answers: The bot's: the turn of the caller's that it is the reply to.
        making: The bot's: when it was asked for and made.
        estimated: The bot's: where its text is cut was estimated.
        redacted: What a redaction made of its text, if that was written down.
    """

    role: str
    start_at: int
    end_at: int | None = None
    pieces: list[Piece] = field(default_factory=list)
    user_id: str | None = None
    language: str | None = None
    node: str | None = None
    interrupted_at: int | None = None
    estimated: bool = False
    released_at: int | None = None
    announced: bool = False
    detected: bool = False
    answers: Turn | None = None
    transcribed_at: int | None = None
    making: Making | None = None
    end_cause: str | None = None
    end_probability: float | None = None
    paused_at: int | None = None
    judged_at: int | None = None
    withdrawn: int = 0
    stt_ttfb_ms: float | None = None
    via: str = "voice"
    redacted: str | None = None

    @property
    def text(self) -> str:
        return join(self.pieces)

    def is_over(self, at: int) -> bool:
        """Whether speech that begins at `at` is another turn of the caller's."""
        if self.released_at is not None:
            return True
        # A murmur that Pipecat never took for a turn ("uh-huh" while the bot speaks).
        return not self.announced and self.end_at is not None and at - self.end_at > MURMUR_NS


@dataclass
class Tool:
    """One tool call and how it ended."""

    id: str
    name: str
    arguments: str
    at: int
    status: str = "running"
    content: str | None = None
    error: str | None = None
    ended_at: int | None = None
    updates: list[tuple[int, str]] = field(default_factory=list)


def iso(at: int) -> str:
    """Epoch nanoseconds as ISO 8601 UTC with milliseconds."""
    return datetime.fromtimestamp(at / 1e9, UTC).isoformat(timespec="milliseconds")


class CallRecord:
    """The state of one call, advanced by `apply`."""

    def __init__(self, *, redact: Redact | None = None) -> None:
        """Start empty; `redact` is applied to every text that is given out."""
        self._redact = redact
        self._last_at = 0
        self.call_id = ""
        self._agent: dict[str, str] = {}
        self._started_at: int | None = None
        self._ended_at: int | None = None
        self._ending: tuple[int, str, str | None] | None = None
        self._anchors: list[tuple[int, float]] = []
        self._recording: dict[str, Any] | None = None
        self._sounds: dict[str, list[tuple[float, float]]] = {"user": [], "assistant": []}
        self._turns: list[Turn] = []
        self._user: Turn | None = None
        self._user_audible = False
        self._speech_edges_seen = False
        self._bot: Turn | None = None
        self._has_output = False
        self._left_at: int | None = None
        self._speech = Speech()
        self._interrupted_at: int | None = None
        self._unanswered: Turn | None = None
        self._making = Making()
        self._speculation: Turn | None = None
        self._requests_wanted = 0
        self._latest_is_asked = False
        self._requests = 0
        self._withdrawn = 0
        self._usage_reports = 0
        self._tools: dict[str, Tool] = {}
        self._usage: dict[str, float] = {}
        self._models: dict[str, list[str]] = {}
        self._errors: list[Event] = []
        self._nodes: list[tuple[int, str]] = []
        self._phone: dict[str, Any] = {}
        self._metadata: dict[str, Any] = {}
        self._prices: dict[str, Any] | None = None

    @classmethod
    def replay(cls, events: Iterable[Event], *, redact: Redact | None = None) -> CallRecord:
        """Return the record these events lead to."""
        record = cls(redact=redact)
        for event in events:
            record.apply(event)
        return record

    def apply(self, event: Event) -> None:
        """Advance by one event; an unknown one is ignored, as are all after `ended`."""
        if self._ended_at is not None and event["event"] not in ("chunk", "sound", "turn-text"):
            return
        at = int(event.get("at") or self._last_at)
        self._last_at = max(self._last_at, at)
        handler = self._HANDLERS.get(event["event"])
        if handler:
            handler(self, at, event)

    def close(self, reason: str, detail: str | None = None, at: int | None = None) -> None:
        """End the call at `at` (default: its last event), for `reason` if none is known yet."""
        at = at or self._last_at
        self.apply(
            {"event": "ending", "at": at, "reason": reason, "detail": detail, "rank": Rank.ASSUMED}
        )
        self.apply({"event": "ended", "at": at})

    @property
    def ended(self) -> bool:
        return self._ended_at is not None

    @property
    def started(self) -> bool:
        return self._started_at is not None

    # What is given out

    def call_started(self) -> Event:
        """Roark's `call-started` body."""
        body = {
            "event": "call-started",
            "pipecatCallId": self.call_id,
            "eventTimestamp": iso(self._started_at or self._last_at),
            "agentId": self._agent.get("id", ""),
        }
        if self._agent.get("name"):
            body["agentName"] = self._agent["name"]
        if self._agent.get("prompt"):
            body["agentPrompt"] = self._agent["prompt"]
        return body

    def call_ended(self) -> Event:
        """Roark's `call-ended` body; optional fields are left out, never null."""
        ended_at = self._ended_at or self._last_at
        reason, _ = self.ending
        turns = self._spoken_turns()
        body: Event = {
            "event": "call-ended",
            "pipecatCallId": self.call_id,
            "eventTimestamp": iso(ended_at),
            "callStartedAt": iso(self._started_at) if self._started_at else None,
            "callEndedAt": iso(ended_at),
            "callEndedReason": reason,
        }
        if turns:
            body["agentSpokeFirst"] = turns[0]["role"] == "assistant"
        if self._recording:
            body["recordingSampleRate"] = self._recording["sample_rate"]
            body["recordingNumChannels"] = self._recording["num_channels"]
        if turns:
            body["transcript"] = [self._wire_turn(turn) for turn in turns]
        if self._tools:
            body["toolCalls"] = self._wire_tools()
        return body

    def as_dict(self) -> Event:
        """All that is known of the call, as `call.json` holds it; offsets in recording ms."""
        ended_at = self._ended_at or self._last_at
        reason, detail = self.ending
        turns = self._spoken_turns()
        record = {
            "version": 1,
            "call_id": self.call_id,
            "agent": dict(self._agent),
            "started_at": iso(self._started_at) if self._started_at else None,
            "ended_at": iso(ended_at),
            "duration_ms": self._span_ms(self._started_at, ended_at),
            "ending": {"reason": reason, "detail": detail or ENDINGS.get(reason, "")},
            "agent_spoke_first": turns[0]["role"] == "assistant" if turns else None,
            "recording": dict(self._recording) if self._recording else None,
            "turns": turns,
            "tools": [self._tool_dict(tool) for tool in self._tools.values()],
            "usage": self._usage_dict(),
            "models": {service: list(names) for service, names in self._models.items()},
            "phone": dict(self._phone),
            "errors": [dict(error) for error in self._errors],
            "nodes": [{"name": name, "at_ms": self._ms(at)} for at, name in self._nodes],
            "metadata": dict(self._metadata),
        }
        if self._prices is not None:
            seconds = record["duration_ms"] / 1000
            record["cost"] = cost_of(record["usage"], seconds, self._prices)
        return record

    @property
    def ending(self) -> tuple[str, str | None]:
        """Why the call ended: one of ENDINGS, or words of the caller's own, and a detail."""
        return self._ending[1:] if self._ending else ("unknown", None)

    def unwritten_texts(self) -> list[tuple[int, str]]:
        """(turn, redacted text) of every turn whose text changed since it was last asked for."""
        changed = []
        # Only the latest turns still change.
        for index, turn in list(enumerate(self._turns))[-4:]:
            text = self._shown(turn.text)
            if turn.role == "assistant":
                settled = turn is not self._bot
            elif turn.via == "keys":
                # The next digits of the same number may follow.
                settled = turn is not self._turns[-1]
            else:
                settled = turn.released_at is not None or turn is not self._user
            if text and text != turn.redacted and (settled or self.ended):
                turn.redacted = text
                changed.append((index, text))
        return changed

    # The call

    def _on_call(self, at: int, event: Event) -> None:
        self.call_id = event["call_id"]
        self._agent = {
            key: event[f"agent_{key}"]
            for key in ("id", "name", "prompt")
            if event.get(f"agent_{key}")
        }

    def _on_started(self, at: int, event: Event) -> None:
        self._started_at = at

    def _on_ending(self, at: int, event: Event) -> None:
        rank = event.get("rank", Rank.SAID)
        if self._ending is None or rank > self._ending[0]:
            self._ending = (rank, event["reason"], event.get("detail"))
        if rank >= Rank.SAID and event["reason"] == "client-disconnected":
            self._left_at = self._left_at or at

    def _on_ended(self, at: int, event: Event) -> None:
        if self._bot and self._left_at and self._left_at <= self._bot.start_at:
            # It was on its way when the caller left, and nobody heard it begin.
            self._end_bot_turn(self._bot, at)
        elif self._bot:
            self._cut_bot_turn(self._bot, at)
        elif not self._has_output:
            self._unheard_turn()
        if self._user and self._user.end_at is None:
            self._user.end_at = at
        self._ended_at = at

    # The recording

    def _on_anchor(self, at: int, event: Event) -> None:
        self._anchors.append((at, float(event["ms"])))

    def _on_chunk(self, at: int, event: Event) -> None:
        self._recording = {
            "sample_rate": event["sample_rate"],
            "num_channels": event["num_channels"],
            "chunks": event["index"] + 1,
            "duration_ms": event["ms"],
        }

    def _on_sound(self, at: int, event: Event) -> None:
        self._sounds[event["role"]].append((event["start_ms"], event["end_ms"]))

    def _ms(self, at: int) -> float:
        """Where in the recording (or, without one, in the call) a moment is, in ms."""
        if not self._anchors or not self._recording:
            return self._span_ms(self._started_at, at)
        index = bisect_right(self._anchors, at, key=lambda anchor: anchor[0])
        if 0 < index < len(self._anchors):
            (at0, ms0), (at1, ms1) = self._anchors[index - 1 : index + 1]
            return round(ms0 + (ms1 - ms0) * (at - at0) / max(1, at1 - at0), 1)
        known_at, ms = self._anchors[max(0, index - 1)]
        return round(max(0.0, ms + (at - known_at) / 1e6), 1)

    @staticmethod
    def _span_ms(start: int | None, end: int) -> float:
        return round(max(0, end - start) / 1e6, 1) if start else 0.0

    def _edges_ms(self, turn: Turn) -> tuple[float, float]:
        """A turn's first and last sample: what the detectors said, set right by the audio."""
        start = self._ms(turn.start_at)
        end = max(start, self._ms(turn.end_at or self._last_at))
        sounds = self._sounds[turn.role]
        first = bisect_right(sounds, start, key=lambda sound: sound[1])
        last = bisect_left(sounds, end, key=lambda sound: sound[0]) - 1
        (start_low, start_high), (end_low, end_high) = NEAR_MS[turn.role]
        begun = sounds[first][0] if first < len(sounds) else end
        over = sounds[last][1] if last >= 0 else start
        if begun < end and start_low <= begun - start <= start_high:
            start = begun
        if turn.role == "user" and not turn.detected:
            # Too short for the voice detector: the turn's end is when somebody decided, much later.
            end_low = -inf
        if over > start and end_low <= over - end <= end_high:
            end = over
        return start, max(start, end)

    # The caller

    def _on_vad(self, at: int, event: Event) -> None:
        self._speech_edges_seen = True
        delay = int(float(event.get("secs") or 0) * 1e9)
        edge_at = at - delay
        if event["edge"] == "start":
            self._user_audible = True
            if self._user and self._user.released_at is None:
                self._user.paused_at = self._user.judged_at = None
            if self._user is None or self._user.is_over(at) or self._is_mute(self._user):
                self._open_user_turn(edge_at).detected = True
            elif not self._user.detected:
                # The turn's own frame came first: this one, its cause, was held up in a queue.
                self._user.detected = True
                self._user.start_at = min(self._user.start_at, at) - delay
        else:
            self._user_audible = False
            if self._user:
                self._user.end_at = max(edge_at, self._user.start_at)
                if self._user.released_at is None:
                    self._user.paused_at = at

    def _on_user_turn(self, at: int, event: Event) -> None:
        self._speech_edges_seen = True
        user = self._user
        if event["edge"] == "start":
            if user is None or user.is_over(at) or user.announced:
                user = self._open_user_turn(at)
            user.announced = True
            self._making = Making()
        elif user and user.released_at is None:
            if user.end_at is None:
                user.end_at = at
            user.released_at = at
            self._unanswered = user
            if self._speculation is not user:
                self._speculation = None
            # The LLM may have been asked, its answer cannot have been said.
            self._making = Making(self._making.requested_at, self._making.first_tokens)

    def _on_turn_guess(self, at: int, event: Event) -> None:
        if self._user and self._user.released_at is None:
            self._user.end_cause = "turn-model" if event["complete"] else "timeout"
            self._user.judged_at = at if event["complete"] else None
            self._user.end_probability = event.get("probability")

    def _on_transcript(self, at: int, event: Event) -> None:
        user = self._turn_of_transcript(at, event.get("service") == "llm")
        user.pieces.append(Piece(event["text"], bool(event.get("spaced"))))
        user.user_id = user.user_id or event.get("user_id") or None
        user.language = user.language or event.get("language") or None
        if user.released_at is None:
            user.transcribed_at = at

    def _turn_of_transcript(self, at: int, speech_to_speech: bool) -> Turn:
        """The turn a text belongs to: never one before something of the bot's that it answers."""
        user = self._user
        if user is None or user.via != "voice":
            return self._open_user_turn(at, end_at=at)
        before = next((turn for turn in self._released_turns() if turn is not user), None)
        if user.released_at is None:
            too_soon = at - user.start_at < SOONEST_TRANSCRIPT_NS and not user.pieces
            if before and not self._is_past(before, at, speech_to_speech, is_early=True):
                # Speech to speech transcribes a turn when it is over. Where no detector told of
                # speech, a text may be what began the turn.
                is_empty = not before.pieces
                if (is_empty and speech_to_speech) or (too_soon and (user.detected or is_empty)):
                    return before
        elif not self._speech_edges_seen:
            return self._open_user_turn(at, end_at=at)
        if self._is_past(user, at, speech_to_speech):
            return self._open_user_turn(at, end_at=at)
        return user

    def _released_turns(self) -> Iterable[Turn]:
        """What the caller has said to the end, the latest first."""
        return (
            turn
            for turn in reversed(self._turns)
            if turn.role == "user" and turn.released_at is not None and turn.via == "voice"
        )

    def _is_past(
        self, user: Turn, at: int, speech_to_speech: bool, *, is_early: bool = False
    ) -> bool:
        """Whether what is transcribed at `at` was said after `user`, maybe in answer to the bot.

        `is_early`: other speech is under way, which it cannot be of.
        """
        over_at = user.end_at or user.released_at
        if over_at is None or (self._user_audible and user.released_at is None):
            return False
        is_done = user.released_at is not None or not user.announced
        if is_done and at - max(user.released_at or 0, over_at) > LATEST_TRANSCRIPT_NS:
            return True
        if speech_to_speech and not user.pieces:
            return False
        for bot in reversed(self._turns):
            if bot is user:
                break
            # The answer to a turn may come before the turn's text does.
            heard_at = bot.start_at if user.pieces and not is_early else bot.end_at
            if bot.role == "assistant" and heard_at and over_at < heard_at <= at - REACTION_NS:
                return True
        return False

    def _is_mute(self, user: Turn) -> bool:
        """Whether nothing was understood of `user`, and the bot has said something since."""
        return not user.pieces and any(
            turn.role == "assistant"
            and turn.end_at is not None
            and user.end_at is not None
            and turn.end_at > user.end_at
            and turn.interrupted_at is None
            for turn in self._turns[-3:]
        )

    def _on_typed(self, at: int, event: Event) -> None:
        since = min(int(event.get("since") or at), at)
        last = self._turns[-1] if self._turns else None
        user = self._user
        if event["via"] == "keys" and user and user is last and user.via == "keys":
            # Nothing was said to it: the next group of one number.
            user.released_at, user.announced = None, False
        elif user and not (user.pieces or user.detected or user.released_at):
            # Pipecat has taken it for a turn before it was told.
            user.start_at = min(user.start_at, since)
        else:
            user = self._open_user_turn(since)
        user.via, user.end_at, user.transcribed_at = event["via"], at, None
        user.pieces.append(Piece(event["text"]))
        user.user_id = user.user_id or event.get("user_id") or None
        self._unanswered, self._making = user, Making()

    def _open_user_turn(self, at: int, end_at: int | None = None) -> Turn:
        if self._user and self._user.end_at is None:
            self._user.end_at = at
        if not self._has_output:
            self._unheard_turn()
        self._user = self._append(Turn("user", at, end_at))
        return self._user

    # The bot

    def _on_output(self, at: int, event: Event) -> None:
        self._has_output = True

    def _on_bot(self, at: int, event: Event) -> None:
        if event["edge"] == "start":
            self._has_output = True
            if self._bot:
                return
            self._bot = self._append(Turn("assistant", at))
            self._speech.begins(at)
            if self._user and self._user.released_at is None and not self._user_audible:
                self._user.released_at = at
            if self._unanswered:
                self._bot.answers, self._bot.making = self._unanswered, self._making
                self._unanswered, self._making = None, Making()
        elif self._bot:
            bot = self._bot
            if self._is_overtaken(at) and not self._speech.is_played(bot.start_at, at):
                bot.interrupted_at = at
                self._cut_bot_turn(bot, at)
                self._speech.take_back_begun()
                return
            bot.pieces += self._speech.ends(at)
            self._end_bot_turn(bot, at)

    def _on_say(self, at: int, event: Event) -> None:
        self._making.said_at = self._making.said_at or at
        self._speculation = None
        self._speech.say(event)

    def _on_voice(self, at: int, event: Event) -> None:
        if not self._bot and self._is_overtaken(at):
            self._speech.take_back_before(event.get("context"))
        self._making.voiced_at = self._making.voiced_at or at
        self._speech.voice(at, event)

    def _on_voiced(self, at: int, event: Event) -> None:
        self._speech.voiced(event)

    def _on_words(self, at: int, event: Event) -> None:
        self._speech.words(at, event)

    def _on_voice_done(self, at: int, event: Event) -> None:
        self._speech.voice_done(event)

    def _on_interruption(self, at: int, event: Event) -> None:
        if self._bot and not self._speech.goes_on:
            self._bot.interrupted_at = at
            self._cut_bot_turn(self._bot, at)
        elif not self._has_output:
            self._unheard_turn()
        self._interrupted_at = at
        self._speech.take_back()
        if self._speculation and self._speculation.released_at is None:
            self._on_withdrawn(at, event)

    def _is_overtaken(self, at: int) -> bool:
        """Whether an interruption may still be on its way through the pipeline."""
        return self._interrupted_at is not None and at - self._interrupted_at < OVERTAKEN_NS

    def _cut_bot_turn(self, bot: Turn, at: int) -> None:
        pieces, bot.estimated = self._speech.heard_until(bot.start_at, at)
        bot.pieces += pieces
        self._end_bot_turn(bot, at)

    def _end_bot_turn(self, bot: Turn, at: int) -> None:
        bot.end_at = at
        self._bot = None

    def _unheard_turn(self) -> None:
        """Without an output transport nobody says what is heard: the words as generated."""
        if words := self._speech.take_all():
            turn = self._append(Turn("assistant", words[0].at, words[-1].at))
            turn.pieces = [Piece(word.text, word.spaced) for word in words]

    def _append(self, turn: Turn) -> Turn:
        turn.node = self._nodes[-1][1] if self._nodes else None
        self._turns.append(turn)
        return turn

    # Tools

    def _on_tool(self, at: int, event: Event) -> None:
        self._tools.setdefault(
            event["id"],
            Tool(event["id"], event.get("name", ""), event.get("arguments") or "{}", at),
        )

    def _on_tool_update(self, at: int, event: Event) -> None:
        if tool := self._tools.get(event["id"]):
            tool.updates.append((at, event["content"]))

    def _on_tool_result(self, at: int, event: Event) -> None:
        self._on_tool(at, event)
        tool = self._tools[event["id"]]
        if tool.ended_at is None:
            tool.ended_at, tool.content, tool.error = at, event["content"], event.get("error")
            tool.status = "failed" if tool.error or event.get("failed") else "completed"

    def _on_tool_cancel(self, at: int, event: Event) -> None:
        tool = self._tools.get(event["id"])
        if tool and tool.ended_at is None:
            tool.ended_at = at
            tool.status = "timed-out" if event.get("timed_out") else "cancelled"
            tool.error = tool.content = tool.status.replace("-", " ")

    def _tool_dict(self, tool: Tool) -> Event:
        status, detail = tool.status, None
        if self.ended and tool.ended_at is None:
            status, detail = "unfinished", f"the call ended first ({self.ending[0]})"
        return {
            "id": tool.id,
            "name": tool.name,
            "arguments": tool.arguments,
            "status": status,
            "status_detail": detail,
            "result": tool.content,
            "error": tool.error,
            "at_ms": self._ms(tool.at),
            "duration_ms": self._span_ms(tool.at, tool.ended_at) if tool.ended_at else None,
            "updates": [
                {"content": content, "at_ms": self._ms(at)} for at, content in tool.updates
            ],
        }

    def _wire_tools(self) -> list[Event]:
        records: list[tuple[int, Event]] = []
        for tool in self._tools.values():
            call = {
                "kind": "tool_call",
                "toolCallId": tool.id,
                "name": tool.name,
                "arguments": tool.arguments,
            }
            records.append((tool.at, call))
            if tool.ended_at is not None:
                content = tool.content or ""
                if tool.error:
                    content = json.dumps(
                        {"error": tool.error}, separators=(",", ":"), ensure_ascii=False
                    )
                result = {"kind": "tool_result", "toolCallId": tool.id, "content": content}
                records.append((tool.ended_at, result))
        return [
            record | {"timestamp": iso(at)} | self._offset("audioOffsetMs", self._ms(at))
            for at, record in sorted(records, key=lambda pair: pair[0])
        ]

    # Measurements

    def _on_metric(self, at: int, event: Event) -> None:
        kind, service, value = event["kind"], event["service"], float(event["value"])
        model = event.get("model")
        if model and model not in self._models.setdefault(service, []):
            self._models[service].append(model)
        if kind == "ttfb":
            if service == "llm" and value > 0:
                self._on_first_token(at - int(value * 1e9), at)
            elif service == "tts" and value > 0 and self._making.tts_ms is None:
                self._making.tts_ms = round(value * 1000, 1)
            elif service == "stt" and value > 0 and self._user and self._user.via == "voice":
                self._user.stt_ttfb_ms = round(value * 1000, 1)
        else:
            self._usage[kind] = self._usage.get(kind, 0.0) + value
            self._usage_reports += kind == "prompt_tokens"

    def _on_request(self, at: int, event: Event) -> None:
        self._requests_wanted += 1
        if event["kind"] == "summary":
            self._requests += 1
            return
        if self._speculation and self._speculation.released_at is None:
            # The one before answers less than was said by now.
            self._on_withdrawn(at, event)
        if event["kind"] == "speculation":
            self._speculation, self._making = self._user, Making()
        self._latest_is_asked = False
        self._making.requested_at = self._making.requested_at or at

    def _on_asked(self, at: int, event: Event) -> None:
        # Where speech goes to speech an LLM answers unasked.
        if self._requests < self._requests_wanted:
            self._requests += 1
            self._latest_is_asked = True

    def _on_withdrawn(self, at: int, event: Event) -> None:
        if self._speculation:
            self._speculation.withdrawn += self._latest_is_asked
            self._withdrawn += self._latest_is_asked
            self._speculation, self._making = None, Making()

    def _on_first_token(self, asked_at: int, at: int) -> None:
        # A request that is given up tells a time too, of no first token.
        requested_at = self._making.requested_at or (inf if self._requests_wanted else 0)
        if asked_at >= requested_at - REQUEST_NS:
            self._making.first_tokens.append((asked_at, at))

    def _usage_dict(self) -> dict[str, float]:
        """What was used, and how many requests are not in it: cut off, they do not tell."""
        requests = {
            "llm_requests": self._requests,
            "llm_requests_withdrawn": self._withdrawn,
            "llm_requests_without_usage": max(0, self._requests - self._usage_reports),
        }
        used = {name: round(value, 3) for name, value in self._usage.items()}
        return used | {name: count for name, count in requests.items() if count}

    def _on_error(self, at: int, event: Event) -> None:
        self._errors.append(
            {
                "at": iso(at),
                "processor": event.get("processor"),
                "message": event["message"],
                "category": event.get("category"),
            }
        )

    def _on_node(self, at: int, event: Event) -> None:
        if not self._nodes or self._nodes[-1][1] != event["name"]:
            self._nodes.append((at, event["name"]))

    def _on_phone(self, at: int, event: Event) -> None:
        self._phone |= {k: v for k, v in event.items() if k not in ("event", "at") and v}

    def _on_annotation(self, at: int, event: Event) -> None:
        self._metadata |= event["values"]

    def _on_prices(self, at: int, event: Event) -> None:
        self._prices = event["values"]

    def _on_turn_text(self, at: int, event: Event) -> None:
        if 0 <= event["turn"] < len(self._turns):
            self._turns[event["turn"]].redacted = event["text"]

    # Rendering

    def _shown(self, text: str) -> str:
        return self._redact(text) if self._redact and text else text

    def _spoken_turns(self) -> list[Event]:
        edges = {id(turn): self._edges_ms(turn) for turn in self._turns}
        shown = []
        for turn in sorted(self._turns, key=lambda turn: edges[id(turn)][0]):
            text = self._shown(turn.text)
            if turn.redacted is not None and not self._redact:
                text = turn.redacted
            if not text:
                continue
            start, end = edges[id(turn)]
            start_at = turn.start_at + int((start - self._ms(turn.start_at)) * 1e6)
            shown.append(
                {
                    "index": len(shown),
                    "role": turn.role,
                    "via": turn.via,
                    "text": text,
                    "words": self._timed_words(turn, start, end),
                    "start_ms": start,
                    "end_ms": end,
                    "started_at": iso(start_at),
                    "ended_at": iso(start_at + int((end - start) * 1e6)),
                    "user_id": turn.user_id,
                    "language": turn.language,
                    "interrupted_ms": self._ms(turn.interrupted_at)
                    if turn.interrupted_at
                    else None,
                    "estimated_cut": turn.estimated,
                    "end_cause": turn.end_cause,
                    "end_probability": turn.end_probability,
                    "stt_ttfb_ms": turn.stt_ttfb_ms,
                    "withdrawn_answers": turn.withdrawn,
                    "node": turn.node,
                    "latency": self._latency(turn, start, edges[id(turn.answers)][1])
                    if turn.answers
                    else None,
                }
            )
        return shown

    def _timed_words(self, turn: Turn, start: float, end: float) -> list[Event]:
        """When each word was heard, where the voice told; none of a redacted record's."""
        if self._redact or turn.redacted is not None:
            return []
        return [
            {"text": piece.text.strip(), "at_ms": min(max(start, self._ms(piece.heard_at)), end)}
            for piece in turn.pieces
            if piece.heard_at is not None
        ]

    def _latency(self, turn: Turn, start: float, asked: float) -> Event:
        """How long the caller waited for `turn`, in ms from their last sound, and for what.

        `parts` are what they waited for at each moment; they add up to `total_ms`.
        """
        question, making = turn.answers, turn.making or Making()
        latency: Event = {"total_ms": round(start - asked, 1)}
        if question and question.released_at:
            latency["end_of_turn_ms"] = max(0.0, round(self._ms(question.released_at) - asked, 1))
        if question and question.transcribed_at:
            latency["stt_ms"] = max(0.0, round(self._ms(question.transcribed_at) - asked, 1))
        if making.first_tokens:
            asked_at, first_at = making.first_tokens[0]
            latency["llm_ms"] = self._span_ms(asked_at, first_at)
            released_at = question.released_at if question else None
            if released_at and asked_at < released_at - REQUEST_NS:
                latency["llm_saved_ms"] = self._span_ms(asked_at, min(first_at, released_at))
        if making.tts_ms is not None:
            latency["tts_ms"] = making.tts_ms
        if question:
            latency["parts"] = self._parts(question, making, start, asked)
        return latency

    def _parts(
        self, question: Turn, making: Making, start: float, asked: float
    ) -> dict[str, float]:
        """What was waited for between `asked` and `start`, ms of the recording; see PARTS."""

        def ms(at: int | None, otherwise: float) -> float:
            return otherwise if at is None else self._ms(at)

        over = ms(question.released_at, asked)
        paused = min(ms(question.paused_at, asked), over)
        judged, heard = ms(question.judged_at, over), ms(question.transcribed_at, asked)
        # Whichever comes last is what the caller waits for.
        stretches = [(asked, paused, "pause_ms")]
        if judged < heard:
            stretches.append((paused, judged, "verdict_ms"))
        stretches += [(paused, min(heard, over), "transcript_ms"), (paused, over, "verdict_ms")]
        made = [(self._ms(a), self._ms(b), "llm_ms") for a, b in making.first_tokens]
        made += [
            (self._ms(tool.at), self._ms(tool.ended_at), "tools_ms")
            for tool in self._tools.values()
            if tool.ended_at is not None
        ]
        voiced = ms(making.voiced_at, start)
        if making.tts_ms is not None:
            made.append((voiced - making.tts_ms, voiced, "voice_ms"))
        made.append((voiced, start, "line_ms"))
        stretches += sorted(made)
        parts = dict.fromkeys(PARTS, 0.0)
        done = asked
        for begin, end, name in stretches:
            begin, end = max(begin, done), min(end, start)
            if end > begin:
                parts[name] += end - begin
                parts["rest_ms"] += begin - done
                done = end
        parts["rest_ms"] += max(0.0, start - done)
        return {name: round(value, 1) for name, value in parts.items() if value >= 0.05}

    def _offset(self, name: str, ms: float) -> Event:
        return {name: round(ms)} if self._recording else {}

    def _wire_turn(self, turn: Event) -> Event:
        wire: Event = {
            "role": turn["role"],
            "content": turn["text"],
            "timestamp": turn["started_at"],
            "endTimestamp": turn["ended_at"],
        }
        wire |= self._offset("audioOffsetMs", turn["start_ms"])
        wire |= self._offset("endAudioOffsetMs", turn["end_ms"])
        if turn["user_id"]:
            wire["userId"] = turn["user_id"]
        if turn["language"]:
            wire["language"] = turn["language"]
        return wire

    _HANDLERS: ClassVar[dict[str, Callable[[CallRecord, int, Event], None]]] = {
        "call": _on_call,
        "started": _on_started,
        "anchor": _on_anchor,
        "chunk": _on_chunk,
        "sound": _on_sound,
        "vad": _on_vad,
        "user-turn": _on_user_turn,
        "turn-guess": _on_turn_guess,
        "transcript": _on_transcript,
        "typed": _on_typed,
        "annotation": _on_annotation,
        "prices": _on_prices,
        "output": _on_output,
        "bot": _on_bot,
        "say": _on_say,
        "voice": _on_voice,
        "voiced": _on_voiced,
        "words": _on_words,
        "voice-done": _on_voice_done,
        "interruption": _on_interruption,
        "request": _on_request,
        "asked": _on_asked,
        "withdrawn": _on_withdrawn,
        "tool": _on_tool,
        "tool-update": _on_tool_update,
        "tool-result": _on_tool_result,
        "tool-cancel": _on_tool_cancel,
        "metric": _on_metric,
        "error": _on_error,
        "node": _on_node,
        "phone": _on_phone,
        "turn-text": _on_turn_text,
        "ending": _on_ending,
        "ended": _on_ended,
    }
