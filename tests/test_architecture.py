"""The rules that keep jaxbound easy to change: where imports point, what a file may know, how long it may be."""

from __future__ import annotations

import ast
import functools
import inspect
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "jaxbound"

# From the foundation upwards: a room imports from rooms before it, and from itself if no cycle arises.
ROOMS = (
    ("errors", "_flags", "_version"),  # before _compat, which raises
    ("_compat",),
    ("backend", "curvature"),
    ("regions",),
    ("graph",),
    ("relaxations",),
    ("driver",),
    ("methods",),
    ("transforms",),
    ("network",),
    ("certificates",),
    ("search", "jacobian"),
    ("training", "frontends", "plots"),
    ("_public",),
    ("",),  # jaxbound/__init__.py
    ("cli", "__main__"),
)
NETWORK = ROOMS.index(("network",))
MOST_LINES = 350
LONG = {  # files that are longer, and why
    "jaxbound.certificates.attack": "one attack; the checks of its arguments are a fifth of it",
    "jaxbound.certificates.proofs.checking": "one checker, to be read from end to end by who does not trust the search",
    "jaxbound.certificates.proofs.reading": "the primitives that the checker knows, each a few lines of NumPy",
    "jaxbound.frontends.vnnlib": "one small language, its reader and its writer",
    "jaxbound.graph.rewriting.patterns": "one table of patterns, each a few lines",
    "jaxbound.jacobian.recursion": "the recursion, how it is cut into chunks, and its steps; a third is documentation",
    "jaxbound.relaxations.enclosures.scalar": "one rule, whose questions read the same samples, borders and errors",
    "jaxbound.training.losses": "the losses and the objective that adds them up; each is short, their documentation is not",
    "jaxbound.training.step": "one step, whose phases, parts of a batch and devices meet in one sum",
}
WRITERS = {  # modules that write into an object which they may not have made, and why
    "jaxbound.backend.compilation": "JAX's own configuration, when a user asks for it",
    "jaxbound.certificates.proofs.reading": "layers of its own, while it reads them",
    "jaxbound.cli.bounding": "options, which were parsed for it",
    "jaxbound.cli.main": "how warnings look in a terminal, and what an interruption of a program does",
    "jaxbound.curvature.elementary": "arrays that it has just made",
    "jaxbound.curvature.jets": "arrays that it has just made; the decisions of cells are noted in them",
    "jaxbound.frontends.files": "a model that it has just parsed",
    "jaxbound.frontends.onnx": "a copy of the file's model",
    "jaxbound.graph.reading": "lists of the program of constants that it builds",
    "jaxbound.graph.rewriting.factors": "a rewrite that it has just made",
    "jaxbound.graph.tracing": "the builder and its values, while they become nodes",
    "jaxbound.methods.exact.solvers": "settings of a solver",
    "jaxbound.network.bounding": "the name and the documentation of functions that it makes",
    "jaxbound.training.models": "variables of Flax modules",
    "jaxbound.training.modes": "copies of Flax modules",
}
MUTATING = {"add", "append", "clear", "extend", "insert", "pop", "popitem", "remove", "setdefault", "update"}
CORE = {"jax", "jaxlib", "numpy", "flax", "optax"}
SOLVERS = {"scipy", "highspy", "clarabel", "cvxpy"}
DATA = {"tensorflow", "tensorflow_datasets", "array_record", "sklearn", "torch", "torchvision"}
RANDOM_OBJECTS = {"default_rng", "Generator", "SeedSequence", "BitGenerator", "PCG64"}

pytestmark = pytest.mark.fast


def _module(path: Path) -> str:
    """The dotted name of a file: jaxbound.relaxations.affine."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {_module(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


@functools.cache
def _nodes(path: Path) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(_tree(path)))


def _imported(node: ast.AST, module: str) -> Iterator[str]:
    """What an import statement names: modules of jaxbound by file, anything else as written."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            package = module if FILES[module].name == "__init__.py" else module.rpartition(".")[0]
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*above, *([node.module] if node.module else [])])
        for alias in node.names:
            full = f"{base}.{alias.name}"
            yield full if full in FILES or not base.startswith("jaxbound") else base


@functools.cache
def _imports(module: str) -> set[str]:
    return {name for node in _nodes(FILES[module]) for name in _imported(node, module)}


