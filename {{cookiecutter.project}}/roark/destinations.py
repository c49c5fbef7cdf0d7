"""Where calls go: the seam between the outbox and those who get its calls.

Roark gets a call while it lasts. Any other destination gets one request when the call is closed,
made of its record (`call.json`): implement `Destination` and list it in `from_environment`. Each
has the promise of the outbox: written first, tried again, delivered by the next process, once and
only to the address it was meant for. None waits for another: connections, attempts and rounds over
what was left are its own.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, Protocol
from urllib.parse import urlencode, urlsplit

from loguru import logger

from roark.client import HttpClient, Rejected, RoarkClient, error_text, retry_after
from roark.delivery import Delivery, PostDelivery, RoarkDelivery
from roark.folder import Folder

# Besides what is about a key: answers that are about the address, not about the call.
WRONG_ADDRESS = frozenset({404, 405, 410})


class Destination(Protocol):
    """Gets a closed call in one request.

    Attributes:
        name: The step's name in delivery.jsonl, in logs and in `roark deliver`.
        address: Whom a call is meant for, without anything secret; it goes nowhere else.
    """

    name: str
    address: str

    async def send(self, record: bytes, *, idempotency_key: str, attempt: int) -> None:
        """Sends a call's record, once; raises `Unreachable` or `Rejected`."""
        ...

    async def close(self) -> None:
        """Closes the connections."""
        ...


class Misdirected(Rejected):
    """Refused by a destination whose address may be wrong; the call waits for the right one."""

    @property
    def is_about_us(self) -> bool:
        """Whether the key or the address was refused, rather than the call."""
        return self.status in WRONG_ADDRESS or super().is_about_us


