"""How a training script runs: parse, check, build, fit; whatever ends it ends in one line.

Exit codes: 0 trained, 1 numbers that are not finite, a disk that takes no more or another process
that ended, 2 a person's mistake, 130 stopped.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn, TypeVar

from torch import nn

from ldm_pipeline.data.writing import in_one_line
from ldm_pipeline.errors import UserError
from ldm_pipeline.processes.lock import alone_in, check_folder, check_writable
from ldm_pipeline.processes.ranks import Ranks, launched, leave
from ldm_pipeline.processes.start import start_the_others
from ldm_pipeline.too_large import in_memory
from ldm_pipeline.training.config import TrainingConfig, parse
from ldm_pipeline.training.engine import Interrupted, check, fit
from ldm_pipeline.training.signals import on_signals

Config = TypeVar("Config", bound=TrainingConfig)


def launch(config: type[Config], objective: Callable[[Config], nn.Module]) -> None:
    """Train `objective` with the configuration on the command line and say where the model is."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        settings = parse(config)
        start_the_others(share_cores=True)
        check_writable(settings.run.out, "run.out")
        for place, name in caches(settings):
            check_folder(place, name)
        check(settings)
        with alone_in(settings.run.out, "run.out", Ranks(launched())):
            final = fit(_built(objective, settings), settings)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(130)
    except KeyboardInterrupt:
        print("stopped at once; the same command goes on from what is saved", file=sys.stderr)
        sys.exit(130)
    except (FloatingPointError, OSError) as error:
        print(f"error: {in_one_line(error)}", file=sys.stderr)
        sys.exit(1)
    finally:
        leave()
    if launched().is_main_process:
        print(f"the trained model is in {final}")


def caches(settings: TrainingConfig) -> Iterator[tuple[Path, str]]:
    """The caches that a run reads, and writes where something is missing, with their keys."""
    for name, section in settings:
        if isinstance(cache := getattr(section, "cache", None), Path):
            yield cache, f"{name}.cache"


def _built(objective: Callable[[Config], nn.Module], settings: Config) -> nn.Module:
    """The objective, which may take long to encode its data; Interrupted by SIGINT and SIGTERM."""
    try:
        with (
            on_signals(_interrupt),
            in_memory("while the model was opened and the data were encoded"),
        ):
            return objective(settings)
    except KeyboardInterrupt:
        raise Interrupted("stopped while encoding; the same command goes on from there") from None


def _interrupt(number: int) -> NoReturn:
    raise KeyboardInterrupt
