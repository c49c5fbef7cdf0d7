"""The loopback providers, as Pipecat's own service classes see them: healthy, then failing."""

import time
from typing import Any

import aiohttp
import pytest
from pipecat.frames.frames import (
    EndFrame,
    InterimTranscriptionFrame,
    InterruptionFrame,
    LLMRunFrame,
    LLMTextFrame,
    TranscriptionFrame,
    TTSAudioRawFrame,
    TTSSpeakFrame,
    TTSStoppedFrame,
    TTSTextFrame,
    VADUserStoppedSpeakingFrame,
)
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.processors.aggregators.llm_response_universal import LLMContextAggregatorPair
from pipecat.serializers.twilio import TwilioFrameSerializer
from pipecat.services.cartesia.tts import CartesiaTTSService
from pipecat.services.llm_service import FunctionCallParams
from pipecat.services.openai.llm import OpenAILLMService
from pipecat.utils.errors import ErrorCategory

from rehearsal.engines.engine import ToolCall
from rehearsal.engines.scripted import Answer, Script, ScriptedEngine
from rehearsal.providers.all import Providers, serve
from rehearsal.providers.faults import ALWAYS, Faults
from rehearsal.tests.service_pipeline import SAMPLE_RATE, answer, ask, line, spoken, usage

pytest.importorskip("deepgram", reason="the project does not hear with Deepgram")
from pipecat.services.deepgram.stt import DeepgramSTTService

pytestmark = pytest.mark.anyio

KEY = "a-secret-of-the-bot"


def deepgram(providers: Providers) -> DeepgramSTTService:
    return DeepgramSTTService(api_key=KEY, base_url=providers.environment["DEEPGRAM_BASE_URL"])


def openai(providers: Providers) -> OpenAILLMService:
    return OpenAILLMService(api_key=KEY, base_url=providers.environment["OPENAI_BASE_URL"])


def cartesia(providers: Providers) -> CartesiaTTSService:
    return CartesiaTTSService(
        api_key=KEY,
        url=providers.environment["CARTESIA_BASE_URL"],
        settings=CartesiaTTSService.Settings(voice="voice"),
    )


def finalized(providers: Providers) -> int:
    return providers.deepgram.connections[0].received.count({"type": "Finalize"})


def cancels(providers: Providers) -> list[dict[str, Any]]:
    return [m for c in providers.cartesia.connections for m in c.received if m.get("cancel")]


def sent_in(providers: Providers, context_id: str) -> list[dict[str, Any]]:
    sent = [m for c in providers.cartesia.connections for m in c.sent]
    return [message for message in sent if message["context_id"] == context_id]


def sent_kinds(providers: Providers, connection: int) -> list[str]:
    return [message["type"] for message in providers.cartesia.connections[connection].sent]


async def test_deepgram_hears_what_the_script_says_when_somebody_spoke() -> None:
    script = Script(hears=("I am calling.", "Bye."))
    async with serve(ScriptedEngine(script)) as providers, line(deepgram(providers)) as call:
        await call.send(*await spoken())
        await call.until(lambda: call.of(TranscriptionFrame))
        await call.send(*await spoken())
        await call.until(lambda: len(call.of(TranscriptionFrame)) == 2)
    assert [frame.text for frame in call.of(TranscriptionFrame)] == ["I am calling.", "Bye."]
    assert [frame.text for frame in call.of(InterimTranscriptionFrame)] == ["I", "Bye."]
    assert call.of(TranscriptionFrame)[0].finalized
    (connection,) = providers.deepgram.connections
    assert connection.request.key == KEY
    assert KEY not in repr(connection.request)
    assert connection.request.query["sample_rate"] == str(SAMPLE_RATE)
    assert connection.received.count({"type": "Finalize"}) == 2
    assert providers.peers == {"127.0.0.1"}


