"""The experiments on Jacobians: one small network trained, looked at by all of them, and what they write."""

from __future__ import annotations

import contextlib
import csv
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbound as jb
from experiments import landscape, lipschitz, mlps, reference_recurjac, robustness, tables, train_mlp
from jaxbound.training import data


def run(main, *arguments) -> list[str]:
    """What a command prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        main([str(argument) for argument in arguments])
    return printed.getvalue().splitlines()


def written(path) -> list[dict]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A network of `python -m experiments.train_mlp --smoke` and what that printed."""
    path = tmp_path_factory.mktemp("networks") / "deep" / "small"
    flags = "--smoke --depth 3 --width 6 --activation leaky_relu --leaky_slope 0.2 --dropout 0.2 --gradient_weight 0.01"
    return path, json.loads(run(train_mlp.main, *flags.split(), "--weight_decay", 0.1, "--output", path)[-1])


def checked(folder, name, lines, count) -> list[dict]:
    """The rows of the CSV, after a look at the table, the plot and the JSON."""
    rows = written(folder / f"{name}.csv")
    table = (folder / f"{name}.md").read_text(encoding="utf-8").splitlines()
    assert table == lines[-1 - len(table) : -1] and len(table) == 2 + len(rows) == 2 + count
    assert all(line.count("|") == table[0].count("|") for line in table)
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert len(json.loads(lines[-1])["rows"]) == count
    return rows


# --- training ---------------------------------------------------------------------------------------------------------


def test_a_trained_network_is_stored_as_it_was_trained(trained):
    path, record = trained
    assert record["file"] == str(path.with_suffix(".npz"))
    network, digits = mlps.load(path), data.load("digits")
    x = digits.images(digits.test.x)
    settings = train_mlp.Settings((6, 6), "leaky_relu", 0.2, dropout=0.5)
    own = train_mlp.forward(network.params, jnp.asarray(x[:20]), settings, None)
    np.testing.assert_allclose(network.logits(x[:20]), own, atol=1e-5)
    error = np.mean(network.logits(x).argmax(axis=1) != digits.test.labels)
    assert record["test_error"] == pytest.approx(error, abs=1e-3)
    described = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert [layer["type"] for layer in described["layers"]] == ["flatten", "dense", "leaky_relu_0.2", "dense", "leaky_relu_0.2", "dense"]  # fmt: skip
    assert described["training"]["weight_decay"] == 0.1 and described["training"]["hidden"] == [6, 6]


def test_the_loss_is_what_it_says():
    draw = np.random.default_rng(0)
    settings = train_mlp.Settings((5,), "tanh", gradient_weight=2.0)
    params = train_mlp.initial((4, 5, 3), 0)
    x, labels, key = jnp.asarray(draw.random((3, 4)), jnp.float32), np.array([0, 1, 2]), jax.random.key(0)

    def natural(x, label):
        logits = train_mlp.forward(params, x[None], settings, None)[0]
        return optax.softmax_cross_entropy_with_integer_labels(logits, label)

    values, slopes = jax.vmap(jax.value_and_grad(natural))(x, labels)
    expected = values + 2 * jnp.sum(slopes**2, axis=1)
    found = [train_mlp.loss(params, x, labels, jnp.array(w), 0.0, key, settings) for w in ([1.0, 1, 1], [1.0, 1, 0])]
    np.testing.assert_allclose(found, [expected.mean(), expected[:2].mean()], rtol=1e-5)
    kept = train_mlp.forward(params, jnp.ones((2000, 4)), train_mlp.Settings((5,), "tanh", dropout=0.4), key)
    plain = train_mlp.forward(params, jnp.ones((1, 4)), settings, None)
    assert np.abs(kept.mean(axis=0) - plain[0]).max() < 0.15 and kept.std(axis=0).min() > 0.01


@pytest.mark.slow
def test_adversarial_training_resists_more(tmp_path):
    """On the same images the attack succeeds less often, and certified radii are larger."""
    lines = run(robustness.main, "--count", 10, "--epochs", 15, "--targets", "runner-up", "--layer_bounds", "crown",
                "spectral", "--jacobian", "recurjac", "fastlip", "--integral_steps", 4, "--output", tmp_path)  # fmt: skip
    rows = {(r["network"], r["layers"], r["jacobian"]): float(r["radius"]) for r in checked(tmp_path, "robustness", lines, 6)}  # fmt: skip
    for layers, jacobian in (("crown", "recurjac"), ("crown", "fastlip")):
        assert rows["adversarial", layers, jacobian] > 1.2 * rows["undefended", layers, jacobian]
    for name in ("undefended", "adversarial"):
        assert rows[name, "crown", "recurjac"] > rows[name, "crown", "fastlip"] > rows[name, "spectral", "disable"] > 0


