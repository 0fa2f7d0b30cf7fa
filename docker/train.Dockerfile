# The package on GPUs: CUDA's libraries come with torch, the driver's from the host (NVIDIA container toolkit).
# build: docker build -f docker/train.Dockerfile -t sas-megatron:gpu .
# run:   launch/docker_run.sh 8 CONFIG [section.field=value ...]
FROM nvidia/cuda:13.0.1-base-ubuntu24.04

# Ubuntu 24.04 has Python 3.12. A compiler and Python's headers are for Triton's kernels, ssh and pdsh for
# DeepSpeed's launcher.
# hadolint ignore=DL3008  # the release is pinned; within it security fixes are wanted
RUN apt-get update && apt-get install --yes --no-install-recommends \
      g++ git libibverbs1 openssh-client pdsh python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

# Ubuntu's own user 1000 goes: files on a volume shall belong to this one on every node.
RUN userdel --remove ubuntu && useradd --create-home --uid 1000 trainer \
    && python3 -m venv /opt/venv && mkdir -p /work/runs && chown -R trainer /work
ENV PATH=/opt/venv/bin:$PATH \
    CUDA_DEVICE_MAX_CONNECTIONS=1

WORKDIR /opt/sas_megatron
# What changes least comes first: torch, then the other packages, then the source.
RUN --mount=type=cache,target=/root/.cache/pip pip install torch==2.13.0
COPY setup.py pyproject.toml README.md LICENSE ./
COPY sas_megatron/__init__.py sas_megatron/__init__.py
RUN --mount=type=cache,target=/root/.cache/pip DS_BUILD_OPS=0 pip install --editable '.[gpu]'
COPY sas_megatron sas_megatron
COPY configs configs
COPY launch launch

# By number, which those that forbid root can check.
USER 1000
WORKDIR /work
# Looks at the node first; a node on which training would fail stops here, with what to do about it.
ENTRYPOINT ["/opt/sas_megatron/launch/container_entrypoint.sh"]
CMD ["sas-megatron", "--help"]
