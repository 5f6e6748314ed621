# The replica. Build from the top of the repository:
#   docker build -f deploy/replica.Dockerfile -t anabranch-replica .
FROM rust:1.95-bookworm AS build
WORKDIR /src
COPY . .
RUN cargo build --profile dist --locked --package anabranch-replica

FROM debian:bookworm-slim
# sqlite3: to look into the file. ca-certificates: for a streamer behind a public authority's certificate.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends ca-certificates sqlite3 \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --system --uid 7430 --home-dir /var/lib/anabranch --create-home anabranch
COPY --from=build /src/target/dist/anabranch-replica /usr/local/bin/
USER anabranch
VOLUME /var/lib/anabranch
ENTRYPOINT ["anabranch-replica"]
CMD ["run", "--config", "/etc/anabranch/replica.toml"]