async def test_deepgram_says_when_the_speech_was() -> None:
    """The times are those of the audio received: half a second of silence, then speech."""
    async with serve(ScriptedEngine()) as providers, line(deepgram(providers)) as call:
        await call.send(*await spoken("measured"))
        await call.until(lambda: call.of(TranscriptionFrame))
    result: Any = call.of(TranscriptionFrame)[0].result
    words = result.channel.alternatives[0].words
    assert result.start == pytest.approx(0.5, abs=0.011)
    assert result.duration == pytest.approx(8 * 0.03, abs=0.021)
    assert words[0].start == result.start
    assert words[-1].end == pytest.approx(result.start + result.duration)


async def test_silence_is_finalized_without_a_transcript() -> None:
    async with serve(ScriptedEngine()) as providers, line(deepgram(providers)) as call:
        await call.send(VADUserStoppedSpeakingFrame(stop_secs=0.2))
        await providers.log.until(lambda: providers.deepgram.connections[0].sent)
        await call.send(*await spoken())
        await call.until(lambda: call.of(TranscriptionFrame))
    empty, *_ = providers.deepgram.connections[0].sent
    assert empty["from_finalize"]
    assert empty["channel"]["alternatives"][0]["transcript"] == ""
    assert len(call.of(TranscriptionFrame)) == 1


async def test_openai_answers_in_pieces_and_reports_usage() -> None:
    script = Script(answers=(Answer(says="It is ten past nine."),))
    async with serve(ScriptedEngine(script)) as providers, line(openai(providers)) as call:
        await call.send(ask("What time is it?"))
        await call.until(lambda: usage(call))
    assert call.text == "It is ten past nine."
    assert len(call.of(LLMTextFrame)) == 5
    assert usage(call)[0].prompt_tokens > 0
    (request,) = providers.openai.requests
    assert request.body["messages"][-1]["content"] == "What time is it?"
    assert request.key == KEY
    assert providers.peers == {"127.0.0.1"}


async def test_parallel_tool_calls_are_all_made_and_their_results_answered() -> None:
    called: list[tuple[str, Any]] = []

    async def book(params: FunctionCallParams, day: str) -> None:
        """Book.

        Args:
            day: The day.
        """
        called.append(("book", day))
        await params.result_callback("booked")

    async def notify(params: FunctionCallParams) -> None:
        """Notify."""
        called.append(("notify", None))
        await params.result_callback("notified")

    script = Script(
        answers=(
            Answer(heard="book", calls=(ToolCall("book", {"day": "Monday"}), ToolCall("notify"))),
            Answer(result="notify", says="Both done."),
        )
    )
    context = LLMContext([{"role": "user", "content": "Book me in."}], tools=[book, notify])
    messages = context.messages
    user, assistant = LLMContextAggregatorPair(context)
    async with serve(ScriptedEngine(script)) as providers:
        async with line(user, openai(providers), assistant) as call:
            await call.send(LLMRunFrame())
            await call.until(lambda: {"role": "assistant", "content": "Both done."} in messages)
    assert sorted(called) == [("book", "Monday"), ("notify", None)]
    assert len(providers.openai.requests) == 2
    offered = [tool["function"]["name"] for tool in providers.openai.requests[0].body["tools"]]
    assert offered == ["book", "notify"]


async def test_one_shot_inference_gets_a_whole_completion() -> None:
    script = Script(answers=(Answer(says="A summary."),))
    async with serve(ScriptedEngine(script)) as providers:
        answer = await openai(providers).run_inference(ask("Sum up.").context)
    assert answer == "A summary."


async def test_cartesia_speaks_with_word_timestamps() -> None:
    async with serve(ScriptedEngine()) as providers, line(cartesia(providers)) as call:
        await call.send(TTSSpeakFrame("Good morning everybody."))
        await call.until(lambda: call.of(TTSStoppedFrame))
    assert [frame.text for frame in call.of(TTSTextFrame)] == ["Good", "morning", "everybody."]
    said = ScriptedEngine().speak("Good morning everybody.", 24000)
    pcm = b"".join([speech.pcm async for speech in said])
    assert b"".join(frame.audio for frame in call.of(TTSAudioRawFrame)) == pcm
    (connection,) = providers.cartesia.connections
    assert connection.audio_bytes == len(pcm)
    assert connection.request.key == KEY
    assert connection.sent[-1]["type"] == "done"
    assert providers.peers == {"127.0.0.1"}


