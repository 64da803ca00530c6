# spectrim on a machine with an NVIDIA GPU, whose driver and container toolkit the host has. See docs/release.md.
#
#     docker build -t spectrim-gpu .
#     docker run --rm --gpus all -v "$PWD:/work" spectrim-gpu compare
FROM python:3.13-slim

# Triton compiles the launcher of each kernel with the system's C compiler.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# torch from PyPI brings its CUDA libraries along. In a layer of its own, so that a change of the source does not load it anew.
RUN pip install --no-cache-dir "torch>=2.9,<2.14"

COPY pyproject.toml README.md LICENSE /opt/spectrim/
COPY src /opt/spectrim/src
RUN pip install --no-cache-dir "/opt/spectrim[lab,data]"

WORKDIR /work
ENTRYPOINT ["spectrim"]
CMD ["--help"]
