"""The profile file: step times measured on one engine, which a planner without experience begins with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .errors import ConfigError
from .records import Memory
from .step_model import StepModel, learn_step

_WEIGHT = 5  # samples that a measured point counts for: enough to begin with, soon outweighed by what is seen


@dataclass(frozen=True)
class Profile:
    """(prompt tokens, seconds) of single prefills; (batch, KV use 0..1, seconds per token) of decoding."""

    prefill: tuple[tuple[float, float], ...] = ()
    decode: tuple[tuple[float, float, float], ...] = ()


def read_profile(path: Path) -> Profile:
    """Raises ConfigError for a file that is none."""
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        prefill = tuple((float(tokens), float(seconds)) for tokens, seconds in plain["prefill"])
        decode = tuple((float(batch), float(kv), float(seconds)) for batch, kv, seconds in plain["decode"])
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; check the path given to --profile") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is no profile; make one with 'dynamo-planner profile --engine URL'") from error
    return Profile(prefill, decode)


def write_profile(path: Path, profile: Profile) -> None:
    """Raises ConfigError if the file cannot be written."""
    try:
        text = json.dumps({"prefill": profile.prefill, "decode": profile.decode}, indent=1)
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}; choose another --out") from error


def models(profile: Profile) -> tuple[StepModel, StepModel]:
    """The prefill and the decode model that the points teach."""
    prefill = _taught([((1.0, tokens), seconds) for tokens, seconds in profile.prefill])
    return prefill, _taught([((1.0, batch, kv), seconds) for batch, kv, seconds in profile.decode])


def with_profile(memory: Memory, path: Path) -> Memory:
    """The memory with the profile's points in models that have learnt nothing yet. Raises ConfigError."""
    prefill, decode = models(read_profile(path))
    return replace(
        memory,
        prefill=memory.prefill if memory.prefill.points else prefill,
        decode=memory.decode if memory.decode.points else decode,
    )


def _taught(samples: Sequence[tuple[tuple[float, ...], float]]) -> StepModel:
    model = StepModel()
    for _ in range(_WEIGHT):
        for features, seconds in samples:
            model = learn_step(model, features, seconds)
    return model
