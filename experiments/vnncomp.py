"""Verification competition families: decide every instance of a folder, by the competition's rules.

    python -m experiments.vnncomp FOLDER [--instances FILE] [--timeout SECONDS] [--json] [--results FILE]

The folder has `instances.csv` with the columns onnx, vnnlib, timeout (a first line of names is skipped) and perhaps the
truth, a verifier's answer and its seconds; files may be gzipped and are relative to the folder. Seconds count loading
and compiling. With `--results` each instance is written to a file as it is done, and one that is there is not
run again. With `--json` one line per instance goes to the standard output, the rest to the standard error:

    {"onnx", "vnnlib", "status", "seconds", "nodes", "counterexample": {"x": [...], "y": [...]} or null}
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

import jaxbound as jb
from jaxbound.frontends.competition import ANSWERS
from jaxbound.frontends.competition import decide as decide_instance


class Instance(NamedTuple):
    """One line of instances.csv."""

    onnx: str
    vnnlib: str
    timeout: float
    truth: str = ""
    """sat, unsat, or empty where it is not known."""
    rival: str = ""
    """The answer of another verifier."""
    rival_seconds: str = ""


def instances_of(path: Path) -> list[Instance]:
    """The lines of a file of instances."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [[field.strip() for field in row] for row in csv.reader(file) if row]
    rows = [row for row in rows if _is_number(row[2])]
    return [Instance(row[0], row[1], float(row[2]), *row[3:6]) for row in rows]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _file(folder: Path, name: str) -> Path:
    """The file of a name, plain or gzipped, whatever instances.csv calls it."""
    for found in (folder / name, folder / f"{name}.gz", folder / name.removesuffix(".gz")):
        if found.exists():
            return found
    raise FileNotFoundError(f"{folder / name} is not there, plain or gzipped")


def decide(folder: Path, instance: Instance, timeout: float, *, progress: bool) -> dict:
    """What is found of one instance, as the line that is written for it."""
    start = time.monotonic()
    found = {"onnx": instance.onnx, "vnnlib": instance.vnnlib, "status": "unknown", "nodes": 0, "counterexample": None}
    try:
        network, prop = _file(folder, instance.onnx), _file(folder, instance.vnnlib)
        verdict = decide_instance(network, prop, timeout, started=start, progress=progress)
    except (jb.JaxboundError, OSError) as fault:
        return found | {"seconds": time.monotonic() - start, "error": str(fault)}
    if verdict.counterexample is not None and verdict.outputs is not None:
        point, outputs = (np.ravel(part).astype(float).tolist() for part in (verdict.counterexample, verdict.outputs))
        found["counterexample"] = {"x": point, "y": outputs}
    done = {"status": verdict.status, "nodes": verdict.nodes, "seconds": time.monotonic() - start}
    return found | done | {"guarantee": verdict.guarantee}


def replayed(folder: Path, instance: Instance, found: dict) -> bool | None:
    """Whether onnxruntime agrees with a counterexample; None where it is not installed."""
    try:
        import onnxruntime
    except ModuleNotFoundError:
        return None
    import gzip

    content = _file(folder, instance.onnx).read_bytes()
    content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (given, *_) = session.get_inputs()
    shape = [size if isinstance(size, int) and size > 0 else 1 for size in given.shape]
    x = np.asarray(found["counterexample"]["x"], np.float64 if "double" in given.type else np.float32)
    (y, *_) = session.run(None, {given.name: x.reshape(shape)})
    _, prop = jb.vnnlib.load(_file(folder, instance.vnnlib))
    return prop.violated(x, np.asarray(y))


def table(instances: list[Instance], results: list[dict]) -> str:
    """Counts by status, beside the truth and the other verifier where they are given."""
    counts = Counter(found["status"] for found in results)
    lines = [f"{len(results)} instances: {', '.join(f'{n} {status}' for status, n in sorted(counts.items()))}"]
    wrong = [i for i, found in zip(instances, results, strict=True) if is_wrong(i, found)]
    lines.append(f"wrong: {len(wrong)}" + "".join(f"\n  {i.onnx} {i.vnnlib}, truth {i.truth}" for i in wrong))
    solved = sorted(found["seconds"] for found in results if found["status"] in ANSWERS)
    if solved:
        lines.append(f"solved: {len(solved)}, seconds: median {np.median(solved):.1f}, most {solved[-1]:.1f}")
    rivals = [float(i.rival_seconds) for i in instances if i.rival in ("sat", "unsat") and _is_number(i.rival_seconds)]
    if rivals:
        lines.append(
            f"the other verifier: {len(rivals)} solved, median {np.median(rivals):.1f} s, most {max(rivals):.1f}"
        )
    replays = Counter(str(found["replayed"]) for found in results if "replayed" in found)
    if replays:
        lines.append(f"counterexamples replayed by onnxruntime: {dict(replays)}")
    return "\n".join(lines)


def is_wrong(instance: Instance, found: dict) -> bool:
    """Whether an answer contradicts the truth."""
    answer = ANSWERS.get(found["status"])
    return answer is not None and instance.truth in ("sat", "unsat") and answer != instance.truth


def _done(path: Path | None) -> dict[tuple[str, str], dict]:
    if path is None or not path.exists():
        return {}
    lines = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    return {(found["onnx"], found["vnnlib"]): found for found in lines}


def main(arguments: list[str] | None = None) -> list[dict]:
    """Run a family."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--instances", type=Path, help="the list, by default instances.csv in the folder")
    parser.add_argument("--timeout", type=float, help="the most seconds of any instance")
    parser.add_argument("--json", action="store_true", help="one line per instance on the standard output")
    parser.add_argument("--results", type=Path, help="a file to write to, and to go on from")
    parser.add_argument("--cache", type=Path, help="a directory for compiled programs")
    chosen = parser.parse_args(arguments)
    if chosen.cache:
        jb.compilation_cache(chosen.cache)
    listed = chosen.instances or chosen.folder / "instances.csv"
    if not listed.exists() and (chosen.folder / listed).exists():
        listed = chosen.folder / listed
    instances, done, results = instances_of(listed), _done(chosen.results), []
    for instance in _bar(instances):
        found = done.get((instance.onnx, instance.vnnlib))
        if found is None:
            timeout = instance.timeout if chosen.timeout is None else min(instance.timeout, chosen.timeout)
            found = decide(chosen.folder, instance, timeout, progress=False)
            if found["counterexample"] is not None:
                found["replayed"] = replayed(chosen.folder, instance, found)
            if chosen.results:
                with chosen.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(found) + "\n")
        results.append(found)
        if chosen.json:
            print(json.dumps(found), flush=True)
        else:
            note = " WRONG" if is_wrong(instance, found) else ""
            print(f"{instance.onnx} {instance.vnnlib}: {found['status']}{note}, {found['seconds']:.1f} s", flush=True)
    print(table(instances, results), file=sys.stderr if chosen.json else sys.stdout)
    return results


def _bar(instances: list[Instance]):
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        return instances
    return tqdm(instances, unit="instance", file=sys.stderr)


if __name__ == "__main__":
    main()
