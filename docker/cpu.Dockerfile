# The package for the CPU: for laptops without Python 3.11 or 3.12, and for CI.
# build: docker build -f docker/cpu.Dockerfile -t sas-megatron:cpu .
# run:   mkdir -p quickstart && docker run --rm --user "$(id -u):$(id -g)" -e HOME=/tmp \
#          -v "$PWD/quickstart:/work/quickstart" sas-megatron:cpu quickstart
FROM python:3.11-slim-bookworm

# DeepSpeed and torch need g++ to compile code at run time. (Megatron-core's wheel contains its compiled helpers.)
# hadolint ignore=DL3008  # the release is pinned, and its security fixes should be installed
RUN apt-get update && apt-get install --yes --no-install-recommends g++ git && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/sas_megatron
# The layers that change least come first: torch, the other packages, the source.
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --index-url https://download.pytorch.org/whl/cpu torch==2.13.0
COPY setup.py pyproject.toml README.md LICENSE ./
COPY sas_megatron/__init__.py sas_megatron/__init__.py
RUN --mount=type=cache,target=/root/.cache/pip DS_BUILD_OPS=0 pip install --editable .
COPY sas_megatron sas_megatron
COPY configs configs
COPY launch launch

RUN useradd --create-home --uid 1000 trainer && mkdir -p /work/runs && chown -R trainer /work
# A number, so that platforms that forbid root can check it.
USER 1000
WORKDIR /work
ENTRYPOINT ["sas-megatron"]
CMD ["--help"]
