# The images of rbee, each a target:
#
#   queen       takes requests and decides where they run
#   hive        owns one machine; without vLLM, for workers that only model an engine (RBEE_WORKER_ENGINE=sim)
#   hive-cpu    the hive with vLLM for processors
#   hive-cuda   the hive with vLLM for NVIDIA GPUs
#
# All of them have the command line tool `rbee`. docs/operations/docker.md shows how they are built and run, also
# on a machine that has its packages from elsewhere: build context `wheels`, secrets `pip.conf` and `uv.toml`.

ARG BASE_IMAGE=python:3.12-slim

# Empty, unless --build-context wheels=FOLDER brings some.
FROM scratch AS wheels

# All that decides which packages are installed: a change of the sources alone installs none anew.
FROM scratch AS manifests
COPY requirements /requirements
COPY packages/contracts/pyproject.toml /packages/contracts/
COPY packages/job-client/pyproject.toml /packages/job-client/
COPY packages/job-server/pyproject.toml /packages/job-server/
COPY packages/keeper/pyproject.toml /packages/keeper/
COPY services/hive/pyproject.toml /services/hive/
COPY services/queen/pyproject.toml /services/queen/
COPY services/worker/pyproject.toml /services/worker/

FROM ${BASE_IMAGE} AS uv
COPY requirements/uv.txt /uv.txt
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    python3 -m pip install --quiet --no-cache-dir --disable-pip-version-check --root-user-action ignore \
        --no-deps --only-binary :all: --require-hashes --target /uv -r /uv.txt

