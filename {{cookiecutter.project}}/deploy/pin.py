"""Pins the Dockerfile's base image by its digest, as the registry has it now; needs no Docker."""

import re
import sys
from pathlib import Path

import httpx

REGISTRY = "https://registry-1.docker.io"
# The list of all platforms, not the image of one.
LISTS = (
    "application/vnd.oci.image.index.v1+json, "
    "application/vnd.docker.distribution.manifest.list.v2+json"
)
SECONDS = 20.0
FROM = re.compile(r"(?m)^FROM (?P<name>[\w./-]+):(?P<tag>[\w.-]+)(@\S+)?$")
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def digest_of(name: str, tag: str, registry: str = REGISTRY) -> str:
    """Ask a registry for the digest of an image's list of platforms, as anybody may.

    https://distribution.github.io/distribution/spec/auth/token/

    Raises:
        httpx.HTTPError: It does not answer, or has no such image.
        LookupError, ValueError: It does not answer as a registry does.
    """
    address = f"{registry}/v2/{name}/manifests/{tag}"
    headers = {"Accept": LISTS}
    with httpx.Client(timeout=SECONDS) as http:
        answer = http.head(address, headers=headers)
        if answer.status_code == httpx.codes.UNAUTHORIZED:
            asked = dict(re.findall(r'(\w+)="([^"]*)"', answer.headers["WWW-Authenticate"]))
            told = http.get(asked.pop("realm"), params=asked).raise_for_status().json()
            headers["Authorization"] = f"Bearer {told['token']}"
            answer = http.head(address, headers=headers)
    digest = answer.raise_for_status().headers["Docker-Content-Digest"]
    if not DIGEST.fullmatch(digest):
        raise ValueError(digest)
    return digest


def pin(dockerfile: Path, registry: str = REGISTRY) -> int:
    """Write the digest beside the tag in the Dockerfile's FROM; returns the exit status."""
    text = dockerfile.read_text(encoding="utf-8")
    base = FROM.search(text)
    if base is None:
        print(f"{dockerfile.name} has no line FROM name:tag", file=sys.stderr)
        return 2
    try:
        digest = digest_of(base["name"], base["tag"], registry)
    except (httpx.HTTPError, LookupError, ValueError) as error:
        image = f"{base['name']}:{base['tag']}"
        print(
            f"The registry did not tell the digest of {image} ({type(error).__name__}). "
            f"With Docker: docker buildx imagetools inspect {image}",
            file=sys.stderr,
        )
        return 1
    line = f"FROM {base['name']}:{base['tag']}@{digest}"
    dockerfile.write_text(text.replace(base[0], line), encoding="utf-8")
    print(line)
    return 0
