"""Tables 3 and 4 of the FROWN paper, for any network: `python -m experiments.frown` (most of its time compiles).

    python -m experiments.frown --table 3 --data_dir DATA      # the paper's list, on MNIST, Fashion-MNIST and a table
    python -m experiments.frown --networks mnist:5x20:relu wine:4x20:sigmoid --data_dir DATA --norms inf
    python -m experiments.frown --network NAME.npz --images IMAGES.npz

How much do tuned slopes gain over CROWN's rule, and what do they cost next to the linear program? For every norm, the
certified radii of the first --count images that the network classifies correctly, by

    CROWN (parallel)    parallel lines; for ReLU, what the paper's tables call CROWN,
    CROWN (adaptive)    CROWN's own choice: the better baseline,
    FROWN               slopes tuned for --steps steps, each bound's own ("neuron") or shared by --groups of them,
    LP                  the linear program at every layer, for the first --lp images.

All search through the same bracket (`jb.certified_radius`) up to --tolerance, so that the first radius on which two of
them disagree separates their results: FROWN, which certifies whatever adaptive CROWN does, never ends below it.
Improvements compare means over the same images. The first call compiles and is timed apart; seconds per image are those
of a second call, in batches, and of LP those of one image after the other. For each image PGD looks for the smallest
radius at which it succeeds, the largest certified one first: a certified radius that is not below it ends the run.

Networks of a list (`experiments.frown_networks`) are trained first, in --output/networks; a network and norm that are
done are not done again by the same command. Without a list and --network one is trained on the digits of scikit-learn,
without any bounds. Radii are in units of pixels in
[0, 1], and balls are not clipped to them, as in the paper (whose pixels lie in [-1, 1]: its radii are twice these).
Writes frown.csv, frown.md and frown.png after each norm; the last line printed is JSON.

Table 4 has networks of width 2048 on CIFAR-10, which is taken from --data_dir where it is there, and else replaced by
random data of its shape (the name of the data is then "noise"). Every bound of a layer is a row of 2048 numbers at
each layer before it: expect hours for an image on a CPU, and choose --groups layer.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxbound as jb
from experiments import digits, frown_networks, mlps, networks, require, require_files, write_csv
from experiments.tables import Pieces, figure, finite
from experiments.verified_accuracy import load_images

TARGETS = ("all", "random", "runner-up", "least-likely", "stored")
FIRST_RADIUS = {np.inf: 0.02, 2.0: 0.4, 1.0: 2.0}
COLUMNS = {  # of the table
    "network": ("network", "{}"), "norm": ("p", "{}"), "method": ("method", "{}"), "groups": ("groups", "{}"),
    "steps": ("steps", "{}"), "images": ("images", "{}"), "radius": ("mean radius", "{:.5f}"),
    "pgd_radius": ("PGD's radius", "{:.5f}"), "over_parallel_percent": ("over parallel", "{:+.2f} %"),
    "over_adaptive_percent": ("over adaptive", "{:+.2f} %"), "cpu_seconds": ("CPU s/image", "{:.4f}"),
    "wall_seconds": ("wall s/image", "{:.4f}"), "first_call_seconds": ("first call s", "{:.1f}"),
    "lp_cpu_over_this": ("LP's CPU s / this", "{:.1f}"),
}  # fmt: skip


class Task(NamedTuple):
    """A network, images that it classifies correctly, and for each its label, then the classes to tell it from."""

    apply_fn: Callable[..., Any]
    params: Any
    x: np.ndarray
    classes: np.ndarray

    def at(self, index) -> Task:
        """The same with some of the images."""
        return self._replace(x=self.x[index], classes=self.classes[index])


class MLP(nn.Module):
    """Dense layers with any activation between."""

    hidden: tuple[int, ...]
    activation: str

    @nn.compact
    def __call__(self, x):
        for width in self.hidden:
            x = networks.ACTIVATIONS[self.activation](nn.Dense(width)(x))
        return nn.Dense(10)(x)


# --- networks and images ----------------------------------------------------------------------------------------------


def train(model: MLP, data: digits.Digits, settings: digits.Settings) -> Any:
    """Adam on the cross-entropy, compiled as one loop."""
    optimizer, rng = optax.adam(settings.learning_rate), np.random.default_rng(settings.seed)
    orders = [rng.permutation(len(data.train_x)) for _ in range(settings.epochs)]
    whole = len(data.train_x) // settings.batch_size * settings.batch_size
    batches = np.stack(orders)[:, :whole].reshape(-1, settings.batch_size)
    x, labels = jnp.asarray(data.train_x), jnp.asarray(data.train_y)

    def loss(params, index):
        logits = jnp.asarray(model.apply(params, x[index]))
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[index]).mean()

    def step(carry, index):
        updates, state = optimizer.update(jax.grad(loss)(carry[0], index), carry[1], carry[0])
        return (optax.apply_updates(carry[0], updates), state), None

    params = model.init(jax.random.key(settings.seed), x[:1])
    return jax.jit(lambda start: jax.lax.scan(step, start, batches)[0][0])((params, optimizer.init(params)))


def load(options: argparse.Namespace) -> Task:
    """The network and the first images that it classifies correctly: from files, or digits."""
    settings = digits.Settings(options.seed, tuple(options.hidden))
    images, model = digits.load_digits(settings), MLP(settings.hidden, options.activation)
    given = None if options.network is None else networks.load(options.network)
    apply_fn, params = given or (model.apply, train(model, images, settings))
    x, labels = images[2:] if options.images is None else load_images(options.images, sys.maxsize)
    return task_of(apply_fn, params, x, labels, options)


def task_of(apply_fn: Callable, params: Any, x: np.ndarray, labels: np.ndarray, options: argparse.Namespace) -> Task:
    """A network at the first examples that it classifies correctly."""
    logits = np.concatenate([np.asarray(apply_fn(params, jnp.asarray(x[k : k + 256]))) for k in range(0, len(x), 256)])
    is_label = np.arange(logits.shape[1]) == labels[:, None]
    correct = logits[is_label] > np.where(is_label, -np.inf, logits).max(axis=1)
    chosen = np.flatnonzero(correct)[: options.count]
    if not len(chosen):
        raise SystemExit("the network classifies no image correctly, so that there is nothing to certify")
    return Task(apply_fn, params, x[chosen], told_apart(logits[chosen], labels[chosen], chosen, options))


def told_apart(logits: np.ndarray, labels: np.ndarray, index: np.ndarray, options: argparse.Namespace) -> np.ndarray:
    """For each image its label, then the classes to tell it from: one, or all."""
    others = (labels[:, None] + np.arange(1, logits.shape[1])) % logits.shape[1]
    logit = np.take_along_axis(logits, others, axis=1)
    if options.targets == "stored":
        with np.load(options.images) as arrays:
            others = arrays["target"][index, None]
    elif options.targets == "random":
        others = np.random.default_rng(options.seed).permuted(others, axis=1)[:, :1]
    elif options.targets != "all":
        place = logit.argmax(axis=1) if options.targets == "runner-up" else logit.argmin(axis=1)
        others = np.take_along_axis(others, place[:, None], axis=1)
    return np.concatenate([labels[:, None], others], axis=1).astype(np.int32)


# --- radii ------------------------------------------------------------------------------------------------------------


def radii(task: Task, method: jb.Method, norm: float, size: int, tolerance: float, steps: int = 40) -> np.ndarray:
    """The certified radius of every image; `size` at once, the last batch padded."""
    found, size = [], min(size, len(task.x))
    for first in range(0, len(task.x), size):
        part = task.at(np.minimum(np.arange(first, first + size), len(task.x) - 1))
        targets = "all" if task.classes.shape[1] > 2 else part.classes[:, 1]
        found.append(jb.certified_radius(
            task.params, part.x, part.classes[:, 0], targets=targets, norm=norm, method=method, steps=steps,
            apply_fn=task.apply_fn, initial=FIRST_RADIUS.get(norm, 0.1), tolerance=tolerance,
        ))  # fmt: skip
    return np.concatenate(found)[: len(task.x)]


def attacked_radii(task: Task, norm: float, radius: np.ndarray, seed: int, steps: int = 10) -> np.ndarray:
    """For each image the smallest radius at which PGD succeeds, as far as a bisection from the given radii finds it."""

    def attack(x, classes, eps, key):
        def logits(params, batch):
            return task.apply_fn(params, batch)[:, classes]

        first, how = jnp.zeros(1, jnp.int32), {"steps": 40, "restarts": 2, "norm": norm}
        return jb.pgd(task.params, x[None], first, eps, key=key, apply_fn=logits, **how).success[0]

    succeeds = jax.jit(jax.vmap(attack))
    keys = jax.random.split(jax.random.key(seed), len(task.x))
    failed, succeeded = np.zeros_like(radius), np.full_like(radius, np.inf)
    for _ in range(steps):
        success = np.asarray(succeeds(task.x, task.classes, radius, keys))
        failed, succeeded = np.where(success, failed, radius), np.where(success, radius, succeeded)
        radius = np.where(np.isinf(succeeded), 2 * radius, failed / 2 + succeeded / 2)
    return succeeded


def check(radius: np.ndarray, attacked: np.ndarray, name: str) -> int:
    """How many certified radii are not below one at which PGD succeeds: 0, or it raises SoundnessError."""
    wrong = np.flatnonzero((radius > 0) & (radius >= attacked))
    if len(wrong):
        raise jb.SoundnessError(
            f"PGD succeeds within {len(wrong)} of {len(radius)} radii certified by {name}: image {wrong[0]} has radius "
            f"{radius[wrong[0]]:g}, and PGD succeeds at {attacked[wrong[0]]:g}; no result of this run can be trusted"
        )
    return 0


def measure(task: Task, norm: float, options: argparse.Namespace, network: str) -> list[dict]:
    """One row per method for one norm."""
    methods = [("CROWN (parallel)", "", "", jb.FastLin()), ("CROWN (adaptive)", "", "", jb.Crown())]
    methods += [("FROWN", g, s, jb.Frown(s, groups=g)) for g, s in itertools.product(options.groups, options.steps)]
    methods += [("LP", "", "", jb.LP())] * (options.lp > 0)
    rows, found = [], []
    for name, group, steps, method in methods:
        count, size, warming = (options.lp, 1, 1) if name == "LP" else (len(task.x), options.batch_size, 40)
        own, started = task.at(slice(count)), time.perf_counter()
        radii(own.at(slice(size)), method, norm, size, options.tolerance, warming)
        wall, cpu = time.perf_counter(), time.process_time()
        found.append(radii(own, method, norm, size, options.tolerance))
        rows.append({
            "network": network, "norm": f"{norm:g}", "method": name, "groups": group, "steps": steps,
            "images": len(own.x), "cpu_seconds": (time.process_time() - cpu) / len(own.x),
            "wall_seconds": (time.perf_counter() - wall) / len(own.x), "first_call_seconds": wall - started,
        })  # fmt: skip
        print(f"norm {norm:g}: {name} {group} {steps} {time.perf_counter() - started:.0f} s", file=sys.stderr)
    longest = np.max([np.pad(radius, (0, len(task.x) - len(radius))) for radius in found], axis=0)
    attacked = attacked_radii(task, norm, np.where(longest > 0, longest, np.float32(0.01)), options.seed)
    for row, radius in zip(rows, found, strict=True):
        mean, parallel, adaptive = (float(each[: len(radius)].mean()) for each in (radius, *found[:2]))
        row |= {
            "radius": mean,
            "over_parallel_percent": 100 * (mean / parallel - 1) if parallel else np.nan,
            "over_adaptive_percent": 100 * (mean / adaptive - 1) if adaptive else np.nan,
            "lp_cpu_over_this": rows[-1]["cpu_seconds"] / row["cpu_seconds"] if options.lp else np.nan,
            "pgd_radius": float(attacked[: len(radius)].mean()),
            "violations": check(radius, attacked[: len(radius)], f"{row['method']} in norm {norm:g}"),
        }
    return rows


# --- what is shown ----------------------------------------------------------------------------------------------------


def table(rows: Sequence[dict]) -> str:
    """The rows in Markdown."""
    lines = [[head for head, _ in COLUMNS.values()], ["---"] * len(COLUMNS)]
    lines += [[form.format(row.get(key, np.nan)) for key, (_, form) in COLUMNS.items()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot(rows: Sequence[dict], path: Path) -> None:
    """Mean radius, as a multiple of adaptive CROWN's over the same images, against CPU time; one panel per norm."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    norms = list(dict.fromkeys(row["norm"] for row in rows))
    made, panels = plt.subplots(1, len(norms), figsize=(5 * len(norms), 4), squeeze=False, layout="tight")
    for panel, norm in zip(panels[0], norms, strict=True):
        own = [row for row in rows if row["norm"] == norm]
        for method, group in dict.fromkeys((row["method"], row["groups"]) for row in own):
            line = [row for row in own if (row["method"], row["groups"]) == (method, group)]
            points = [(row["cpu_seconds"], 1 + row["over_adaptive_percent"] / 100) for row in line]
            panel.plot(*zip(*points, strict=True), marker="o" if group else "s", label=f"{method} {group}")
            for row, point in zip(line, points, strict=True):
                panel.annotate(str(row["steps"]), point, textcoords="offset points", xytext=(4, 4), fontsize=8)
        panel.set_xscale("log")
        panel.xaxis.set_minor_formatter("")
        panel.set_xlabel(f"CPU seconds per image, norm {norm} (numbers: steps)")
    panels[0][0].set_ylabel("mean certified radius / adaptive CROWN's")
    panels[0][0].legend(fontsize=8)
    made.savefig(path, dpi=150)
    plt.close(made)