class Webhook:
    """A web server of one's own: POST of call.json, signed.

    Headers: `Idempotency-Key`, the same for every repeat; with a secret also `Webhook-Timestamp`
    (epoch seconds of this attempt) and `Webhook-Signature`: `v1=` and the hex HMAC-SHA256, keyed
    by the secret, of timestamp, a dot, and the body. Any 2xx takes the call.
    """

    name = "webhook"

    def __init__(
        self, url: str, *, secret: str | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self.address = public_address(url)
        self._url = url
        self._secret = secret
        self._clock = clock
        self._http = HttpClient()

    async def send(self, record: bytes, *, idempotency_key: str, attempt: int) -> None:
        """Posts the record as the bytes it is on disk."""
        headers = {"Content-Type": "application/json", "Idempotency-Key": idempotency_key}
        if self._secret:
            timestamp = str(int(self._clock()))
            signed = hmac.new(self._secret.encode(), f"{timestamp}.".encode() + record, "sha256")
            headers["Webhook-Timestamp"] = timestamp
            headers["Webhook-Signature"] = f"v1={signed.hexdigest()}"
        await _post(self._http, self._url, record, headers, attempt, secret=self._secret or "")

    async def close(self) -> None:
        """Closes the connections."""
        await self._http.close()


class Tuner:
    """Tuner's one endpoint, with the CallPayload of tuner-pipecat-sdk 0.2.9."""

    name = "tuner"

    def __init__(
        self, *, api_key: str, workspace_id: int, agent_id: str, base_url: str | None = None
    ) -> None:
        base_url = (base_url or "https://api.usetuner.ai").rstrip("/")
        query = urlencode({"workspace_id": workspace_id, "agent_remote_identifier": agent_id})
        self.address = f"{base_url} (workspace {workspace_id}, agent {agent_id})"
        self._url = f"{base_url}/api/v1/public/call?{query}"
        self._api_key = api_key
        self._http = HttpClient()

    async def send(self, record: bytes, *, idempotency_key: str, attempt: int) -> None:
        """Posts the payload; a call that Tuner has already (409) counts as taken."""
        body = json.dumps(tuner_payload(json.loads(record)), ensure_ascii=False).encode()
        headers = {
            "Content-Type": "application/json",
            "Authorization": f"Bearer {self._api_key}",
            "Idempotency-Key": idempotency_key,
        }
        try:
            await _post(self._http, self._url, body, headers, attempt, secret=self._api_key)
        except Rejected as error:
            if error.status != 409:
                raise

    async def close(self) -> None:
        """Closes the connections."""
        await self._http.close()


async def _post(
    http: HttpClient, url: str, body: bytes, headers: dict[str, str], attempt: int, *, secret: str
) -> None:
    response = await http.send("POST", url, body, headers, attempt)
    if not response.is_success:
        raise Misdirected(
            response.status_code,
            error_text(response.content, secret=secret),
            retry_after_s=retry_after(response.headers.get("Retry-After")),
        )


def public_address(url: str) -> str:
    """A URL's server, and a digest of its path: paths, queries and user names may be secrets."""
    parts = urlsplit(url)
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    port = f":{parts.port}" if parts.port else ""
    digest = hashlib.sha256(parts.path.encode()).hexdigest()[:8]
    return f"{parts.scheme}://{host}{port}/#{digest}"


# What the outbox asks


class Route(Protocol):
    """A destination as the outbox sees it."""

    name: str
    address: str

    def has_left(self, folder: Folder) -> bool:
        """Whether this destination should have more of a call now."""
        ...

    def delivery(self, folder: Folder, **how: Any) -> Delivery:
        """Brings a call there; `how` are the arguments of `Delivery`."""
        ...

    async def close(self) -> None:
        """Closes the connections."""
        ...


class RoarkRoute:
    """Roark: a call as it happens."""

    name = "Roark"

    def __init__(self, client: RoarkClient) -> None:
        self.address = client.base_url
        self._client = client

    def has_left(self, folder: Folder) -> bool:
        """Whether Roark should have more of a call now."""
        return folder.destination == self.address and bool(folder.roark_steps_left)

    def delivery(self, folder: Folder, **how: Any) -> Delivery:
        """Brings a call to Roark."""
        return RoarkDelivery(folder, self._client, **how)

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.close()


class PostRoute:
    """A destination that gets a closed call in one request."""

    def __init__(self, destination: Destination) -> None:
        self.name = destination.name
        self.address = destination.address
        self._destination = destination

    def has_left(self, folder: Folder) -> bool:
        """Whether the call is closed and not there yet."""
        return folder.posts.get(self.name) == self.address and self.name in folder.posts_left

    def delivery(self, folder: Folder, **how: Any) -> Delivery:
        """Brings a closed call there."""
        return PostDelivery(folder, self.name, self._destination.send, **how)

    async def close(self) -> None:
        """Closes the connections."""
        await self._destination.close()


def from_environment() -> Sequence[Destination]:
    """The destinations besides Roark that the environment names; a half-named one is said."""
    found: list[Destination] = []
    if url := _setting("CALL_WEBHOOK_URL"):
        if _is_web_address(url):
            found.append(Webhook(url, secret=_setting("CALL_WEBHOOK_SECRET")))
        else:
            logger.error("CALL_WEBHOOK_URL is not an http(s) address: no call goes there")
    if key := _setting("TUNER_API_KEY"):
        workspace, agent = _setting("TUNER_WORKSPACE_ID"), _setting("TUNER_AGENT_ID")
        if agent and workspace and workspace.isdigit() and int(workspace) > 0:
            found.append(
                Tuner(
                    api_key=key,
                    workspace_id=int(workspace),
                    agent_id=agent,
                    base_url=_setting("TUNER_BASE_URL"),
                )
            )
        else:
            logger.error(
                "TUNER_API_KEY is set: TUNER_WORKSPACE_ID (a number) and TUNER_AGENT_ID have to be "
                "as well; no call goes to Tuner"
            )
    return found


def _setting(name: str) -> str | None:
    return os.environ.get(name, "").strip() or None


def _is_web_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


# Tuner's payload

TUNER_REASONS = {
    "client-disconnected": "user_hangup",
    "agent-ended": "agent_hangup",
    "idle-timeout": "timeout",
    "max-duration": "timeout",
    "error": "error",
    "process-died": "error",
}


# Why the caller's turn was taken to be over.
TUNER_TURN_ENDS = {"turn-model": "model_verdict", "timeout": "silence_timeout"}


def tuner_payload(record: dict[str, Any]) -> dict[str, Any]:
    """The CallPayload of tuner-pipecat-sdk 0.2.9 that a call's record makes; absent is left out."""
    ended_at = datetime.fromisoformat(record["ended_at"]).timestamp()
    started_at = ended_at
    if record.get("started_at"):
        started_at = datetime.fromisoformat(record["started_at"]).timestamp()
    usage, models = record.get("usage") or {}, record.get("models") or {}
    seconds = max(0, int(ended_at) - int(started_at))
    tokens = usage.get("prompt_tokens", 0) + usage.get("completion_tokens", 0)
    phone = record.get("phone") or {}
    cost = record.get("cost") or {}
    return _present(
        call_id=record["call_id"],
        call_type="phone_call" if phone else "web_call",
        start_timestamp=int(started_at),
        end_timestamp=int(ended_at),
        recording_url="pipecat://no-recording",
        transcript_with_tool_calls=_tuner_segments(record),
        call_status="call_ended",
        duration_ms=int(record.get("duration_ms") or 0),
        general_meta_data_raw={
            **(record.get("metadata") or {}),
            "ai_models": {
                "asr_model": ", ".join(models.get("stt", ())),
                "llm_model": ", ".join(models.get("llm", ())),
                "tts_model": ", ".join(models.get("tts", ())),
            },
            "usage_token": _present(
                asr_duration=seconds,
                llm_token=int(tokens) or None,
                tts_character_count=int(usage.get("tts_characters", 0)) or None,
            ),
        },
        disconnection_reason=TUNER_REASONS.get(record["ending"]["reason"], "unknown"),
        sip_call_id=phone.get("sip_call_id") or phone.get("call_id"),
        sip_headers=phone.get("sip_headers"),
        agent_version=_build_number((record.get("metadata") or {}).get("version")),
        # Tuner's is in cents of a dollar; nobody here knows another currency's rate.
        call_cost=round(100 * cost["total"], 4) if cost.get("currency") == "USD" else None,
        recipient=phone.get("to_number"),
    )


def _tuner_segments(record: dict[str, Any]) -> list[dict[str, Any]]:
    rows: list[tuple[float, dict[str, Any]]] = []
    was_interrupted = False
    for index, turn in enumerate(record.get("turns") or []):
        is_user = turn["role"] == "user"
        latency = turn.get("latency") or {}
        is_cut = turn.get("interrupted_ms") is not None
        metadata = {"id": _segment_id(record, f"turn {index}"), "turn_index": index}
        if is_user:
            answer = next(iter(record["turns"][index + 1 :]), {})
            waited = answer.get("latency") or {}
            metadata |= _present(
                interrupted=was_interrupted,
                stt_node_ttfb=_whole(turn.get("stt_ttfb_ms") or waited.get("stt_ms")),
                eou_delay=_whole(waited.get("end_of_turn_ms")),
                eou_confidence=turn.get("end_probability"),
                eou_reason=TUNER_TURN_ENDS.get(turn.get("end_cause") or ""),
            )
        else:
            metadata |= _present(
                interrupted=is_cut,
                e2e_latency=_whole(latency.get("total_ms")),
                llm_node_ttft=_whole(latency.get("llm_ms")),
                tts_node_ttfb=_whole(latency.get("tts_ms")),
                node=turn.get("node"),
                interrupted_at_ms=_whole(turn.get("interrupted_ms")),
            )
        was_interrupted = is_cut and not is_user
        row = {
            "role": "user" if is_user else "agent",
            "text": turn["text"],
            "start_ms": int(turn["start_ms"]),
            "end_ms": int(turn["end_ms"]),
            "metadata": metadata,
        }
        rows.append((turn["start_ms"], row))
    for tool in record.get("tools") or []:
        rows += _tuner_tool(record, tool)
    return [row for _, row in sorted(rows, key=lambda pair: pair[0])]


def _tuner_tool(record: dict[str, Any], tool: dict[str, Any]) -> list[tuple[float, dict[str, Any]]]:
    params = _parsed(tool.get("arguments"))
    params = params if isinstance(params, dict) else {}
    begun = int(tool["at_ms"])
    about = {"name": tool["name"], "request_id": tool["id"]}
    shown = ", ".join(f"{name}={value}" for name, value in params.items())
    call = {
        "role": "agent_function",
        "text": f"{tool['name']}({shown})",
        "start_ms": begun,
        "metadata": {"id": _segment_id(record, f"call {tool['id']}"), "interrupted": False},
        "tool": {**about, "params": params, "start_ms": begun},
    }
    if tool.get("duration_ms") is None:
        return [(tool["at_ms"], call)]
    ended = int(tool["at_ms"] + tool["duration_ms"])
    content = _parsed(tool.get("result"))
    result = _present(
        role="agent_result",
        text=content if isinstance(content, str) else None,
        start_ms=ended,
        metadata={"id": _segment_id(record, f"result {tool['id']}"), "interrupted": False},
        tool=_present(
            **about,
            result=content if isinstance(content, dict) else None,
            is_error=True if tool.get("error") else None,
            error=tool.get("error"),
            start_ms=ended,
        ),
    )
    return [(tool["at_ms"], call), (tool["at_ms"] + tool["duration_ms"], result)]


def _present(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _parsed(text: Any) -> Any:
    try:
        return json.loads(text) if isinstance(text, str) else text
    except (ValueError, RecursionError):
        return text


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)


def _build_number(version: Any) -> int | None:
    """A version that is a number, as Tuner wants it; the 12 digits of a git commit are none."""
    text = str(version or "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 12 else None


def _segment_id(record: dict[str, Any], what: str) -> str:
    """The same whenever the payload is made: a repeat is the same bytes."""
    return hashlib.sha256(f"{record['call_id']}/{what}".encode()).hexdigest()[:32]
