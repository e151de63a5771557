# The project with both environments, for CUDA 13 machines: docker build -t mcore-flows .
#
# The code lies in /opt/mcore-flows, owned by the user that runs it. Stores, models and data are volumes: nothing that a
# run makes belongs into a container. docs/deployments.md has the job variables of work pools that start it.
FROM nvidia/cuda:13.0.1-cudnn-devel-ubuntu24.04

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ENV DEBIAN_FRONTEND=noninteractive \
    PIP_NO_CACHE_DIR=1 \
    DO_NOT_TRACK=1 \
    PREFECT_SERVER_ANALYTICS_ENABLED=false

# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends iproute2 make python3.12 python3.12-dev python3.12-venv tini \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 10001 mcore && install --directory --owner=mcore /opt/mcore-flows /data
USER 10001
WORKDIR /opt/mcore-flows

# First what changes seldom, so that a change of the code does not build Transformer Engine again.
COPY --chown=mcore Makefile pyproject.toml README.md LICENSE ./
COPY --chown=mcore requirements requirements
RUN mkdir flows tasks mcore configs && make setup-gpu PYTHON=python3.12

COPY --chown=mcore . .
RUN for environment in .venv .venv-vllm; do "$environment/bin/python" -m pip install --quiet --no-deps --editable .; done
ENV PATH=/opt/mcore-flows/.venv/bin:$PATH
VOLUME /data

# tini reaps what an ended run leaves, and hands signals on. Work pools put their own command behind it.
ENTRYPOINT ["tini", "--"]
CMD ["mcore-flows", "--help"]
