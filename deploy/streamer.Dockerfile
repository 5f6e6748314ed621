# The streamer. Build from the top of the repository:
#   docker build -f deploy/streamer.Dockerfile -t anabranch-streamer .
FROM rust:1.95-bookworm AS build
WORKDIR /src
COPY . .
RUN cargo build --profile dist --locked --package anabranch-streamer

FROM debian:bookworm-slim
# ca-certificates: for `sslmode=verify-full` against a public authority.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends ca-certificates \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --system --uid 7420 --home-dir /var/lib/anabranch --create-home anabranch
COPY --from=build /src/target/dist/anabranch-streamer /usr/local/bin/
USER anabranch
VOLUME /var/lib/anabranch
EXPOSE 7420
ENTRYPOINT ["anabranch-streamer"]
CMD ["run", "--config", "/etc/anabranch/streamer.toml"]
