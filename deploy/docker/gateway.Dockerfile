# syntax=docker/dockerfile:1.7
# The gateway, and both workers with their preview engines: all of vidgen but torch.
#
#   docker build -f deploy/docker/gateway.Dockerfile -t vidgen/gateway .
#
# It runs as a user without a name or a home, writes to /tmp alone, and does with a read-only root.
ARG PYTHON=3.11.14

FROM python:${PYTHON}-slim-bookworm AS build
ARG UV=0.13.9
ENV UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1
WORKDIR /src
RUN pip install --no-cache-dir "uv==${UV}" && uv venv /opt/vidgen
# What is installed changes less often than the code: a layer of its own.
COPY pyproject.toml constraints.txt ./
RUN uv pip install --no-cache --python /opt/vidgen/bin/python -c constraints.txt -r pyproject.toml --extra tracing
COPY README.md LICENSE ./
COPY shared shared
COPY services services
RUN uv build --no-cache --wheel --out-dir /wheels

FROM python:${PYTHON}-slim-bookworm
LABEL org.opencontainers.image.title="vidgen gateway" org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/vidgen /opt/vidgen
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    python -m pip --python /opt/vidgen/bin/python install --no-cache-dir --no-deps --no-index /wheels/*.whl
ENV PATH=/opt/vidgen/bin:$PATH HOME=/tmp PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
EXPOSE 8080 9100
CMD ["vidgen-gateway"]