async def test_the_times_of_words_run_on_over_the_texts_of_a_context() -> None:
    """Two sentences of one turn: the second one's words begin after the first one's audio."""
    async with serve(ScriptedEngine()) as providers, line(cartesia(providers)) as call:
        await call.send(*answer("One two. ", "Three."))
        await call.until(lambda: call.of(TTSStoppedFrame))
    sent = providers.cartesia.connections[0].sent
    starts = [s for m in sent if m["type"] == "timestamps" for s in m["word_timestamps"]["start"]]
    assert starts == pytest.approx([0.0, 0.13, 0.29])
    assert len({message["context_id"] for message in sent}) == 1


async def test_speech_comes_near_real_time_so_that_it_can_be_interrupted() -> None:
    async with serve(ScriptedEngine()) as providers, line(cartesia(providers)) as call:
        providers.cartesia.lead_s = 0.1
        began = time.monotonic()
        await call.send(TTSSpeakFrame("Half a second of speech."))
        await providers.log.until(lambda: sent_kinds(providers, 0)[-1:] == ["done"])
    seconds = providers.cartesia.connections[0].audio_bytes / 2 / 24000
    assert seconds > 0.5
    assert time.monotonic() - began >= seconds - 0.1


async def test_barge_in_cancels_what_is_being_spoken() -> None:
    async with serve(ScriptedEngine()) as providers, line(cartesia(providers)) as call:
        await call.send(TTSSpeakFrame("a long sentence " * 10))
        await call.until(lambda: call.of(TTSAudioRawFrame))
        await call.send(InterruptionFrame())
        await providers.log.until(lambda: cancels(providers))
        (cancelled,) = cancels(providers)
        sent = list(sent_in(providers, cancelled["context_id"]))
        await call.send(TTSSpeakFrame("Spoken for longer than the audio runs ahead."))
        await providers.log.until(lambda: sent_kinds(providers, 0)[-1:] == ["done"])
    assert "chunk" in [message["type"] for message in sent]
    assert sent_in(providers, cancelled["context_id"]) == sent


async def test_the_bot_can_hang_up_a_twilio_call() -> None:
    async with serve(ScriptedEngine()) as providers:
        serializer = TwilioFrameSerializer(
            "MZ1",
            call_sid="CA1",
            account_sid="AC1",
            auth_token="token",
            base_url=providers.environment["TWILIO_BASE_URL"],
        )
        await serializer.serialize(EndFrame())
    assert providers.twilio.hung_up == ["CA1"]
    (request,) = providers.twilio.requests
    assert request.key == "token"
    assert "token" not in repr(request)


@pytest.mark.parametrize(
    ("login", "call", "status"),
    [(("AC1", "t"), "CA1", 200), (("AC2", "t"), "CA1", 401), (("AC1", "t"), "CA2", 404)],
)
async def test_twilio_hangs_up_only_calls_that_are_there_and_ones_own(
    login: tuple[str, str], call: str, status: int
) -> None:
    async with serve(ScriptedEngine()) as providers, aiohttp.ClientSession() as http:
        providers.twilio.gone.add("CA2")
        url = (
            providers.environment["TWILIO_BASE_URL"] + f"/2010-04-01/Accounts/AC1/Calls/{call}.json"
        )
        data = {"Status": "completed"}
        async with http.post(
            url, data=data, headers={"Authorization": aiohttp.encode_basic_auth(*login)}
        ) as response:
            assert response.status == status
            assert (await response.json()).get("code") == {404: 20404, 401: 20003}.get(status)


# What follows states what the stock classes really do when a provider fails.


async def test_deepgram_gives_up_at_once_on_a_wrong_key() -> None:
    async with serve(ScriptedEngine(), faults={"deepgram": Faults(wrong_key=True)}) as providers:
        stt = deepgram(providers)
        async with line(stt) as call:
            await call.until(lambda: call.errors)
    assert not stt.is_usable
    assert [request.status for request in providers.deepgram.requests] == [401]
    assert KEY not in call.errors[0].error


