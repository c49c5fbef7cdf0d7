"""A project takes the later versions of this template, whatever made it, and keeps its edits."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from baking import FOLDER, GIVING_WAY, ROOT, BakedProject, CommandLine, succeed

from extensions.template_link import checked_out, link, origin

PURPOSE = 'You say "{{ 7 * 7 }}" to all \N{GRINNING FACE}.'
ANSWERS = {"purpose": PURPOSE, "transport": "twilio", "record_audio": False}
CHANGED, DELETED, ADDED = "roark/client.py", "rehearsal/engines/scripted.py", "LATER.md"
EDITED_TOO = "roark/folder.py"
LATER = "# From a later version.\n"
# The last commit before the move into rooms: see "If you already generated one" in CHANGELOG.md.
BEFORE_THE_MOVE = "f4d13c14ca0b62b89984138f29ad4f93609fb760"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass(frozen=True)
class Workplace:
    """A template with a history, a clone of it, and a project made from that clone."""

    folder: Path

    @property
    def template(self) -> Path:
        """The template's repository, where later versions appear."""
        return self.folder / "template"

    @property
    def clone(self) -> Path:
        """Where a user generates from."""
        return self.folder / "clone"

    @property
    def project(self) -> BakedProject:
        """The project made from it."""
        return BakedProject(self.folder / "my-voice-bot")

    def link(self) -> dict[str, Any]:
        """Return the project's .cruft.json."""
        return json.loads(self.project.read(".cruft.json"))

    def run(self, *command: str | Path, cwd: Path | None = None) -> str:
        """Run a command that has to succeed, with git and cookiecutter as they come."""
        people = {f"GIT_{who}": "ann@example.org" for who in ("AUTHOR_NAME", "AUTHOR_EMAIL")}
        people |= {f"GIT_{who}": "ann@example.org" for who in ("COMMITTER_NAME", "COMMITTER_EMAIL")}
        own = {"HOME": str(self.folder), "TMPDIR": str(self.folder), "PYTHONUTF8": "1"}
        done = subprocess.run(
            (*GIVING_WAY, *command),
            cwd=cwd or self.folder,
            env=os.environ | people | own | {"GIT_CONFIG_GLOBAL": os.devnull},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            timeout=120,
        )
        succeed(done)
        return done.stdout

    def tool(self, name: str, *arguments: str | Path, cwd: Path | None = None) -> str:
        """Run cookiecutter or cruft."""
        return self.run(sys.executable, "-m", name, *arguments, cwd=cwd)

    def cruft(self, *arguments: str) -> str:
        """Run cruft in the project."""
        return self.tool("cruft", *arguments, cwd=self.project.path)

    def generate(self, maker: str = "cookiecutter", template: Path | str | None = None) -> None:
        """Make the project and commit it as it came."""
        source = template or self.clone
        if maker == "cruft":
            options = ["--no-input", "--extra-context", json.dumps(ANSWERS)]
            self.tool("cruft", "create", source, *options)
        else:
            given = [f"{question}={answer}" for question, answer in ANSWERS.items()]
            self.tool("cookiecutter", "--no-input", source, *given)
        self.run("git", "init", "--quiet", cwd=self.project.path)
        self.commit(self.project.path)

    def edit(self, name: str, edited: str) -> None:
        """Change a file of the project and commit that."""
        (self.project.path / name).write_text(edited, encoding="utf-8")
        self.commit(self.project.path)

    def commit(self, repository: Path) -> str:
        """Commit everything in a repository; return the commit."""
        self.run("git", "add", "--all", cwd=repository)
        self.run("git", "commit", "--quiet", "--message", "work", cwd=repository)
        return self.run("git", "rev-parse", "HEAD", cwd=repository).strip()

    def release(self) -> str:
        """Commit a later template: three changed files, a new file and a new question."""
        folder = self.template / FOLDER
        for name in (CHANGED, DELETED, EDITED_TOO):
            later = LATER + (folder / name).read_text(encoding="utf-8")
            (folder / name).write_text(later, encoding="utf-8")
        (folder / ADDED).write_text("{{ cookiecutter.project }} is {{ cookiecutter.colour }}.\n")
        form = self.template / "cookiecutter.json"
        questions = json.loads(form.read_text(encoding="utf-8")) | {"colour": ["blue", "red"]}
        form.write_text(json.dumps(questions), encoding="utf-8")
        return self.commit(self.template)