# --- the experiments --------------------------------------------------------------------------------------------------


def test_lipschitz_constants_grow_from_the_gradient_to_the_global_one(trained, tmp_path):
    lines = run(lipschitz.main, "--smoke", "--networks", trained[0], "--target", 3, "--output", tmp_path)
    rows = checked(tmp_path, "lipschitz", lines, 10)
    constants = {m: np.array([float(r["constant"]) for r in rows if r["method"] == m]) for m in ("recurjac", "fastlip")}
    assert [float(row["radius"]) for row in rows[:5]] == pytest.approx([0, 1e-3, 10**-1.5, 1, np.inf])
    assert all(np.all(np.diff(values) >= -1e-3) for values in constants.values())
    assert np.all(constants["recurjac"] <= constants["fastlip"] * 1.0001)
    assert np.all(constants["fastlip"] <= float(rows[0]["product"]) * 1.0001)
    network, digits = mlps.load(trained[0]), data.load("digits")
    x = digits.images(digits.test.x)
    chosen = x[(digits.test.labels == 3) & (network.logits(x).argmax(axis=1) == 3)][:2]
    gradient = jax.vmap(jax.grad(lambda image: network.apply_fn(network.params, image[None])[0, 3]))(chosen)
    assert constants["recurjac"][0] == pytest.approx(np.abs(gradient).reshape(len(chosen), -1).sum(1).mean(), rel=1e-3)


def test_landscapes_of_given_networks(trained, tmp_path):
    lines = run(landscape.main, "--smoke", "--networks", trained[0], "--target", 3, "--constants", 3, "--output", tmp_path)  # fmt: skip
    (row,) = checked(tmp_path, "landscape", lines, 1)
    assert (row["network"], row["layers"], row["norm"]) == ("small", "3", "2")
    assert 0 < float(row["least"]) <= float(row["radius"]) <= landscape.LIMITS[2.0]
    assert 0 < float(row["constant"]) <= 1.01 * float(row["product"]) and float(row["endless"]) in (0, 0.5, 1)
    constants = [float(part) for part in row["constants"].split()]
    assert len(constants) == 3 and constants[-1] == pytest.approx(float(row["constant"]), rel=1e-5)
    assert np.all(np.diff(constants) >= -1e-3)


def test_robustness_of_a_given_network(trained, tmp_path):
    lines = run(robustness.main, "--smoke", "--networks", trained[0], "--jacobian", "recurjac", "fastlip", "--output", tmp_path)  # fmt: skip
    rows = checked(tmp_path, "robustness", lines, 2)
    recurjac, fastlip = (float(row["radius"]) for row in rows)
    assert 0 < fastlip <= recurjac < float(rows[0]["pgd_radius"])
    images = written(tmp_path / "robustness_images.csv")
    assert len(images) == 4 and images[0]["image"] == images[2]["image"]
    assert np.mean([float(row["radius"]) for row in images[:2]]) == pytest.approx(recurjac)
    assert lines[0].startswith("network=small target=runner-up layers=crown jacobian=recurjac image=")


@pytest.mark.slow
@pytest.mark.parametrize("experiment", [lipschitz, landscape, robustness])
def test_networks_are_trained_where_none_are_given(experiment, tmp_path):
    lines = run(experiment.main, "--smoke", "--output", tmp_path)
    name = experiment.__name__.rpartition(".")[2]
    rows = checked(tmp_path, name, lines, len(written(tmp_path / f"{name}.csv")))
    for path in tmp_path.glob("*.npz"):
        assert mlps.load(path).params
    assert len(list(tmp_path.glob("*.npz"))) == len({row["network"] for row in rows})


# --- pieces -----------------------------------------------------------------------------------------------------------


def test_methods_by_their_names():
    layers = jb.FastLin()
    assert robustness.jacobian_method("recurjac-forward-shift", layers) == jb.RecurJac("forward", 1, layers)
    assert robustness.jacobian_method("fastlip", layers) == jb.FastLip(layers)
    assert robustness.method_of("interval", "disable", 3) == jb.IBP()
    assert robustness.method_of("crown", "recurjac", 3) == jb.LipschitzIntegral(jb.RecurJac(), 3)


