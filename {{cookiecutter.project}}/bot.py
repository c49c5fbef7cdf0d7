"""One call, from pick-up to hang-up.

    python bot.py                      a browser, at http://localhost:7860
    python bot.py -t daily             a Daily room
    python bot.py -t twilio -x HOST    a phone number; HOST is the public name of this server
    python -m telephony call +49...    it calls somebody, by the line above
    python -m rehearsal                no account, no key

Pipecat Cloud calls `bot()` for every session, as the commands above do.
"""

import asyncio
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

from loguru import logger
from pipecat.frames.frames import EndWorkerFrame, Frame
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineParams, PipelineWorker, ProcessorUnusablePolicy
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.processors.aggregators.llm_response_universal import LLMContextAggregatorPair
from pipecat.processors.frameworks.rtvi import RTVIObserverParams
from pipecat.runner.types import RunnerArguments
from pipecat.workers.runner import WorkerRunner

import config
import services
import tools
import transports
from conversation import (
    clock,
    endings,
    outcome,
    phrases,
    recorded,
    recovery,
    silence,
    turns,
    warm_up,
)
from conversation.caller_words import CallerAudio, CallerWords
from conversation.first_words import FirstWords
from conversation.floor import Floor
from conversation.hold import Hold
from host import calls, metrics, private_log, shutdown, telemetry
from host.observers import Together
from roark import RoarkObserver
from telephony import transfer, twilio_auth

private_log.begin()

AGENT = "{{ cookiecutter.project }}"
PROMPT_FILE = Path(__file__).with_name("prompt.md")
# What it is told besides, of a call that it has placed.
OUTBOUND_FILE = Path(__file__).with_name("outbound.md")
# Many places want the caller to be told. GREETING says it; the LLM does where that is blank.
# <% if not cookiecutter.record_audio %>
RECORDED = ""
# <% endif %>
# <% if cookiecutter.record_audio %>
RECORDED = "Say in a sentence of its own that this call is recorded."
# <% endif %>


async def bot(runner_args: RunnerArguments) -> None:
    """Hold one call. Returns when it is over and its record is delivered or safe on disk."""
    connection: transports.Connection | None = None
    try:
        config.require_keys()
        connection = await transports.answer(runner_args)
        instructions = first_instructions(connection)
        line = calls.of_process.begin(
            connection.caller, connection.call_id, is_promised=connection.is_promised
        )
    except (transports.Refused, calls.Busy) as refusal:
        logger.warning(f"A call was refused: {refusal}")
        # Or they have hung up, and hear nothing.
        with suppress(Exception):
            if connection:
                await connection.say_busy()
        await transports.hang_up(runner_args)
        return
    except Exception as error:
        logger.error(f"This call could not be answered: {config.reason(error)}")
        await transports.hang_up(runner_args)
        raise

    with line:
        try:
            roark = RoarkObserver(
                api_key=config.setting("ROARK_API_KEY"),
                agent_id=AGENT,
                agent_name=AGENT,
                agent_prompt=instructions,
                runner_args=runner_args,
            )
            async with telemetry.of_call(roark.pipecat_call_id, service=AGENT):
                # Last: a provider's cache needs the same beginning. Roark knows the time without.
                instructions += f"- {clock.instruction()}\n"
                if connection.errand:
                    instructions = connection.errand.fill_in(instructions)
                await run_call(connection, line, instructions, roark, runner_args)
        except Exception:
            # Also what broke before run_call: nobody is left on a line that is silent.
            await transports.hang_up(runner_args)
            raise


def first_instructions(connection: transports.Connection) -> str:
    """What the LLM is told of every call on such a connection; the caller is in none of it."""
    instructions = config.text(PROMPT_FILE).rstrip()
    instructions += f"\n- {phrases.instruction()}\n"
    if connection.errand:
        instructions += config.text(OUTBOUND_FILE)
    if people := transfer.instruction():
        instructions += f"- {people}\n"
    return instructions


