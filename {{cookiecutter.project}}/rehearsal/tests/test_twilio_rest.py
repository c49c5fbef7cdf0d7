"""Twilio's REST API and its signature."""

import aiohttp
import pytest
from pipecat.frames.frames import (
    EndFrame,
)
from pipecat.serializers.twilio import TwilioFrameSerializer

from rehearsal.engines.scripted import ScriptedEngine
from rehearsal.providers.all import serve
from rehearsal.providers.twilio_rest import sign

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
