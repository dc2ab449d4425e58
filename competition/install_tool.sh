#!/bin/bash
# install_tool.sh v1: jaxbound with its command, into .venv beside this script.
set -eu
[ "${1:-}" = v1 ] || { echo "usage: install_tool.sh v1" >&2; exit 1; }
here=$(cd "$(dirname "$0")" && pwd)
"${PYTHON:-python3}" -m venv "$here/.venv"
"$here/.venv/bin/python" -m pip install --quiet "$here/..[onnx]"
