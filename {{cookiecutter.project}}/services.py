"""Speech recognition, language model and voice: the services of a call. Swap one here alone.

Each factory imports its service when a call needs it. Every base URL can be pointed elsewhere by
environment: at a proxy, at a region, or at the rehearsal on this machine.
"""

# <% if false %>
# In the template each choice of the form stands here; only the last of each kind is in force.
# ruff: noqa: F811
# pyright: reportRedeclaration=false

# <% endif %>
from typing import TYPE_CHECKING, Any

from config import language, setting, whole_number
from spoken_text import for_voice

if TYPE_CHECKING:
    from pipecat.processors.aggregators.llm_response_universal import LLMAssistantAggregatorParams
    from pipecat.services.llm_service import LLMService
    from pipecat.services.stt_service import STTService
    from pipecat.services.tts_service import TTSService

# The rate at which the recogniser wants the caller's audio, Hz; None: as the line brings it.
# <% if cookiecutter.stt == "local" %>
# Whisper hears nonsense at any other rate, and does not resample: a phone call has 8000.
RECOGNISER_HZ: int | None = 16000
# <% endif %>
# <% if cookiecutter.stt != "local" %>
RECOGNISER_HZ: int | None = None
# <% endif %>
# A tool that has not answered by then is reported to the LLM as timed out. Pipecat's own default
# is to wait for ever, with the caller in silence.
TOOL_TIMEOUT_SECONDS = 10.0
# <% if cookiecutter.tts != "local" %>
# A voice that has made no sound by then, of a sentence or of its rest, is taken for broken. Twice
# this has to stay below the time after which a caller thinks that the line is dead.
VOICE_TIMEOUT_SECONDS = 3.2
# <% endif %>
# A conversation this long, about a quarter of an hour, is summarised while it goes on; its last
# messages stay as they are. It keeps the LLM fast and cheap.
CONTEXT_TOKENS = 8000
SUMMARY_TOKENS = 2000
KEPT_MESSAGES = 10
SUMMARY_TIMEOUT_SECONDS = 30.0
# <% if cookiecutter.stt == "deepgram" %>
# Where nova-3 tells the speech of a country apart; elsewhere it is given the language alone.
# https://developers.deepgram.com/docs/models-languages-overview
DEEPGRAM_REGIONS = set(
    "da-DK de-CH en-AU en-GB en-IN en-NZ en-US es-419 fr-CA ko-KR nl-BE pt-BR pt-PT sv-SE".split()
)
# <% endif %>
# <% if cookiecutter.stt == "deepgram-flux" %>
# What flux-general-multi hears. https://developers.deepgram.com/docs/flux/language-prompting
FLUX_LANGUAGES = set("de en es fr hi it ja nl pt ru".split())
# <% endif %>
# <% if cookiecutter.tts == "local" %>
# A voice speaks one language. https://huggingface.co/rhasspy/piper-voices
PIPER_VOICES = {
    "en": "en_US-ljspeech-medium",
    "de": "de_DE-thorsten-medium",
    "es": "es_ES-davefx-medium",
    "fr": "fr_FR-siwis-medium",
    "it": "it_IT-paola-medium",
    "nl": "nl_NL-mls-medium",
    "pt": "pt_BR-faber-medium",
}
# <% endif %>
# <% if cookiecutter.tts == "deepgram" %>
# A voice speaks one language. https://developers.deepgram.com/docs/tts-models
DEEPGRAM_VOICES = {
    "en": "aura-2-andromeda-en",
    "de": "aura-2-aurelia-de",
    "es": "aura-2-celeste-es",
    "fr": "aura-2-agathe-fr",
    "it": "aura-2-cinzia-it",
    "ja": "aura-2-ama-ja",
    "nl": "aura-2-beatrix-nl",
}
# <% endif %>


