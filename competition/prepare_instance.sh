#!/bin/bash
# prepare_instance.sh v1 CATEGORY ONNX VNNLIB: 0 if the instance can be run. It looks at nothing but whether files are there.
set -eu
[ "${1:-}" = v1 ] && [ $# -eq 4 ] || { echo "usage: prepare_instance.sh v1 CATEGORY ONNX VNNLIB" >&2; exit 1; }
for file in "$3" "$4"; do
    [ -f "$file" ] || [ -f "$file.gz" ] || { echo "$file is not there" >&2; exit 1; }
done
