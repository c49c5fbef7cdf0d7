"""Twilio's REST API and its signature."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import pytest
from aiohttp import web
from pipecat.frames.frames import (
    EndFrame,
)
from pipecat.serializers.twilio import TwilioFrameSerializer

from rehearsal.callers.twilio import TwilioCaller
from rehearsal.engines.scripted import ScriptedEngine
from rehearsal.providers.all import Providers, serve
from rehearsal.providers.server import HOST
from rehearsal.providers.twilio_rest import Callee, Colleague, sign

pytestmark = pytest.mark.anyio

KEY = "a-secret-of-the-bot"


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


def test_it_signs_as_the_documented_example() -> None:
    form = {
        "Digits": "1234",
        "CallSid": "CA1234567890ABCDE",
        "To": "+18005551212",
        "Caller": "+14158675309",
        "From": "+14158675309",
    }
    signature = sign("12345", "https://mycompany.com/myapp.php?foo=1&bar=2", form)
    assert signature == "RSOYDt4T1cUTdK1PDd93/VVr8B8="


TO, FROM = "+4930123456", "+4930654321"


class Webhooks:
    """Where Twilio comes to.

    Attributes:
        host: Its name and port.
        told: What was posted, as (path, form), without what is always the same.
    """

    host = ""

    def __init__(self) -> None:
        self.told: list[tuple[str, dict[str, str]]] = []
        self._more = asyncio.Event()

    async def take(self, request: web.Request) -> web.Response:
        form = {name: str(value) for name, value in (await request.post()).items()}
        signature = sign("rehearsal", f"https://{self.host}{request.path}", form)
        assert request.headers["X-Twilio-Signature"] == signature
        if request.path == "/reject":
            return web.Response(text="<Response><Reject reason='busy' /></Response>")
        assert form.pop("AccountSid") == "AC1"
        self.told.append((request.path, form))
        self._more.set()
        return web.Response(status=204)

    async def until(self, number: int) -> None:
        async with asyncio.timeout(10.0):
            while len(self.told) < number:
                self._more.clear()
                await self._more.wait()


@asynccontextmanager
async def twilio_and_webhooks() -> AsyncIterator[tuple[Providers, Webhooks]]:
    hooks, app = Webhooks(), web.Application()
    app.router.add_post("/{path}", hooks.take)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, HOST, 0).start()
    hooks.host = f"{HOST}:{runner.addresses[0][1]}"
    try:
        async with serve(ScriptedEngine()) as providers:
            yield providers, hooks
    finally:
        await runner.cleanup()


async def place(providers: Providers, form: list[tuple[str, str]]) -> tuple[int, dict[str, str]]:
    twiml = [("Twiml", f"<Response><Dial>{TO}</Dial></Response>"), ("To", TO), ("From", FROM)]
    url = providers.environment["TWILIO_BASE_URL"] + "/2010-04-01/Accounts/AC1/Calls.json"
    login = {"Authorization": aiohttp.encode_basic_auth("AC1", "t")}
    async with (
        aiohttp.ClientSession() as http,
        http.post(url, data=[*twiml, *form], headers=login) as answer,
    ):
        return answer.status, await answer.json()


async def test_the_stages_that_were_asked_for_are_posted_with_twilios_signature() -> None:
    async with twilio_and_webhooks() as (providers, hooks):
        status = [("StatusCallback", f"https://{hooks.host}/status")]
        events = [("StatusCallbackEvent", one) for one in ("initiated", "ringing", "completed")]
        for does, sip_code, code in (
            *(("busy", "", "486"), ("busy", "603", "603")),
            *(("no-answer", "", "487"), ("failed", "", "404")),
        ):
            providers.twilio.callees[TO] = Callee(does=does, sip_code=sip_code)
            hooks.told.clear()
            _, call = await place(providers, [*status, *events])
            await hooks.until(3)
            assert call["status"] == "queued"
            told = sorted((form for _, form in hooks.told), key=lambda one: one["SequenceNumber"])
            assert [one["CallStatus"] for one in told] == ["initiated", "ringing", does]
            assert {one["CallbackSource"] for one in told} == {"call-progress-events"}
            assert {one["CallSid"] for one in told} == {call["sid"]}
            _, second, end = told
            assert (end["To"], end["From"], end["Timestamp"][-5:]) == (TO, FROM, "+0000")
            assert (end["CallDuration"], end["SipResponseCode"]) == ("0", code)
            assert "SipResponseCode" not in second
        # Where no stage is named it is the end.
        await place(providers, status)
        await hooks.until(4)
    assert hooks.told[3][1]["CallStatus"] == "failed"


@pytest.mark.parametrize("is_aside", [True, False], ids=["beside the TwiML", "before it"])
async def test_machine_detection_says_who_answered_before_the_twiml_or_beside_it(
    is_aside: bool,
) -> None:
    """Five calls at once, for each takes as long as it would."""
    cases = (
        ("human", "Enable", "human", 0.1),
        ("machine", "Enable", "machine_start", 0.1),
        ("machine", "DetectMessageEnd", "machine_end_beep", 0.2),
        ("fax", "DetectMessageEnd", "fax", 0.1),
        ("unknown", "Enable", "unknown", 0.1),
    )
    found_by_call: dict[str, tuple[str, float]] = {}
    async with twilio_and_webhooks() as (providers, hooks):
        # So long a call lasts.
        providers.twilio.colleagues[TO] = Colleague(rings_s=0.5 if is_aside else 0.0)
        for answered_by, mode, found, seconds in cases:
            providers.twilio.callees[TO] = Callee(
                TwilioCaller(""), answered_by=answered_by, detected_after_s=0.1, greets_s=0.2
            )
            form = [("MachineDetection", mode), ("AsyncAmd", str(is_aside).lower())]
            form += [("AsyncAmdStatusCallback", f"https://{hooks.host}/amd")]
            form += [("StatusCallback", f"https://{hooks.host}/status")]
            _, call = await place(providers, form)
            found_by_call[call["sid"]] = found, seconds
        await hooks.until(len(cases) * (2 if is_aside else 1))
        shown = {sid: call["answered_by"] for sid, call in providers.twilio.placed.items()}
    assert shown == {sid: found for sid, (found, _) in found_by_call.items()}
    ends = [form for path, form in hooks.told if path == "/status"]
    assert [one["CallStatus"] for one in ends] == ["completed"] * len(cases)
    found_aside = {form["CallSid"]: form for path, form in hooks.told if path == "/amd"}
    assert found_aside.keys() == (found_by_call.keys() if is_aside else set())
    for sid, form in found_aside.items():
        found, seconds = found_by_call[sid]
        assert form["AnsweredBy"] == found
        assert int(form["MachineDetectionDuration"]) >= 1000 * seconds - 20


async def test_a_call_that_is_rejected_is_over() -> None:
    async with twilio_and_webhooks() as (providers, hooks):
        phone = TwilioCaller("")
        await providers.twilio.ring(phone, f"https://{hooks.host}/reject")
        await asyncio.wait_for(phone.ended.wait(), 10.0)
    assert phone.call_sid in providers.twilio.gone


async def test_a_machine_detection_that_twilio_does_not_have_is_refused() -> None:
    async with twilio_and_webhooks() as (providers, _):
        status, answer = await place(providers, [("MachineDetection", "Maybe")])
    assert status == 400
    assert "MachineDetection" in answer["message"]
