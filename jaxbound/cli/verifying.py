"""What is decided: verify a property, check a certificate."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

import jaxbound
from jaxbound.cli import options as given
from jaxbound.cli.main import FALSIFIED, UNKNOWN, VERIFIED, interruptible
from jaxbound.cli.output import counted, progress, save_figure, show
from jaxbound.frontends import competition, onnx, vnnlib
from jaxbound.methods.frown import Frown
from jaxbound.search import BranchAndBound, Verdict

_CODES = {"verified": VERIFIED, "falsified": FALSIFIED, "unknown": UNKNOWN}


def verify(options: given.Verify, started: float) -> int:
    """`jaxbound verify`."""
    results = None if options.results is None else Path(options.results)
    if results is not None:
        results.write_text("error\n", encoding="utf-8")  # stands where nothing better comes
    history: list[dict] = []
    with _telling(history, shown=not options.json) as tell:
        verdict = competition.decide(
            _network(options), options.property, options.timeout, started=started,
            method=BranchAndBound(Frown(steps=options.steps), split=options.split, max_nodes=options.max_nodes),
            attack=options.attack, key=jax.random.key(options.seed), certificate=options.certificate, progress=tell,
        )  # fmt: skip
    seconds = time.monotonic() - started
    if results is not None:
        timed_out = options.timeout is not None and seconds >= options.timeout - 2 * competition.SPARE
        results.write_text(competition.results(verdict, timed_out=timed_out), encoding="utf-8")
    if options.plot:
        from jaxbound import plots

        save_figure(plots.search_progress(history), options.plot)
    found = {
        "status": verdict.status, "lower": verdict.lower, "nodes": verdict.nodes, "guarantee": verdict.guarantee,
        "counterexample": verdict.counterexample, "outputs": verdict.outputs, "seconds": round(seconds, 3),
    }  # fmt: skip
    show(options.json, {"net": options.net, "property": options.property} | found, _text(verdict, seconds))
    return _CODES[verdict.status]


@contextlib.contextmanager
def _telling(history: list[dict], *, shown: bool) -> Iterator[Callable[[dict], None]]:
    """A function that is told of a search: it is kept and shown, and can from then on be interrupted."""
    with contextlib.ExitStack() as search:
        advance = None

        def tell(now: dict) -> None:
            nonlocal advance
            if advance is None:
                search.enter_context(interruptible())
                advance = search.enter_context(progress(shown, "verify", None, "domain"))
            more = now["nodes"] - (history[-1]["nodes"] if history else 0)
            advance(more, f"{now['left']} left, margin >= {now['lower']:.4g}")
            history.append(now)

        yield tell


def _network(options: given.Verify | given.Check) -> str | Callable:
    """The network as `decide` takes it; for an ONNX file nothing else is imported."""
    if options.net.endswith((".onnx", ".onnx.gz")):
        return onnx.load(options.net, input_shape=(1, *options.input_shape)) if options.input_shape else options.net
    from jaxbound.cli.networks import load, of_one_example, shape_of

    loaded = load(options.net)
    function, params = of_one_example(loaded, shape_of(loaded, options.input_shape))
    return lambda x: function(params, x)


def _text(verdict: Verdict, seconds: float) -> str:
    lines = [f"{verdict.status} in {seconds:.1f} s ({verdict.guarantee})"]
    if verdict.status != "falsified":
        return f"{lines[0]}\n{counted(verdict.nodes, 'domain')}, margin of the property >= {verdict.lower:.6g}"
    for name, values in (("counterexample", verdict.counterexample), ("outputs", verdict.outputs)):
        lines.append(f"{name} {np.array2string(np.ravel(np.asarray(values)), separator=', ', threshold=40)}")
    return "\n".join(lines)


def check(options: given.Check, started: float) -> int:
    """`jaxbound check`."""
    network = _network(options)
    network = onnx.load(network) if isinstance(network, str) else network
    try:
        proof = jaxbound.check_certificate(options.certificate, network)
    except jaxbound.CertificateError as fault:
        proof, said = None, str(fault)
    else:
        over, leaves = counted(len(proof.regions), "region"), counted(proof.leaves, "domain")
        said = f"proved over {over}: {leaves}, in {proof.arithmetic} arithmetic"
    if proof is not None and options.property and not competition.is_about(proof, *vnnlib.load(options.property)):
        proof, said = None, f"the certificate is about another property than {options.property}"
    seconds = round(time.monotonic() - started, 3)
    found = {"certificate": options.certificate, "net": options.net, "proved": proof is not None, "text": said}
    show(options.json, found | {"seconds": seconds}, said)
    return UNKNOWN if proof is None else VERIFIED