@pytest.fixture
def workplace(template: Path, tmp_path: Path) -> Workplace:
    """The template as it is now, as the only commit of a repository, cloned."""
    workplace = Workplace(tmp_path)
    shutil.copytree(template, workplace.template)
    workplace.run("git", "init", "--quiet", cwd=workplace.template)
    workplace.commit(workplace.template)
    workplace.run("git", "clone", "--quiet", workplace.template, workplace.clone)
    return workplace


@pytest.mark.slow
@pytest.mark.parametrize("maker", ["cookiecutter", "cruft"])
def test_a_project_takes_a_later_version_and_keeps_its_edits(
    workplace: Workplace, maker: str
) -> None:
    # A project that cruft makes is linked to what cruft was given: here not to the user's clone.
    workplace.generate(maker, template=workplace.template if maker == "cruft" else None)
    made = workplace.project
    prompt = made.read("prompt.md") + "Never sing.\n"
    bot = made.read("bot.py") + "\n# Ours.\n"
    workplace.edit("prompt.md", prompt)
    workplace.edit("bot.py", bot)
    _, _, rest = made.read(EDITED_TOO).partition("\n")
    workplace.edit(EDITED_TOO, f'"""Ours."""\n{rest}')
    (made.path / DELETED).unlink()
    workplace.commit(made.path)
    assert "up to date" in workplace.cruft("check")
    commit = workplace.release()

    workplace.cruft("update", "--skip-apply-ask")

    assert PURPOSE in prompt
    assert (made.read("prompt.md"), made.read("bot.py")) == (prompt, bot)
    assert made.read(CHANGED).startswith(LATER)
    assert made.read(ADDED) == "my-voice-bot is blue.\n"
    assert not (made.path / DELETED).exists()
    link = workplace.link()
    assert (link["commit"], link["template"]) == (commit, str(workplace.template))
    assert link["context"]["cookiecutter"].items() >= (ANSWERS | {"colour": "blue"}).items()
    assert "up to date" in workplace.cruft("check")
    changed = workplace.run("git", "status", "--porcelain", cwd=made.path).splitlines()
    assert {line[3:] for line in changed} == {CHANGED, EDITED_TOO, ADDED, ".cruft.json"}
    # Where the template changed the same lines its owner decides.
    assert f"UU {EDITED_TOO}" in changed
    assert made.read(EDITED_TOO).startswith(f'<<<<<<< ours\n"""Ours."""\n=======\n{LATER}')


@pytest.mark.slow
def test_a_project_from_before_the_move_comes_into_the_new_house_with_its_edits(
    template: Path, tmp_path: Path
) -> None:
    workplace = Workplace(tmp_path)
    archive = ["git", "-C", ROOT, "archive", "--format=tar", "--prefix=template/", BEFORE_THE_MOVE]
    old = subprocess.run(archive, capture_output=True)
    if old.returncode:
        pytest.skip("a shallow clone: the commit before the move is not in it")
    subprocess.run(["tar", "-x", "-C", tmp_path], input=old.stdout, check=True)
    workplace.run("git", "init", "--quiet", cwd=workplace.template)
    workplace.commit(workplace.template)
    workplace.run("git", "clone", "--quiet", workplace.template, workplace.clone)
    workplace.generate()
    made = workplace.project
    edits = {
        "prompt.md": "Never sing.\n",
        "tools.py": '\n\nasync def sing(params: FunctionCallParams):\n    """Sing."""\n',
        "services.py": "\n# Ours, to keep.\n",
    }
    for name, edit in edits.items():
        workplace.edit(name, made.read(name) + edit)

    for path in workplace.template.iterdir():
        if path.name != ".git":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copytree(template, workplace.template, dirs_exist_ok=True)
    workplace.commit(workplace.template)
    workplace.cruft("update", "--skip-apply-ask")

    for name, edit in edits.items():
        assert made.read(name).endswith(edit), name
        assert "<<<<<<<" not in made.read(name), name
    assert not [name for name in made.files() if name.endswith(".rej")]
    files = made.files()
    assert {
        "conversation/recovery.py",
        "host/private_log.py",
        "rehearsal/providers/all.py",
    } <= files
    assert not {"failures.py", "quiet_log.py", "rehearsal/deepgram.py", "tests/stage.py"} & files
    succeed(made.tool("ruff", "check", "--no-cache", "--select", "E,F", "."))


