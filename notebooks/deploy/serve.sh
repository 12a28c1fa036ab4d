#!/bin/sh
# Start vLLM's server from the variables of .env; compose.yaml and kubernetes.yaml run this in the image.
# Arguments of this script go to vLLM as they are, last, so they win: serve.sh --max-num-batched-tokens 2048
# exec matters: without it the shell gets SIGTERM, vLLM does not, and no request is drained.
set -eu

fail() {
    echo "serve.sh: $1" >&2
    exit 2
}

[ -n "${MODEL_NAME:-}" ] || fail "MODEL_NAME is empty: give a hub name, with @ and a commit to pin it"
[ "$MODEL_NAME" != embedded ] || fail "MODEL_NAME=embedded: that model comes with the notebooks, not with the image"
# An empty key would switch the check of keys off.
key=${VLLM_API_KEY:-}
[ "${#key}" -ge 16 ] || fail "VLLM_API_KEY must have 16 characters or more (openssl rand -base64 32)"

case "${QUANTIZATION:-none}" in
    none) ;;
    fp8) set -- --quantization fp8_per_tensor "$@" ;;
    # Nothing here makes a checkpoint. Ignored, the value would serve a model in 16 bits without a word.
    awq) fail "QUANTIZATION=awq: name an AWQ checkpoint in MODEL_NAME and set none; its config says the rest" ;;
    *) fail "QUANTIZATION=$QUANTIZATION: must be none or fp8" ;;
esac

model=${MODEL_NAME%@*}
case "$MODEL_NAME" in
    *@*) set -- --revision "${MODEL_NAME##*@}" "$@" ;; # of weights and tokenizer alike
esac
[ -z "${SERVED_MODEL_NAME:-}" ] || set -- --served-model-name "$SERVED_MODEL_NAME" "$@"

exec ${PYTHON:-python3} -c "from vllm.entrypoints.launchers.api_server.entry import main; main()" \
    --model "$model" \
    --host "${SERVER_HOST:-127.0.0.1}" \
    --port "${SERVER_PORT:-8000}" \
    --dtype "${DTYPE:-auto}" \
    --max-model-len "${MAX_MODEL_LEN:-2048}" \
    --max-num-seqs "${MAX_NUM_SEQS:-64}" \
    --gpu-memory-utilization "${GPU_MEMORY_UTILIZATION:-0.9}" \
    --shutdown-timeout "${SHUTDOWN_TIMEOUT:-30}" \
    "$@"
