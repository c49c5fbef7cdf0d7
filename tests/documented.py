"""Every command of the documents, and the test that runs it or why none can.

A command stands here as it is typed, without its comment, for the default project.
"""

import re

FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"^    ((?:uvx?|pip|python|\.ci/run)\b.*)$", re.MULTILINE)
INLINE = re.compile(r"`((?:uvx?|pip|python|pytest) [^`]+)`")

# Typed literally, in this order, in the project that the README's first command made. One with a
# pattern serves: once it prints a line like that, it is stopped by Ctrl-C.
FOLLOWED = {
    "uv sync --extra local": None,
    "uv run --extra local python -m rehearsal": r"http://localhost:\d+",
    "uv run python -m roark calls": None,
    "uv run python -m roark report": None,
    "uv run python -m roark report --watch": r"index\.html",
    "uv run python -m pipecat.evals --help": None,
    "uv sync --extra tracing": None,
    "uv sync --extra sentry": None,
    "uv sync --extra metrics": None,
    "uv lock": None,
    'uv tool install "pipecat-ai[cli]" --with pipecatcloud': None,
    "cp env.example .env": None,
}

ARGUMENTS = "tests/test_form.py::test_answers_come_by_arguments_or_by_a_file"
README = "tests/test_readme.py::test_followed_from_nothing"
PIP = "tests/test_readme.py::test_a_project_installs_and_holds_a_call_with_pip_alone"
CI = "tests/test_root_deploy.py::test_the_workflows_run_everything"
FRESH = "tests/test_rendering.py::test_the_rendering_farthest_from_the_default_passes_its_own_tests"
BOT = "host/tests/test_development_server.py::test_the_server_has_pipecats_routes"
RECORDED = "tests/test_recovery.py::test_the_apology_is_recorded_by_the_bots_own_voice"
PROVIDERS = "rehearsal/tests/test_cli.py::test_the_servers_alone_print_what_points_a_bot_at_them"
DIALOGUE = "rehearsal/tests/test_cli.py::test_a_dialogue_with_a_tool_of_ones_own_is_rehearsed"
SAID = "rehearsal/tests/test_cli.py::test_a_call_is_answered_recorded_and_at_roark"
LATENCIES = "rehearsal/tests/test_delayed.py::test_latencies_are_drawn_around_their_medians"
TRANSFER = "rehearsal/tests/test_cli.py::test_a_caller_is_handed_to_a_colleague_who_is_busy"
DELIVER = "roark/tests/test_cli.py::test_deliver_delivers_what_is_left_with_a_line_per_call"
CHECK = "tests/test_deploy.py::test_a_project_that_can_be_deployed_passes"
REPLACED = "telephony/tests/test_twilio_auth.py::test_one_process_is_replaced_and_no_call_is_cut"
GATE = "telephony/tests/test_twilio_auth.py::test_a_call_enters_with_its_token_and_nobody_else"
TWIML = "deploy/tests/test_deploy.py::test_it_alone_is_on_stdout_to_be_pasted"
EVALS = "tests/test_evals.py::test_the_starter_scenarios_hold"

PIN = "deploy/tests/test_deploy.py::test_the_registry_is_asked_for_the_digest_that_pins"
DIAL = "rehearsal/tests/test_cli.py::test_the_bot_calls_a_voicemail_by_one_command"
CALLS = "telephony/tests/test_outbound.py::test_the_command_says_what_is_missing_and_calls_nobody"
DIAL_OUT = "telephony/tests/test_daily.py::test_the_command_has_pipecats_runner_make_a_room"

# The beginning of the name of a test that runs the same program, or sees to it that CI does.
TESTED = {
    "pip install uv && uvx cookiecutter . --no-input -o .. && cd ../my-voice-bot && "
    "uv sync --extra local && uv run python -m rehearsal call -t twilio && "
    "uv run python -m rehearsal call -t webrtc": README,
    "pip install uv": README,
    "uv run python -m rehearsal call -t twilio": README,
    "uv run python -m rehearsal": README,
    "uv run --extra local python -m rehearsal call -t twilio": README,
    "python -m venv .venv && . .venv/bin/activate": PIP,
    "pip install --upgrade pip": PIP,
    "pip install -e . --group dev": PIP,
    "pytest": PIP,
    'uv run python -m rehearsal call -t webrtc --say "What are your opening hours?"': SAID,
    "python -m rehearsal": README,
    "python -m rehearsal call -t twilio": README,
    "python -m rehearsal call --engine scripted --script dialogue.toml": DIALOGUE,
    "python -m rehearsal dial --callee voicemail": DIAL,
    "uv run python -m rehearsal dial": DIAL,
    "uv run python -m rehearsal dial --callee person": DIAL,
    "uv run python -m rehearsal dial --callee voicemail": DIAL,
    "LANGUAGE=de uv run python -m rehearsal dial --callee voicemail": DIAL,
    'uv run python -m telephony call +4930123456 --name Anna --reason "your appointment on Friday" '
    "--webhook-host HOST": CALLS,
    "python bot.py -t daily": DIAL_OUT,
    "uv sync --extra dialout": FRESH,
    "python -m rehearsal providers": PROVIDERS,
    "python -m rehearsal call --latencies llm=450,tts=150,stt=100": LATENCIES,
    "python -m rehearsal call --transfer busy": TRANSFER,
    "LANGUAGE=de uv run python -m rehearsal call --transfer busy": TRANSFER,
    "pip install uv && uv run pytest": "tests/test_readme.py::test_the_readme_has_the_two_commands",
    ".ci/run": CI,
    "uv run pytest": CI,
    'uv run pytest -m "not slow"': CI,
    "uv run pytest .": CI,
    'uv run pytest -m "" .': CI,
    'uv run pytest -m "" tests/test_tools.py': CI,
    "uv sync": FRESH,
    "uv sync && uv run pytest": FRESH,
    "uv run ruff check . && uv run ruff format --check . && uv run pyright": FRESH,
    "uvx cookiecutter . --no-input stt=assemblyai llm=anthropic": ARGUMENTS,
    "uvx cookiecutter . --no-input --config-file answers.yaml": ARGUMENTS,
    "uvx cookiecutter .": "tests/test_form.py::test_enter_enter_enter_gives_the_default_project",
    "uvx cruft update": "tests/test_update.py::test_a_project_takes_a_later_version",
    "python bot.py": BOT,
    "uv run python bot.py": BOT,
    "python bot.py -t twilio": GATE,
    "for port in 7861 7862; do sudo systemctl restart bot@$port; done": REPLACED,
    "uv run python bot.py -t twilio -x HOST": GATE,
    "uv run python -m preflight": "deploy/tests/test_preflight.py::test_the_exit_status_tells",
    "uv run python -m roark deliver": DELIVER,
    "python -m roark deliver": DELIVER,
    "uv run python -m deploy check": CHECK,
    "python -m deploy check": CHECK,
    "uv run python -m deploy pin": PIN,
    "python -m deploy twiml YOUR-ORG": TWIML,
    "uv run python -m pipecat.evals run evals --verbose --logs-dir /tmp": EVALS,
    "ALLOW_EVAL=1 uv run python -m rehearsal --engine scripted --script evals/script.toml": EVALS,
}

