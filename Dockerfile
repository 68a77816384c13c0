# The pipeline as a container image, for CPUs:
#   docker build --tag anytext2-distill .
# and for GPUs, with the CUDA that the hosts' driver knows:
#   docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 --tag anytext2-distill:cuda .
ARG PYTHON_VERSION=3.11
FROM python:${PYTHON_VERSION}-slim-bookworm

# The package index that torch comes from.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

# Without fribidi text is neither kerned nor shaped, and a set that was begun with it would be refused.
# Debian keeps one version of it for a release, so there is none to pin.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libfribidi0 \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --uid 1000 --create-home distill

# Libraries first: they change less often than the code.
WORKDIR /app
COPY pyproject.toml constraints.txt requirements-ocr.txt README.md LICENSE NOTICE ./
RUN python -m pip install --no-cache-dir --constraint constraints.txt --index-url "${TORCH_INDEX}" torch \
    && python -m pip install --no-cache-dir --constraint constraints.txt '.[teacher,evaluate,s3]' \
    && python -m pip install --no-cache-dir --no-deps --requirement requirements-ocr.txt

COPY pipeline.py ./
COPY both_stages both_stages
COPY cluster cluster
COPY common common
COPY shards shards
COPY stage1_teacher stage1_teacher
COPY stage2_student stage2_student
COPY configs configs
# A checkpoint's fingerprint is kept beside it, so this folder is the user's.
COPY --chown=1000:1000 models models

USER 1000
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
ENTRYPOINT ["python", "pipeline.py"]
CMD ["--help"]
