"""Check bounds of random programs: `python -m fuzzing --seconds 60 --seed 0`.

Structure k of a seed is the same on every machine. A progress file says where the last run of the seed ended, and the
next one goes on there; `--fresh` begins again and writes none. A quarter of the time goes to float64, in a process of
its own. Exits with 1 if a value was outside its bounds; the scripts that show it are in the folder of results.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path

_MOST_MAPS = 20_000
"""Memory maps of compiled programs, of 65,530 that Linux allows by default; at that limit XLA crashes."""


def main() -> int:
    """Both dtypes, one after the other; 1 if there was a violation."""
    options = _options()
    if options.dtype != "both":
        return _search(options)
    own = [sys.executable, "-m", "fuzzing", *sys.argv[1:]]
    parts = ("float32", 0.75 * options.seconds), ("float64", 0.25 * options.seconds)
    found = [
        subprocess.run([*own, "--dtype", dtype, "--seconds", str(seconds)], check=False).returncode
        for dtype, seconds in parts
    ]
    return max(found)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fuzzing", description="bounds of random programs against values")
    parser.add_argument("--seconds", type=float, default=60, help="how long")
    parser.add_argument("--seed", type=int, default=0, help="which programs")
    parser.add_argument("--cases", type=int, default=20, help="parameters and regions for each program")
    parser.add_argument("--dtype", choices=["both", "float32", "float64"], default="both")
    parser.add_argument("--folder", type=Path, default=Path(".fuzz"), help="progress and scripts")
    parser.add_argument("--optimised", action="store_true", help="compile as users do, not as fast as possible")
    parser.add_argument("--verbose", action="store_true", help="say what has been done after each program")
    parser.add_argument("--fresh", action="store_true", help="begin with the seed's first program, keep no progress")
    return parser.parse_args()


def _maps() -> int:
    maps = Path("/proc/self/maps")
    return maps.read_bytes().count(b"\n") if maps.exists() else 0


def _search(options: argparse.Namespace) -> int:
    # Before anything that imports JAX: compiling takes most of the time.
    os.environ["JAX_ENABLE_X64"] = str(options.dtype == "float64")
    if not options.optimised:
        os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
        os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1 --xla_cpu_use_fusion_emitters=false")
    import jax
    import numpy as np

    from fuzzing import programs, search

    file = options.folder / f"progress_{options.dtype}_{options.seed}.json"
    known = {} if options.fresh or not file.exists() else json.loads(file.read_text(encoding="utf-8"))
    tally, number = search.Tally(**known.get("tally", {})), known.get("next", 0)
    dtype, deadline, before = np.dtype(options.dtype).type, time.monotonic() + options.seconds, tally.violations
    while time.monotonic() < deadline:
        rng = np.random.default_rng([options.seed, number, options.dtype == "float64"])
        program = programs.draw(rng)
        try:
            for violation in search.run(program, rng, dtype, options.cases, tally):
                smaller = search.shrink(violation)
                path = search.write(smaller, options.folder)
                print(f"violation in program {number}: {path}\n{search.script(smaller)}", flush=True)
                break  # one for each program
        except Exception as error:
            print(f"program {number} raised {type(error).__name__}: {error}\n{program.source()}", flush=True)
            tally.violations += 1
        number += 1
        if options.verbose:
            print(number, dataclasses.asdict(tally), flush=True)
        if not options.fresh:
            options.folder.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({"next": number, "tally": dataclasses.asdict(tally)}), encoding="utf-8")
        if _maps() > _MOST_MAPS:
            jax.clear_caches()
            gc.collect()
    counts = ", ".join(f"{value} {name}" for name, value in dataclasses.asdict(tally).items())
    print(f"{options.dtype}, seed {options.seed}, next program {number}: {counts}", flush=True)
    return int(tally.violations > before)


if __name__ == "__main__":
    sys.exit(main())
