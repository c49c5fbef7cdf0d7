"""Calls that the bot places: who may be called, and by whom, and what Twilio is told."""

from datetime import UTC, datetime
from typing import Any
from xml.etree import ElementTree

import httpx
import pytest
from fastapi import FastAPI
from harness import serve_app

from rehearsal.dial import ENVIRONMENT
from rehearsal.engines.scripted import ScriptedEngine
from rehearsal.providers.all import serve
from rehearsal.providers.server import HOST, free_port
from telephony import __main__ as command
from telephony import call_api
from telephony.errand import Errand, NotPlaced, check
from telephony.outbound import Outbound
from telephony.twilio_auth import Gate

pytestmark = pytest.mark.anyio

KEY = "an-auth-token"
NUMBER = "+4930123456"
ERRAND = Errand(callee_number=NUMBER, callee_name="Ann", call_reason="your appointment")
NOON = datetime(2026, 11, 26, 12, 0, tzinfo=UTC)


@pytest.fixture
def may_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that calling out needs."""
    for name, value in {**ENVIRONMENT, "TWILIO_AUTH_TOKEN": KEY, "TWILIO_STREAM_URL": ""}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("setting", "value", "errand", "sentence"),
    [
        ("", "", {"callee_number": "030123456"}, "not in E.164 form"),
        ("", "", {"callee_number": "+99912345678"}, "no country's code"),
        ("", "", {"callee_number": "+4912"}, "not in E.164 form"),
        ("CALL_PREFIXES", "", {}, "CALL_PREFIXES is empty"),
        ("CALL_PREFIXES", "+44,+31", {}, "begins with none of CALL_PREFIXES"),
        ("CALL_HOURS", "always", {}, "CALL_HOURS is like 08-20"),
        ("CALL_HOURS", "14-20", {}, "it is 13:00 in Europe/Berlin"),
        ("", "", {"call_reason": " "}, "name and reason are needed"),
        ("", "", {"call_reason": "x\0"}, "name and reason are needed"),
        ("", "", {"callee_name": "\ud800"}, "name and reason are needed"),
        ("", "", {"callee_number": "+4930" + "\u0663" * 7}, "is not in E.164 form"),
        ("CALL_FROM", "", {}, "CALL_FROM is the number"),
        ("TWILIO_AUTH_TOKEN", "", {}, "TWILIO_ACCOUNT_SID"),
        ("TWILIO_ACCOUNT_SID", "AC1", {}, "TWILIO_ACCOUNT_SID"),
    ],
)
@pytest.mark.usefixtures("may_call")
def test_what_may_not_be_called_is_refused_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, setting: str, value: str, errand: dict[str, str], sentence: str
) -> None:
    if setting:
        monkeypatch.setenv(setting, value)
    if errand.get("callee_number", "").startswith("+999"):
        monkeypatch.setenv("CALL_PREFIXES", "+999")
    whom = {"callee_number": NUMBER, "callee_name": "Ann", "call_reason": "it", **errand}
    with pytest.raises(NotPlaced, match="(?i)" + sentence.replace("+", r"\+")) as refusal:
        Outbound(agent="bot", host="voice.example.org", tell=print)
        check(Errand(**whom), now=lambda: NOON)
    assert "\n" not in str(refusal.value)


@pytest.mark.usefixtures("may_call")
def test_the_command_says_what_is_missing_and_calls_nobody(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("config.read_env", lambda: None)
    assert command.main(["call", NUMBER, "--name", "Ann", "--reason", "it"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("Not called: the bot's public host is missing: --webhook-host")
    assert len(said.splitlines()) == 1


@pytest.mark.usefixtures("may_call")
async def test_a_bot_at_pipecat_cloud_is_named_in_the_streams_parameters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with serve(ScriptedEngine()) as providers:
        monkeypatch.setenv("TWILIO_BASE_URL", providers.environment["TWILIO_BASE_URL"])
        calls = Outbound(agent="bot", cloud_agent="bot.acme", tell=print)
        sid = await calls.place(ERRAND, digits="1w2")
        assert providers.twilio.placed[sid]["to"] == NUMBER
        (request,) = providers.twilio.requests
        monkeypatch.setenv("CALL_FROM", "+1")
        with pytest.raises(NotPlaced, match="CALL_FROM"):
            Outbound(agent="bot", cloud_agent="bot.acme", tell=print)
        providers.twilio.faults.wrong_key = True
        with pytest.raises(NotPlaced, match="Twilio refused the call with 401: Authenticate"):
            await calls.place(ERRAND)
    play, connect = ElementTree.fromstring(request.body["Twiml"])
    assert play.attrib == {"digits": "1w2"}
    assert connect[0].attrib["url"] == "wss://api.pipecat.daily.co/ws/twilio"
    brought = {one.attrib["name"]: one.attrib["value"] for one in connect[0]}
    assert brought["_pipecatCloudServiceHost"] == "bot.acme"
    assert Errand.of(brought) == ERRAND
    assert ERRAND.is_ours(dict(brought), Gate(KEY))


def test_an_errand_is_taken_once_and_as_it_was_signed() -> None:
    gate = Gate(KEY)
    brought: dict[str, object] = dict(ERRAND.parameters(KEY))
    other = Errand.of({**brought, "call_reason": "your money"})
    assert Errand.of(brought) == ERRAND
    assert not other.is_ours(dict(brought), gate)
    assert not ERRAND.is_ours(dict(brought), Gate("another"))
    assert ERRAND.is_ours(dict(brought), gate)
    assert not ERRAND.is_ours(dict(brought), gate)
    assert not ERRAND.is_ours(dict(brought), None), "no auth token, no errand"


@pytest.mark.usefixtures("may_call")
async def test_a_call_by_daily_is_placed_over_http_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server that is asked is the one that starts the bot's sessions."""
    for name, value in {"CALL_API_KEY": "a-key", "DAILY_API_KEY": "a-key-of-dailys"}.items():
        monkeypatch.setenv(name, value)
    app, port = FastAPI(), free_port()
    call_api.serve(app, agent="bot", busy=lambda _number: "")
    started: list[dict[str, Any]] = []

    @app.post("/start")
    async def start(asked: dict[str, Any]) -> dict[str, str]:
        started.append(asked)
        return {"sessionId": "a session"}

    body = {"to": NUMBER, "name": "Ann", "reason": "your appointment", "transport": "daily"}
    async with (
        serve_app(app, port),
        httpx.AsyncClient(base_url=f"http://{HOST}:{port}") as http,
    ):
        headers = {"Authorization": "Bearer a-key"}
        answer = await http.post("/calls", json=body, headers=headers)
        assert (answer.status_code, answer.json()) == (201, {"session": "a session"})
        monkeypatch.setenv("DAILY_API_KEY", "")
        answer = await http.post("/calls", json=body, headers=headers)
        assert answer.status_code == 422
        assert "needs DAILY_API_KEY" in answer.json()["detail"]
    (asked,) = started
    assert Errand.of(asked["body"]) == ERRAND
    assert ERRAND.is_ours(asked["body"], Gate("a-key-of-dailys"))
