# Luthier in a container, with or without a GPU:
#   docker build -t luthier .                                        needs BuildKit, the package docker-buildx
#   docker run --rm -v luthier-outputs:/srv/outputs luthier          the built-in images and model
#   docker run --rm --gpus all --shm-size 4g -v "$PWD/photos:/photos:ro" \
#       -v luthier-outputs:/srv/outputs -v luthier-cache:/cache luthier \
#       --data_dir /photos --output_dir outputs/my_run
# torch's wheels contain CUDA, so the host needs only the driver, 580 or newer for CUDA 13.
FROM debian:bookworm-slim AS build
# Packages of the distribution have no pins: the newest ones have the security updates.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
COPY requirements.txt requirements.lock /build/
RUN --mount=type=cache,target=/pip \
    python3 -m venv /opt/luthier \
    && /opt/luthier/bin/pip install --cache-dir /pip \
        --requirement /build/requirements.txt --constraint /build/requirements.lock

FROM debian:bookworm-slim
# The compiler is for --torch_compile.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-dev g++ ca-certificates \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/luthier /opt/luthier
COPY *.py accelerate_config.yaml cloud/entrypoint.sh /app/
COPY configs /app/configs
COPY luthier /app/luthier
# Only the two volumes are writable: for this user, and for every other user of group 0 (`docker run --user 1234`).
RUN mkdir -p /srv/outputs /cache \
    && ln -s /app/configs /srv/configs \
    && chown -R 10001:0 /srv/outputs /cache \
    && chmod -R 0770 /srv/outputs /cache \
    && chmod 0755 /app/entrypoint.sh
ENV PATH=/opt/luthier/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/cache \
    HF_HOME=/cache/huggingface \
    USER=luthier
WORKDIR /srv
VOLUME ["/srv/outputs", "/cache"]
USER 10001:0
# A run that trains is healthy, and nothing here listens on a port.
HEALTHCHECK NONE
STOPSIGNAL SIGTERM
ENTRYPOINT ["/app/entrypoint.sh"]
