#!/bin/bash
# run_instance.sh v1 CATEGORY ONNX VNNLIB RESULTS TIMEOUT: sat and a counterexample, unsat, timeout, unknown or error.
set -u
[ "${1:-}" = v1 ] && [ $# -eq 6 ] || { echo "usage: run_instance.sh v1 CATEGORY ONNX VNNLIB RESULTS TIMEOUT" >&2; exit 1; }
here=$(cd "$(dirname "$0")" && pwd)
command=${JAXBOUND:-jaxbound} # words, such as "python -m jaxbound"
[ -z "${JAXBOUND:-}" ] && [ -x "$here/.venv/bin/jaxbound" ] && command="$here/.venv/bin/jaxbound"
onnx=$3 vnnlib=$4 results=$5 limit=$6
[ -f "$onnx" ] || onnx=$onnx.gz
[ -f "$vnnlib" ] || vnnlib=$vnnlib.gz
timeout --kill-after=1 "$limit" $command verify "$onnx" "$vnnlib" --timeout "$limit" --results "$results"
code=$?
[ "$code" -ge 124 ] && echo timeout >"$results" # it was stopped
[ -s "$results" ] || echo error >"$results"
case $code in 0 | 10 | 20 | 12[4-9] | 137) exit 0 ;; *) exit "$code" ;; esac
