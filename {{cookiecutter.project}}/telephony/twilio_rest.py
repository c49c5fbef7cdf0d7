"""Twilio's REST API, as far as calls need it."""

import asyncio
import ssl
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING
from urllib.parse import quote

from config import setting

if TYPE_CHECKING:
    import httpx

API = "https://api.twilio.com"


async def request(
    method: str, path: str, fields: Mapping[str, str] | None = None, *, seconds: float
) -> "httpx.Response":
    """Ask for something of the account, or have it done; a refusal is a response too.

    Args:
        method: "GET" or "POST".
        path: What follows the account in the address, such as "Calls.json".
        fields: Of the question, or of the form that is posted.
        seconds: How long the whole may take.

    Raises:
        httpx.HTTPError: There was no answer.
        TimeoutError: There was none in time.
    """
    import httpx

    account = setting("TWILIO_ACCOUNT_SID")
    address = f"{setting('TWILIO_BASE_URL', API)}/2010-04-01/Accounts/{quote(account)}/{path}"
    tls = await asyncio.to_thread(_tls_context)
    login = httpx.BasicAuth(account, setting("TWILIO_AUTH_TOKEN"))
    is_question = method == "GET"
    # The timeout of httpx is for each step; this one is for the whole.
    async with asyncio.timeout(seconds), httpx.AsyncClient(verify=tls, auth=login) as http:
        return await http.request(
            method,
            address,
            params=fields if is_question else None,
            data=None if is_question else fields,
        )


@cache
def _tls_context() -> ssl.SSLContext:
    """Made once and in a thread: reading all certificates would hold up every call for 100 ms."""
    import httpx

    return httpx.create_ssl_context()
