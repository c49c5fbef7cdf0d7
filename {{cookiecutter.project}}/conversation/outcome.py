"""What came of a call, for your own systems: asked of the LLM when the call is over.

Where `outcome.json`, a JSON schema, lies beside bot.py, the LLM fills it and says in two sentences
what the call was about. Both go into the call's record, its report and the webhook. It costs one
request a call. `outcome.example.json` is an example to copy.

It is asked beside the call, by a service of its own: the call's may be closed, or be what failed.
"""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from loguru import logger
from pipecat.processors.aggregators.llm_context import LLMContext

import services
from conversation import endings, phrases
from host import shutdown

if TYPE_CHECKING:
    from roark import RoarkObserver

SCHEMA_FILE = Path(__file__).parents[1] / "outcome.json"
# The delivery of the call begins after this.
OUTCOME_SECONDS = 6.0
# So much of the end of a conversation is read: about 10,000 tokens.
MAX_CHARACTERS = 40_000

ASK = """\
You read the transcript of a call between a caller and a voice bot, and report on it. Answer with
JSON alone, by this schema; say only what the transcript says. `summary` is two sentences in
{language}: what the caller wanted, and what came of it.

{schema}"""


class NoOutcome(Exception):
    """The outcome could not be told; the text says why, without what was said."""


def schema() -> dict[str, Any] | None:
    """The schema of the answer: a summary, and the owner's; None where there is no file.

    Raises:
        NoOutcome: The file is no JSON schema of an object.
    """
    import fastjsonschema

    try:
        owners = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
        if owners.get("type") != "object":
            raise NoOutcome('outcome.json is a JSON schema whose "type" is "object"')
        fastjsonschema.compile(owners)
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError, fastjsonschema.JsonSchemaException) as error:
        raise NoOutcome(f"outcome.json is no JSON schema ({type(error).__name__})") from error
    return {
        "type": "object",
        "properties": {"summary": {"type": "string"}, "outcome": owners},
        "required": ["summary", "outcome"],
        "additionalProperties": False,
    }


def doubts() -> list[str]:
    """What is wrong with outcome.json, in a sentence."""
    try:
        schema()
    except NoOutcome as error:
        return [f"{error}: calls have no outcome"]
    return []


def prepare(roark: "RoarkObserver") -> None:
    """Have the record wait for its outcome, where one is wanted."""
    if SCHEMA_FILE.exists() and (stay_open := getattr(roark, "stay_open", None)):
        stay_open()


async def tell(roark: "RoarkObserver", context: LLMContext) -> None:
    """Put what came of the call into its record, or why that could not be told. Never raises.

    Takes OUTCOME_SECONDS at most. Nothing is asked where nobody spoke, or there is no place for it.
    """
    try:
        wanted = schema() if hasattr(roark, "stay_open") else None
        said = transcript(context)
        if not wanted or "\nCaller: " not in f"\n{said}":
            return
        if shutdown.is_draining():
            raise NoOutcome("not asked: the process was about to stop")
        async with asyncio.timeout(OUTCOME_SECONDS):
            endings.annotate(roark, **await ask(wanted, said))
    except NoOutcome as error:
        _failed(roark, str(error))
    except TimeoutError:
        _failed(roark, f"the LLM did not answer within {OUTCOME_SECONDS:g} s")
    # Of the vendors' clients, whose texts may repeat what was asked.
    except Exception as error:
        _failed(roark, f"the LLM refused or broke off: {type(error).__name__}")


async def ask(wanted: dict[str, Any], said: str) -> dict[str, Any]:
    """Ask the LLM to fill the schema for a transcript.

    Raises:
        NoOutcome: It answered something else.
    """
    import fastjsonschema

    instructions = ASK.format(language=phrases.spoken().language, schema=json.dumps(wanted))
    llm = services.create_llm(instructions)
    try:
        answer = await llm.run_inference(
            LLMContext([{"role": "user", "content": said}]), response_schema=wanted
        )
    finally:
        await llm.cleanup()
    text = answer or ""
    # Some put it between code fences.
    text = text[text.find("{") : text.rfind("}") + 1]
    try:
        check: Callable[[Any], dict[str, Any]] = fastjsonschema.compile(wanted)
        return check(json.loads(text))
    except ValueError as error:
        raise NoOutcome(
            f"the LLM answered what outcome.json does not allow: {_where(error)}"
        ) from error


def transcript(context: LLMContext) -> str:
    """What was said and done in a call, a line each; of a long one its end."""
    lines: list[str] = []
    # Of other kinds are what one vendor's service alone understands.
    messages = [
        cast(dict[str, Any], one) for one in context.get_messages() if isinstance(one, dict)
    ]
    for message in messages:
        content = message.get("content")
        said = content if isinstance(content, str) else ""
        match message.get("role"):
            case "user":
                lines.append(f"Caller: {said}")
            case "tool":
                lines.append(f"Result: {said}")
            case "assistant":
                lines += [f"Bot: {said}"] if said else []
                lines += [
                    f"The bot calls {call['function']['name']} {call['function']['arguments']}"
                    for call in message.get("tool_calls") or ()
                ]
            case _:
                lines.append(f"Note: {said}")
    return "\n".join(lines)[-MAX_CHARACTERS:]


def _where(error: ValueError) -> str:
    """The place of the answer that is wrong, without what stands there."""
    return getattr(error, "name", None) or "no JSON"


def _failed(roark: "RoarkObserver", why: str) -> None:
    logger.warning(f"A call has no outcome: {why}")
    endings.annotate(roark, outcome_error=why)
