"""What a call cost, from a small file of prices that `PRICES_FILE` names.

    currency = "USD"
    prompt_tokens_per_million = 0.40
    cached_tokens_per_million = 0.10
    completion_tokens_per_million = 1.60
    tts_characters_per_million = 30.0
    stt_per_hour = 0.46
    call_per_hour = 0.60

The numbers are yours: an account's own prices are on its provider's page. What is left out costs
nothing; tokens from the provider's cache cost what others do, unless they have a price.
"""

import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loguru import logger

PER_MILLION = ("prompt_tokens", "cached_tokens", "completion_tokens", "tts_characters")
NAMES = {
    "currency",
    *(f"{kind}_per_million" for kind in PER_MILLION),
    "stt_per_hour",
    "call_per_hour",
}


def prices_in(path: str | Path | None) -> dict[str, Any] | None:
    """The prices in a TOML file; None without one. A file that is wrong is named in one warning."""
    try:
        return read_prices(path)
    except RuntimeError as error:
        logger.warning(f"Roark: {error}; no cost")
        return None


def read_prices(path: str | Path | None) -> dict[str, Any] | None:
    """The prices in a TOML file; None without one.

    Raises:
        RuntimeError: It cannot be read, or holds something else than prices.
    """
    if not path:
        return None
    try:
        prices = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RuntimeError(f"PRICES_FILE {path} cannot be read ({type(error).__name__})") from None
    wrong = [name for name, value in prices.items() if not _is_price(name, value)]
    if wrong:
        raise RuntimeError(
            f"PRICES_FILE {path}: {', '.join(wrong)} should be a number called one of "
            f"{', '.join(sorted(NAMES))}"
        )
    return prices


def _is_price(name: str, value: Any) -> bool:
    if name == "currency":
        return isinstance(value, str)
    return name in NAMES and type(value) in (int, float) and 0 <= value < math.inf


def cost_of(
    usage: Mapping[str, float], call_seconds: float, prices: Mapping[str, Any]
) -> dict[str, Any]:
    """What the parts of a call cost and its total, in the prices' currency (default USD).

    What an LLM charges for a request that was cut off, and told no usage, nobody knows here: such
    requests are counted beside the total.
    """

    def tokens(kind: str, count: float) -> float:
        return count * prices.get(f"{kind}_per_million", 0) / 1e6

    cached = usage.get("cached_tokens", 0) if "cached_tokens_per_million" in prices else 0
    parts = {
        "llm": tokens("prompt_tokens", usage.get("prompt_tokens", 0) - cached)
        + tokens("cached_tokens", cached)
        + tokens("completion_tokens", usage.get("completion_tokens", 0)),
        "tts": tokens("tts_characters", usage.get("tts_characters", 0)),
        "stt": usage.get("stt_seconds", 0) * prices.get("stt_per_hour", 0) / 3600,
        "call": call_seconds * prices.get("call_per_hour", 0) / 3600,
    }
    cost = {
        "currency": prices.get("currency", "USD"),
        **{name: round(value, 6) for name, value in parts.items()},
        "total": round(sum(parts.values()), 6),
    }
    if unknown := usage.get("llm_requests_without_usage"):
        cost["llm_requests_not_counted"] = unknown
    return cost
