# The agent server in an image. `make image` makes the wheels first, so that building it needs no network.
ARG BASE_IMAGE=python:3.12-slim-bookworm

FROM ${BASE_IMAGE} AS build
COPY build/image/wheels /wheels
RUN python3 -m venv /opt/agent-server \
 && /opt/agent-server/bin/pip install --quiet --no-cache-dir --disable-pip-version-check \
      --no-index --find-links /wheels "remote-agent-server[cli,secrets]" \
 && /opt/agent-server/bin/pip uninstall --quiet --yes --disable-pip-version-check pip setuptools \
 && /opt/agent-server/bin/agent-server --version \
 && /opt/agent-server/bin/python -m workspaces.box.runtime /opt/agent-server/share/agent-box

FROM ${BASE_IMAGE}
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="agent-server" \
      org.opencontainers.image.description="Run AI agents here, in a container or on other machines, through one protocol" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# A base that has all of them needs no network here.
RUN missing=""; for tool in bash git tini setpriv; do \
      command -v $tool >/dev/null || missing="$missing $tool"; \
    done; missing=$(echo "$missing" | sed s/setpriv/util-linux/) \
 && if [ -n "$missing" ]; then \
      apt-get update && apt-get install --yes --no-install-recommends ca-certificates $missing \
      && rm -rf /var/lib/apt/lists/*; \
    fi \
 && useradd --uid 10000 --user-group --create-home --shell /usr/sbin/nologin agent-server \
 && useradd --uid 10001 --user-group --create-home --comment agent --shell /bin/bash agent \
 && chmod 0700 /home/agent-server /home/agent \
 && install -d -o 10000 -g 10000 -m 0711 /data \
 && install -d -o 10001 -g 10001 -m 0755 /workspace
COPY --from=build /opt/agent-server /opt/agent-server
COPY deploy/image/start deploy/image/health /opt/agent-server/bin/
# Not in the PATH: commands are to find the Python of the base, not the server's.
RUN ln -s /opt/agent-server/bin/agent-server /usr/local/bin/agent-server
ENV AGENT_SERVER_HOST=0.0.0.0 \
    AGENT_SERVER_PORT=8000 \
    AGENT_SERVER_DATA=/data
EXPOSE 8000
VOLUME /data
# It starts as root and drops all of it but what starting commands as another user needs: see the script.
ENTRYPOINT ["/opt/agent-server/bin/start"]
CMD ["serve", "--json"]
HEALTHCHECK --interval=15s --timeout=5s --start-period=20s --retries=3 CMD ["/opt/agent-server/bin/health"]
