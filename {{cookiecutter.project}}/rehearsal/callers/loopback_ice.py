"""Keeps WebRTC on this machine: of all addresses, ICE is offered 127.0.0.1 alone.

aioice 0.13 lists every address except 127.0.0.1 and has no setting for it, so the function that
lists them is replaced, here and nowhere else: for the caller, and for the bot of a rehearsal.
"""

import aioice.ice


def keep_ice_on_loopback() -> None:
    """Make every later ICE connection of this process gather 127.0.0.1 only."""
    aioice.ice.get_host_addresses = _loopback_only


def _loopback_only(use_ipv4: bool, use_ipv6: bool) -> list[str]:
    return ["127.0.0.1"] if use_ipv4 else []
