# docker build -f docker/cpu.Dockerfile -t ssl-bench:cpu .
# docker run --rm -v /data:/data:ro -v "$PWD/results:/results" -v ssl-bench-cache:/cache ssl-bench:cpu run --ckpt /data/x.pth --protocol knn --dataset /data/imagenet
FROM python:3.13-slim-bookworm

RUN apt-get update && apt-get install --yes --no-install-recommends make git && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/ssl-bench
COPY . .
# The same target that sets up a checkout, so what is tested there holds here.
RUN make setup VENV=/opt/venv

ENV PATH=/opt/venv/bin:$PATH \
    SSL_BENCH_DATA=/data SSL_BENCH_RESULTS=/results SSL_BENCH_CACHE=/cache
RUN useradd --create-home bench && mkdir -p /data /results /cache && chown bench /results /cache
USER bench
WORKDIR /home/bench
VOLUME ["/data", "/results", "/cache"]
ENTRYPOINT ["ssl-bench"]
CMD ["--help"]
