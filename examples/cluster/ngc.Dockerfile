# docker build --build-arg TAG=YY.MM-py3 --tag megatron-long:ngc --file examples/cluster/ngc.Dockerfile .
# NVIDIA's image has torch, Transformer Engine and NCCL built for each other, and its /etc/pip/constraint.txt keeps pip
# from replacing them. TAG needs Python 3.12 or 3.13, torch 2.11 or later and Transformer Engine 2.20 or later; check
# with: docker run --gpus all megatron-long:ngc megatron-long doctor
ARG TAG
FROM nvcr.io/nvidia/pytorch:${TAG}
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /opt/megatron-long
COPY . .
RUN pip install -e ".[cluster,parquet,gguf,tiktoken,eval]"
CMD ["megatron-long"]
