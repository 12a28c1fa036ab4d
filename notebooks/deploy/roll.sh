#!/bin/sh
# A new version without a gap, for compose.scale.yaml: change .env, then `sh roll.sh`.
# One server after the other leaves the router, answers what it has, is replaced, and comes back when healthy.
set -eu
cd "$(dirname "$0")"

compose() { ${COMPOSE:-docker compose} -f compose.scale.yaml "$@"; }

tell() { # add_worker or remove_worker, and which
    compose exec -T router python3 -c \
        "import sys, urllib.request as u; u.urlopen(u.Request('http://127.0.0.1:8000/$1?url=http://$2:8000', method='POST'), timeout=60)"
}

for server in ${SERVERS:-vllm-0 vllm-1}; do
    tell remove_worker "$server"
    # SIGTERM, the drain (SHUTDOWN_TIMEOUT), the new one, its health check
    compose up -d --no-deps --wait --wait-timeout "${WAIT:-1200}" "$server" || {
        echo "$server did not come up and is out of the router. The others serve: mend .env, run this again." >&2
        exit 1
    }
    tell add_worker "$server"
    echo "$server is new"
done
