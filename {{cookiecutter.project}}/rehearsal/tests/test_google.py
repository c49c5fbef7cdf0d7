"""What is Google's own, as Pipecat's class sees it."""

import pytest

from rehearsal.tests.language_model_wire import tells_an_error_within_a_stream
from rehearsal.tests.vendors.google import VENDOR

pytestmark = pytest.mark.anyio


async def test_an_error_within_a_stream_is_told_and_passes() -> None:
    await tells_an_error_within_a_stream(VENDOR)