async def run_call(
    connection: transports.Connection,
    line: calls.Line,
    instructions: str,
    roark: RoarkObserver,
    runner_args: RunnerArguments,
) -> None:
    """Hold the call on `connection` and deliver its record, however it ends."""
    if note := connection.note:
        endings.annotate(roark, transfer_to=note.name, transfer_outcome=note.outcome or "unknown")
    outcome.prepare(roark)
    context = LLMContext()
    try:
        await run_pipeline(connection, instructions, context, roark, runner_args)
    except asyncio.CancelledError:
        # Cancelled before the pipeline ran; afterwards endings.py has noted it.
        endings.note(roark, *endings.SESSION_LIMIT)
        raise
    except Exception as error:
        endings.note(roark, "error", f"{type(error).__name__} in the bot")
        logger.exception("The call broke")
        raise
    finally:
        # The one place that runs after every kind of ending. The reason noted first stands.
        await transports.hang_up(runner_args)
        # Delivery may take seconds, for which no caller has to wait.
        line.give_back()
        try:
            await outcome.tell(roark, context)
        finally:
            await roark.aflush(reason="client-disconnected")
        metrics.call_ended(roark)
        endings.forget_soon()


def readyz() -> dict[str, object]:
    """Tell Pipecat Cloud whether this process can take a call, and why not."""
    missing = config.missing_keys()
    if not missing:
        # The platform sends no caller before this has returned.
        warm_up.once()
    return {"ready": not missing, "missing": sorted(missing)}


def doubts() -> list[str]:
    """What of the settings does not go together, for `python -m deploy check`."""
    return [*phrases.doubts(), *outcome.doubts()]


