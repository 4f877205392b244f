# docker build -f docker/cpu.Dockerfile --build-arg COMMIT="$(git describe --always --dirty --abbrev=12)" -t ssl-bench:cpu .
# mkdir -p results && docker run --rm --shm-size 8g --user "$(id -u):$(id -g)" -v /data:/data:ro -v "$PWD/results:/results" -v ssl-bench-cache:/cache ssl-bench:cpu run --ckpt /data/x.pth --protocol knn --dataset /data/imagenet
FROM python:3.13-slim-bookworm

RUN apt-get update && apt-get install --yes --no-install-recommends make git && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/ssl-bench
COPY . .
# The same target that sets up a checkout, so what is tested there holds here.
RUN make setup VENV=/opt/venv

ENV PATH=/opt/venv/bin:$PATH \
    SSL_BENCH_DATA=/data SSL_BENCH_RESULTS=/results SSL_BENCH_CACHE=/cache
# Anybody may write here, as in /tmp, so that with --user the records belong to whoever runs the container.
RUN useradd --create-home bench && mkdir -p /data /results /cache && chmod 1777 /results /cache /home/bench
# The image has no .git: the commit that records name comes from outside. Down here, since it changes every time.
ARG COMMIT=
ENV HOME=/home/bench SSL_BENCH_COMMIT=$COMMIT
USER bench
WORKDIR /home/bench
VOLUME ["/data", "/results", "/cache"]
ENTRYPOINT ["ssl-bench"]
CMD ["--help"]