async def test_deepgram_gives_up_at_once_on_a_429_too() -> None:
    """Pipecat 1.14 takes every 4xx of the handshake for permanent."""
    async with serve(ScriptedEngine(), faults={"deepgram": Faults(rate_limited=1)}) as providers:
        stt = deepgram(providers)
        async with line(stt) as call:
            await call.until(lambda: call.errors)
    assert not stt.is_usable
    assert [request.status for request in providers.deepgram.requests] == [429]


async def test_a_hanging_deepgram_goes_unnoticed() -> None:
    script = Script(hears=("Lost.", "Heard."))
    async with serve(ScriptedEngine(script)) as providers, line(deepgram(providers)) as call:
        providers.deepgram.faults.hang = True
        await call.send(*await spoken())
        await providers.log.until(lambda: finalized(providers) == 1)
        providers.deepgram.faults.hang = False
        await call.send(*await spoken())
        await call.until(lambda: call.of(TranscriptionFrame))
    assert [frame.text for frame in call.of(TranscriptionFrame)] == ["Heard."]
    assert call.errors == []


async def test_a_slow_deepgram_is_late() -> None:
    async with serve(ScriptedEngine()) as providers, line(deepgram(providers)) as call:
        providers.deepgram.faults.slow_s = 0.3
        before = time.monotonic()
        await call.send(*await spoken())
        await call.until(lambda: call.of(TranscriptionFrame))
    assert time.monotonic() - before >= 0.3


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["cut", "drop"])
async def test_deepgram_reconnects_when_its_socket_breaks(fault: str) -> None:
    """After 4 s; what was being said is lost."""
    async with serve(ScriptedEngine()) as providers, line(deepgram(providers)) as call:
        if fault == "cut":
            providers.deepgram.faults.cuts = 1
            await call.send(*await spoken())
        else:
            await providers.log.until(lambda: providers.deepgram.connections)
            await providers.deepgram.drop()
        await providers.log.until(lambda: len(providers.deepgram.connections) == 2, within_s=10)
        assert call.of(TranscriptionFrame) == []
        await call.send(*await spoken())
        await call.until(lambda: call.of(TranscriptionFrame))
    assert [connection.is_open for connection in providers.deepgram.connections] == [False, False]


@pytest.mark.slow
async def test_deepgram_recovers_from_one_500() -> None:
    async with serve(ScriptedEngine(), faults={"deepgram": Faults(server_errors=1)}) as providers:
        async with line(deepgram(providers)) as call:
            await call.send(*await spoken())
            await call.until(lambda: call.of(TranscriptionFrame))
    assert [request.status for request in providers.deepgram.requests] == [500, 101]


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["refused", "500"])
async def test_deepgram_gives_up_after_three_attempts(fault: str) -> None:
    """4 s apart, and the pipeline does not start before."""
    async with serve(ScriptedEngine()) as providers:
        if fault == "refused":
            await providers.deepgram.refuse()
        else:
            providers.deepgram.faults.server_errors = ALWAYS
        stt = deepgram(providers)
        before = time.monotonic()
        async with line(stt) as call:
            assert time.monotonic() - before >= 8
            await call.until(lambda: not stt.is_usable)
    assert len(providers.deepgram.requests) == (0 if fault == "refused" else 3)


@pytest.mark.parametrize(
    ("faults", "requests", "is_answered"),
    [
        (Faults(wrong_key=True), [401], False),
        (Faults(rate_limited=1), [429, 200], True),
        (Faults(rate_limited=ALWAYS, retry_after_s=0.1), [429, 429, 429], False),
        (Faults(server_errors=1), [500, 200], True),
        (Faults(server_errors=ALWAYS), [500, 500, 500], False),
    ],
    ids=["401", "429 once", "429 always", "500 once", "500 always"],
)
async def test_openai_is_asked_up_to_three_times(
    faults: Faults, requests: list[int], is_answered: bool
) -> None:
    async with serve(ScriptedEngine(), faults={"openai": faults}) as providers:
        llm = openai(providers)
        async with line(llm) as call:
            await call.send(ask("Hello?"))
            await call.until(lambda: usage(call) or call.errors)
    assert [request.status for request in providers.openai.requests] == requests
    assert bool(call.text) == is_answered
    assert len(call.errors) == (0 if is_answered else 1)
    assert llm.is_usable == (not faults.wrong_key)