# <% if cookiecutter.stt == "deepgram-flux" %>
def create_stt() -> "STTService":
    """Deepgram Flux: speech to text, and when the caller's turn begins and ends."""
    from pipecat.services.deepgram.flux.stt import DeepgramFluxSTTService
    from pipecat.transcriptions.language import Language

    from config import is_on

    model = setting(
        "DEEPGRAM_FLUX_MODEL", "flux-general-en" if _spoken() == "en" else "flux-general-multi"
    )
    is_multilingual = model == "flux-general-multi"
    return DeepgramFluxSTTService(
        api_key=setting("DEEPGRAM_API_KEY"),
        url=setting("DEEPGRAM_FLUX_URL", "wss://api.deepgram.com/v2/listen"),
        # It tells where a turn may be over: the LLM begins there, for more requests.
        enable_eager_end_of_turn=is_on("SPECULATE", True),
        settings=DeepgramFluxSTTService.Settings(
            model=model, language_hints=[Language(_spoken())] if is_multilingual else None
        ),
    )


# <% endif %>
# <% if cookiecutter.stt == "assemblyai" %>
def create_stt() -> "STTService":
    """AssemblyAI: speech to text."""
    from pipecat.services.assemblyai.stt import AssemblyAISTTService
    from pipecat.transcriptions.language import Language

    return AssemblyAISTTService(
        api_key=setting("ASSEMBLYAI_API_KEY"),
        api_endpoint_base_url=setting(
            "ASSEMBLYAI_BASE_URL", "wss://streaming.assemblyai.com/v3/ws"
        ),
        settings=AssemblyAISTTService.Settings(
            model=setting("ASSEMBLYAI_MODEL", "universal-3-6-pro"),
            # Not `language`, which this service never sends.
            language_codes=[Language(setting("ASSEMBLYAI_LANGUAGE", language()))],
        ),
    )


# <% endif %>
# <% if cookiecutter.stt == "openai" %>
def create_stt() -> "STTService":
    """OpenAI: speech to text."""
    from pipecat.frames.frames import Frame, InterimTranscriptionFrame, VADUserStoppedSpeakingFrame
    from pipecat.services.openai.stt import OpenAIRealtimeSTTService

    stt = OpenAIRealtimeSTTService(
        api_key=setting("OPENAI_API_KEY"),
        base_url=setting("OPENAI_STT_BASE_URL", "wss://api.openai.com/v1/realtime"),
        settings=OpenAIRealtimeSTTService.Settings(
            model=setting("OPENAI_STT_MODEL", "gpt-realtime-whisper"),
            language=setting("OPENAI_STT_LANGUAGE", language()),
        ),
    )
    heard: dict[str, str] = {}

    @stt.event_handler("on_before_process_frame")
    async def on_before_process_frame(_stt, frame: Frame):
        if isinstance(frame, VADUserStoppedSpeakingFrame):
            # The next transcript is all that was said. Without a word about it the turn would
            # wait for more of it, 1.66 s each time.
            stt.request_finalize()
            stt.confirm_finalize()

    @stt.event_handler("on_before_push_frame")
    async def on_before_push_frame(_stt, frame: Frame):
        if isinstance(frame, InterimTranscriptionFrame) and frame.result:
            # It has only what is new; the others' have all that was heard so far.
            item = frame.result["item_id"]
            heard[item] = frame.text = heard.get(item, "") + frame.text

    return stt


# <% endif %>
# <% if cookiecutter.stt == "local" %>
def create_stt() -> "STTService":
    """Whisper, in this process: speech to text. Its model is downloaded when first used."""
    from functools import cache

    from pipecat.services.whisper import stt as whisper

    names = whisper.__dict__
    if isinstance(names["WhisperModel"], type):
        # Each call would load a model of its own, for seconds, while the others wait.
        names["WhisperModel"] = cache(names["WhisperModel"])
    return whisper.WhisperSTTService(
        # Half the time and memory of the default on a CPU, and hardly an error more.
        compute_type="int8",
        # How long a word may be on its way after the caller has stopped, seconds; measured with
        # tiny.en on two cores.
        ttfs_p99_latency=1.0,
        settings=whisper.WhisperSTTService.Settings(
            model=_whisper_model(),
            language=setting("WHISPER_LANGUAGE", language()),
        ),
    )


# <% endif %>
# <% if cookiecutter.stt == "deepgram" %>
def create_stt() -> "STTService":
    """Deepgram: speech to text."""
    from pipecat.services.deepgram.stt import DeepgramSTTService

    return DeepgramSTTService(
        api_key=setting("DEEPGRAM_API_KEY"),
        base_url=setting("DEEPGRAM_BASE_URL", "wss://api.deepgram.com"),
        settings=DeepgramSTTService.Settings(
            model=setting("DEEPGRAM_MODEL", "nova-3-general"),
            language=setting("DEEPGRAM_LANGUAGE", _deepgram_language()),
        ),
    )


