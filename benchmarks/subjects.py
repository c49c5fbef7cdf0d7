"""The observers under measurement, each made the way its own README makes it."""

import importlib
import os
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from pipecat.observers.base_observer import BaseObserver
from pipecat.processors.frame_processor import FrameProcessor

NULL, OURS, PUBLISHED, TUNER = "null", "ours", "pipecat-roark", "tuner"
NAMES = (NULL, OURS, PUBLISHED, TUNER)

MODULES = {OURS: "roark", PUBLISHED: "pipecat_roark", TUNER: "tuner_pipecat_sdk.observer"}
"""What a bot imports. Of the first two it imports `RoarkObserver`: nothing else differs."""


class NullObserver(BaseObserver):
    """Sees every frame once and does nothing: the floor of every comparison."""

    def __init__(self) -> None:
        super().__init__(observe_every_push=False)

    async def on_push_frame(self, data: Any) -> None:
        """Do nothing."""


@dataclass
class Subject:
    """An observer with what it needs in the pipeline and in the worker."""

    name: str
    observers: list[BaseObserver]
    processors: list[FrameProcessor] = field(default_factory=list[FrameProcessor])

    @property
    def observer(self) -> Any:
        """The one that sees the frames."""
        return self.observers[0]


def subject(
    name: str,
    *,
    url: str = "http://127.0.0.1:9",
    runner_args: Any = None,
    call_id: str = "",
    **roark: Any,
) -> Subject:
    """Make the observer called `name`, reporting to `url` (default: nobody listens there).

    Args:
        name: One of NAMES.
        url: Its server.
        runner_args: What the runner gave to `bot()`.
        call_id: For the observer that does not find one itself.
        roark: Further arguments of `RoarkObserver`.
    """
    if name == NULL:
        return Subject(name, [NullObserver()])
    if name == TUNER:
        from pipecat.observers.turn_tracking_observer import TurnTrackingObserver
        from tuner_pipecat_sdk import Observer

        tuner = Observer(
            api_key="key",
            workspace_id=1,
            agent_id="agent",
            call_id=call_id or str(uuid4()),
            base_url=url,
        )
        turns = TurnTrackingObserver()
        tuner.attach_turn_tracking_observer(turns)
        return Subject(name, [tuner, tuner.latency_observer, turns])
    if name == PUBLISHED:
        point_published_to(url)
    else:
        os.environ["ROARK_BASE_URL"] = url
    module = importlib.import_module(MODULES[name])
    observer = module.RoarkObserver(
        **{
            "api_key": "key",
            "agent_id": "agent",
            "agent_name": "Agent",
            "agent_prompt": "Be brief.",
            "runner_args": runner_args,
            **roark,
        }
    )
    return Subject(name, [observer], [observer.audio_processor])


def point_published_to(url: str) -> None:
    """Redirect pipecat-roark, whose address is built in, to `url`."""
    from pipecat_roark import client

    client.WEBHOOK_URL = f"{url}/v1/integrations/pipecat"
    client.CHUNK_UPLOAD_URL_ENDPOINT = f"{url}/v1/integrations/pipecat/chunk-upload-url"
