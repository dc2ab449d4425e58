"""Every subcommand as a dataclass of its options, from which tyro makes the command line; it knows no JAX.

`check` refuses what can be seen to be wrong before anything heavy is imported.
"""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from tyro.conf import OmitArgPrefixes, Positional, arg

from jaxbound import errors
from jaxbound.training.configuration import Configuration, MethodName, Slope, digits

FILES = (".onnx", ".onnx.gz", ".keras", ".h5")
"""Endings of network files."""


def _positive(name: str, value: float) -> None:
    if not value >= 0:
        raise errors.argument(name, f"is {value!r}", "pass a number of 0 or more")


def _check_place(name: str, path: str) -> None:
    """Refuse a file that cannot be written, before the work that it is for."""
    folder = os.path.dirname(path) or "."
    if os.path.isdir(path) or not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise errors.argument(name, f"{path!r} cannot be written", "pass a file in a folder that is there")


def _check_figure(path: str) -> None:
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ModuleNotFoundError as missing:
        raise errors.argument("plot", "needs matplotlib", "pip install 'jaxbound[plot]'") from missing
    kinds = FigureCanvasBase.get_supported_filetypes()
    if os.path.splitext(path)[1].removeprefix(".").lower() not in kinds:
        raise errors.argument("plot", f"is {path!r}", f"pass a file that ends in one of {', '.join(sorted(kinds))}")


def _check_network(net: str) -> None:
    if net.endswith(FILES) or os.sep in net:
        _check_there("net", net)
    elif not Path(net).is_dir() and ":" not in net:
        way_out = f"pass a file ({', '.join(FILES)}), the folder of a run, or module:attribute"
        raise errors.argument("net", f"is {net!r}", way_out)


def _check_there(name: str, path: str) -> None:
    if not Path(path).exists():
        raise errors.argument(name, f"{path!r} is not there")


@dataclasses.dataclass(kw_only=True)
class Options:
    """What every subcommand takes."""

    command: ClassVar[str]
    """module:function of what it does."""

    json: bool = False
    """print one JSON object; numbers that are not finite are the strings inf, -inf and nan"""
    cache: str = dataclasses.field(default_factory=lambda: os.environ.get("JAXBOUND_CACHE", "default"))
    """folder for compiled programs: default (the user's own), off, or a path; JAXBOUND_CACHE sets the default"""
    x64: bool = False
    """compute in float64"""

    def check(self) -> None:
        """Refuse what is wrong whatever the network is."""
        for name in (
            "count", "batch_size", "steps", "step_size", "restarts", "pgd_steps", "max_nodes", "timeout", "tolerance",
        ):  # fmt: skip
            _positive(name, getattr(self, name, None) or 0)
        for name in ("plot", "results"):
            if path := getattr(self, name, None):
                _check_place(name, path)
        if plot := getattr(self, "plot", None):
            _check_figure(plot)


@dataclasses.dataclass(kw_only=True)
class Choices:
    """What there is to choose in many methods."""

    lower_slope: Slope = ""
    """of lines below: adaptive, parallel (same-slope), zero (zero-lb) or one (one-lb); by default the method's own"""
    intersect: bool = True
    """keep what interval arithmetic says where it is tighter"""


@dataclasses.dataclass(kw_only=True)
class Bounding(Choices):
    """How to bound."""

    method: MethodName = "crown"
    """how to bound"""


@dataclasses.dataclass(kw_only=True)
class OnNetwork(Options):
    """What is about a network."""

    net: Positional[Annotated[str, arg(metavar="NET")]]
    """an ONNX file, a Keras file, the folder of a training run, or module:attribute"""

    def check(self) -> None:
        """The network is there."""
        super().check()
        _check_network(self.net)


