"""Train a certifiable network, from data to verified error: `python -m experiments.train --config FILE`.

    python -m experiments.train --config experiments/configs/digits.py --config.eps=0.05 --output results/digits

Every field of `jaxbound.training.configuration` can be changed by a flag `--config.FIELD=VALUE`. A configuration may
name several models (a family); `--config.model_subset=0,2` picks some. Each has its own folder `OUTPUT/NAME/MODEL`
(`jaxbound.training.runs`). A run that was killed is continued by the same command, to the same bits.

Several processes train one model where each runs the command with the same flags, a folder that all of them see, and
`--coordinator=HOST:PORT --processes=N --process=I` (or `--distributed` where the launcher says who is who).

The last line on standard output is JSON: for one model its result, for several also the least, median and greatest of
each error. `verified_error` is certified on the test set, in strict arithmetic, and attacked: an attack that breaks a
certificate stops the run.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import config_flags

import jaxbound as jb
from experiments import require
from jaxbound.training import configuration, runs
from jaxbound.training.configuration import Configuration


def summary(results: list[dict]) -> dict:
    """The least, median, greatest and mean error over a family."""
    rows = {}
    for key in ("clean_error", "pgd_error", "verified_error"):
        values = [result[key] for result in results]
        rows[key] = statistics.median(values)
        rows[f"{key}_min"], rows[f"{key}_max"], rows[f"{key}_mean"] = min(values), max(values), statistics.mean(values)
    same = {key: results[0][key] for key in ("name", "eps_train", "eps", "method")}
    return {**same, **rows, "models": [r["model"] for r in results], "seconds": sum(r["seconds"] for r in results)}


def main(_) -> None:
    """Train the models of a configuration and print the result."""
    require("tqdm", "orbax")
    logging.set_verbosity(logging.WARNING)  # orbax reports every save
    given = flags.FLAGS
    try:
        config = Configuration(**given.config.to_dict())
        names = runs.chosen_models(config)
    except jb.ArgumentError as error:
        raise SystemExit(str(error)) from None
    if given.coordinator or given.distributed:
        jax.distributed.initialize(given.coordinator, given.processes, given.process)
    leads = jax.process_index() == 0
    results = []
    try:
        dataset = runs.dataset_of(config, given.data_dir, download=given.download)
        for name in names:
            folder = runs.folder_of(config, given.output, name)
            results.append(runs.train_model(config, name, dataset, folder, given.stop_after))
            if leads and len(config.models) > 1:
                print(json.dumps(results[-1]), flush=True)
    except (jb.ArgumentError, ImportError) as error:
        raise SystemExit(str(error)) from None
    if leads:
        print(json.dumps(results[0] if len(results) == 1 or given.stop_after else summary(results)), flush=True)


def define_flags() -> None:
    """The command's flags; not at import, where defining one reads its default configuration."""
    default = str(Path(__file__).parent / "configs" / "digits.py")
    config_flags.DEFINE_config_file("config", default, "the configuration")
    flags.DEFINE_string("output", "results/train", "folder for checkpoints, metrics and results")
    flags.DEFINE_string("data_dir", None, "where TFDS keeps prepared data sets")
    flags.DEFINE_boolean("download", False, "fetch and prepare a missing data set (needs tensorflow)")
    flags.DEFINE_string("coordinator", None, "HOST:PORT of the first of several processes")
    flags.DEFINE_integer("processes", None, "how many there are")
    flags.DEFINE_integer("process", None, "which of them this is, from 0")
    flags.DEFINE_boolean(
        "distributed", False, "join the processes that a launcher such as Slurm's or a TPU pod's names"
    )
    flags.DEFINE_integer("stop_after", None, "train only so many steps in all, for trials; no result is written")


if __name__ == "__main__":
    define_flags()
    __doc__ = f"{__doc__}\nThe fields of --config, with the defaults of base.py:\n\n{configuration.described()}\n"
    app.run(main)
