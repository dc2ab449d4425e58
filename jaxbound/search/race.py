"""A search and an attack on one part, each in a thread, so that time is kept also while programs compile."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import jax
import jax.numpy as jnp
import numpy as np

from jaxbound._compat import default_device
from jaxbound.search.parts import Clock, Part

_GRACE = 0.5
"""Seconds past the deadline for a step that is under way."""


def decide(part: Part, key: jax.Array | None, clock: Clock, *, progress: bool | Callable[[dict], object]) -> bool:
    """Search, and attack where there is a key, until the part is decided or the time is up; whether to stop here."""
    ready, x64 = threading.Event(), jnp.result_type(float) == np.float64  # threads begin with the global settings
    device = default_device()
    part.expect_attack(key is not None)

    def search() -> None:
        with jax.enable_x64(x64), jax.default_device(device):
            try:
                part.prepare()
            finally:
                ready.set()
            part.run()

    def descend() -> None:
        ready.wait()
        with jax.enable_x64(x64), jax.default_device(device):
            if key is not None and part.attack is not None:
                part.descend(key)

    pool, shown = ThreadPoolExecutor(2), _Shown(progress)
    try:
        pending: set[Future] = {pool.submit(search), pool.submit(descend)}
        while pending and not part.decided:
            left = clock.left
            wanted = 0.5 if left is None else min(0.5, left) if left else _GRACE
            done, pending = wait(pending, wanted, FIRST_COMPLETED)
            for future in done:
                future.result()
            shown.show(part)
            if left == 0:
                break
    except KeyboardInterrupt:
        clock.stop()
    except BaseException:
        clock.stop()
        raise
    finally:
        shown.close()
        pool.shutdown(wait=False, cancel_futures=True)
    return clock.over()


class _Shown:
    """A tqdm bar on the standard error, a function that is told, or nothing."""

    def __init__(self, wanted: bool | Callable[[dict], object]):
        self.bar, self.tell = None, wanted if callable(wanted) else None
        if wanted and self.tell is None:
            try:
                from tqdm import tqdm
            except ModuleNotFoundError:
                return
            self.bar = tqdm(unit="domain", desc="verify")

    def show(self, part: Part) -> None:
        """How many domains were bounded, how many are left, and what is known so far."""
        if part.splits is None:
            return
        if self.tell is not None:
            now = {"seconds": part.clock.seconds, "nodes": part.nodes, "left": part.splits.left, "lower": part.lower}
            self.tell(now | {name: float(now[name]) for name in ("seconds", "lower")})
        if self.bar is not None:
            self.bar.set_postfix_str(f"{part.splits.left} left, margin >= {part.lower:.4g}", refresh=False)
            self.bar.update(part.nodes - self.bar.n)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self.bar is not None:
            self.bar.close()