# <% endif %>
# <% if cookiecutter.llm == "anthropic" %>
def create_llm(instructions: str) -> "LLMService[Any]":
    """Anthropic: what to say next.

    Args:
        instructions: The system prompt, from prompt.md.
    """
    from anthropic import (
        APIRequest,
        AsyncAnthropic,
        AsyncAPIResponse,
        AsyncCallNext,
        DefaultAsyncHttpxClient,
    )
    from pipecat.services.anthropic.llm import AnthropicLLMService
    from pipecat.utils.http import connection_limits

    async def one_tool_at_a_time(
        request: APIRequest, call_next: AsyncCallNext
    ) -> AsyncAPIResponse[Any]:
        # Of several tool calls in one answer Pipecat 1.14 makes only the last.
        body = request.json
        if isinstance(body, dict) and body.get("tools"):
            choice = {"type": "auto", "disable_parallel_tool_use": True}
            request = request.copy(body={**body, "tool_choice": choice})
        return await call_next(request)

    key = setting("ANTHROPIC_API_KEY")
    client = AsyncAnthropic(
        api_key=key,
        # Given in full, for the SDK takes a blank ANTHROPIC_BASE_URL at its word.
        base_url=setting("ANTHROPIC_BASE_URL", "https://api.anthropic.com"),
        # The SDK would hang up after 5 s without a request, and every turn connect anew.
        http_client=DefaultAsyncHttpxClient(limits=connection_limits(keepalive_expiry=None)),
        middleware=[one_tool_at_a_time],
    )
    return AnthropicLLMService(
        api_key=key,
        client=client,
        function_call_timeout_secs=TOOL_TIMEOUT_SECONDS,
        settings=AnthropicLLMService.Settings(
            model=setting("ANTHROPIC_MODEL", "claude-sonnet-4-6"),
            system_instruction=instructions,
        ),
    )


# <% endif %>
# <% if cookiecutter.llm == "google" %>
def create_llm(instructions: str) -> "LLMService[Any]":
    """Google Gemini: what to say next.

    Args:
        instructions: The system prompt, from prompt.md.
    """
    from google.genai.types import HttpOptions, HttpRetryOptions
    from pipecat.services.google.llm import GoogleLLMService

    return GoogleLLMService(
        api_key=setting("GOOGLE_API_KEY"),
        http_options=HttpOptions(
            base_url=setting("GOOGLE_BASE_URL", "https://generativelanguage.googleapis.com"),
            # Left to itself the SDK never repeats a refused request, and waits up to 10 s before
            # it repeats one that could not be made.
            retry_options=HttpRetryOptions(
                attempts=3, initial_delay=0.5, max_delay=1.0, jitter=0.25
            ),
        ),
        function_call_timeout_secs=TOOL_TIMEOUT_SECONDS,
        settings=GoogleLLMService.Settings(
            model=setting("GOOGLE_MODEL", "gemini-3.6-flash"),
            system_instruction=instructions,
        ),
    )


# <% endif %>
# <% if cookiecutter.llm == "compatible" %>
def create_llm(instructions: str) -> "LLMService[Any]":
    """Any server that speaks OpenAI's chat completions: what to say next.

    Args:
        instructions: The system prompt, from prompt.md.
    """
    from pipecat.services.openai.llm import OpenAILLMService

    llm = OpenAILLMService(
        # Never blank: the SDK would send OPENAI_API_KEY instead, to somebody else's server.
        api_key=setting("LLM_API_KEY", "none"),
        base_url=setting("LLM_URL"),
        function_call_timeout_secs=TOOL_TIMEOUT_SECONDS,
        settings=OpenAILLMService.Settings(
            model=setting("LLM_MODEL"),
            system_instruction=instructions,
        ),
    )
    # Most of these servers refuse OpenAI's role "developer", or ignore what is said in it.
    llm.supports_developer_role = False
    notice_early_ends(llm)
    return llm