async def test_openai_is_asked_again_when_its_retry_after_has_passed() -> None:
    """Left to itself the SDK would wait half a second at most."""
    faults = Faults(rate_limited=1, retry_after_s=0.8)
    async with serve(ScriptedEngine(), faults={"openai": faults}) as providers:
        async with line(openai(providers)) as call:
            await call.send(ask("Hello?"))
            await call.until(lambda: usage(call))
    first, second = providers.openai.requests
    assert second.at - first.at >= 0.8


async def test_openai_is_asked_three_times_when_it_refuses_connections() -> None:
    async with serve(ScriptedEngine()) as providers, line(openai(providers)) as call:
        await providers.openai.refuse()
        await call.send(ask("Hello?"))
        await call.until(lambda: call.errors)
        await providers.openai.accept()
        await call.send(ask("Hello?"))
        await call.until(lambda: call.text)
    assert len(providers.openai.requests) == 1


async def test_a_hanging_openai_is_left_when_the_caller_interrupts() -> None:
    async with serve(ScriptedEngine()) as providers, line(openai(providers)) as call:
        providers.openai.faults.hang = True
        await call.send(ask("Hello?"))
        await providers.log.until(lambda: len(providers.openai.requests) == 1)
        providers.openai.faults.hang = False
        await call.send(InterruptionFrame(), ask("Hello?"))
        await call.until(lambda: usage(call))
    assert [request.status for request in providers.openai.requests] == [None, 200]
    assert call.errors == []


async def test_a_dropped_openai_request_is_made_again() -> None:
    async with serve(ScriptedEngine()) as providers, line(openai(providers)) as call:
        providers.openai.faults.hang = True
        await call.send(ask("Hello?"))
        await providers.log.until(lambda: len(providers.openai.requests) == 1)
        providers.openai.faults.hang = False
        await providers.openai.drop()
        await call.until(lambda: usage(call))
    assert [request.status for request in providers.openai.requests] == [None, 200]


async def test_a_slow_openai_is_late() -> None:
    async with serve(ScriptedEngine(), faults={"openai": Faults(slow_s=0.3)}) as providers:
        async with line(openai(providers)) as call:
            await call.send(ask("Hello?"))
            await call.until(lambda: call.text)
            assert time.monotonic() - providers.openai.requests[0].at >= 0.3


async def test_an_openai_stream_that_breaks_off_leaves_half_a_sentence_and_an_error() -> None:
    async with serve(ScriptedEngine(), faults={"openai": Faults(cuts=1)}) as providers:
        async with line(openai(providers)) as call:
            await call.send(ask("Hello?"))
            await call.until(lambda: call.errors)
    assert call.text == "Yes, I can"
    assert len(providers.openai.requests) == 1


@pytest.mark.parametrize(
    ("faults", "status"),
    [(Faults(wrong_key=True), 401), (Faults(rate_limited=2), 429), (Faults(server_errors=2), 500)],
)
async def test_cartesia_tells_of_a_refused_handshake_and_lets_the_call_start(
    faults: Faults, status: int
) -> None:
    async with serve(ScriptedEngine(), faults={"cartesia": faults}) as providers:
        tts = cartesia(providers)
        async with line(tts) as call:
            await call.until(lambda: call.errors)
    assert str(status) in call.errors[0].error
    assert tts.is_usable == (status != 401)
    assert providers.cartesia.requests[0].status == status


async def test_cartesia_recovers_with_the_next_text_after_one_500() -> None:
    async with serve(ScriptedEngine(), faults={"cartesia": Faults(server_errors=1)}) as providers:
        async with line(cartesia(providers)) as call:
            await call.until(lambda: call.errors)
            await call.send(TTSSpeakFrame("Hello."))
            await call.until(lambda: call.of(TTSAudioRawFrame))
    assert [request.status for request in providers.cartesia.requests] == [500, 101]


