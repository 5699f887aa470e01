# syntax=docker/dockerfile:1.7
# A GPU service with its real engine. STAGE is edit or i2v:
#
#   docker build -f deploy/docker/worker.Dockerfile --build-arg STAGE=edit -t vidgen/edit-service .
#
# FLASH_ATTENTION_3=with compiles FlashAttention 3, for Hopper GPUs. The weights are not inside: they are on a volume at
# /models, which `vidgen weights pull` fills. Who wants them inside builds the target `baked`, in layers of at most 10 GB:
#
#   docker build -f deploy/docker/worker.Dockerfile --target baked --build-arg STAGE=edit \
#     --build-arg MODEL=Qwen/Qwen-Image-Edit-2511 --build-arg REVISION=COMMIT --secret id=hf-token,src=TOKEN_FILE .
ARG CUDA=13.0.2
ARG FLASH_ATTENTION_3=without

FROM nvidia/cuda:${CUDA}-runtime-ubuntu24.04 AS base
# Triton compiles a launcher for each of its kernels where it runs: the compiler and Python's headers stay.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates g++ libpython3.12-dev python3.12 python3.12-venv \
    && rm -rf /var/lib/apt/lists/*

FROM base AS build
ARG UV=0.13.9
ENV UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1 PATH=/opt/uv/bin:$PATH
WORKDIR /src
RUN python3.12 -m venv /opt/uv \
    && pip install --no-cache-dir "uv==${UV}" \
    && uv venv --python /usr/bin/python3.12 /opt/vidgen
COPY pyproject.toml constraints.txt ./
RUN uv pip install --no-cache --python /opt/vidgen/bin/python -c constraints.txt -r pyproject.toml --extra gpu --extra tracing

FROM build AS wheel
COPY README.md LICENSE ./
COPY shared shared
COPY services services
RUN uv build --no-cache --wheel --out-dir /wheels

FROM base AS flash-without
WORKDIR /flash

FROM nvidia/cuda:${CUDA}-devel-ubuntu24.04 AS flash-with
ARG FLASH_ATTENTION=0251105a2fb19d2957484b7f023cd8c115286ced
ARG CUTLASS=7127592069c2fe01b041e174ba4345ef9b279671
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates git libpython3.12-dev python3.12 \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src/flash-attention
RUN git init -q && git fetch -q --depth 1 https://github.com/Dao-AILab/flash-attention "${FLASH_ATTENTION}" \
    && git checkout -q FETCH_HEAD
WORKDIR /src/cutlass
RUN git init -q && git fetch -q --depth 1 https://github.com/NVIDIA/cutlass "${CUTLASS}" && git checkout -q FETCH_HEAD
COPY --from=build /opt/vidgen /opt/vidgen
COPY deploy/flash-attention-3/build.py /src/
# As everything else that is imported here, with its bytecode: a service may not write any.
RUN /opt/vidgen/bin/python /src/build.py /src/flash-attention /src/cutlass /flash \
    && /opt/vidgen/bin/python -m compileall -q -s /flash -p /opt/vidgen/lib/python3.12/site-packages /flash

# hadolint ignore=DL3006
FROM flash-${FLASH_ATTENTION_3} AS flash

FROM base AS worker
ARG STAGE
RUN case "${STAGE}" in edit | i2v) ;; *) echo "--build-arg STAGE=edit or STAGE=i2v, not '${STAGE}'" >&2; exit 1 ;; esac \
    && ln -s "/opt/vidgen/bin/${STAGE}-service" /usr/local/bin/vidgen-stage \
    && install -d -o 10001 -g 10001 /models /scratch
COPY --from=build /opt/vidgen /opt/vidgen
COPY --from=flash /flash/ /opt/vidgen/lib/python3.12/site-packages/
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    --mount=type=bind,from=wheel,source=/opt/uv,target=/opt/uv \
    /opt/uv/bin/uv pip install --no-cache --python /opt/vidgen/bin/python --compile-bytecode --no-deps --no-index \
        /wheels/*.whl
LABEL org.opencontainers.image.title="vidgen ${STAGE}-service" org.opencontainers.image.licenses="Apache-2.0"
# USER: torch names its cache after it, and no file of the image knows the number below.
ENV PATH=/opt/vidgen/bin:$PATH HOME=/tmp USER=vidgen PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
EXPOSE 9100
CMD ["vidgen-stage"]

# ── the weights inside ────────────────────────────────────────────────────────────────────────────────────────────────

FROM worker AS weights
ARG MODEL
ARG REVISION
WORKDIR /scratch
# The hub's client reads the token from the file itself: it is in no variable, and in no layer.
RUN --mount=type=secret,id=hf-token,target=/run/secrets/hf-token,uid=10001 \
    HF_TOKEN_PATH=/run/secrets/hf-token HF_HOME=/tmp/huggingface \
    vidgen weights pull "${MODEL}" --revision "${REVISION}" --to /scratch/model
COPY deploy/docker/layers.py /usr/local/bin/
RUN python /usr/local/bin/layers.py /scratch/model /scratch/layers

FROM worker AS baked
ARG STAGE
COPY --from=weights /scratch/layers/00/ /models/${STAGE}/
COPY --from=weights /scratch/layers/01/ /models/${STAGE}/
COPY --from=weights /scratch/layers/02/ /models/${STAGE}/
COPY --from=weights /scratch/layers/03/ /models/${STAGE}/
COPY --from=weights /scratch/layers/04/ /models/${STAGE}/
COPY --from=weights /scratch/layers/05/ /models/${STAGE}/
COPY --from=weights /scratch/layers/06/ /models/${STAGE}/
COPY --from=weights /scratch/layers/07/ /models/${STAGE}/
COPY --from=weights /scratch/layers/08/ /models/${STAGE}/
COPY --from=weights /scratch/layers/09/ /models/${STAGE}/
COPY --from=weights /scratch/layers/10/ /models/${STAGE}/
COPY --from=weights /scratch/layers/11/ /models/${STAGE}/
COPY --from=weights /scratch/layers/12/ /models/${STAGE}/
COPY --from=weights /scratch/layers/13/ /models/${STAGE}/
COPY --from=weights /scratch/layers/14/ /models/${STAGE}/
COPY --from=weights /scratch/layers/15/ /models/${STAGE}/
# An image whose weights are not those of their manifest is not made.
RUN vidgen weights verify "/models/${STAGE}"
ENV VIDGEN_ENGINE=real VIDGEN_EDIT_MODEL=/models/edit VIDGEN_I2V_MODEL=/models/i2v

# What is built where no target is named: without weights.
FROM worker
