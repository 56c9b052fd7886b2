# The server with the default super-network inside: nothing is fetched when it runs. `--target cuda` is the one for GPUs.
FROM rust:1-slim-bookworm AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ python3 python3-pip \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY Cargo.toml Cargo.lock LICENSE README.md build.rs ./
COPY src src
COPY benches benches
COPY tests tests
COPY models models
RUN cargo build --release --locked --bin lonas
# `inspect` opens the base, which fetches it and checks its digest.
RUN LONAS_CACHE=/cache target/release/lonas inspect > /dev/null

FROM build AS build-cuda
COPY kernels kernels
RUN CUDA_HOME=$(kernels/toolkit.sh) cargo build --release --locked --features cuda --bin lonas

FROM debian:bookworm-slim AS cpu
RUN useradd --system --uid 10001 --home-dir /nonexistent --shell /usr/sbin/nologin lonas
COPY --from=build /source/target/release/lonas /usr/local/bin/lonas
COPY --from=build /source/models /models
COPY --from=build /cache /var/cache/lonas
WORKDIR /
USER lonas
ENV LONAS_CACHE=/var/cache/lonas LONAS_HOST=0.0.0.0 LONAS_PORT=8080
EXPOSE 8080
# bash opens the connection itself, so that the image needs no client.
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s \
    CMD ["bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/$LONAS_PORT && printf 'GET /health HTTP/1.0\\r\\n\\r\\n' >&3 && head -1 <&3 | grep -q ' 200 '"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["lonas"]
CMD ["serve"]

FROM cpu AS cuda
COPY --from=build-cuda /source/target/release/lonas /usr/local/bin/lonas
# What the NVIDIA container runtime puts in: the driver's library.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

# Without a target it is the one for processors.
FROM cpu
