#!/bin/sh
# Start vLLM's server from the variables of .env on a host of your own, with the Python that has vLLM:
#   set -a; . ./.env; set +a; PYTHON=/path/to/python ./serve.sh
# The containers run the same module. Its arguments go to vLLM, last, so they win: serve.sh --max-num-seqs 8
# exec matters: without it the shell gets SIGTERM, the server does not, and no request is drained.
cd "$(dirname "$0")/../.." && exec "${PYTHON:-python3}" -m helpers.serve.launch "$@"
