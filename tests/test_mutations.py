"""Planted faults: each changes one function of the core, and a fast deterministic check must fail.

Sampling whole networks misses most of these (docs: four faults, caught in 0 of 20 networks each), so the checks are the
sharp ones: equality with linear programs and closed forms, dense lines, values at points. Without a fault all pass.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable

import checks
import checks_adversarial
import checks_choices
import checks_exact
import checks_handed
import checks_modes
import checks_pruning
import jax
import jax.numpy as jnp
import pytest

import jaxbound as jb
from jaxbound import _compat, curvature, graph, regions
from jaxbound.certificates import radius, records
from jaxbound.certificates.proofs import files
from jaxbound.driver import chunks, pruning, steps
from jaxbound.graph import folding, operations, primitives
from jaxbound.graph.rewriting import definedness, factors, indicators, infinities, masked, patterns
from jaxbound.jacobian import composition, norms, recursion
from jaxbound.methods import ascent, domains, executed
from jaxbound.methods.exact import encoding, oracles, program, tree
from jaxbound.network import functions, independence
from jaxbound.regions import balls, polytopes, sets, support, zonotopes
from jaxbound.relaxations import (
    affine,
    backward,
    coefficients,
    convolutions,
    execution,
    forward,
    interval,
    windows,
)
from jaxbound.relaxations.enclosures import (
    evaluation,
    logsumexp,
    maximum,
    meet,
    product,
    running,
    scalar,
    search,
    select,
    simplification,
    sort,
    staircase,
)

CHECKS: dict[str, Callable[[], None]] = {
    name.removeprefix("check_"): check
    for name, check in (
        checks.CHECKS
        | checks_choices.CHECKS
        | checks_exact.CHECKS
        | checks_adversarial.CHECKS
        | checks_modes.CHECKS
        | checks_handed.CHECKS
        | checks_pruning.CHECKS
    ).items()
}

# --- the faults -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Mutant:
    """`change(original)` takes the place of `owner.name` (or `owner[name]`); `check` must fail."""

    check: str
    owner: object
    name: str
    change: Callable


def _swapped_pairs(original):
    def mutant(op, inputs, planes, sizes):
        turned = [
            dataclasses.replace(
                pair, slopes=tuple(ends[::-1] for ends in pair.slopes), intercepts=pair.intercepts[::-1]
            )
            for pair in inputs
        ]
        return original(op, turned, planes, sizes)

    return mutant


def _kinds_exchanged(original):
    kinds = {"convex": "concave", "concave": "convex", "linear": "linear"}

    def mutant(op):
        curvature = original(op)
        pieces = tuple(dataclasses.replace(piece, kind=kinds[piece.kind]) for piece in curvature.pieces)
        return dataclasses.replace(curvature, pieces=pieces)

    return mutant


def _facts(**changes) -> Callable:
    return lambda facts: dataclasses.replace(facts, **changes)


def _after(change: Callable) -> Callable:
    """A fault in what a function returns."""
    return lambda original: functools.wraps(original)(lambda *a, **k: change(original(*a, **k)))


def _always(value) -> Callable:
    return lambda original: lambda *a, **k: value


def _another_column(original):
    def mutant(op, rows, constants):
        if isinstance(rows, coefficients.Identity) and op.name == "dot_general":
            rows = dataclasses.replace(rows, index=jnp.roll(rows.index, 1))
        return original(op, rows, constants)

    return mutant


def _padded_with_zeros(original):
    def mutant(params, operands):
        _, arguments = original[0](params, operands)
        plain = original[0]({**params, "padding": tuple((0, 0) for _ in params["padding"])}, operands)[0]
        return lambda x: plain(jnp.pad(x, params["padding"])), arguments

    return [mutant]


def _part(function: Callable) -> Callable:
    """Another function of the same operands."""
    return lambda _: lambda params, operands: (function, operands)


def _changed(change: Callable) -> Callable:
    """A fault in the functions that an equation's rules make."""

    def mutant(original):
        def changed(rule):
            def run(params, operands):
                found = rule(params, operands)
                return None if found is None else (change(found[0]), found[1])

            return run

        return [changed(rule) for rule in original]

    return mutant


def _options(**changes) -> Callable:
    """A fault in the parameters that an equation's rules read."""
    return lambda original: [lambda params, operands, r=r: r({**params, **changes}, operands) for r in original]