@pytest.mark.slow
def test_where_git_never_saw_the_file_as_it_came_the_template_s_change_lies_beside_it(
    workplace: Workplace,
) -> None:
    """And the later version brings another extension, under another name.

    `cruft update` renders both versions in one process, which imports a module only once.
    """
    workplace.generate()
    made = workplace.project
    shutil.rmtree(made.path / ".git")
    workplace.run("git", "init", "--quiet", cwd=made.path)
    _, _, rest = made.read(CHANGED).partition("\n")
    ours = f'"""Ours."""\n{rest}'
    workplace.edit(CHANGED, ours)
    old = workplace.template / "extensions" / "answer_checks.py"
    new = old.with_name("answer_rules.py")
    new.write_text(old.read_text(encoding="utf-8").replace('["choices"]', '["allowed"]'))
    old.unlink()
    for name in ("cookiecutter.json", "hooks/pre_gen_project.py"):
        file = workplace.template / name
        text = file.read_text(encoding="utf-8")
        text = text.replace("answer_checks", "answer_rules").replace("choices()", "allowed()")
        file.write_text(text, encoding="utf-8")
    commit = workplace.release()

    workplace.cruft("update", "--skip-apply-ask")

    assert workplace.link()["commit"] == commit
    assert made.read(CHANGED) == ours
    assert f"+{LATER}" in made.read(f"{CHANGED}.rej")
    assert made.read(ADDED)


@pytest.mark.slow
def test_a_project_is_linked_to_the_repository_behind_an_abbreviation_and_to_its_branch(
    workplace: Workplace,
) -> None:
    workplace.run("git", "branch", "stable", cwd=workplace.template)
    workplace.run("git", "clone", "--quiet", "--bare", workplace.template, "bots.git")
    commit = workplace.run("git", "rev-parse", "stable", cwd=workplace.template).strip()
    settings = {"abbreviations": {"here": f"file://{workplace.folder}/{{0}}.git"}}
    (workplace.folder / ".cookiecutterrc").write_text(json.dumps(settings))

    workplace.tool("cookiecutter", "--no-input", "here:bots", "--checkout", "stable")

    link = workplace.link()
    assert link["template"] == f"file://{workplace.folder}/bots.git"
    assert (link["commit"], link["checkout"]) == (commit, "stable")
    assert not [name for name in link["context"]["cookiecutter"] if name.startswith("_")]


def test_a_project_from_a_copy_that_is_no_clone_is_not_linked_and_says_so(
    command_line: CommandLine, template: Path, tmp_path: Path
) -> None:
    done = command_line("--no-input", template, "--output-dir", tmp_path)

    succeed(done)
    assert "The template is no git clone" in done.stdout
    assert not (tmp_path / "my-voice-bot" / ".cruft.json").exists()


@pytest.fixture
def git(tmp_path: Path) -> Path:
    """The .git folder of a clone that is at a branch's commit."""
    git = tmp_path / ".git"
    (git / "refs" / "heads").mkdir(parents=True)
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    (git / "refs" / "heads" / "main").write_text(f"{COMMIT}\n")
    return git


def test_the_commit_of_a_clone_is_found_wherever_git_keeps_it(git: Path) -> None:
    assert checked_out(git) == COMMIT
    (git / "refs" / "heads" / "main").unlink()
    assert checked_out(git) is None
    (git / "packed-refs").write_text(f"# pack-refs with: peeled\n{COMMIT} refs/heads/main\n")
    assert checked_out(git) == COMMIT
    (git / "HEAD").write_text(f"{COMMIT[::-1]}\n")
    assert checked_out(git) == COMMIT[::-1]
    (git / "HEAD").write_text("ref: refs/heads/.invalid\n")  # git's newer way to keep references.
    assert checked_out(git) is None


@pytest.mark.parametrize(
    ("address", "linked"),
    [
        ("https://github.com/ann/bots.git", "https://github.com/ann/bots.git"),
        ("https://ann:secret@example.org/bots", "https://example.org/bots"),
        ("https://ghp_secret@example.org/a@b", "https://example.org/a@b"),
        ("git@github.com:ann/bots.git", "git@github.com:ann/bots.git"),
        ("ssh://git@example.org/bots", "ssh://git@example.org/bots"),
    ],
)
def test_a_password_in_the_address_of_a_clone_does_not_travel(
    git: Path, address: str, linked: str
) -> None:
    other = '[remote "fork"]\n\turl = https://example.org/fork\n'
    config = f'[core]\n\tbare = false\n{other}[remote "origin"]\n\turl = {address}\n{other}'
    (git / "config").write_text(config)

    assert origin(git) == linked


def test_a_repository_that_was_cloned_from_nowhere_is_linked_by_its_path(git: Path) -> None:
    (git / "config").write_text("[core]\n\tbare = false\n")

    text = link(git.parent, {"project": "a-bot", "_template": "."})

    assert text
    assert json.loads(text)["template"] == str(git.parent)
