# Builds the template's default bot straight from a clone of this repository; with the
# pcc-deploy.toml beside it, `pipecat cloud deploy` deploys it. Users get the Dockerfile of their
# own project instead: the second stage below is that file, and a test keeps the two alike.

# Bakes the template. Runs on the builder's own processor; nothing of it stays in the image.
FROM --platform=$BUILDPLATFORM python:3.12-slim-trixie AS bake
RUN pip install --no-cache-dir "cookiecutter==2.7.1"
COPY . /template/
RUN cookiecutter --no-input --output-dir /baked /template && mv /baked/* /bot && rm /bot/preflight.py

FROM dailyco/pipecat-base:0.2.3-py3.12
ENV UV_LINK_MODE=copy
COPY --from=bake /bot/pyproject.toml /bot/uv.loc[k] ./
RUN --mount=type=cache,target=/root/.cache/uv \
    if [ -f uv.lock ]; then \
        uv sync --locked --no-install-project --no-dev; \
    else \
        echo "No uv.lock: today's newest versions. Run 'uv lock' and commit it to pin them." >&2; \
        uv sync --no-install-project --no-dev; \
    fi \
    && apt-get update && apt-get install -y --no-install-recommends binutils \
    && find .venv -name '*.so*' -type f -exec strip --strip-unneeded {} ';' \
    && apt-get purge -y --auto-remove binutils \
    && apt-get clean && rm -rf /var/lib/apt/lists/*
COPY --from=bake /bot/*.py /bot/prompt.md /bot/outbound.md /bot/voicemail.md /bot/outcome.jso[n] ./
COPY --from=bake /bot/conversation/ conversation/
COPY --from=bake /bot/host/ host/
COPY --from=bake /bot/roark/ roark/
COPY --from=bake /bot/telephony/ telephony/
RUN python -c "import bot"
RUN python -c "import os, config; os.environ.update(dict.fromkeys(config.REQUIRED, 'none')); \
import bot; assert bot.readyz()['ready']"