def _renamed(old: str, new: str) -> Callable:
    """The operand of a rule taken for the result of another primitive."""

    def change(original):
        def mutant(params, operands):
            (truth,) = operands
            if getattr(truth, "name", "") == old:
                truth = dataclasses.replace(truth, primitive=types.SimpleNamespace(name=new))
            return original(params, [truth])

        return mutant

    return change


_upper_as_lower = _after(
    lambda p: dataclasses.replace(p, upper_slopes=p.lower_slopes, upper_intercept=p.lower_intercept)
)

MUTANTS: dict[str, Mutant] = {
    # the affine rule
    "radius without absolute values": Mutant("affine_intervals", affine, "absolute", lambda _: affine.linear),
    "constant dropped": Mutant("crown_program", affine, "offset", _always(None)),
    "ends chosen without signs": Mutant("affine_intervals", affine, "_ends", lambda _: lambda op, inputs, side: [e[side] for e in inputs]),
    "offset doubled": Mutant("crown_program", affine, "offset", _after(lambda b: None if b is None else 2 * b)),
    "transpose with the sign flipped": Mutant("crown_program", affine, "pull", lambda original: lambda op, rows, c: [-part if op.facts.scales else part for part in original(op, rows, c)]),
    "no rounding of products": Mutant("rounding", affine, "gamma", _always(0.0)),
    "rounding of one term": Mutant("rounding", affine, "gamma", lambda original: lambda terms, dtype: original(1, dtype)),
    "overflow kept": Mutant("abnormal", interval, "certain", lambda _: lambda low, high: (low, high)),
    "infinite ends as a middle": Mutant("abnormal", affine, "_middle_radius", lambda _: lambda ends: (jnp.nan_to_num(ends[0] / 2 + ends[1] / 2), jnp.nan_to_num(ends[1] - ends[0], posinf=1.0) / 2)),
    # facts
    "subtraction increases": Mutant("affine_intervals", primitives.AFFINE, "sub", _facts(signs=(1, 1))),
    "transposition keeps the order": Mutant("affine_intervals", primitives.AFFINE, "transpose", _facts(order_preserving=True)),
    "reversal keeps the order": Mutant("affine_intervals", primitives.AFFINE, "rev", _facts(order_preserving=True)),
    "products of two values are affine": Mutant("products", primitives.AFFINE, "mul", _facts(alone=False)),
    "sums are exact for anything": Mutant("affine_intervals", graph.Op, "repeats", lambda _: property(lambda self: False)),
    # coefficients
    "positive and negative parts exchanged": Mutant("crown_program", coefficients, "by_sign", lambda original: lambda held, low, high: original(held, high, low)),
    "second reader forgotten": Mutant("sound_everywhere", coefficients, "add", lambda _: lambda first, second: first),
    "columns of another neuron": Mutant("crown_program", coefficients, "pull", _another_column),
    "windows begin one entry late": Mutant("windows", windows.Windowed, "origin", lambda original: lambda self, axis: original(self, axis)._replace(position=original(self, axis).position + 1)),
    "windows stand out at the border": Mutant("windows", windows, "_inside", lambda _: lambda rows: rows),
    "a union of windows moved": Mutant("windows", windows, "_united", _after(lambda values: jnp.roll(values, 1, 2))),
    "values seen by the first row": Mutant("windows", windows, "cut", _after(lambda seen: jnp.broadcast_to(seen[:1], seen.shape))),
    "taps of a strided kernel reversed": Mutant("windows", convolutions, "_moved", lambda original: lambda inner, table: original(inner, table[::-1])),
    "residues of a strided kernel reversed": Mutant("windows", affine._FASTER, "conv_general_dilated", _after(lambda rows: None if rows is None else jnp.flip(rows, 2))),
    # backward
    "intercept dropped": Mutant("crown_program", backward._Tally, "_shift", _always(None)),
    "lower planes on both sides": Mutant("crown_program", scalar, "planes", _upper_as_lower),
    "rows not negated": Mutant("crown_program", steps, "begin", _after(lambda r: (dataclasses.replace(r[0], weight=jnp.abs(r[0].weight)), r[1]))),
    "rows mixed up": Mutant("crown_program", steps, "by_side", _after(lambda r: ((jnp.roll(r[0][0], 1), r[0][1]), r[1]))),
    "last rows forgotten": Mutant("chunks", chunks, "cut", lambda original: lambda *a: [-(k > 0) | rows for k, rows in enumerate(original(*a))]),
    "merged with the wrong end": Mutant("sound_everywhere", interval, "intersect", lambda _: lambda a, b: (jnp.maximum(a[0], b[0]), jnp.minimum(a[1], b[0] / 2 + b[1] / 2))),
    "magnitude of the upper end": Mutant("rounding", interval, "magnitude", lambda _: lambda ends: jnp.abs(ends[1]) * 1e-3),
    "stable where it is not": Mutant("row_selection", scalar, "is_exact", _after(jnp.ones_like)),
    # forward
    "lower and upper functions exchanged": Mutant("forward", forward, "nonlinear_node", _swapped_pairs),
    "every leaf is the first": Mutant("forward", forward, "start", _after(lambda pairs: [dataclasses.replace(p, slopes=pairs[0].slopes) if p.slopes[0][0].shape == pairs[0].slopes[0][0].shape else dataclasses.replace(p, slopes=tuple((a + 1, b + 1) for a, b in p.slopes)) for p in pairs])),
    "lower function for negative rows": Mutant("forward", forward, "substitute", lambda original: lambda rows, pair, carry, leaves: original(rows, dataclasses.replace(pair, slopes=tuple((a, a) for a, _ in pair.slopes)), carry, leaves)),
    # scalar functions
    "kinks ignored": Mutant("scalar_lines", scalar, "_borders", _always(())),
    "searched bound too high": Mutant("scalar_lines", search, "minimize", _after(lambda found: (found[0], found[1] + 0.01))),
    "searched bound too low": Mutant("scalar_lines", search, "minimize", _after(lambda found: (found[0], found[1] - 0.01))),
    "intercepts exchanged": Mutant("scalar_lines", scalar, "intercepts", _after(lambda ends: ends[::-1])),
    "hull slopes exchanged": Mutant("scalar_lines", scalar, "hull_slopes", _after(lambda slopes: slopes[::-1])),
    "convex and concave exchanged": Mutant("scalar_lines", scalar, "curvature_of", _kinds_exchanged),
    "monotone where it is not": Mutant("scalar_lines", scalar, "curvature_of", _after(lambda c: dataclasses.replace(c, is_monotone=1))),
    "no rounding of evaluations": Mutant("evaluations", scalar, "_error", _after(jnp.zeros_like)),
    "derivatives trusted at switches": Mutant("switches", scalar, "_flattest", lambda _: scalar._derivative),
    # products and maxima
    "corners forgotten": Mutant("products", product, "_extreme", lambda original: lambda boxes, slopes, choose: jnp.stack([x * y - slopes[0] * x - slopes[1] * y for x, y in zip(*boxes, strict=True)]).mean(axis=0)),
    "corners of equal signs only": Mutant("products", product, "interval", lambda _: lambda op, inputs, c: (inputs[0][0] * inputs[1][0], inputs[0][1] * inputs[1][1])),
    "any entry taken for the largest": Mutant("maxima", maximum, "_first_largest", _after(lambda mask: jnp.roll(mask, 1, axis=-1))),
    "largest of the lower ends only": Mutant("maxima", maximum, "interval", _after(lambda ends: (ends[0], ends[0]))),
    # regions
    "norm taken for its dual": Mutant("regions", balls, "dual_exponent", lambda _: lambda norm: norm),
    "clip box ignored": Mutant("regions", regions, "minimum", lambda original: lambda region, slope: original(dataclasses.replace(region, clip=None) if isinstance(region, jb.LpBall) else region, slope)),
    "ends of boxes exchanged": Mutant("regions", support, "_box_end", lambda original: lambda low, high, slope: original(high, low, slope)),
    "no outward rounding of boxes": Mutant("regions", sets, "next_number", lambda _: lambda value, direction: value),
    "nothing is empty": Mutant("abnormal", regions, "is_empty", _always(jnp.array(False))),
    # patterns
    "any sum is the denominator": Mutant("patterns", patterns, "put_back", _always(True)),
    "any shift is harmless": Mutant("patterns", patterns, "_without_shift", lambda _: lambda value, axes: value.operands[0] if value.name == "sub" else value),
    "any factor makes a mean": Mutant("patterns", patterns, "_mean_of", lambda _: lambda operand: (operand.operands[0].operands[0], tuple(operand.operands[0].params["axes"])) if getattr(operand, "name", "") in ("div", "mul") and getattr(operand.operands[0], "name", "") == "reduce_sum" else None),
    "maximum as minimum": Mutant("patterns", patterns._PARTS, "max", _part(lambda x, y: x - jax.nn.relu(x - y))),
    "quotient as product": Mutant("patterns", patterns._PARTS, "div", _part(lambda x, y: x * y)),
    "pools padded with zeros": Mutant("patterns", patterns._MATCHES, "reduce_window_max", _padded_with_zeros),
    "minimum without a sign": Mutant("patterns", patterns._PARTS, "reduce_min", lambda _: lambda params, operands: (lambda x: jnp.max(x, axis=params["axes"]), operands)),
    # choices and meets
    "choice always the first case": Mutant("choices", select, "interval", lambda _: lambda op, inputs, constants: select._operands(op, inputs, constants)[1]),
    "decided where it is not": Mutant("choices", select, "_operands", lambda original: lambda *a: [(lambda low, high: (low, low))(*original(*a)[0]), *original(*a)[1:]]),
    "nothing separates the planes": Mutant("choices", select, "_separation", lambda _: lambda share, least, most: jnp.zeros_like(least)),
    "separated at one end only": Mutant("choices", select, "_separation", lambda _: lambda share, least, most: -(1 - share) * jnp.abs(least)),
    "union for an intersection": Mutant("meets", meet, "_intersection", lambda _: lambda a, b: (jnp.minimum(a[0], b[0]), jnp.maximum(a[1], b[1]))),
    "expressions of a meet exchanged": Mutant("meets", meet, "planes", lambda original: lambda op, inputs, *rest: original(op, inputs[::-1], *rest)),
    # inactive neurons
    "the first neurons are left": Mutant("inactive", pruning, "_left", _after(lambda left: left if left is None else jnp.zeros_like(left) + jnp.arange(left.shape[1], dtype=jnp.int32))),
    "the first example's neurons are left": Mutant("inactive", pruning, "_left", _after(lambda left: left if left is None else jnp.broadcast_to(left[:1], left.shape))),
    # logsumexp, sorted entries, roundings
    "logsumexp of the largest alone": Mutant("logsumexp", logsumexp, "interval", lambda _: lambda op, inputs, constants: tuple(jnp.max(end, maximum.axes(op)) for end in inputs[0])),
    "entries without a lower end at their upper one": Mutant("logsumexp", logsumexp, "planes", lambda f: lambda op, inputs, *rest: f(op, [(jnp.where(jnp.isinf(low), high, low), high) for low, high in inputs], *rest)),
    "chords of exponentials as a tangent": Mutant("logsumexp", logsumexp, "planes", _after(lambda p: dataclasses.replace(p, upper_slopes=p.lower_slopes, upper_intercept=p.lower_intercept))),
    "entries not sorted": Mutant("sorted", sort, "interval", lambda _: lambda op, inputs, constants: inputs[0]),
    "largest taken for least": Mutant("sorted", patterns._MATCHES, "top_k", _changed(lambda f: lambda x: [-part for part in f(-x)])),
    "floor as round": Mutant("staircases", staircase._OFFSETS, "floor", lambda _: (-0.5, 0.5)),
    "one line for both sides": Mutant("staircases", staircase, "planes", _upper_as_lower),
    "only one case of a choice errs": Mutant("turned_choices", evaluation, "_turned", lambda original: lambda predicate, cases, errors: original(predicate, cases, (None, *errors[1:]))),
    "every sum is exact": Mutant("turned_choices", curvature.functions.FUNCTIONS, "add", lambda row: dataclasses.replace(row, without_error=lambda x, y: x == x)),
    "what rounds and absorbs is exact": Mutant("exact_sums", curvature.functions.FUNCTIONS, "add", lambda row: dataclasses.replace(row, units=(0, 0))),
    # booleans
    "and as or": Mutant("truth_and", indicators._LOGIC, "and", lambda _: lambda a, b: jnp.minimum(a + b, 1)),
    "or as a sum": Mutant("truth_or", indicators._LOGIC, "or", lambda _: lambda a, b: a + b),
    "xor as a difference": Mutant("truth_xor", indicators._LOGIC, "xor", lambda _: lambda a, b: a - b),
    "difference of a comparison turned": Mutant("truth_comparisons", indicators._COMPARISONS, "lt", lambda _: jnp.greater),
    "any as all": Mutant("truth_any_all", patterns._PARTS, "convert_element_type", _renamed("reduce_or", "reduce_and")),
    "counts are booleans": Mutant("truth_counts", patterns._PARTS, "convert_element_type", _renamed("reduce_sum", "reduce_or")),
    "cases of a selection exchanged": Mutant("truth_where", operations, "select", lambda original: lambda indicator, no, yes: original(indicator, yes, no)),
    # regrouped products and sums
    "factors too large": Mutant("group_product", factors._FACTORS, "times", lambda _: lambda x, dtype: x * 1.5),
    "sum for a difference": Mutant("group_difference", patterns._MATCHES, "sub", lambda original: [*original[:2], factors.total("add")]),
    "other factors taken for the same": Mutant("group_difference", factors, "_identities", _always([1])),
    "numbers of a choice exchanged": Mutant("group_choice", factors, "_gated", lambda original: lambda no, yes, *rest: original(yes, no, *rest)),
    "if as unless": Mutant("group_chain", factors._FACTORS, "if", lambda _: factors._FACTORS["unless"]),
    # derivatives of maxima
    "every count is of ties": Mutant("divided_by_ties", indicators, "_counted", lambda _: lambda operand, equal: indicators._total(operand)),
    "larger than the first taken for largest": Mutant("gradients_of_maxima", indicators, "_is_largest", lambda _: lambda x: x - x[..., :1] >= 0),
    "larger than itself": Mutant("gradients_of_maxima", operations, "pairwise", _after(lambda found: (found[0] + 1, found[1]))),
    "largest for least": Mutant("gradients_of_maxima", patterns._MATCHES, "eq", _changed(lambda f: lambda x, y: f(y, x))),
    # other rewrites
    "later updates do not win": Mutant("rewrite_scatter", patterns._MATCHES, "scatter", _changed(lambda f: lambda x, indices, updates: f(x, indices, updates[::-1]))),
    "places multiplied once": Mutant("rewrite_scatter_mul", patterns._MATCHES, "scatter-mul", _changed(lambda f: lambda x, *where: f(x, where[0] * 0, *where[1:]))),
    "kernel reversed": Mutant("rewrite_convolution", patterns._MATCHES, "conv_general_dilated", _changed(lambda f: lambda x, kernel: f(x, kernel[::-1]))),
    "running from the other end": Mutant("rewrite_running", patterns._MATCHES, "cummax", _options(reverse=False)),
    "the odd entry forgotten": Mutant("rewrite_reduce_prod", patterns._MATCHES, "reduce_prod", _changed(lambda f: lambda x: f(x[: len(x) - len(x) % 2]))),
    "padded with zero": Mutant("rewrite_padding", patterns._MATCHES, "pad", _changed(lambda f: lambda x, value: f(x, 0 * value))),
    "filled with zero": Mutant("rewrite_filled", patterns._MATCHES, "gather", _changed(lambda f: lambda x, indices: f(x, indices) - f(0 * x, indices))),
    "scanned from the other end": Mutant("rewrite_scanned", patterns._MATCHES, "scan", _options(reverse=False)),
    "repeated along other axes": Mutant("rewrite_repeated", patterns._MATCHES, "broadcast_in_dim", _changed(lambda f: lambda x: jnp.flip(f(x), 1))),
    "what comes from a window goes everywhere": Mutant("rewrite_pool_gradient", patterns._MATCHES, "select_and_scatter_add", _changed(lambda f: lambda source, x: f(source, 0 * x))),
    # batches and specifications
    "examples in another order": Mutant("batches", regions, "per_example", _after(lambda region: jax.tree.map(lambda a: jnp.flip(a, 0), region))),
    # programs
    "no rounding of a Lagrangian": Mutant("multipliers", program, "gamma", _always(0.0)),
    "the other end of each row": Mutant("multipliers", program, "_times", lambda original: lambda y, values: abs(original(y, values))),
    "rounding proves that there is nothing": Mutant("emptiness", program, "gamma", _always(0.0)),
    "one option taken for all": Mutant("branching", tree, "narrowed", lambda original: lambda whole, options: original(whole, [option for option in options[:1] or (split.options[0] for split in whole.splits[:1])])),
    "a leaf forgotten": Mutant("branching", program.Builder, "add_split", lambda original: lambda self, column, options: original(self, column, options[1:])),
    "pieces end early": Mutant("branching", oracles.families, "_pieces", _after(lambda found: (found[0], found[1], found[2] - 0.3 * (found[2] - found[1])))),
    "subnormal weights dropped": Mutant("equations", encoding, "_parts", lambda _: lambda op, constants: [(op, [jnp.where(jnp.abs(c) < 1e-307, 0, c) for c in constants], 1.0)]),
    "scaled weights not scaled back": Mutant("equations", encoding, "_parts", _after(lambda parts: [(op, read, 1.0) for op, read, _ in parts])),
    "a ball of half the radius": Mutant("balls", program.Builder, "add_ball", lambda original: lambda self, columns, center, radius: original(self, columns, center, radius / 2)),
    # infinite literals and domains
    "infinite numbers are numbers": Mutant("infinite_factors", infinities, "of", _always(0)),
    "nothing is doubtful": Mutant("infinite_differences", infinities, "is_doubtful", _always(False)),
    "infinity has no sign": Mutant("infinite_differences", infinities, "_flipped", lambda _: lambda infinite: infinite),
    "bounds are always finite": Mutant("infinite_factors", domains, "_leaves_domain", _after(jnp.zeros_like)),
    "some score is always left": Mutant("masked_softmax", domains, "_leaves_domain", _after(jnp.zeros_like)),
    "masked scores count": Mutant("masks_of_sums", logsumexp, "_mask", _always(None)),
    "another mask for this one": Mutant("masks_of_sums", masked, "_off", _after(lambda off: None if off is None else not off)),
    "no scores are infinite": Mutant("nothing_left_by_masks", infinities, "of_result", _always(0)),
    "every shift is defined": Mutant("undefined_shifts", definedness, "is_total", _always(True)),
    "every shift is the maximum": Mutant("undefined_shifts", patterns, "_is_peak", _always(True)),
    # promises and numbers
    "promises of gathers are kept": Mutant("promised_gathers", patterns._MATCHES, "gather", lambda _: []),
    "promises of scatters are kept": Mutant("promised_scatters", patterns._MATCHES, "scatter-add", lambda _: []),
    "folded numbers are exact": Mutant("folded_numbers", folding, "_proved", _always(None)),
    "exact within functions": Mutant("folded_numbers_within_functions", evaluation, "_stored", _always(0.0)),
    "subnormal parameters are not flushed": Mutant("subnormal_parameters", evaluation, "is_subnormal", _after(jnp.zeros_like)),
    # what runs
    "nothing is as it runs": Mutant("executed_sums", execution, "MODE", lambda _: "no mode"),
    "what runs is exact": Mutant("executed_sums", execution, "error", _after(jnp.zeros_like)),
    "functions that run have no error": Mutant("executed_functions", running, "error", _after(jnp.zeros_like)),
    "errors are not carried on by exp": Mutant("executed_functions", running.RULES, "exp", lambda original: lambda x: (*original(x)[:2], 0 * x.error)),
    "errors of factors are not carried on": Mutant("executed_functions", running.RULES, "mul", lambda original: lambda x, y: (*original(x, y)[:2], 0 * x.error)),
    "factors of any size": Mutant("executed_factors", simplification, "FACTORS", lambda _: (0.0, float("inf"))),
    "factors are not gathered": Mutant("executed_factors", executed, "_factors", _after(lambda counts: [0] * len(counts))),
    "readers see the same value": Mutant("executed_readers", executed, "_unsettled", _after(lambda found: [False] * len(found))),
    "nothing is simplified": Mutant("executed_pairs", simplification, "refusal", _always("")),
    # polytopes and zonotopes
    "multipliers of either sign": Mutant("polytope_minima", polytopes, "_multipliers", _after(lambda y: -y)),
    "multipliers without right sides": Mutant("polytope_minima", polytopes.Polytope, "_flat", _after(lambda rows: rows._replace(offsets=rows.offsets - 0.05))),
    "rows leave the wrong end": Mutant("polytope_minima", polytopes, "_tightened", lambda original: lambda rows: original(rows._replace(matrix=-rows.matrix))),
    "no room for rounded rows": Mutant("polytope_rounding", polytopes, "_rounded", lambda original: lambda own, exact: original(own, True)),
    "everything is empty": Mutant("polytope_emptiness", polytopes, "_lagrangian", _after(lambda found: (jnp.abs(found[0]) + 1, found[1]))),
    "nothing is proved to be empty": Mutant("polytope_emptiness", polytopes, "_multipliers", _after(jnp.zeros_like)),
    "generators that cancel": Mutant("zonotopes", zonotopes.Zonotope, "_flat", _after(lambda parts: (parts[0], parts[1].sum(axis=-2, keepdims=True), parts[2]))),
    # tuned lines
    "lines beyond the table": Mutant("tuned_tables", ascent, "between", lambda original: lambda table, share: original(table, None if share is None else share - 0.5)),
    "the best of another row": Mutant("tuned_lines", ascent, "_where", lambda original: lambda condition, new, old: original(condition, jax.tree.map(lambda leaf: jnp.roll(leaf, 1, 0), new), old)),
    "intercepts of other lines": Mutant("tuned_tables", ascent, "mixed", lambda original: lambda op, table, shares: original(op, dataclasses.replace(table, lower_intercept=table.lower_intercept[::-1]), shares)),
    "lines below taken for those above": Mutant("tuned_lines", ascent, "mixed", _upper_as_lower),
    # Jacobians, norms and radii
    "no underflow in Jacobians": Mutant("underflow_of_jacobians", recursion, "enlargement", _always(0.0)),
    "no underflow in products of norms": Mutant("underflow_of_norms", norms, "product", lambda _: lambda factors, dtype: functools.reduce(jnp.multiply, factors)),
    "stored constants alone": Mutant("computed_constants_of_jacobians", affine, "_error", _after(jnp.zeros_like)),
    "values are not looked at": Mutant("values_of_radii", radius, "_check_values", _always(None)),
    # what is handed over
    "certificates of any form": Mutant("forms_of_certificates", files, "_check_array", _always(None)),
    "programs of reductions are entered": Mutant("calls_of_certificates", _compat, "called", lambda original: lambda primitive, params, avals: params.get("jaxpr") or original(primitive, params, avals)),
    "results are taken as they are": Mutant("wholeness_of_results", records, "hashed", _always("")),
    "places are all alike": Mutant("places_in_batches", independence, "_differs_by_place", _always(False)),
    "no number is made of a place": Mutant("places_in_batches", independence, "_makes_number", _always(False)),
    "a vector's own stretch for the norm": Mutant("norms_between_powers", norms, "_raised", lambda original: lambda x, power: original(x, power) * (1 - 1e-3)),
    "Schur's test without its vector": Mutant("norms_between_powers", norms, "rolled", lambda _: lambda loop: lambda low, high, step, start: start),
    "derivatives are believed": Mutant("rules_of_others", composition, "_has_rules_of_others", _always(False)),
    "specification of the wrong sign": Mutant("interval_program", functions.Specified, "__call__", lambda original: lambda self, v, x, spec: -original(self, v, x, spec)),
}  # fmt: skip


@pytest.fixture
def _fresh():
    """No graph or program of before, and nothing compiled that a fault could hide behind."""
    jb.clear_caches()
    with jax.enable_x64(True), jax.disable_jit():
        yield
    jb.clear_caches()


@pytest.mark.usefixtures("_fresh")
@pytest.mark.parametrize("name", CHECKS)
def test_checks_pass_without_a_fault(name):
    CHECKS[name]()


@pytest.mark.usefixtures("_fresh")
@pytest.mark.parametrize("name", MUTANTS)
def test_faults_are_found(name, monkeypatch):
    mutant = MUTANTS[name]
    if isinstance(mutant.owner, dict):
        monkeypatch.setitem(mutant.owner, mutant.name, mutant.change(mutant.owner[mutant.name]))
    else:
        monkeypatch.setattr(mutant.owner, mutant.name, mutant.change(getattr(mutant.owner, mutant.name)))
    with pytest.raises(AssertionError):
        CHECKS[mutant.check]()


def test_there_are_enough_faults_and_every_check_finds_some():
    assert len(MUTANTS) >= 130
    assert {mutant.check for mutant in MUTANTS.values()} == set(CHECKS)
