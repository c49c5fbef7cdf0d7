"""What an owner does in the first week, word by word as README.md and AGENTS.md say."""

import re
import shutil

import pytest
from baking import PATIENT, Bake, BakedProject, succeed
from config import required
from deploy.check import check_secrets

STANDS_IN = (
    "The rehearsal has no server for GroqLLMService: OpenAILLMService stands in for it.",
    "The rehearsal has no server for RimeTTSService: CartesiaTTSService stands in for it.",
)


def swapped(readme: str, services: str) -> str:
    """Put the factories of the README's block in the place of those with the same names."""
    section = readme.partition("### Another service")[2]
    block = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert block
    for factory in block[1].strip().split("\n\n\n"):
        name = factory.partition("(")[0]
        pattern = rf"^{name}\(.*?(?=\n\n\n)"
        services, count = re.subn(
            pattern, lambda _, new=factory: new, services, flags=re.DOTALL | re.MULTILINE
        )
        assert count == 1, name
    return services


def add_tool(project: BakedProject) -> None:
    """Write the tool of AGENTS.md and its test where it says."""
    section = project.read("AGENTS.md").partition("## A tool and its test")[2]
    tool, test = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    ((condition, append),) = re.findall(r"a line `(if .*?:)`, a line\n`(.*?)`", section)
    returns = "    return ToolsSchema(tools)\n"
    offer = f"    {condition}\n        {append}\n"
    tools = project.read("tools.py").replace(returns, offer + returns) + f"\n\n{tool}"
    (project.path / "tools.py").write_text(tools)
    (project.path / "tests" / "test_opening_hours.py").write_text(test)


@pytest.mark.slow(seconds=50)
def test_with_groq_and_rime_swapped_in_calls_and_tests_go_on_and_say_what_stands_in(
    bake: Bake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(*PATIENT)
    project = bake()
    services = swapped(project.read("README.md"), project.read("services.py"))
    (project.path / "services.py").write_text(services)
    names = ["GROQ_API_KEY", "RIME_API_KEY", "RIME_VOICE"]
    assert [*required(project.path / "services.py")] == ["DEEPGRAM_API_KEY", *names]
    found = list(check_secrets(project.path, project.path / ".env"))
    assert [finding.mend for finding in found if finding.what.startswith("services.py reads")] == [
        f"a line {name}= in env.example" for name in names
    ]
    succeed(project.tool("ruff", "check", "--no-cache", "."))
    succeed(project.tool("ruff", "format", "--check", "--no-cache", "."))

    called = project.tool("rehearsal", "call", "-t", "twilio", "--engine", "scripted")
    succeed(called)
    assert all(sentence in called.stdout for sentence in STANDS_IN)
    assert "Yes, I can hear you. Is there anything else?" in called.stdout

    add_tool(project)
    succeed(project.tool("ruff", "check", "--no-cache", "."))
    files = ("deploy/tests/test_preflight.py", "tests/test_opening_hours.py")
    tested = project.tool("pytest", "-q", "-n", "0", *files)
    succeed(tested)
    assert all(sentence in tested.stdout for sentence in STANDS_IN)
    assert "skipped" not in tested.stdout


@pytest.mark.slow
def test_without_rehearsal_the_tests_that_need_it_are_left_out_in_one_line_and_ci_is_green(
    bake: Bake,
) -> None:
    """Nor do they need evals/ or .github/."""
    project = bake()
    for folder in ("rehearsal", "evals", ".github"):
        shutil.rmtree(project.path / folder)
    collected = project.tool("pytest", "-q", "-n", "0", "--collect-only", ".")
    succeed(collected)
    assert "they need rehearsal/, which is not here" in collected.stdout
    succeed(
        project.tool("pytest", "-q", "-n", "0", "tests/test_config.py", "-k", "copied or has_to")
    )
    # As CI types it, of what needs rehearsal/ most.
    succeed(project.tool("pyright", "tests/harness.py", "tests/test_tools.py"))
