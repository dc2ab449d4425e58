"""The page of the documentation that says what can be bounded: `python tests/support.py` writes it, a test compares it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from coverage import CASES, METHODS, NORMS, Case

import jaxbound as jb

PAGE = Path(__file__).resolve().parent.parent / "docs" / "support.md"
COMMAND = "python tests/support.py"

_HEAD = f"""# What can be bounded

<!-- Written by `{COMMAND}` from tests/coverage.py. Do not edit. -->

Each line is a test. A supported case is bounded by {", ".join(METHODS)} over {", ".join(NORMS)} (a box, and balls of the
norms 1, 2 and infinity), over a box alone where the line says so, and the bounds are compared with values all over the
region: inside, in corners, on faces, and on both sides of kinks and ties. Everything that backward bounds work on (`CrownIBP`, `FastLin`, `Frown`, ...) has
the same nodes. A refused case raises `UnsupportedError` with the reason shown, when the function is traced.

"Nodes" are the kinds of relaxation that a function needs ([how it works](how_it_works.md)); a function that is *affine*
alone is bounded exactly by linear methods. `jaxbound.explain` shows the same for any function:

```python
import jax, jax.numpy as jnp
import jaxbound as jb

box = jb.Box(jnp.zeros(3), jnp.ones(3))
print(jb.explain(lambda x: jax.nn.softmax(x) * x, jb.Crown())(box))
print(jb.explain(lambda x: jnp.linalg.norm(jnp.linalg.inv(jnp.outer(x, x))), jb.Crown())(box).refusals)
```
"""

FRAMEWORKS = [
    ("Linen", "its variables, with `apply_fn=model.apply`; a bound module"),
    ("NNX", "the module"),
    ("`TrainState`", "the state; with `apply_fn` where the model takes flags"),
    ("Equinox", "the module of one example"),
    ("Haiku", "its parameters, with `apply_fn` from `haiku.without_apply_rng`"),
    ("Keras 3 on JAX", "the model; or its file, by `jaxbound` on the command line"),
    ("ONNX", "`jaxbound.onnx.load(path)`"),
    ("Dense layers", 'a list of `(kernel, bias)`, with `activation="relu"`'),
]
"""Each has a recipe in docs/your_framework.md or docs/bring_your_network.md, and a test of it."""


def page() -> str:
    """The page's text: traced only, nothing is bounded."""
    parts = [_HEAD, "## Frameworks\n", _table(("what you have", "what you pass as params"), FRAMEWORKS)]
    for section in dict.fromkeys(case.section for case in CASES.values()):
        cases = {name: case for name, case in CASES.items() if case.section == section}
        parts.append(f"## {section}\n")
        parts.append(_table(("case", "nodes"), [
            (name if case.fixed is None else f"{name} (over a box)", _kinds(case))
            for name, case in cases.items() if case.refused is None
        ]))  # fmt: skip
        if refused := {name: case for name, case in cases.items() if case.refused is not None}:
            parts.append("Refused:\n")
            parts.append(_table(("case", "reason"), [(name, _reason(case)) for name, case in refused.items()]))
    return "\n".join(parts)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def _explained(case: Case) -> jb.Explanation:
    return jb.explain(case.function, jb.Crown())(*case.pack(case.regions(None, np.float32)["wide"]))


def _kinds(case: Case) -> str:
    kinds = [row[1] for row in _explained(case).rows if row[1] != "input"]
    return ", ".join(dict.fromkeys(kinds)) or "the input itself"


def _reason(case: Case) -> str:
    """The refusal that names the case's primitive, without the line of this repository."""
    found = next(reason for reason in _explained(case).refusals if f"`{case.refused[0]}`" in reason)
    return re.sub(r" at \S+:\d+( \([^)]*\))?(?=:)", "", " ".join(found.split()))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
