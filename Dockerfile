# 3D-R1 with everything that its commands need. Not built by any test: report what goes wrong.
#
#   docker build --build-arg KIND=cpu -t 3d-r1:cpu .
#   docker build --build-arg KIND=cuda -t 3d-r1:cuda .   # to run it on GPUs: the NVIDIA container toolkit, --gpus all
#
#   docker run --rm 3d-r1:cpu doctor
#   docker run --rm -p 7860:7860 -v "$PWD/runs:/opt/3d-r1/runs" 3d-r1:cpu demo --host 0.0.0.0
#   docker run --rm --gpus all -v "$PWD/data:/opt/3d-r1/data" -v "$PWD/runs:/opt/3d-r1/runs" 3d-r1:cuda \
#       sft --config script/recipes/sft.yaml
#
# torch brings some 4 GB of CUDA libraries. An image for CPUs without them: name an index that has torch for CPUs with
# --build-arg PIP_EXTRA_INDEX_URL=...
#
# Folders that are mounted must be writable for user 1000, or add: --user "$(id -u):$(id -g)".

ARG KIND=cpu

FROM python:3.11-slim-bookworm AS cpu
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ default-jre-headless \
    && rm -rf /var/lib/apt/lists/* \
    && python -m venv /opt/venv
ENV THREEDR1_BUILD_OPS=cpu

# the devel image has nvcc, with which the point operations are compiled; torch brings its own CUDA libraries
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04 AS cuda
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ python3 python3-dev python3-venv default-jre-headless \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv
ENV THREEDR1_BUILD_OPS=1 CUDA_HOME=/usr/local/cuda

FROM ${KIND}
ENV PATH=/opt/venv/bin:$PATH THREEDR1_PYTHON=/opt/venv/bin/python PIP_NO_CACHE_DIR=1
WORKDIR /opt/3d-r1
ARG PIP_EXTRA_INDEX_URL=
COPY requirements.txt setup.py ./
RUN pip install "$(grep '^torch==' requirements.txt)" \
    && pip install -r requirements.txt \
    && pip install "$(grep -o 'gradio==[0-9.]*' setup.py)"
COPY . .
RUN pip install --no-deps --no-build-isolation -e . \
    && useradd --create-home --uid 1000 --non-unique visitor \
    && mkdir -p runs data \
    && chown -R 1000:1000 runs data
USER 1000
EXPOSE 7860
ENTRYPOINT ["python", "main.py"]
CMD ["--help"]
