#!/usr/bin/env bash
# llama.cpp on this machine's CPUs, to measure Moray against: builds it from a source package, converts a checkpoint, serves.
#
#     tests/bench/peer_llama.sh install FOLDER
#     tests/bench/peer_llama.sh convert FOLDER CHECKPOINT FILE.gguf [q8_0|bf16|f16]
#     tests/bench/peer_llama.sh serve FOLDER FILE.gguf PORT [options of `llama-server`]
#
# The source is what llama-cpp-python carries. It is built for this machine's instructions (needs cmake, ninja and a C++
# compiler; ten minutes on two cores). Its converter knows tokenizers by a hash of what they make of a text, and refuses others:
# that of tests/bench/make_checkpoint.py splits as GPT-2's does, and is said to. CHECKPOINT is in BF16. `serve` has room for 32
# streams of 2048 tokens and keeps no prompts. It closes the connection after each stream without saying so; `moray bench` then
# sends the next request once more over a new one.
set -euo pipefail

version=0.3.36
torch=2.13.0

install() {
    local folder=$1
    "${PYTHON:-python3}" -m venv "$folder"
    local pip=("$folder/bin/pip" --quiet --disable-pip-version-check)
    "${pip[@]}" download --no-deps --no-binary llama-cpp-python --dest "$folder" "llama-cpp-python==$version"
    tar -xzf "$folder"/llama_cpp_python-"$version".tar.gz -C "$folder" --strip-components 2 --wildcards '*/vendor/llama.cpp'
    local source=$folder/llama.cpp
    # No user interface, no app: they want to be downloaded.
    cmake -S "$source" -B "$folder/build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DGGML_OPENMP=ON \
        -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TOOLS=ON \
        -DLLAMA_BUILD_SERVER=ON -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_BUILD_APP=OFF
    cmake --build "$folder/build" --target llama-server
    "${pip[@]}" install "torch==$torch" numpy transformers sentencepiece protobuf "$source/gguf-py"
    sed -i 's/^        if res is None:$/        res = res or "gpt-2"\n&/' "$source/conversion/base.py"
}

convert() {
    local folder=$1 checkpoint=$2 file=$3 kind=${4:-q8_0}
    HF_HUB_OFFLINE=1 "$folder/bin/python" "$folder/llama.cpp/convert_hf_to_gguf.py" "$checkpoint" --outfile "$file" --outtype "$kind"
}

serve() {
    local folder=$1 file=$2 port=$3
    shift 3
    exec "$folder/build/bin/llama-server" -m "$file" --host 127.0.0.1 --port "$port" --alias "$(basename "$file" .gguf)" \
        -t "$(nproc)" -tb "$(nproc)" -np 32 -c 65536 --no-kv-unified -fa on --cache-ram 0 --offline --no-ui "$@"
}

case "${1:-}" in
    install) install "${2:?a folder to build in}" ;;
    convert) convert "${2:?the folder}" "${3:?a checkpoint in BF16}" "${4:?a file to write}" "${@:5}" ;;
    serve) serve "${2:?the folder}" "${3:?a file}" "${4:?a port}" "${@:5}" ;;
    *) sed -n '2,14s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