def test_spectral_radii_are_margins_over_products():
    """f = 2 x through one layer: f_0 - f_1 has the l_inf constant 4, and the margin at x is 2 (x_0 - x_1)."""
    params = {"dense0": {"kernel": 2 * np.eye(2, dtype=np.float32), "bias": np.zeros(2, np.float32)}}
    network = mlps.Network("linear", mlps.stored(0, "relu"), params)
    found = robustness.spectral_radii(network, np.array([[0.9, 0.5]], np.float32), np.array([[0, 1]]), np.inf)
    assert 0.19 < found[0] <= 0.2


def test_a_class_is_a_target():
    images = mlps.Images(np.zeros((2, 4)), np.array([1, 2]), np.array([5, 9]))
    assert robustness.targets_of(np.zeros((2, 3)), images, "2", 0).tolist() == [[1, 2], [2, 2]]


def test_plots_of_a_run_under_way(tmp_path):
    rows = [{"network": network, "target": target, "layers": "crown", "jacobian": jacobian, "radius": 0.1}
            for network, target in (("a", "random"), ("a", "all"), ("b", "random")) for jacobian in ("recurjac", "disable")]  # fmt: skip
    robustness.draw(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_radii_are_evenly_or_logarithmically_spaced():
    even = lipschitz.radii_of(lipschitz.parse(["--steps", "2", "--eps", "0.5", "--log_start", "0", "--log_end", "0"]))
    assert even.tolist() == [0, 0.25, 0.5, np.inf]
    assert lipschitz.radii_of(lipschitz.parse([]))[[1, -2]] == pytest.approx([1e-3, 1])


def test_refusals_come_before_any_work(capsys, tmp_path):
    for main, arguments, text in (
        (train_mlp.main, ["--dropout", "1"], "--dropout is in [0, 1)"),
        (train_mlp.main, ["--depth", "0"], "--depth is 1 or more"),
        (robustness.main, ["--targets", "best"], "--targets are runner-up"),
        (lipschitz.main, ["--eps", "0"], "--eps above 0"),
        (landscape.main, ["--count", "0"], "--count, --steps"),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert text in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"there is no file absent\.npz in "):
        robustness.main(["--networks", str(tmp_path / "absent")])


def test_tables(tmp_path):
    rows = [{"a": 1, "b": float("inf")}]
    text = tables.save(tmp_path / "new", "found", rows, {"a": ("first", "{}"), "b": ("second", "{:.1f}")}, lambda rows, path: path.touch())  # fmt: skip
    assert text.splitlines()[2] == "| 1 | inf |" and tables.finite(rows[0]) == {"a": 1}
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["found.csv", "found.md", "found.png"]


def test_arrays_of_another_code_are_compared(tmp_path, capsys):
    """Our own bounds pass, narrower ones do not, and a folder without arrays says so."""
    with pytest.raises(SystemExit, match=r"there is no recurjac_\*\.npz"):
        reference_recurjac.main([str(tmp_path)])
    rng = np.random.default_rng(0)
    layers = [(rng.normal(size=shape).astype(np.float32), np.zeros(shape[1], np.float32)) for shape in ((3, 6), (6, 2))]
    arrays = {f"tiny|{kind}{k}": part for k, layer in enumerate(layers) for kind, part in zip("Wb", layer, strict=True)}
    x = np.array([0.5, -0.5, 1.0], np.float32)
    label = int(np.argmax(np.maximum(x @ layers[0][0], 0) @ layers[1][0]))
    bounds = jb.jacobian_bounds(layers, x[None], 0.1, activation="relu")
    case = "tiny|fastlin|pinf|eps0.1|recurjac-B"
    constants = jb.lipschitz(layers, x[None], 0.1, activation="relu")[0, label]
    for share, code in ((1.0, 0), (0.9, 1)):
        middle, half = (np.asarray(each)[0] for each in (bounds.center, share * bounds.width / 2))
        np.savez(
            tmp_path / "recurjac_relu.npz", **arrays, **{"tiny|x0": x, "tiny|c": label},
            **{f"{case}|jac_lb": middle - half, f"{case}|jac_ub": middle + half, f"{case}|lip_class_c": constants},
        )  # fmt: skip
        with pytest.raises(SystemExit) as ended:
            reference_recurjac.main([str(tmp_path), "--samples", "200"])
        assert ended.value.code == code
        assert f"2 comparisons, {code} lines worse" in capsys.readouterr().out
