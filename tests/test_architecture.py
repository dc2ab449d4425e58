"""The rules that keep jaxbound easy to change: where imports point, what a file may know, how long it may be."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "jaxbound"

# From the foundation upwards: a room imports from rooms before it, and from itself if no cycle arises.
ROOMS = (
    ("errors", "_flags"),  # before _compat, which raises
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
    "jaxbound.search.passes": "one small program, whose steps share the rows that they pull",
    "jaxbound.training.losses": "the losses and the objective that adds them up; each is short, their documentation is not",
    "jaxbound.training.step": "one step, whose phases, parts of a batch and devices meet in one sum",
}
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


def _imports(module: str) -> set[str]:
    return {name for node in ast.walk(_tree(FILES[module])) for name in _imported(node, module)}


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


def _source_files() -> Iterator[Path]:
    """The project's own text files."""
    kinds = {".py", ".md", ".toml", ".cfg", ".yml", ".yaml", ".json", ".txt", ".sh", ""}
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        hidden = any(part.startswith(".") and part not in (".ci", ".gitignore", ".editorconfig") for part in parts)
        if path.is_file() and not hidden and path.suffix in kinds and not {"_build", "build", "shared"} & set(parts):
            yield path


# --- imports ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", FILES)
def test_imports_point_to_earlier_rooms(module):
    room = _room(module)
    for other in _own_imports(module):
        assert _room(other) <= room, f"{module} imports {other}, which stands after it"


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


@pytest.mark.parametrize("module", [name for name in FILES if name not in ("jaxbound._compat", "jaxbound._flags")])
def test_only_compat_knows_jax_internals(module):
    internal = re.compile(r"jax\.(extend|_src|core|interpreters)(\.|$)|jaxlib(\.|$)")
    uses = _imports(module) | {_dotted(node) for node in ast.walk(_tree(FILES[module]))}
    found = sorted(filter(internal.match, uses))
    assert not found, f"{module} uses {found}: put a name for it into _compat.py"


@pytest.mark.parametrize("module", FILES)
def test_only_network_and_after_know_flax(module):
    if _room(module) < NETWORK:
        assert "flax" not in set(map(_top, _imports(module)))


@pytest.mark.parametrize("module", FILES)
def test_importing_needs_core_dependencies_only(module):
    statements = [node for node in _tree(FILES[module]).body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {_top(name) for node in statements for name in _imported(node, module)}
    allowed = (
        CORE | {"jaxbound"} | ({"tyro"} if module == "jaxbound.cli.options" else set())
    )  # what `main` imports last
    extra = {name for name in names if name not in allowed and name not in sys.stdlib_module_names}
    assert not extra, f"{module} needs {sorted(extra)} at import: import it where it is used, and name the extra"


@pytest.mark.parametrize("module", FILES)
def test_solvers_and_data_sets_stay_in_their_rooms(module):
    names = set(map(_top, _imports(module)))
    if not module.startswith("jaxbound.methods.exact"):
        assert not names & SOLVERS, f"{module} imports a solver; only methods/exact does"
    assert not names & DATA or module.startswith("jaxbound.training"), f"{module} knows a data set"


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", FILES)
def test_file_length(module):
    length = len(FILES[module].read_text(encoding="utf-8").splitlines())
    assert (length > MOST_LINES) == (module in LONG), (
        f"{module} has {length} lines: split it, or say in LONG why it is one file; or take it from that list"
    )


def test_every_room_says_what_it_is():
    silent = [name for name, path in FILES.items() if path.name == "__init__.py" and not ast.get_docstring(_tree(path))]
    assert not silent


def test_no_file_names_a_machine_path_or_registry():
    path = re.compile(r"(?<![\w.~$)}/-])/(?:home|root|Users|tmp|work|mnt|opt)/\w")
    registry = re.compile(r"pypi\.org|pythonhosted\.org|registry\.npmjs|proxy\.golang")
    found = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for file in _source_files()
        for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if path.search(line) or registry.search(line)
    ]
    assert not found, "\n".join(found)


def test_no_global_random_state():
    found = []
    for file in _source_files():
        if file.suffix == ".py":
            names = {_dotted(node) for node in ast.walk(_tree(file)) if isinstance(node, ast.Attribute)}
            drawn = [re.match(r"(?:np|numpy)\.random\.(\w+)", name) for name in names]
            found += [f"{file.name}: {m[0]}" for m in drawn if m and m[1] not in RANDOM_OBJECTS]
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