def _own_imports(module: str) -> set[str]:
    return {name for name in _imports(module) if name in FILES} - {module}


def _room(module: str) -> int:
    name = module.removeprefix("jaxbound").removeprefix(".").split(".")[0]
    for rank, room in enumerate(ROOMS):
        if name in room:
            return rank
    pytest.fail(f"{module} is in no room: add it to ROOMS in {Path(__file__).name}, where its imports allow it")


def _top(name: str) -> str:
    return name.split(".")[0]


def _dotted(node: ast.AST) -> str:
    """`a.b.c` of an attribute chain that starts at a name; "" otherwise."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


@functools.cache
def _source_files() -> tuple[Path, ...]:
    """The project's own text files."""
    kinds, found = {".py", ".md", ".toml", ".cfg", ".yml", ".yaml", ".json", ".txt", ".sh", ""}, []
    for folder, inner, names in os.walk(ROOT):  # an environment has thousands of files that need not be listed
        inner[:] = [name for name in inner if _is_own(name) and name not in ("_build", "build", "shared")]
        found += [Path(folder, name) for name in names if _is_own(name) and Path(name).suffix in kinds]
    return tuple(sorted(found))


def _is_own(name: str) -> bool:
    return not name.startswith(".") or name in (".ci", ".gitignore", ".editorconfig")


def test_loops_stay_loops():
    """Where programs are traced inline JAX unrolls loops that are not `rolled` (see `jaxbound.backend.tracing`)."""
    loops = {"scan", "fori_loop", "map", "while_loop"}
    for room in ("regions", "relaxations", "driver", "methods", "jacobian", "search"):
        for path in (ROOT / "jaxbound" / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in loops:
                    assert _dotted(node.func).split(".")[-2:][0] != "lax", f"{path}:{node.lineno}: not rolled"


# --- imports ----------------------------------------------------------------------------------------------------------


def test_imports_point_to_earlier_rooms():
    found = [(module, other) for module in FILES for other in _own_imports(module) if _room(other) > _room(module)]
    assert not found, "\n".join(f"{module} imports {other}, which stands after it" for module, other in found)


def test_no_import_cycle():
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, f"import cycle: {' -> '.join([*above[above.index(module) :], module])}"
        if module not in done:
            for other in sorted(_own_imports(module)):
                visit(other, (*above, module))
            done.add(module)

    for module in FILES:
        visit(module, ())


def test_only_compat_knows_jax_internals():
    internal = re.compile(r"jax\.(extend|_src|core|interpreters)(\.|$)|jaxlib(\.|$)")
    for module in FILES.keys() - {"jaxbound._compat", "jaxbound._flags"}:
        found = sorted(filter(internal.match, _imports(module) | {_dotted(node) for node in _nodes(FILES[module])}))
        assert not found, f"{module} uses {found}: put a name for it into _compat.py"


def test_only_network_and_after_know_flax():
    found = [module for module in FILES if _room(module) < NETWORK and "flax" in map(_top, _imports(module))]
    assert not found


def test_importing_needs_core_dependencies_only():
    for module, file in FILES.items():
        statements = [node for node in _tree(file).body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {_top(name) for node in statements for name in _imported(node, module)}
        allowed = CORE | {"jaxbound"} | ({"tyro"} if module == "jaxbound.cli.options" else set())  # imported last
        extra = {name for name in names if name not in allowed and name not in sys.stdlib_module_names}
        assert not extra, f"{module} needs {sorted(extra)} at import: import it where it is used, and name the extra"


def test_solvers_and_data_sets_stay_in_their_rooms():
    for module in FILES:
        names = set(map(_top, _imports(module)))
        if not module.startswith("jaxbound.methods.exact"):
            assert not names & SOLVERS, f"{module} imports a solver; only methods/exact does"
        assert not names & DATA or module.startswith("jaxbound.training"), f"{module} knows a data set"


# --- state -----------------------------------------------------------------------------------------------------------


def _written(node: ast.AST) -> Iterator[ast.AST]:
    """What a statement writes into: targets of assignments, and what a mutating method is called on."""
    if isinstance(node, ast.Assign):
        for target in node.targets:
            yield from target.elts if isinstance(target, ast.Tuple | ast.List) else [target]
    elif isinstance(node, ast.AugAssign):
        yield node.target
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):  # whose result is not used
        called = node.value.func
        if isinstance(called, ast.Attribute) and called.attr in MUTATING:
            yield called.value


def _foreign_writes(module: str) -> list[str]:
    """Writes into attributes of an object that is not the method's own."""
    found = []
    for target in (target for node in _nodes(FILES[module]) for target in _written(node)):
        owner, depth = target, 0
        while isinstance(owner, ast.Attribute | ast.Subscript):
            depth += isinstance(owner, ast.Attribute)
            owner = owner.value
        if isinstance(owner, ast.Name) and depth > (owner.id in ("self", "cls")):
            found.append(f"{ast.unparse(target)}")
    return [text for text in found if not text.startswith(("os.environ", "sys.path"))]


def test_no_module_writes_into_anothers_object():
    for module in FILES:
        found = _foreign_writes(module)
        assert bool(found) == (module in WRITERS), (
            f"{module} writes into {found}: return a new object or give its class a method, or say why not in WRITERS"
        )


# --- types -----------------------------------------------------------------------------------------------------------


def _parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.arg]:
    given, extra = node.args, (node.args.vararg, node.args.kwarg)
    return [*given.posonlyargs, *given.args, *given.kwonlyargs, *(each for each in extra if each)]


