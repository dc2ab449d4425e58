"""Timings: `python -m benchmarks` prints a table, `--task "cnn_small crown 8" --json` runs one row."""
