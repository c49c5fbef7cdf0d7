"""What several of our TwiML documents are made of."""

import re
from collections.abc import Mapping
from xml.sax.saxutils import quoteattr

# What no XML may hold, however it is written: https://www.w3.org/TR/xml/#charsets
NO_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def parameters(values: Mapping[str, str]) -> str:
    """Write what a stream brings along, a line for each; goes right behind `<Stream …>`."""
    return "".join(
        f"\n      <Parameter name={_quoted(name)} value={_quoted(value)} />"
        for name, value in values.items()
    )


def _quoted(text: str) -> str:
    return quoteattr(NO_XML.sub("", text))