# <% endif %>
# <% if cookiecutter.llm == "openai" %>
def create_llm(instructions: str) -> "LLMService[Any]":
    """OpenAI: what to say next.

    Args:
        instructions: The system prompt, from prompt.md.
    """
    from pipecat.services.openai.llm import OpenAILLMService

    llm = OpenAILLMService(
        api_key=setting("OPENAI_API_KEY"),
        # Given in full, for the SDK takes a blank OPENAI_BASE_URL at its word.
        base_url=setting("OPENAI_BASE_URL", "https://api.openai.com/v1"),
        function_call_timeout_secs=TOOL_TIMEOUT_SECONDS,
        settings=OpenAILLMService.Settings(
            model=setting("OPENAI_MODEL", "gpt-4.1"),
            system_instruction=instructions,
        ),
    )
    notice_early_ends(llm)
    return llm


# <% endif %>
# <% if cookiecutter.tts == "elevenlabs" %>
def create_tts() -> "TTSService":
    """ElevenLabs: text to speech."""
    from pipecat.services.elevenlabs.tts import ElevenLabsTTSService

    return ElevenLabsTTSService(
        api_key=setting("ELEVENLABS_API_KEY"),
        url=setting("ELEVENLABS_BASE_URL", "wss://api.elevenlabs.io"),
        stop_frame_timeout_s=VOICE_TIMEOUT_SECONDS,
        settings=ElevenLabsTTSService.Settings(
            model=setting("ELEVENLABS_MODEL", "eleven_flash_v2_5"),
            # Required: ElevenLabs has no voice that every account may use.
            voice=setting("ELEVENLABS_VOICE_ID"),
            language=language(),
        ),
        text_transforms=[("*", as_spoken)],
    )


# <% endif %>
# <% if cookiecutter.tts == "deepgram" %>
def create_tts() -> "TTSService":
    """Deepgram: text to speech."""
    from pipecat.services.deepgram.tts import DeepgramTTSService

    return DeepgramTTSService(
        api_key=setting("DEEPGRAM_API_KEY"),
        base_url=setting("DEEPGRAM_TTS_BASE_URL", "wss://api.deepgram.com"),
        stop_frame_timeout_s=VOICE_TIMEOUT_SECONDS,
        settings=DeepgramTTSService.Settings(
            # At Deepgram the voice is the model, and speaks one language.
            voice=_deepgram_voice(),
            language=language(),
        ),
        text_transforms=[("*", as_spoken)],
    )


# <% endif %>
# <% if cookiecutter.tts == "local" %>
def create_tts() -> "TTSService":
    """Piper, in this process: text to speech. Its voice is downloaded when first used."""
    from functools import cache
    from pathlib import Path

    from pipecat.services.piper.tts import PiperTTSService
    from piper import PiperVoice

    if not hasattr(PiperVoice.load, "cache_info"):
        # Each call would load a voice of its own, while the others wait.
        PiperVoice.load = cache(PiperVoice.load)
    voice = Path(_piper_voice())
    return PiperTTSService(
        download_dir=voice.parent if voice.suffix == ".onnx" else None,
        # Piper makes a sentence as a whole; on a busy machine a long one may take seconds.
        stop_frame_timeout_s=10.0,
        settings=PiperTTSService.Settings(
            voice=voice.name.removesuffix(".onnx"), language=language()
        ),
        text_transforms=[("*", as_spoken)],
    )


# <% endif %>
# <% if cookiecutter.tts == "cartesia" %>
def create_tts() -> "TTSService":
    """Cartesia: text to speech."""
    from pipecat.services.cartesia.tts import CartesiaTTSService

    return CartesiaTTSService(
        api_key=setting("CARTESIA_API_KEY"),
        url=setting("CARTESIA_BASE_URL", "wss://api.cartesia.ai/tts/websocket"),
        stop_frame_timeout_s=VOICE_TIMEOUT_SECONDS,
        settings=CartesiaTTSService.Settings(
            model=setting("CARTESIA_MODEL", "sonic-3.6"),
            # Cartesia has no default voice; this is the one Pipecat's own examples use.
            voice=setting("CARTESIA_VOICE_ID", "86e30c1d-714b-4074-a1f2-1cb6b552fb49"),
            language=language(),
        ),
        text_transforms=[("*", as_spoken)],
    )


