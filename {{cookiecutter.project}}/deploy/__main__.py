"""Errands of a deployment to Pipecat Cloud; DEPLOY.md says when to run which.

    python -m deploy check          what would fail, each with its mend, in seconds
    python -m deploy pin            pin the Dockerfile's base image by its digest
    python -m deploy secrets        upload the keys of .env to the secret set
    python -m deploy twiml [ORG]    print the TwiML that sends a Twilio number's calls to the bot

Development only: the image does not hold it, and nothing imports it.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from deploy.check import check, read_deploy_file, secrets
from deploy.pin import pin


def upload_secrets(project: Path, env_file: Path) -> int:
    """Send the filled-in names of env.example to the secret set; returns the exit status.

    `pipecat cloud secrets set --file .env` would send everything else in .env too, and refuses a
    file with one blank value.
    """
    settings, values = read_deploy_file(project), secrets(project, env_file)
    if broken := [name for name, value in values.items() if "\n" in value]:
        print(f"{', '.join(broken)}: a secret is one line", file=sys.stderr)
        return 2
    if not values:
        print(f"{env_file} has no value for any name of env.example", file=sys.stderr)
        return 2
    if not shutil.which("pipecat"):
        install = 'uv tool install "pipecat-ai[cli]" --with pipecatcloud'
        print(f"The pipecat command is not installed: {install}", file=sys.stderr)
        return 2
    print(f"{settings['secret_set']}: {', '.join(sorted(values))}", flush=True)
    # Its folder is readable by nobody else, and gone afterwards.
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "secrets")
        file.write_text("".join(f'{name}="{value}"\n' for name, value in values.items()))
        command = ["pipecat", "cloud", "secrets", "set", str(settings["secret_set"])]
        options = ["--file", str(file), "--region", str(settings["region"]), "--skip"]
        return subprocess.run([*command, *options]).returncode


def twiml(agent: str, organization: str, region: str) -> str:
    """Return the TwiML that connects a call to the deployed agent.

    Twilio drops a query string, so the agent is named in a parameter. It fills in the caller's
    number itself: that is what the double braces are for.
    """
    host = "api.pipecat.daily.co" if region == "us-west" else f"{region}.api.pipecat.daily.co"
    caller = "{" * 2 + "From" + "}" * 2
    return f"""\
<?xml version="1.0" encoding="UTF-8"?>
<Response>
  <Connect>
    <Stream url="wss://{host}/ws/twilio">
      <Parameter name="_pipecatCloudServiceHost" value="{agent}.{organization}"/>
      <Parameter name="from_number" value="{caller}"/>
    </Stream>
  </Connect>
</Response>
"""


def print_twiml(project: Path, organization: str | None) -> int:
    """Print the TwiML alone on stdout, what to do with it on stderr; returns the exit status."""
    if not organization:
        from pipecatcloud.cli.config import config

        organization = config.get("org")
    if not organization:
        print("Which organization? `pipecat cloud organizations list` has it.", file=sys.stderr)
        return 2
    settings = read_deploy_file(project)
    print("In Twilio's console: a new TwiML Bin with this, then the phone number,", file=sys.stderr)
    print('"A call comes in": TwiML Bin.', file=sys.stderr)
    print(twiml(str(settings["agent_name"]), organization, str(settings["region"])), end="")
    return 0


def main(arguments: list[str] | None = None, project: Path | None = None) -> int:
    """Run one errand; returns the exit status."""
    project = project or Path(__file__).resolve().parents[1]
    parser = argparse.ArgumentParser(prog="python -m deploy", description="Deployment errands.")
    errands = parser.add_subparsers(dest="errand", required=True)
    for name, purpose in (
        ("check", "what would fail, each with its mend"),
        ("secrets", "upload the keys to the secret set of pcc-deploy.toml"),
    ):
        errand = errands.add_parser(name, help=purpose)
        errand.add_argument("--env-file", type=Path, default=project / ".env")
    errands.add_parser("pin", help="pin the Dockerfile's base image by its digest")
    errands.add_parser("twiml", help="print the TwiML for Twilio").add_argument(
        "organization", nargs="?", help="default: the one `pipecat cloud` is signed in to"
    )
    chosen = parser.parse_args(arguments)
    if chosen.errand == "check":
        return 0 if check(project, chosen.env_file) else 1
    if chosen.errand == "pin":
        return pin(project / "Dockerfile")
    if chosen.errand == "secrets":
        return upload_secrets(project, chosen.env_file)
    return print_twiml(project, chosen.organization)


if __name__ == "__main__":
    sys.exit(main())
