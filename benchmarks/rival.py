"""auto_LiRPA on the same tasks, in a process of its own: `python rival.py CHECKOUT TASK.npz` answers with times.

It needs PyTorch and a checkout of auto_LiRPA, and nothing of JAX or of jaxbound. `TASK.npz` (see `tasks.Task.arrays`)
holds the layers in order (`kernel0`, `bias0`, ...; convolutions as (height, width, in, out) beside `stride0`), batches
of images, the method and the radius. Every line that comes in is the number of a batch; the answer is a line of JSON
with the seconds of that call and the lower bounds.
"""

from __future__ import annotations

import json
import sys
import time
import warnings

import numpy as np

METHODS = {"ibp": "IBP", "crown_ibp": "CROWN-IBP", "crown": "CROWN", "frown20": "CROWN-Optimized"}
"""What its methods are called there."""
OPTIONS = {"optimize_bound_args": {"iteration": 20, "fix_interm_bounds": False}}
"""Tuning as `Frown(steps=20)` does it: the slopes of every layer's passes. All else is its default."""


def main(checkout: str, task: str) -> None:
    """Answer until no more numbers come."""
    warnings.simplefilter("ignore")
    sys.path.insert(0, checkout)
    run = _task(np.load(task))
    for line in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        bounds = run(int(line))
        seconds = time.perf_counter() - wall, time.process_time() - cpu
        print(json.dumps({"wall_seconds": seconds[0], "cpu_seconds": seconds[1], "bounds": bounds}), flush=True)


def _task(arrays):
    import torch
    from auto_LiRPA import BoundedModule, BoundedTensor, PerturbationLpNorm

    batches = arrays["images"]
    shape, radius = batches.shape[1:], float(arrays["radius"])
    if len(shape) == 4:
        batches = np.ascontiguousarray(np.moveaxis(batches, -1, 2))
    kind = str(arrays["method"])
    training, method = kind.startswith("train_"), METHODS[kind.removeprefix("train_").removeprefix("jit_")]
    bounded = BoundedModule(_network(torch, arrays, shape), torch.zeros(batches.shape[1:]), bound_opts=OPTIONS)
    classes = len(arrays[f"bias{int(arrays['layers']) - 1}"])
    labels = torch.zeros(shape[0], dtype=torch.long)
    margins = torch.eye(classes)[:1] - torch.eye(classes)[1:]
    spec = margins.expand(shape[0], -1, -1)
    optimizer = torch.optim.SGD(bounded.parameters(), lr=0.1)

    def lower(x, name: str):
        ball = BoundedTensor(x, PerturbationLpNorm(norm=np.inf, eps=radius))
        return bounded.compute_bounds(x=(ball,), C=spec, method=name, bound_upper=False)[0]

    def bound(number: int):
        with torch.set_grad_enabled(method == "CROWN-Optimized"):
            return lower(torch.from_numpy(batches[number]), method).detach().tolist()

    def step(number: int):
        """Cross-entropy at the mean of the two bounds and the logits beside it, as the other side's step has them."""
        x = torch.from_numpy(batches[number])
        bounded(x)
        by_interval = lower(x, "IBP")  # whose ends of the hidden layers the pass takes, as in its own examples
        by_pass = bounded.compute_bounds(C=spec, method="backward", bound_upper=False)[0]
        logits = torch.cat([torch.zeros(shape[0], 1), -(by_pass + by_interval) / 2], dim=1)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits, labels).backward()
        optimizer.step()
        return []

    return step if training else bound


def _network(torch, arrays, shape):
    """Channels come first there, so the rows of the first Dense kernel after convolutions are put in that order."""
    layers, after_convolution = [], False
    side = tuple(shape[1:])
    for k in range(int(arrays["layers"])):
        kernel, bias = arrays[f"kernel{k}"], arrays[f"bias{k}"]
        if kernel.ndim == 4:
            stride = int(arrays[f"stride{k}"])
            layer = torch.nn.Conv2d(kernel.shape[2], kernel.shape[3], kernel.shape[:2], stride)
            weight = kernel.transpose(3, 2, 0, 1)
            side = (*((n - m) // stride + 1 for n, m in zip(side, kernel.shape[:2], strict=False)), kernel.shape[3])
            after_convolution = True
        else:
            if after_convolution:
                layers.append(torch.nn.Flatten())
                kernel = kernel.reshape(*side, -1).transpose(2, 0, 1, 3).reshape(kernel.shape)
                after_convolution = False
            layer, weight = torch.nn.Linear(*kernel.shape), kernel.T
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(np.ascontiguousarray(weight)))
            layer.bias.copy_(torch.from_numpy(bias))
        layers += [layer, torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1])


if __name__ == "__main__":
    main(*sys.argv[1:])