@dataclasses.dataclass(kw_only=True)
class OnData(OnNetwork):
    """What is about a network at examples."""

    data: Positional[Annotated[str, arg(metavar="DATA")]] = ""
    """an .npz file with x and labels, a folder with a folder of images per class, digits, mnist, fashion_mnist,
    cifar10, svhn, sklearn:NAME, or module:attribute; a training run has its own test set"""
    count: int = 0
    """the first so many examples; 0 for all"""
    data_dir: str | None = None
    """where TFDS keeps prepared data sets"""
    batch_size: int = 0
    """examples at once; 0 for an automatic choice"""
    norm: float = math.inf
    """p of the balls around examples, 1 or more"""
    clip: tuple[float, float] | None = None
    """the range of valid inputs, such as 0 1; a training run has its own"""

    def check(self) -> None:
        """Numbers are in their ranges, and files are there."""
        super().check()
        if not self.norm >= 1:
            raise errors.argument("norm", f"is {self.norm}", "pass p >= 1, or inf")
        if self.clip is not None and not self.clip[0] <= self.clip[1]:
            raise errors.argument("clip", f"is {self.clip}", "pass the lower end first")
        if self.data.endswith(".npz") or os.sep in self.data:
            _check_there("data", self.data)


@dataclasses.dataclass(kw_only=True)
class OnBalls(Bounding, OnData):
    """What is about a network over balls."""

    eps: float
    """radius of the balls"""

    def check(self) -> None:
        """The radius is one."""
        super().check()
        _positive("eps", self.eps)


@dataclasses.dataclass(kw_only=True)
class Bounds(OnBalls):
    """Guaranteed bounds of every output over a ball around every example."""

    command = "jaxbound.cli.bounding:bounds"
    plot: str | None = None
    """an image file for the bounds of the first example"""


@dataclasses.dataclass(kw_only=True)
class Certify(OnBalls):
    """Which examples keep their class over a ball.

    Exit code 0 if all are verified, 10 if the network gets one wrong as it is, else 20.
    """

    command = "jaxbound.cli.bounding:certify"
    results: str | None = None
    """file for partial results, from which a run that was killed goes on"""


@dataclasses.dataclass(kw_only=True)
class Radius(Bounding, OnData):
    """The largest certified radius around every example."""

    command = "jaxbound.cli.bounding:radius"
    steps: int = 30
    """the most radii to try per example"""
    initial: float = 0.05
    """the first one"""
    tolerance: float = 1e-3
    """relative width of a bracket that is narrow enough"""
    plot: str | None = None
    """an image file for the histogram of radii"""


@dataclasses.dataclass(kw_only=True)
class Lipschitz(OnData):
    """Local Lipschitz constants around every example, from above; over everything with --eps inf."""

    command = "jaxbound.cli.bounding:lipschitz"
    eps: float
    """radius of the balls"""
    of: Literal["outputs", "margins", "map"] = "outputs"
    """constants of each output, of margins of the predicted class, or of all outputs together"""
    method: Literal["recurjac", "fastlip", "ibp", "crown"] = "recurjac"
    """how to bound the Jacobian"""

    def check(self) -> None:
        """The radius is one."""
        super().check()
        _positive("eps", self.eps)


@dataclasses.dataclass(kw_only=True)
class Explain(Bounding, OnNetwork):
    """What bounding a network would do: nodes, rules and refusals. Exit code 0 if it can be bounded, else 20."""

    command = "jaxbound.cli.bounding:explain"
    input_shape: tuple[int, ...] = ()
    """of one example, where the network does not say it"""


@dataclasses.dataclass(kw_only=True)
class Attack(OnData):
    """Look for wrong predictions in balls by PGD. Exit code 10 if one was found, else 20."""

    command = "jaxbound.cli.bounding:attack"
    eps: float
    """radius of the balls"""
    steps: int = 40
    """gradient steps per start"""
    restarts: int = 1
    """starts: the example itself, then random points"""
    step_size: float = 0.0
    """length of a step; 0 for 2.5 eps / steps"""
    seed: int = 0
    """of random starts"""

    def check(self) -> None:
        """The radius is one."""
        super().check()
        _positive("eps", self.eps)


