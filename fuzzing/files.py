"""Broken files: `python -m fuzzing.files --count 10000 --seed 0`.

Networks in ONNX and properties in VNN-LIB are drawn, broken and read. What is read must mean what onnxruntime computes,
or what another reader says; the rest must be refused by a `JaxboundError`, soon. File k of a seed is the same on every
machine. A progress file says where the last run ended, and the next one goes on there; `--fresh` begins again. Files
are read in a process of their own, so that a crash or a hang is one more count. Exits with 1 if there was a wrong
network, another exception, a hang or a crash of ours; such files are kept in the folder.
"""

from __future__ import annotations

import argparse
import collections
import json
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import numpy as np

from fuzzing import texts

FAULTS = ("wrong", "raised", "hung", "crashed")
_LONGEST = 60
"""Seconds that one file may take, on a busy machine."""
MOST_ENTRIES = 1_000_000
"""Of one value: networks beyond it are read and not evaluated."""


def main() -> int:
    """Read files in child processes until the count is reached; 1 if there was a fault."""
    parser = argparse.ArgumentParser(prog="python -m fuzzing.files", description="broken ONNX and VNN-LIB files")
    parser.add_argument("--count", type=int, default=1000, help="how many files of the seed, in all runs together")
    parser.add_argument("--seed", type=int, default=0, help="which files")
    parser.add_argument("--folder", type=Path, default=Path(".fuzz"), help="progress, and files that show a fault")
    parser.add_argument("--fresh", action="store_true", help="begin with the seed's first file")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    progress = options.folder / f"files_{options.seed}.json"
    if options.child:
        return _read(options, progress)
    if options.fresh:
        progress.unlink(missing_ok=True)
    own = [sys.executable, "-m", "fuzzing.files", *(a for a in sys.argv[1:] if a != "--fresh"), "--child"]
    while (ended := subprocess.run(own, check=False).returncode) < 0:  # by a signal
        state = json.loads(progress.read_text(encoding="utf-8"))
        ours = state["reader"] == "jaxbound"
        word = ("hung" if -ended == signal.SIGALRM else "crashed") if ours else "onnxruntime crashed"
        _count(state, word, options, progress)
    if ended:
        return ended
    tally = json.loads(progress.read_text(encoding="utf-8"))["tally"]
    print(f"seed {options.seed}: " + ", ".join(f"{count} {word}" for word, count in sorted(tally.items())))
    return int(any(word.split()[-1] in FAULTS and word != "onnxruntime crashed" for word in tally))


def _read(options: argparse.Namespace, progress: Path) -> int:
    from fuzzing import networks  # before the clock runs

    warnings.simplefilter("ignore")
    state = {"next": 0, "reader": "", "tally": {}}
    if progress.exists():
        state = json.loads(progress.read_text(encoding="utf-8"))
    while state["next"] < options.count:
        signal.alarm(_LONGEST)
        kind, content, rng = case(options.seed, state["next"])

        def reading(reader: str) -> None:
            state["reader"] = reader
            progress.write_text(json.dumps(state), encoding="utf-8")

        reading("jaxbound")
        try:
            if kind == "vnnlib":
                word = texts.check(content.decode(), rng)
            else:
                word = networks.check(content, rng, options.folder, reading)
        except Exception as fault:
            word = "raised"
            print(f"file {state['next']} raised {type(fault).__name__}: {str(fault)[:300]}", flush=True)
        _count(state, f"{kind} {word}", options, progress)
        if state["next"] % 500 == 0:
            jax.clear_caches()  # compiled programs are memory maps, of which Linux allows so many
    return 0


def case(seed: int, number: int) -> tuple[str, bytes, np.random.Generator]:
    """A file: its kind, its content, and the generator to go on with."""
    rng = np.random.default_rng([seed, number])
    if number % 2:
        return "vnnlib", texts.broken(texts.draw(rng), rng).encode(), rng
    from fuzzing import networks

    return "onnx", networks.broken(networks.draw(rng), rng), rng


def _count(state: dict, word: str, options: argparse.Namespace, progress: Path) -> None:
    """Count what became of a file, and keep it where it is a fault."""
    tally = collections.Counter(state["tally"])
    tally[word] += 1
    if word.split()[-1] in FAULTS:
        kind, content, _ = case(options.seed, state["next"])
        kept = options.folder / f"{word.replace(' ', '_')}_{options.seed}_{state['next']}.{kind}"
        kept.write_bytes(content)
        print(f"{word}: {kept}", flush=True)
    state |= {"next": state["next"] + 1, "tally": dict(tally)}
    progress.write_text(json.dumps(state), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