CLOUD = "an account at Pipecat Cloud"
KEYS = "keys of the services"
INTERNET = "Hugging Face, for the voice"
QUIET = "a machine with nothing else to do, and someone who reads what it measured"

# No test has what these need. That the options of `pipecat cloud` exist is a test of the project.
NEEDS = {
    "sudo systemctl enable --now bot@7861 bot@7862": "a machine with systemd",
    'python -m benchmarks conversation --transport twilio --rows "no pause,0.6 s" --stories': QUIET,
    "uv run python -m pipecat.evals run evals/simulated --verbose --logs-dir /tmp": "an Ollama",
    "uv run python bot.py -t daily": "an account at Daily",
    'curl https://api.daily.co/v1 -H "Authorization: Bearer $DAILY_API_KEY" '
    '-H "Content-Type: application/json" -d \'{"properties": {"pinless_dialin": [{': CLOUD,
    "ALLOW_EVAL=1 ROARK_API_KEY= uv run python bot.py": KEYS,
    "pipecat cloud auth login": CLOUD,
    "uv run python -m deploy secrets": CLOUD,
    "python -m deploy secrets": CLOUD,
    "uv run python -m deploy twiml": CLOUD,
    "pipecat cloud deploy --yes": CLOUD,
    "pipecat cloud deploy": CLOUD,
    "pipecat cloud agent start my-voice-bot --use-daily": CLOUD,
    "pipecat cloud agent logs my-voice-bot": CLOUD,
    "docker buildx build --platform linux/arm64 --tag docker.io/YOU/my-voice-bot:0.1.0 --push .": (
        "Docker, and a registry to push to"
    ),
    "python -m conversation.recorded": RECORDED,
    "docker buildx imagetools inspect dailyco/pipecat-base:0.2.3-py3.12": "Docker",
    "uv run python -m piper.download_voices en_US-ljspeech-medium": INTERNET,
    "REHEARSAL_VOICE=en_US-ljspeech-medium.onnx uv run python -m rehearsal": INTERNET,
    "uvx cookiecutter gh:OWNER/REPOSITORY": "this repository at GitHub",
    "uv run python -m benchmarks": QUIET,
    "uv run python -m benchmarks markers": QUIET,
    "python -m benchmarks.verdicts": QUIET,
    "python -m benchmarks destinations": QUIET,
    "python -m benchmarks stalls": QUIET,
    "python -m benchmarks bound": QUIET,
    "python -m benchmarks pythons": "a Python 3.12 and a 3.13 beside this one, and a quiet machine",
    "python -m benchmarks turn": QUIET,
    "python -m benchmarks images": "buildah and root, as tests/test_images.py",
    "python -m benchmarks soak --minutes 20": QUIET,
    "python -m benchmarks replaced": QUIET,
    "python -m benchmarks.kept_calls DIRECTORY": QUIET,
}


def commands(document: str) -> list[str]:
    """Return the commands of a Markdown text: in blocks, indented, or in the middle of a line."""
    consoles = [
        line.removeprefix("$ ")
        for language, text in FENCED.findall(document)
        if language in ("console", "")
        for line in re.sub(r"\\\n\s*", "", text).splitlines()
        if line.startswith("$ ")
    ]
    rest = FENCED.sub("", document)
    typed = [*consoles, *INDENTED.findall(rest), *INLINE.findall(rest)]
    fenced = [line for block in shell_blocks(document) for line in block]
    return [*fenced, *map(without_comment, typed)]


def shell_blocks(document: str) -> list[list[str]]:
    """Return the lines of each block marked `sh`, all of which are to be typed."""
    return [
        [without_comment(line) for line in text.splitlines() if line]
        for language, text in FENCED.findall(document)
        if language == "sh"
    ]


def without_comment(line: str) -> str:
    """Return a command without the remark that stands beside it."""
    return re.sub(r"\s{2,}.*", "", line)