def plot_networks(rows: Sequence[dict], path: Path) -> None:
    """Mean radius as a multiple of adaptive CROWN's over the same images, a line per method, one panel per norm."""
    norms, listed = (list(dict.fromkeys(row[key] for row in rows)) for key in ("norm", "network"))
    with figure(path, len(norms), sharey=True) as panels:
        for panel, norm in zip(panels, norms, strict=True):
            own = [row for row in rows if row["norm"] == norm and "over_adaptive_percent" in row]
            for method in dict.fromkeys((row["method"], row["groups"], row["steps"]) for row in own):
                line = [row for row in own if (row["method"], row["groups"], row["steps"]) == method]
                places = [listed.index(row["network"]) for row in line]
                panel.plot(
                    places,
                    [1 + row["over_adaptive_percent"] / 100 for row in line],
                    "o",
                    label=" ".join(map(str, method)),
                )
            panel.set_xticks(range(len(listed)), listed, rotation=90, fontsize=6)
            panel.set_title(f"norm {norm}", fontsize=9)
        panels[0].set_ylabel("mean certified radius / adaptive CROWN's")
        panels[0].legend(fontsize=7)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--table", type=int, choices=(3, 4), help="the networks and norms of a table of the paper")
    parser.add_argument("--networks", type=frown_networks.read, nargs="+", default=[],
                        metavar="DATA:LAYERSxWIDTH:ACTIVATION",
                        help=f"such as mnist:5x20:relu; data: {', '.join(frown_networks.DATA)}")  # fmt: skip
    parser.add_argument("--data_dir", type=Path, help="where TFDS keeps prepared data sets")
    parser.add_argument("--download", action="store_true", help="fetch and prepare a missing data set")
    parser.add_argument("--epochs", type=int, default=20, help="of the networks of a list")
    parser.add_argument("--examples", type=int, help="train the networks of a list on so many examples only")
    parser.add_argument("--lp_width", type=int, default=20, help="the widest networks of a list that the LP is for")
    parser.add_argument("--network", type=Path, help="NAME.npz, with NAME.json beside it; by default one is trained")
    parser.add_argument("--images", type=Path, help="an npz with `image` and `label`; by default the test digits")
    parser.add_argument("--hidden", type=int, nargs="+", default=[20] * 4, help="widths of the network to train")
    parser.add_argument("--activation", choices=networks.ACTIVATIONS, default="relu", help="of the network to train")
    parser.add_argument("--count", type=int, default=10, help="how many correctly classified images, from the first on")
    parser.add_argument("--norms", type=float, nargs="+", default=[np.inf, 2.0, 1.0], help="p >= 1, inf included")
    parser.add_argument("--targets", choices=TARGETS, default="random", help="stored: `target` in the file of --images")
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 20], help="of FROWN's tuning, for every bound")
    parser.add_argument("--groups", type=lambda text: int(text) if text.isdigit() else text, nargs="+",
                        default=["neuron", 5, "layer"], help="how many neighbouring bounds share slopes")  # fmt: skip
    parser.add_argument("--lp", type=int, help="images for the LP; by default --count if that is at most 10, else none")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="relative width of a radius's bracket")
    parser.add_argument("--batch-size", type=int, default=10, help="images at once")
    parser.add_argument("--seed", type=int, default=0, help="of training, random targets and PGD")
    parser.add_argument("--output", type=Path, default=Path("results/frown"), help="folder for the tables and the plot")
    parser.add_argument("--smoke", action="store_true", help="seconds, for tests: two images, one norm, few steps")
    options = parser.parse_args(arguments)
    if (options.table is not None) + bool(options.networks) + (options.network is not None) > 1:
        parser.error("--table, --networks and --network exclude each other")
    if (options.targets == "stored" and not options.images) or (options.images and not options.network):
        parser.error("--targets stored needs --images, and --images need --network")
    if options.epochs < 1:
        parser.error("--epochs is 1 or more")
    if options.smoke:
        vars(options).update(
            epochs=1,
            examples=200,
            count=2,
            norms=[np.inf],
            steps=[3],
            groups=["neuron"],
            lp=1,
            hidden=[8, 8],
            batch_size=1,
        )
    options.lp = options.count * (options.count <= 10) if options.lp is None else options.lp
    if options.count < 1 or options.lp < 0 or options.batch_size < 1:
        parser.error("--count and --batch-size are 1 or more, --lp 0 or more")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the flags, run, print and save."""
    options = parse(arguments)
    require("sklearn", "matplotlib", "tqdm")
    files = [] if options.network is None else [options.network.with_suffix(suffix) for suffix in (".npz", ".json")]
    require_files(*files, *filter(None, [options.images]))
    listed = wanted(options)
    rows = []
    for piece in of_list(listed, options) if listed else of_one(options):
        rows += piece
        write_csv(options.output / "frown.csv", rows)
        (options.output / "frown.md").write_text(table(rows) + "\n", encoding="utf-8")
        (plot_networks if listed else plot)(rows, options.output / "frown.png")
    print(table(rows))
    print(json.dumps({"network": rows[0]["network"], "targets": options.targets, "rows": list(map(finite, rows))}))


def wanted(options: argparse.Namespace) -> dict[str, tuple[float, ...]]:
    """The networks of a list, each with its norms."""
    if options.table == 3:
        return frown_networks.TABLE_3
    if options.table == 4:
        return frown_networks.table_4(_is_there("cifar10", options))
    return {str(name): tuple(options.norms) for name in options.networks}


def _is_there(name: str, options: argparse.Namespace) -> bool:
    try:
        frown_networks.dataset(name, options.data_dir, download=options.download)
    except (jb.ArgumentError, ImportError):
        return False
    return True


def of_one(options: argparse.Namespace) -> Iterator[list[dict]]:
    """The rows of one network, norm by norm."""
    task = load(options)
    name = options.network.stem if options.network else f"digits, {options.activation}, {options.hidden}"
    for norm in options.norms:
        yield measure(task, norm, options, name)


def of_list(listed: dict[str, tuple[float, ...]], options: argparse.Namespace) -> Iterator[list[dict]]:
    """The rows of the networks of a list, norm by norm; what is done is read from pieces.json."""
    left_out = ("output", "norms", "networks", "network", "images", "data_dir", "download", "table")
    settings = {key: value for key, value in vars(options).items() if key not in left_out}
    kept = Pieces(options.output / "pieces.json", settings)
    with mlps.progress("FROWN", sum(map(len, listed.values())), "network and norm") as bar:
        for text, norms in listed.items():
            read = functools.cache(functools.partial(_task, text, options))  # only if a norm of it is left to do
            few = argparse.Namespace(**{**vars(options), "lp": 0})
            how = few if frown_networks.read(text).width > options.lp_width else options
            for norm in norms:
                bar.set_postfix_str(f"{text}, l_{norm:g}")
                yield kept.get(f"{text} {norm:g}", lambda norm=norm, how=how, read=read, text=text: [
                    finite(row) for row in measure(read(), norm, how, text)
                ])  # fmt: skip
                bar.update()


def _task(text: str, options: argparse.Namespace) -> Task:
    try:
        given = frown_networks.dataset(frown_networks.read(text).dataset, options.data_dir, download=options.download)
    except (jb.ArgumentError, ImportError) as error:
        raise SystemExit(str(error)) from None
    network = frown_networks.network(text, given, options.output / "networks", options)
    return task_of(network.apply_fn, network.params, given.images(given.test.x), given.test.labels, options)


if __name__ == "__main__":
    main()
