"""What a run tells while it works: a line for each stage with its seconds and peak memory, and the same as JSON."""

import contextlib
import dataclasses
import json
import resource
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from sam_flax.errors import InputWarning

LOG = "log.jsonl"
# Values of --verbosity, which absl defines.
QUIET, LINES = -1, 0


@dataclasses.dataclass
class Stages:
    """The stages of one run, told as they end.

    Attributes:
        verbosity: 0 prints a line for each stage and bars; below, warnings alone.
        seconds: of every stage so far, summed where one came more than once.
        file: where the lines go as JSON; None keeps them until `open` names it.
    """

    verbosity: int = LINES
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    file: Path | None = None
    _waiting: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    @property
    def bars(self) -> bool:
        """Whether progress bars are shown."""
        return self.verbosity >= LINES

    def say(self, line: str) -> None:
        """Prints a line on stderr, unless the run is to be quiet."""
        if self.verbosity >= LINES:
            print(line, file=sys.stderr, flush=True)

    def open(self, file: Path, **about: Any) -> None:
        """Names the file for the lines as JSON, and writes those that waited for it below one `about` the run.

        A run that goes on after a kill adds to the lines of the one before.
        """
        self.file = file
        waiting, self._waiting = self._waiting, []
        for record in ({"start": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **about}, *waiting):
            self._log(record)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times the block; only what ends without an error is told."""
        start = time.perf_counter()
        yield
        spent = time.perf_counter() - start
        self.seconds[name] = self.seconds.get(name, 0.0) + spent
        memory = peak_memory()
        self.say(f"{name}: {spent:.1f} s, peak " + ", ".join(f"{k} {v / 2**20:,.0f} MiB" for k, v in memory.items()))
        self._log({"stage": name, "seconds": round(spent, 3), "peak_bytes": memory})

    def _log(self, record: dict[str, Any]) -> None:
        if self.file is None:
            self._waiting.append(record)
        else:
            with contextlib.suppress(OSError), open(self.file, "a") as file:  # no result depends on it
                file.write(json.dumps(record) + "\n")


def peak_memory() -> dict[str, int]:
    """Most bytes so far: of this process, as "memory", and of each accelerator that tells it, as its name."""
    unit = 1 if sys.platform == "darwin" else 1024
    peaks = {"memory": unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
    for device in jax.local_devices():
        if device.platform != "cpu" and (stats := device.memory_stats()):
            peaks[str(device)] = int(stats.get("peak_bytes_in_use", 0))
    return peaks


@contextlib.contextmanager
def collected_warnings() -> Iterator[list[str]]:
    """The sentences of all warnings for the user that are given inside, each once; they are shown as well."""
    sentences: list[str] = []
    with warnings.catch_warnings():
        show = warnings.showwarning

        def note(message: Warning | str, category: type[Warning], *rest: Any, **named: Any) -> None:
            if not issubclass(category, InputWarning):
                show(message, category, *rest, **named)
            elif str(message) not in sentences:
                sentences.append(str(message))
                show(message, category, *rest, **named)

        warnings.simplefilter("always", InputWarning)
        warnings.showwarning = note
        yield sentences
