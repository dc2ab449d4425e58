"""The interface that the VNN-LIB 2.0 standard asks of solvers: `jaxbound-vnnlib verify` and `jaxbound-vnnlib supports`.

Reference: the VNN-LIB 2.0 standard, https://www.vnnlib.org, chapter "Solver interface".
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence

import jaxbound
from jaxbound import errors
from jaxbound.cli.main import BAD_INPUT, complain, keep_programs, program

_THEORIES = {
    "vnnlib-versions": "2.0\n2.0",
    "onnx-element-types": "real",
    "hidden-node-theories": "NH",
    "multiple-input-output-theories": "MIO",
    "multiple-network-theories": "SNET",
    "multiple-node-comparison-theories": "MNC",
    "arithmetic-complexity-theories": "LIN",
    "optimised-disjunctive-reasoning": "false",
    "serialise-assignments": "true",
    "unsat-proofs": "false",
}
_OF_ONNX = ("onnx-opset-versions", "onnx-operators")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line, and return its exit code: 0, or 2 for an error, which is one line on the standard error.

    >>> main(["supports", "--hidden-node-theories"])
    NH
    0
    """
    started = time.monotonic()
    try:
        options = _parser().parse_args(arguments)
        if options.name or options.version:
            print("jaxbound" if options.name else jaxbound.__version__)
        elif options.command == "supports":
            print(_capability(options.capability))
        elif options.command == "verify":
            print(_verify(options, started), end="")
        else:
            raise errors.ArgumentError("pass verify, supports, --name or --version")
    except SystemExit as end:  # help, or arguments that the parser refuses
        return int(end.code or 0)
    except (errors.JaxboundError, ImportError, OSError) as fault:
        return complain(fault, BAD_INPUT)
    return 0


def run() -> None:
    """The program `jaxbound-vnnlib`."""
    program(main)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jaxbound-vnnlib", description=(__doc__ or "").split("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--name", action="store_true", help="print the solver's name")
    parser.add_argument("--version", action="store_true", help="print its version")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    verify = commands.add_parser("verify", help="decide a query: sat and an assignment, unsat, unknown or timed-out")
    verify.add_argument("query", metavar="FILE", help="a VNN-LIB 2.0 query, plain or gzipped")
    verify.add_argument(
        "--network", metavar="NAME=FILE", action="append", default=[], help="the declared network's ONNX file"
    )
    verify.add_argument(
        "--timeout", metavar="SECONDS", type=float, help="from the start of the command; none by default"
    )
    verify.add_argument(
        "--serialise-assignments", metavar="FOLDER", help="write the assignment as ONNX tensors, print none"
    )
    verify.add_argument(
        "--real", action="store_true", help="take the query's element types as real; otherwise others are refused"
    )
    supports = commands.add_parser("supports", help="print what queries and networks can be verified")
    kinds = supports.add_mutually_exclusive_group(required=True)
    for name in (*_OF_ONNX, *_THEORIES):
        kinds.add_argument(f"--{name}", dest="capability", action="store_const", const=name)
    return parser


def _capability(name: str) -> str:
    if name == "onnx-opset-versions":
        from jaxbound.frontends.files import OLDEST_OPSET, newest_opset

        return f"{OLDEST_OPSET}\n{newest_opset()}"
    if name == "onnx-operators":
        from jaxbound.frontends.operators import OPERATORS

        return "\n".join(sorted({*OPERATORS, "Constant", "ConstantOfShape", "Range"}))
    return _THEORIES[name]


def _verify(options: argparse.Namespace, started: float) -> str:
    from jaxbound.frontends import competition, onnx, queries, vnnlib

    query = vnnlib.declared_network(vnnlib.text_of(options.query))
    if query is None:
        raise errors.argument("query", "declares no network", "VNN-LIB 1.0 is read by `jaxbound verify`")
    network = _network(options.network, query.network)
    if not options.real:
        queries.check_real(query)
    keep_programs(os.environ.get("JAXBOUND_CACHE", "default"))
    verdict = competition.decide(onnx.load(network), options.query, options.timeout, started=started, progress=False)
    if verdict.status == "verified":
        return "unsat\n"
    if verdict.counterexample is None or verdict.outputs is None:
        late = options.timeout is not None and time.monotonic() - started >= options.timeout - 2 * competition.SPARE
        return "timed-out\n" if late else "unknown\n"
    values = verdict.counterexample, verdict.outputs
    if options.serialise_assignments is None:
        return "sat\n" + queries.assigned(query, values)
    queries.serialise(query, values, options.serialise_assignments)
    return "sat\n"


def _network(given: Sequence[str], declared: str) -> str:
    """The file of the declared network."""
    named: dict[str, str] = {name: file for name, _, file in (pair.partition("=") for pair in given)}
    if len(given) != 1 or declared not in named:
        raise errors.argument(
            "network", f"is given for {', '.join(named) or 'none'}", f"pass --network {declared}=FILE, and no other"
        )
    return named[declared]


if __name__ == "__main__":
    sys.exit(main())