async def run_pipeline(
    connection: transports.Connection,
    instructions: str,
    context: LLMContext,
    roark: RoarkObserver,
    runner_args: RunnerArguments,
) -> None:
    """Build the pipeline for `connection` and run it until one side ends the call."""
    transport = connection.transport
    call = tools.CallState(transfer=connection.transfer)
    stt = services.create_stt()
    llm = services.create_llm(instructions)
    tts = services.create_tts()

    floor = Floor()
    client_ready = asyncio.Event()
    if connection.is_phone:
        # A telephone plays from the start, whoever has called whom.
        client_ready.set()
    context.set_tools(tools.offered())
    # May load two models; in a thread, for the other calls of this process are not to stumble.
    user_params = await asyncio.to_thread(turns.params, floor, stt)
    aggregators = LLMContextAggregatorPair(
        context, user_params=user_params, assistant_params=services.memory_params()
    )
    opening = None
    if connection.errand and not connection.note:
        # Only who calls out pays for it.
        from conversation.opening import Opening

        opening = Opening(connection.errand, floor, to_say=RECORDED)
    pipeline = Pipeline(
        [
            CallerAudio(),
            transport.input(),
            stt,
            CallerWords(floor),
            *([opening.ears] if opening else []),
            aggregators.user(),
            *([opening.gate] if opening else []),
            llm,
            tts,
            Hold(floor, client_ready),
            recorded.RecordedApology(),
            transport.output(),
            # <% if cookiecutter.record_audio %>
            roark.audio_processor,
            # <% endif %>
            # After the output, so that the context holds what the caller heard, not what was said
            # into an interruption.
            aggregators.assistant(),
        ]
    )
    is_traced = bool(config.setting("OTEL_EXPORTER_OTLP_ENDPOINT"))
    worker = PipelineWorker(
        pipeline,
        params=PipelineParams(
            audio_in_sample_rate=services.RECOGNISER_HZ or connection.audio_in_hz,
            audio_out_sample_rate=connection.audio_out_hz,
            enable_metrics=True,
            enable_usage_metrics=True,
        ),
        app_resources=call,
        conversation_id=roark.pipecat_call_id,
        enable_rtvi=not connection.is_phone,
        # Each message takes the way of an answer, at the same time; and what the services take and
        # cost is not the browser's business.
        rtvi_observer_params=RTVIObserverParams(metrics_enabled=False),
        enable_tracing=is_traced,
        # Counts turns for the traces; nobody else asks.
        enable_turn_tracking=is_traced,
        idle_timeout_secs=runner_args.pipeline_idle_timeout_secs,
        cancel_timeout_secs=endings.TEARDOWN_SECONDS,
        # A service that is broken for good ends the call in recovery.py, after an apology.
        processor_unusable_policy=ProcessorUnusablePolicy.CONTINUE,
    )
    runner = WorkerRunner(handle_sigint=runner_args.handle_sigint)
    await runner.add_workers(worker)
    caller_side = aggregators.user()
    ending = call.ending = endings.Ending(worker, runner, roark, floor=floor, caller=caller_side)
    failed = recovery.Recovery(
        worker,
        ending,
        floor=floor,
        stt=stt,
        llm=llm,
        tts=tts,
        bot_side=aggregators.assistant(),
        fail_over=connection.transfer.fail_over if connection.transfer else lambda: None,
    )
    failed.look(ending.look)
    worker.add_observer(Together(roark, failed))
    silence.watch(caller_side, worker, ending, failed, recogniser=type(stt).__name__)
    # Who comes back from a transfer to which nobody answered is not greeted again.
    told = connection.note.instruction if connection.note else ""
    greeting = FirstWords(worker, ending, caller_side, told=told, to_say=RECORDED)

    caller: str | None = None

    @transport.event_handler("on_client_connected")
    async def on_client_connected(_transport, client):
        nonlocal caller
        if caller is not None:
            return
        caller = transports.client_id(client)
        if connection.dial_out:
            # The bot alone is there: their telephone still rings.
            return
        logger.info("Caller connected")
        if opening:
            opening.picked_up(worker, ending, failed)
        else:
            await greeting.say()
        # The greeting is on its way meanwhile. A client that never says so hears it all the same.
        with suppress(TimeoutError):
            await asyncio.wait_for(client_ready.wait(), connection.client_ready_seconds)
        client_ready.set()

    async def caller_is_gone(reason: str, detail: str, *_event: object) -> None:
        client_ready.set()
        if connection.transfer and (name := await connection.transfer.done_to()):
            # The line closes once the person is being dialled.
            await ending.now(*transfer.ending_of(name))
        await ending.now(reason, detail)

    @transport.event_handler("on_client_disconnected")
    async def on_client_disconnected(_transport, client):
        if caller is None or transports.client_id(client) == caller:
            how = "client-disconnected", "the caller hung up"
            if connection.is_broken_off():
                how = "error", "the line sent what is no message of its protocol"
            elif opening:
                how = opening.how_it_ended()
            await caller_is_gone(*how)

    if opening and connection.dial_out:
        connection.dial_out.watch(
            picked_up=partial(opening.picked_up, worker, ending, failed),
            gone=caller_is_gone,
            how_it_ended=opening.how_it_ended,
        )
    for event, ends in connection.losses.items():
        transport.add_event_handler(event, partial(caller_is_gone, *ends))

    if not connection.is_phone:

        @worker.rtvi.event_handler("on_client_ready")
        async def on_client_ready(_rtvi):
            client_ready.set()

        @worker.rtvi.event_handler("on_before_push_frame")
        async def on_before_push_frame(_rtvi, frame: Frame):
            # So a client's disconnectBot() arrives.
            if isinstance(frame, EndWorkerFrame):
                await ending.now("client-disconnected", "the client ended the call")

    @worker.event_handler("on_idle_timeout")
    async def on_idle_timeout(_worker):
        endings.note(roark, "idle-timeout", "nothing happened on the line")

    @worker.event_handler("on_setup_timeout")
    async def on_setup_timeout(_worker):
        endings.note(roark, "error", "a service took too long to connect")

    async def on_signal(name: str) -> None:
        await ending.now("signal", f"the process received {name}")

    with shutdown.ends_call(on_signal):
        await ending.run(connection)
    # Nobody waits for it now.
    asyncio.get_running_loop().run_in_executor(None, turns.prepare, stt)


if __name__ == "__main__":
    config.exit_without_keys(warm_up.check_values)

    from pipecat.runner.run import app, main

    from host import front_door
    from telephony import call_api

    front_door.guard(app, sys.argv[1:], may_choose_room=call_api.may_choose_room)
    # Outside of it: what is not there takes no body.
    twilio_auth.guard(app, sys.argv[1:], reserve=calls.of_process.reserve)
    call_api.serve(app, agent=AGENT, busy=calls.of_process.refusal)
    metrics.serve()
    if not config.missing_keys():
        warm_up.once()
    main()