# <% endif %>
def language_doubts() -> list[str]:
    """What of the above cannot hear or speak LANGUAGE, in a sentence each."""
    doubts: list[str] = []
    # <% if cookiecutter.stt == "deepgram-flux" %>
    if _spoken() not in FLUX_LANGUAGES:
        doubts.append(f"Deepgram Flux does not hear {_spoken()}")
    # <% endif %>
    # <% if cookiecutter.stt == "local" %>
    if _whisper_model().endswith(".en") and _spoken() != "en":
        doubts.append(f"WHISPER_MODEL is {_whisper_model()}, which hears English only")
    # <% endif %>
    # <% if cookiecutter.tts == "local" %>
    # Splits at both kinds of slashes.
    from pathlib import PureWindowsPath

    if not PureWindowsPath(voice := _piper_voice()).name.startswith(f"{_spoken()}_"):
        doubts.append(f"the voice {voice} does not speak {_spoken()}: set PIPER_VOICE")
    # <% endif %>
    # <% if cookiecutter.tts == "deepgram" %>
    if (voice := _deepgram_voice()).rpartition("-")[2] != _spoken():
        doubts.append(f"the voice {voice} does not speak {_spoken()}: set DEEPGRAM_TTS_VOICE")
    # <% endif %>
    return doubts


def _spoken() -> str:
    """LANGUAGE without its region."""
    return language().partition("-")[0]


# <% if cookiecutter.stt == "local" %>
def _whisper_model() -> str:
    """A name, or a folder with a model in CTranslate2's format."""
    return setting("WHISPER_MODEL", "base.en" if _spoken() == "en" else "base")


# <% endif %>
# <% if cookiecutter.stt == "deepgram" %>
def _deepgram_language() -> str:
    return language() if language() in DEEPGRAM_REGIONS else _spoken()


# <% endif %>
# <% if cookiecutter.tts == "local" %>
def _piper_voice() -> str:
    """A name, or a voice's .onnx file with its .onnx.json beside it."""
    return setting("PIPER_VOICE", PIPER_VOICES.get(_spoken(), PIPER_VOICES["en"]))


# <% endif %>
# <% if cookiecutter.tts == "deepgram" %>
def _deepgram_voice() -> str:
    return setting("DEEPGRAM_TTS_VOICE", DEEPGRAM_VOICES.get(_spoken(), DEEPGRAM_VOICES["en"]))


# <% endif %>
# <% if cookiecutter.llm in ("openai", "compatible") %>
def notice_early_ends(llm: Any) -> None:
    """Let an answer fail that ends without a finish reason; Pipecat takes it for a whole one."""
    ask = llm.get_chat_completions

    async def ask_for_all(context: object) -> Any:
        return whole(await ask(context))

    async def whole(chunks: Any) -> Any:
        is_whole = False
        async with chunks:
            async for chunk in chunks:
                is_whole = is_whole or any(choice.finish_reason for choice in chunk.choices or ())
                yield chunk
        if not is_whole:
            raise EOFError("the answer ended early")

    llm.get_chat_completions = ask_for_all


# <% endif %>
async def as_spoken(text: str, _type: object) -> str:
    """For the voice: without markup, numbers in words. Models write for eyes now and then."""
    return for_voice(text, _spoken())


def memory_params() -> "LLMAssistantAggregatorParams":
    """How much of a long call the LLM is told word by word."""
    from pipecat.processors.aggregators.llm_response_universal import LLMAssistantAggregatorParams
    from pipecat.utils.context.llm_context_summarization import (
        LLMAutoContextSummarizationConfig,
        LLMContextSummaryConfig,
    )

    tokens = whole_number("CONTEXT_TOKENS", CONTEXT_TOKENS)
    return LLMAssistantAggregatorParams(
        enable_auto_context_summarization=tokens > 0,
        auto_context_summarization_config=LLMAutoContextSummarizationConfig(
            max_context_tokens=tokens or CONTEXT_TOKENS,
            max_unsummarized_messages=None,
            summary_config=LLMContextSummaryConfig(
                target_context_tokens=SUMMARY_TOKENS,
                min_messages_after_summary=KEPT_MESSAGES,
                summarization_timeout=SUMMARY_TIMEOUT_SECONDS,
            ),
        ),
    )
