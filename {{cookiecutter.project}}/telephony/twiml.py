"""What several of our TwiML documents are made of."""

from collections.abc import Mapping
from xml.sax.saxutils import quoteattr


def parameters(values: Mapping[str, str]) -> str:
    """Write what a stream brings along, a line for each; goes right behind `<Stream …>`."""
    return "".join(
        f"\n      <Parameter name={quoteattr(name)} value={quoteattr(value)} />"
        for name, value in values.items()
    )
