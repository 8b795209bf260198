# The server in a container. The CPU image:
#   docker build -t midflight .
# The CUDA image, on top of one that has Python >= 3.11, torch >= 2.11 and CUDA already:
#   docker build -t midflight-cuda --build-arg BASE=nvcr.io/nvidia/pytorch:TAG --build-arg MIDFLIGHT_TORCH=system .
# How to run it (--shm-size, --network host): docs/operations.md.
ARG BASE=python:3.11-slim
FROM ${BASE}

ARG MIDFLIGHT_TORCH=cpu
RUN apt-get update \
    && apt-get install -y --no-install-recommends tini \
    && { python3 -c 'import ensurepip' || apt-get install -y --no-install-recommends python3-venv; } \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 midflight \
    && install -d -o midflight /opt/midflight /data

USER midflight
WORKDIR /opt/midflight
ENV MIDFLIGHT_HOME=/data MIDFLIGHT_TORCH=${MIDFLIGHT_TORCH} PYTHONUNBUFFERED=1

# First what decides the environment, so that a change of the code does not install torch again.
COPY --chown=midflight pyproject.toml README.md LICENSE ./
COPY --chown=midflight scripts scripts
# Empty packages, for setuptools to find: those that pyproject.toml names.
RUN python3 -c 'import pathlib, tomllib; \
        names = tomllib.loads(pathlib.Path("pyproject.toml").read_text())["tool"]["setuptools"]["packages"]; \
        folders = [pathlib.Path(*name.split(".")) for name in names]; \
        [(folder.mkdir(parents=True, exist_ok=True), (folder / "__init__.py").touch()) for folder in folders]' \
    && bash -c '. scripts/env.sh && ensure_env'
COPY --chown=midflight . .

VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s CMD \
    [".venv/bin/python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["tini", "--", "scripts/serve"]
CMD ["--host", "0.0.0.0"]