def test_every_parameter_is_annotated():
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    bare = [
        f"{file.relative_to(ROOT)}:{each.lineno}: {each.arg}"
        for file in FILES.values()
        for node in _nodes(file)
        if isinstance(node, functions)
        for each in _parameters(node)
        if each.annotation is None and each.arg not in ("self", "cls")
    ]
    assert not bare, "these parameters have no annotation:\n" + "\n".join(bare)


# --- files ------------------------------------------------------------------------------------------------------------


def test_file_length():
    lengths = {module: len(file.read_text(encoding="utf-8").splitlines()) for module, file in FILES.items()}
    wrong = {module: length for module, length in lengths.items() if (length > MOST_LINES) != (module in LONG)}
    assert not wrong, f"split these, or say in LONG why each is one file; or take them from that list: {wrong}"


def test_every_room_says_what_it_is():
    silent = [name for name, path in FILES.items() if path.name == "__init__.py" and not ast.get_docstring(_tree(path))]
    assert not silent


def test_no_file_names_a_machine_path_or_registry():
    path = re.compile(r"/(?<![\w.~$)}/-]/)(?:home|root|Users|tmp|work|mnt|opt)/\w")  # begins with what is rare
    registry = re.compile(r"pypi\.org|pythonhosted\.org|registry\.npmjs|proxy\.golang")
    found = []
    for file in _source_files():
        text = file.read_text(encoding="utf-8", errors="replace")
        for match in [*path.finditer(text), *registry.finditer(text)]:
            line = text.count("\n", 0, match.start()) + 1
            found.append(f"{file.relative_to(ROOT)}:{line}: {match[0]}")
    assert not found, "\n".join(found)


def test_no_global_random_state():
    found = []
    for file in _source_files():
        if file.suffix == ".py" and file != Path(__file__):
            drawn = re.finditer(r"\b(?:np|numpy)\.random\.(\w+)", file.read_text(encoding="utf-8"))
            found += [f"{file.name}: {match[0]}" for match in drawn if match[1] not in RANDOM_OBJECTS]
    assert not found, f"pass a generator or a key instead: {found}"


# --- the public face --------------------------------------------------------------------------------------------------


def _public_names() -> list[str]:
    package = FILES.get("jaxbound")
    for node in _tree(package).body if package else []:
        if isinstance(node, ast.Assign) and any(getattr(target, "id", "") == "__all__" for target in node.targets):
            return ast.literal_eval(node.value)
    return []


@pytest.mark.parametrize("name", _public_names())
def test_public_names_are_documented(name):
    import jaxbound

    public = getattr(jaxbound, name)
    if not (inspect.isclass(public) or inspect.isroutine(public)):
        pytest.skip(f"{name} is data")
    text = public.__doc__ or ""
    assert text.strip(), f"{name} has no docstring"
    assert not text.startswith(f"{name}("), f"{name} has only the docstring that dataclasses write"
    if not (inspect.isclass(public) and issubclass(public, BaseException | Warning)):
        assert ">>>" in text or "Reference" in text, f"{name} shows no example and names no reference"