# rbee's own packages, as wheels in /dist.
FROM uv AS members
COPY packages /src/packages
COPY services /src/services
RUN for member in /src/packages/* /src/services/*; do \
        /uv/bin/uv build --quiet --offline --wheel --out-dir /dist "$member" || exit; \
    done

FROM ${BASE_IMAGE} AS base
LABEL org.opencontainers.image.title="rbee" \
    org.opencontainers.image.description="Turn the GPU machines you own into one inference cluster"
RUN groupadd --system --gid 10001 rbee \
    && useradd --system --uid 10001 --gid 10001 --home-dir /var/lib/rbee --shell /usr/sbin/nologin rbee \
    && install -d -o rbee -g rbee /var/lib/rbee /models /run/rbee
COPY deploy/docker/healthcheck.py /usr/local/lib/rbee/healthcheck.py
ENV PATH=/opt/rbee/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HOME=/var/lib/rbee \
    XDG_STATE_HOME=/var/lib
# For uv, during the build only.
ARG VIRTUAL_ENV=/opt/rbee
ARG UV_CACHE_DIR=/var/cache/uv
ARG UV_COMPILE_BYTECODE=1
ARG UV_LINK_MODE=copy
ARG UV_NO_BUILD=1
ARG UV_NO_SOURCES=1
ARG UV_PYTHON_DOWNLOADS=never
WORKDIR /var/lib/rbee
STOPSIGNAL SIGTERM

# --- queen -----------------------------------------------------------------------------------------------

FROM base AS queen-packages
RUN --mount=type=bind,from=uv,source=/uv,target=/uv \
    --mount=type=bind,from=manifests,target=/src \
    --mount=type=secret,id=uv.toml,target=/etc/uv/uv.toml \
    --mount=type=cache,target=/var/cache/uv \
    cd /src && /uv/bin/uv venv $VIRTUAL_ENV \
    && /uv/bin/uv pip install --excludes requirements/members.in --constraints requirements/base.txt \
        -r packages/contracts/pyproject.toml -r packages/job-client/pyproject.toml \
        -r packages/job-server/pyproject.toml -r packages/keeper/pyproject.toml \
        -r services/queen/pyproject.toml --extra postgres

FROM queen-packages AS queen
RUN --mount=type=bind,from=members,target=/members \
    /members/uv/bin/uv pip install --no-cache --offline --no-deps --no-index --find-links /members/dist \
        rbee-contracts rbee-job-client rbee-job-server rbee-keeper rbee-queen
USER rbee
VOLUME /var/lib/rbee
EXPOSE 7833
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --start-interval=1s \
    CMD ["python", "/usr/local/lib/rbee/healthcheck.py", "http://127.0.0.1:7833"]
ENTRYPOINT ["rbee-queen", "--host", "0.0.0.0"]

# --- hive ------------------------------------------------------------------------------------------------

FROM base AS hive-base
COPY models/rbee-tiny /usr/share/rbee/models/rbee-tiny
ENV RBEE_HOST=0.0.0.0 \
    RBEE_MODELS_DIR=/models \
    RBEE_MODEL_ROOTS=/usr/share/rbee/models \
    RBEE_STATE_DIR=/var/lib/rbee
EXPOSE 7835
# A large model may take long to load.
HEALTHCHECK --interval=10s --timeout=5s --start-period=1800s --start-interval=2s \
    CMD ["python", "/usr/local/lib/rbee/healthcheck.py", "http://127.0.0.1:7835"]
ENTRYPOINT ["rbee-hive"]

FROM hive-base AS hive-packages
RUN --mount=type=bind,from=uv,source=/uv,target=/uv \
    --mount=type=bind,from=manifests,target=/src \
    --mount=type=secret,id=uv.toml,target=/etc/uv/uv.toml \
    --mount=type=cache,target=/var/cache/uv \
    cd /src && /uv/bin/uv venv $VIRTUAL_ENV \
    && /uv/bin/uv pip install --excludes requirements/members.in --constraints requirements/base.txt \
        -r packages/contracts/pyproject.toml -r packages/job-client/pyproject.toml \
        -r packages/job-server/pyproject.toml -r packages/keeper/pyproject.toml \
        -r services/hive/pyproject.toml -r services/worker/pyproject.toml

FROM hive-packages AS hive
RUN --mount=type=bind,from=members,target=/members \
    /members/uv/bin/uv pip install --no-cache --offline --no-deps --no-index --find-links /members/dist \
        rbee-contracts rbee-job-client rbee-job-server rbee-keeper rbee-hive rbee-worker
USER rbee
VOLUME /var/lib/rbee /models

FROM hive-base AS hive-cpu-packages
# vLLM's kernels for processors need it.
RUN apt-get update -qq \
    && apt-get install -y -qq --no-install-recommends libnuma1 \
    && rm -rf /var/lib/apt/lists/*
RUN --mount=type=bind,from=uv,source=/uv,target=/uv \
    --mount=type=bind,from=manifests,target=/src \
    --mount=type=bind,from=wheels,target=/wheels \
    --mount=type=secret,id=uv.toml,target=/etc/uv/uv.toml \
    --mount=type=cache,target=/var/cache/uv \
    cd /src && /uv/bin/uv venv $VIRTUAL_ENV \
    && torch=$(grep '^torch==' requirements/torch-cpu.in) \
    && python=$(python3 -c 'import sys; print("cp%d%d" % sys.version_info[:2])') \
    && if ls /wheels/torch-*+cpu-$python-*_$(uname -m).whl >/dev/null 2>&1; \
        then /uv/bin/uv pip install --no-deps --find-links /wheels "$torch+cpu"; \
        else /uv/bin/uv pip install --no-deps --torch-backend cpu "$torch"; \
    fi
RUN --mount=type=bind,from=uv,source=/uv,target=/uv \
    --mount=type=bind,from=manifests,target=/src \
    --mount=type=secret,id=uv.toml,target=/etc/uv/uv.toml \
    --mount=type=cache,target=/var/cache/uv \
    cd /src && /uv/bin/uv pip install --excludes requirements/members.in \
        --constraints requirements/engine-cpu.txt --overrides requirements/engine-cpu-overrides.in \
        -r requirements/engine-cpu.in \
        -r packages/contracts/pyproject.toml -r packages/job-client/pyproject.toml \
        -r packages/job-server/pyproject.toml -r packages/keeper/pyproject.toml \
        -r services/hive/pyproject.toml -r services/worker/pyproject.toml --extra cpu

FROM hive-cpu-packages AS hive-cpu
RUN --mount=type=bind,from=members,target=/members \
    /members/uv/bin/uv pip install --no-cache --offline --no-deps --no-index --find-links /members/dist \
        rbee-contracts rbee-job-client rbee-job-server rbee-keeper rbee-hive rbee-worker
USER rbee
VOLUME /var/lib/rbee /models

FROM hive-base AS hive-cuda-packages
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
# Triton, of which vLLM's kernels are made, compiles a launcher for each.
RUN apt-get update -qq \
    && apt-get install -y -qq --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
RUN --mount=type=bind,from=uv,source=/uv,target=/uv \
    --mount=type=bind,from=manifests,target=/src \
    --mount=type=secret,id=uv.toml,target=/etc/uv/uv.toml \
    --mount=type=cache,target=/var/cache/uv \
    cd /src && /uv/bin/uv venv $VIRTUAL_ENV \
    && /uv/bin/uv pip install --excludes requirements/members.in \
        --constraints requirements/engine-cuda.txt -r requirements/torch-cuda.in \
        -r packages/contracts/pyproject.toml -r packages/job-client/pyproject.toml \
        -r packages/job-server/pyproject.toml -r packages/keeper/pyproject.toml \
        -r services/hive/pyproject.toml -r services/worker/pyproject.toml --extra cuda

FROM hive-cuda-packages AS hive-cuda
RUN --mount=type=bind,from=members,target=/members \
    /members/uv/bin/uv pip install --no-cache --offline --no-deps --no-index --find-links /members/dist \
        rbee-contracts rbee-job-client rbee-job-server rbee-keeper rbee-hive rbee-worker
USER rbee
VOLUME /var/lib/rbee /models
