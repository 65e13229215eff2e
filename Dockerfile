# ral_gym in a container; nobody has built it yet.
#
#   docker build -t ral-gym .                                       # CPU
#   docker build -t ral-gym --build-arg TORCH=torch --build-arg TORCH_INDEX= .    # CUDA wheels, for --gpus all
#   docker run -it -v "$PWD/runs:/work/runs" ral-gym ral-gym train
ARG BASE=python:3.11-slim
FROM ${BASE}
ARG TORCH="torch"
ARG TORCH_INDEX="https://download.pytorch.org/whl/cpu"
WORKDIR /src
COPY . .
RUN pip install --no-cache-dir "${TORCH}" ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"} \
    && pip install --no-cache-dir ".[demo]"
RUN useradd --create-home user && mkdir /work && chown user /work
USER user
WORKDIR /work
CMD ["ral-gym", "--help"]
