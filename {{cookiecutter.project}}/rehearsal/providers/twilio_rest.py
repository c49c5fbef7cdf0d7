"""The one call of Twilio's REST API that a bot makes: hanging up.

`POST /2010-04-01/Accounts/{account}/Calls/{call}.json` with the form field `Status=completed` and
basic authentication. 404 with code 20404 means that the call has ended already.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from aiohttp import BasicAuth, web

from rehearsal.providers.faults import Faults
from rehearsal.providers.server import HOST, ProviderServer, WireLog

_ERRORS = {
    400: (20001, "Status must be completed"),
    401: (20003, "Authenticate"),
    404: (20404, "The requested resource was not found"),
    429: (20429, "Too Many Requests"),
    500: (20500, "Internal Server Error"),
}


class TwilioServer(ProviderServer):
    """Records hang-ups. `hung_up` has the calls the bot ended, `gone` those that ended before."""

    name = "twilio"

    def __init__(self, log: WireLog, faults: Faults | None = None) -> None:
        """Prepare the server; `start` makes it listen."""
        super().__init__(log, faults)
        self.hung_up: list[str] = []
        self.gone: set[str] = set()

    def routes(self) -> Iterable[web.RouteDef]:
        """Return the route of the call resource."""
        return [web.post("/2010-04-01/Accounts/{account}/Calls/{call}.json", self._update)]

    @property
    def environment(self) -> dict[str, str]:
        """The variable that points a bot here."""
        return {"TWILIO_BASE_URL": f"http://{HOST}:{self.port}"}

    def key_of(self, request: web.Request) -> str:
        """Return the password, if the login is the account itself or an API key (`SK…`)."""
        try:
            login = BasicAuth.decode(request.headers.get("Authorization", ""))
        except ValueError:
            return ""
        is_known = login.login == request.match_info["account"] or login.login.startswith("SK")
        return login.password if is_known else ""

    def error(self, status: int) -> Mapping[str, Any]:
        """Return Twilio's error object."""
        code, message = _ERRORS[status]
        return {"code": code, "message": message, "status": status}

    async def _update(self, request: web.Request) -> web.Response:
        form = dict(await request.post())
        entry = await self.admit(request, form)
        if isinstance(entry, web.Response):
            return entry
        await self.before_answer()
        call = request.match_info["call"]
        if form.get("Status") != "completed":
            entry.status = 400
        elif call in self.gone:
            entry.status = 404
        else:
            entry.status = 200
            self.gone.add(call)
            self.hung_up.append(call)
        self._log.changed()
        if entry.status != 200:
            return web.json_response(dict(self.error(entry.status)), status=entry.status)
        return web.json_response({"sid": call, "status": "completed"})
