# The package for GPUs. torch includes the CUDA libraries; the NVIDIA container toolkit adds the driver of the host.
# build: docker build -f docker/train.Dockerfile -t sas-megatron:gpu .
# run:   launch/docker_run.sh 8 CONFIG [section.field=value ...]
FROM nvidia/cuda:13.0.1-base-ubuntu24.04

# Ubuntu 24.04 has Python 3.12. Triton needs a compiler and Python's headers; DeepSpeed's launcher needs ssh and pdsh.
# NCCL uses InfiniBand through libibverbs, and finds only devices with a provider (mlx5 for ConnectX).
# hadolint ignore=DL3008  # the release is pinned, and its security fixes should be installed
RUN apt-get update && apt-get install --yes --no-install-recommends \
      g++ git ibverbs-providers libibverbs1 openssh-client pdsh python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

# Replace Ubuntu's user 1000, so that files on a volume belong to the same user on every node.
RUN userdel --remove ubuntu && useradd --create-home --uid 1000 trainer \
    && python3 -m venv /opt/venv && mkdir -p /work/runs && chown -R trainer /work
ENV PATH=/opt/venv/bin:$PATH

WORKDIR /opt/sas_megatron
# The layers that change least come first: torch, the other packages, the source.
RUN --mount=type=cache,target=/root/.cache/pip pip install torch==2.13.0
COPY setup.py pyproject.toml README.md LICENSE ./
COPY sas_megatron/__init__.py sas_megatron/__init__.py
RUN --mount=type=cache,target=/root/.cache/pip DS_BUILD_OPS=0 pip install --editable '.[gpu]'
COPY sas_megatron sas_megatron
COPY configs configs
COPY launch launch

# A number, so that platforms that forbid root can check it.
USER 1000
WORKDIR /work
# Checks the node first. If training would fail on it, the container stops and prints the remedies.
ENTRYPOINT ["/opt/sas_megatron/launch/container_entrypoint.sh"]
CMD ["sas-megatron", "--help"]