@dataclasses.dataclass(kw_only=True)
class Verify(OnNetwork):
    """Decide a property by branch and bound. Exit code: 0 verified, 10 falsified, 20 unknown."""

    command = "jaxbound.cli.verifying:verify"
    property: Positional[Annotated[str, arg(metavar="PROPERTY")]]
    """a VNN-LIB file, plain or gzipped"""
    timeout: float | None = None
    """seconds from the start of the command, loading and compiling included; None for no limit"""
    split: Literal["auto", "relu", "input"] = "auto"
    """what a search splits"""
    steps: int = 20
    """gradient steps that tune the bounds of every domain"""
    max_nodes: int | None = None
    """the most domains to bound"""
    attack: bool = True
    """look for counterexamples"""
    seed: int = 0
    """of the attack"""
    input_shape: tuple[int, ...] = ()
    """of one example, where the network does not say it"""
    certificate: str | None = None
    """a file to write what was verified to, so that it can be checked"""
    results: str | None = None
    """a file to write in the verification competition's format: sat with a counterexample, unsat, timeout, unknown,
    error"""
    plot: str | None = None
    """an image file for the search's progress"""

    def check(self) -> None:
        """The property is there, and the certificate can be written."""
        super().check()
        _check_there("property", self.property)
        if self.certificate:
            _check_place("certificate", self.certificate)


@dataclasses.dataclass(kw_only=True)
class Check(Options):
    """Check a certificate of `verify` on an independent path. Exit code 0 if it proves what it says, else 20."""

    command = "jaxbound.cli.verifying:check"
    certificate: Positional[Annotated[str, arg(metavar="CERTIFICATE")]]
    """the file that `verify --certificate` wrote"""
    net: Positional[Annotated[str, arg(metavar="NET")]]
    """the network, as for verify"""
    property: Positional[Annotated[str, arg(metavar="PROPERTY")]] = ""
    """a VNN-LIB file that the certificate must be about; without it the certificate may be about anything"""
    input_shape: tuple[int, ...] = ()
    """of one example, where the network does not say it"""

    def check(self) -> None:
        """The files are there."""
        super().check()
        _check_network(self.net)
        _check_there("certificate", self.certificate)
        if self.property:
            _check_there("property", self.property)


@dataclasses.dataclass(kw_only=True)
class Train(Options):
    """Train a network that can be certified, from data to a verified error; a run that was killed goes on."""

    command = "jaxbound.cli.training:train"
    config: OmitArgPrefixes[Configuration] = dataclasses.field(default_factory=digits)
    output: str = "results/train"
    """folder for runs; each has its own, OUTPUT/NAME/MODEL"""
    data_dir: str | None = None
    """where TFDS keeps prepared data sets"""
    download: bool = False
    """fetch and prepare a missing data set (needs tensorflow)"""
    stop_after: int | None = None
    """train only so many steps in all, for trials; no result is written"""


@dataclasses.dataclass(kw_only=True)
class Evaluate(Choices, OnData):
    """Clean, PGD and verified error, for every radius and method."""

    command = "jaxbound.cli.training:evaluate"
    eps: tuple[float, ...] = ()
    """radii; a training run has its own"""
    method: tuple[MethodName, ...] = ()
    """how to certify; a training run has its own, else crown"""
    pgd_steps: int = 200
    """of the attack"""
    seed: int = 0
    """of the attack"""


COMMANDS: dict[str, type[Options]] = {
    "bounds": Bounds,
    "certify": Certify,
    "radius": Radius,
    "lipschitz": Lipschitz,
    "verify": Verify,
    "check": Check,
    "explain": Explain,
    "train": Train,
    "evaluate": Evaluate,
    "attack": Attack,
}
"""The subcommands by name."""