async def test_cartesia_reports_an_error_in_an_open_socket() -> None:
    async with serve(ScriptedEngine()) as providers, line(cartesia(providers)) as call:
        providers.cartesia.faults.server_errors = 1
        await call.send(TTSSpeakFrame("Lost."))
        await call.until(lambda: call.errors)
        await call.send(TTSSpeakFrame("Hello."))
        await call.until(lambda: call.of(TTSAudioRawFrame))
    assert len(providers.cartesia.connections) == 1


async def test_cartesia_lets_the_call_start_when_it_refuses_connections() -> None:
    async with serve(ScriptedEngine()) as providers:
        await providers.cartesia.refuse()
        tts = cartesia(providers)
        async with line(tts) as call:
            await call.until(lambda: call.errors)
            await providers.cartesia.accept()
            await call.send(TTSSpeakFrame("Hello."))
            await call.until(lambda: call.of(TTSAudioRawFrame))
    assert call.errors[0].category is ErrorCategory.CONNECTIVITY


@pytest.mark.slow
async def test_without_a_voice_pipecat_takes_the_text_for_spoken() -> None:
    """With a wrong key nothing is played, yet after 3 s the text enters the context."""
    async with serve(ScriptedEngine(), faults={"cartesia": Faults(wrong_key=True)}) as providers:
        async with line(cartesia(providers)) as call:
            await call.send(*answer("Nobody hears this."))
            await call.until(lambda: call.of(TTSTextFrame), within_s=10)
    assert not call.of(TTSAudioRawFrame)


@pytest.mark.parametrize("fault", ["cut", "drop"])
async def test_cartesia_reconnects_when_its_socket_breaks(fault: str) -> None:
    async with serve(ScriptedEngine()) as providers, line(cartesia(providers)) as call:
        if fault == "cut":
            providers.cartesia.faults.cuts = 1
        await call.send(TTSSpeakFrame("A sentence that nobody hears the end of."))
        await call.until(lambda: call.of(TTSAudioRawFrame))
        if fault == "drop":
            await providers.cartesia.drop()
        await providers.log.until(lambda: len(providers.cartesia.connections) == 2)
        await call.send(TTSSpeakFrame("Hello."))
        await providers.log.until(lambda: sent_kinds(providers, 1)[-1:] == ["done"])
    assert "done" not in sent_kinds(providers, 0)


async def test_a_hanging_cartesia_is_silent() -> None:
    async with serve(ScriptedEngine()) as providers, line(cartesia(providers)) as call:
        providers.cartesia.faults.hang = True
        await call.send(TTSSpeakFrame("Never heard."))
        await providers.log.until(lambda: providers.cartesia.connections[0].received)
        providers.cartesia.faults.hang = False
        await call.send(InterruptionFrame(), TTSSpeakFrame("Heard."))
        await call.until(lambda: call.of(TTSTextFrame))
    assert [frame.text for frame in call.of(TTSTextFrame)] == ["Heard."]


async def test_a_slow_cartesia_is_late() -> None:
    async with serve(ScriptedEngine(), faults={"cartesia": Faults(slow_s=0.3)}) as providers:
        async with line(cartesia(providers)) as call:
            before = time.monotonic()
            await call.send(TTSSpeakFrame("Hello."))
            await call.until(lambda: call.of(TTSAudioRawFrame))
    assert time.monotonic() - before >= 0.3


async def test_a_request_without_a_key_is_refused() -> None:
    async with serve(ScriptedEngine()) as providers, aiohttp.ClientSession() as http:
        url = f"{providers.environment['OPENAI_BASE_URL']}/chat/completions"
        async with http.post(url, json={"model": "m", "messages": []}) as response:
            assert response.status == 401


async def test_waiting_for_what_does_not_happen_ends_and_says_what_did() -> None:
    async with serve(ScriptedEngine()) as providers:
        with pytest.raises(TimeoutError, match="on the wire: nothing"):
            await providers.log.until(lambda: False, within_s=0.01)


async def test_a_taken_port_is_named() -> None:
    async with serve(ScriptedEngine()) as first:
        with pytest.raises(OSError, match=f"port {first.deepgram.port} of 127.0.0.1"):
            async with serve(ScriptedEngine(), port=first.deepgram.port):
                pass
