"""From arguments to an exit code: 0 verified or done, 10 falsified, 20 unknown, 2 bad input, 1 jaxbound is wrong.

Interrupted from the keyboard, a program ends at once, with 130: what it keeps is on disk at any time. An exception
would be lost where Python or a package ignores it, as in callbacks of the garbage collector. `interruptible` is for
waiting on what returns the best that is known.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO, Union

import jaxbound
from jaxbound import errors

if TYPE_CHECKING:
    from jaxbound.cli.options import Options

VERIFIED, WRONG, BAD_INPUT, FALSIFIED, UNKNOWN, INTERRUPTED = 0, 1, 2, 10, 20, 130
DESCRIPTION = f"""Guaranteed bounds for neural networks (jaxbound {jaxbound.__version__}).

Exit codes: 0 verified or done, 10 falsified, 20 unknown, 2 bad input."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line, and return its exit code.

    Args:
        arguments: without the program's name; None for those of the process.

    >>> main(["certify", "nothing.onnx", "digits", "--eps", "0.1"])  # and a line on standard error
    2
    """
    started = time.monotonic()
    with warnings.catch_warnings():
        warnings.showwarning = _shown
        try:
            options = _parsed(arguments)
            options.check()
            return _work(options, started)
        except SystemExit as end:  # of the parser: help, or arguments that it refuses
            return int(end.code or 0)
        except KeyboardInterrupt:
            return INTERRUPTED
        except (errors.SoundnessError, errors.MiscompilationError) as fault:
            return complain(fault, WRONG)
        except (errors.JaxboundError, ImportError, OSError) as fault:
            return complain(fault, BAD_INPUT)


def run() -> None:
    """The program `jaxbound`."""
    program(main)


def program(work: Callable[[], int]) -> None:
    """Run a command line, and end the process with its exit code."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # and not where a shell has it ignored
        signal.signal(signal.SIGINT, _stop)
    leave(work())


def _stop(*_: Any) -> None:
    os.write(2, b"\njaxbound: interrupted\n")
    os._exit(INTERRUPTED)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Within, an interruption of a program is a `KeyboardInterrupt`."""
    if signal.getsignal(signal.SIGINT) is not _stop:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, _stop)


def leave(code: int) -> None:
    """End the process."""
    sys.stdout.flush()
    sys.stderr.flush()
    if any(thread is not threading.main_thread() and not thread.daemon for thread in threading.enumerate()):
        os._exit(code)  # a program that compiles or runs past the time limit is not waited for
    sys.exit(code)


def _parsed(arguments: Sequence[str] | None) -> Options:
    try:
        import tyro
    except ModuleNotFoundError as missing:
        raise ImportError("the command needs tyro: pip install 'jaxbound[cli]'") from missing
    from jaxbound.cli.options import COMMANDS

    kinds = [Annotated[kind, tyro.conf.subcommand(name, prefix_name=False)] for name, kind in COMMANDS.items()]
    union: Any = Union[tuple(kinds)]  # noqa: UP007 - made at run time
    config = (tyro.conf.OmitSubcommandPrefixes,)
    given = None if arguments is None else list(arguments)
    return tyro.cli(union, args=given, prog="jaxbound", description=DESCRIPTION, config=config)


def _work(options: Options, started: float) -> int:
    """Do it, with compiled programs kept and numbers of the size that was asked for."""
    import jax

    logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax reports every save, TFDS what it would have otherwise
    keep_programs(options.cache)
    module, _, function = options.command.partition(":")
    with jax.enable_x64(True) if options.x64 else contextlib.nullcontext():
        return getattr(importlib.import_module(module), function)(options, started)


def keep_programs(folder: str) -> None:
    """Keep compiled programs in a folder, or the user's own, "default"; unless "off", or JAX keeps them already."""
    if folder == "off" or os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    from jaxbound.backend.compilation import compilation_cache

    if folder != "default":
        compilation_cache(folder)
        return
    try:
        compilation_cache(default_cache())
    except OSError as fault:  # a home that cannot be written to
        print(f"jaxbound: compiled programs are not kept ({fault})", file=sys.stderr)


def default_cache() -> Path:
    """The user's folder for compiled programs."""
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "jaxbound"


def complain(fault: Exception, code: int) -> int:
    """Say what went wrong in one line, and return the exit code."""
    lines = fault.refusals if isinstance(fault, errors.UnsupportedError) else str(fault).splitlines()
    print(f"jaxbound: {'; '.join(line for line in lines if line.strip())}", file=sys.stderr)
    return code


def _shown(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    print(f"jaxbound: {message}", file=sys.stderr)
