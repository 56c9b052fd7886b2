# The server with the default super-network inside: nothing is fetched when it runs.
FROM rust:1-slim-bookworm AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ python3 python3-pip \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY Cargo.toml Cargo.lock LICENSE README.md ./
COPY src src
COPY benches benches
COPY tests tests
COPY models models
RUN cargo build --release --locked --bin lonas
# `inspect` opens the base, which fetches it and checks its digest.
RUN LONAS_CACHE=/cache target/release/lonas inspect > /dev/null

FROM debian:bookworm-slim
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
