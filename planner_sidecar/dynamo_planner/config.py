"""The operator's settings: one frozen object, parsed once from YAML and flags; flags win.

Every mistake becomes one ConfigError line that names the key and says what to do.
"""

from __future__ import annotations

import shlex
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .errors import ConfigError
from .kube_target import KubeSettings, parse_target
from .local_actuator import LaunchPlan
from .planner import DEFAULT_POOL
from .records import SizingPolicy
from .replica import Limits
from .tracking import Targets

Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=10_000)]
Milliseconds = Annotated[float, Field(gt=0, le=3_600_000, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]


class PlannerConfig(BaseModel):
    """All settings with their defaults; the command line's flags bear the same names with dashes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    engine: tuple[str, ...] = ()
    proxy_admin: str | None = None
    advisory: bool = True
    optimization_target: Literal["load", "sla"] = "load"
    target_ttft_ms: Milliseconds | None = None
    target_itl_ms: Milliseconds | None = None
    burst_factor: Annotated[float, Field(ge=1, le=100, allow_inf_nan=False)] = 1.0
    target_attainment: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] = 0.95
    role: Literal["aggregated", "prefill", "decode"] = "aggregated"
    pools: dict[str, dict[str, Any]] = Field(default_factory=dict)
    max_gpus: Count | None = None
    gpus_per_replica: Annotated[int, Field(ge=1, le=1024)] = 1
    min_replicas: Count = 1
    max_replicas: Count = 8
    interval_seconds: Annotated[float, Field(ge=0.05, le=3600, allow_inf_nan=False)] = 10.0
    stabilisation_seconds: Annotated[float, Field(ge=0, le=86_400, allow_inf_nan=False)] = 300.0
    warmup_seconds: Annotated[float, Field(ge=0, le=86_400, allow_inf_nan=False)] = 30.0
    startup_seconds: Seconds = 60.0
    max_down_share: Share = 0.5
    down_period_seconds: Annotated[float, Field(ge=0, le=86_400, allow_inf_nan=False)] = 60.0
    scale_to_zero_seconds: Seconds | None = None
    is_pooled: bool = False
    daily_profile: bool = True
    profile: Path | None = None
    memory_file: Path | None = None
    kubernetes: str | None = None
    kubernetes_namespace: str | None = None
    kubeconfig: Path | None = None
    lease_name: str = "dynamo-planner"
    pod_port: Annotated[int, Field(ge=1, le=65_535)] = 8000
    pending_seconds: Seconds = 600.0
    scale_command: str | None = None
    command_seconds: Seconds = 120.0
    max_kv_usage: Share = 0.8
    max_waiting_per_replica: Annotated[float, Field(ge=0, le=1_000_000, allow_inf_nan=False)] = 4.0
    max_running_per_replica: Annotated[float, Field(gt=0, le=1_000_000, allow_inf_nan=False)] | None = None
    decision_log: Path | None = None
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65_535)] = 8790
    engine_command: str | None = None
    engine_port_range: str = "8100-8199"
    engine_gpus: tuple[str, ...] = ()
    engine_log_dir: Path = Path(tempfile.gettempdir(), "dynamo-planner")
    keep_replicas: bool = False
    start_seconds: Seconds = 600.0
    drain_seconds: Seconds = 300.0
    exit_drain_seconds: Annotated[float, Field(ge=0, le=86_400, allow_inf_nan=False)] = 30.0
    terminate_seconds: Seconds = 60.0
    poll_seconds: Seconds = 0.5

    @field_validator("engine", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("engine")
    @classmethod
    def _engine_urls(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        urls = tuple(_url(entry) for entry in value)
        twice = next((url for url in urls if urls.count(url) > 1), None)
        if twice:
            raise ValueError(f"{twice} is named twice; name each engine once")
        return urls

    @field_validator("proxy_admin")
    @classmethod
    def _proxy_url(cls, value: str | None) -> str | None:
        return None if value is None else _url(value)

    @field_validator("engine_port_range")
    @classmethod
    def _range(cls, value: str) -> str:
        first, last = _ports(value)
        if not 1 <= first <= last <= 65_535:
            raise ValueError(f"{value!r} is not a range of ports; write it as 8100-8199")
        return value

    @field_validator("engine_gpus", mode="before")
    @classmethod
    def _gpus(cls, value: Any) -> Any:
        entries = value if isinstance(value, list | tuple) else str(value).split(",")
        found = [gpu for entry in entries for gpu in _gpu_names(str(entry).strip())]
        twice = next((gpu for gpu in found if found.count(gpu) > 1), None)
        if twice is not None:
            raise ValueError(f"GPU {twice} is named twice; name each GPU once")
        return tuple(found)

    @field_validator("engine_command")
    @classmethod
    def _template(cls, value: str | None) -> str | None:
        if value is None:
            return None
        try:
            words = shlex.split(value)
        except ValueError as error:
            raise ValueError(f"cannot be split into words ({error}); check its quotes") from error
        if not words or "{port}" not in value:
            raise ValueError("must contain {port}, as in 'vllm serve MODEL --port {port}'")
        if shutil.which(words[0]) is None:
            raise ValueError(f"{words[0]!r} is not a program on this machine's PATH; name one that is")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> PlannerConfig:
        if self.pools:  # every pool is held against all of this by itself, with its own settings in place
            return self
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is above max_replicas {self.max_replicas}; lower it")
        targets = self.target_ttft_ms, self.target_itl_ms
        if self.optimization_target == "sla" and targets == (None, None):
            raise ValueError("optimization_target sla needs target_ttft_ms or target_itl_ms; give at least one")
        if self.optimization_target == "load" and targets != (None, None):
            raise ValueError("target_ttft_ms and target_itl_ms work only with optimization_target sla; set it too")
        if self.optimization_target == "load" and self.burst_factor > 1:
            raise ValueError("burst_factor works only with optimization_target sla; set it too")
        hands = [name for name in ("engine_command", "kubernetes", "scale_command") if getattr(self, name) is not None]
        if len(hands) > 1:
            raise ValueError(f"{' and '.join(hands)} are two ways to scale one pool; give one of them")
        if not self.advisory and not hands:
            text = "as in 'vllm serve MODEL --port {port}', or kubernetes, or scale_command; give one"
            raise ValueError(f"no-advisory needs engine_command, {text}")
        if self.kubernetes is not None:
            parse_target(self.kubernetes, "default")
        if self.scale_to_zero_seconds is not None and self.proxy_admin is None:
            raise ValueError("scale_to_zero_seconds needs proxy_admin: only the proxy sees who wants to wake the pool")
        held = self.min_replicas * self.gpus_per_replica
        if self.max_gpus is not None and held > self.max_gpus:
            raise ValueError(f"min_replicas take {held} GPUs but max_gpus is {self.max_gpus}; change one of them")
        if self.engine_gpus and not self.engine_command:
            raise ValueError("engine_gpus are for replicas that engine_command starts; give engine_command too")
        most = self._most_replicas()
        few = self.max_replicas if "max_replicas" in self.model_fields_set else self.min_replicas
        if few > most:
            named = f"engine_gpus names {len(self.engine_gpus)}; name more or lower the count"
            raise ValueError(f"{few} replicas take {few * self.gpus_per_replica} GPUs but {named}")
        if not self.engine and self.proxy_admin is None and self.advisory:
            raise ValueError("nothing to observe; give at least one --engine URL or a --proxy-admin URL")
        if not self.advisory and self.engine_command and self.port and self.ports[0] <= self.port <= self.ports[1]:
            raise ValueError(f"port {self.port} lies in engine_port_range {self.engine_port_range}; move one of them")
        return self

    @property
    def ports(self) -> tuple[int, int]:
        return _ports(self.engine_port_range)

    def _most_replicas(self) -> int:
        """Never more than there are GPUs for."""
        if not self.engine_gpus:
            return self.max_replicas
        return min(self.max_replicas, len(self.engine_gpus) // self.gpus_per_replica)

    def policy(self) -> SizingPolicy:
        """What the pure rules need."""
        return SizingPolicy(
            target=self.optimization_target,
            role=self.role,
            gpus_per_replica=self.gpus_per_replica,
            startup_seconds=self.startup_seconds,
            interval_seconds=self.interval_seconds,
            max_down_share=self.max_down_share,
            down_period_seconds=self.down_period_seconds,
            idle_to_zero_seconds=self.scale_to_zero_seconds,
            is_pooled=self.is_pooled,
            has_daily_profile=self.daily_profile,
            burst_factor=self.burst_factor,
            min_replicas=self.min_replicas,
            max_replicas=self._most_replicas(),
            ttft_seconds=None if self.target_ttft_ms is None else self.target_ttft_ms / 1e3,
            itl_seconds=None if self.target_itl_ms is None else self.target_itl_ms / 1e3,
            attainment=self.target_attainment,
            stabilisation_seconds=self.stabilisation_seconds,
            warmup_seconds=self.warmup_seconds,
            max_kv_usage=self.max_kv_usage,
            max_waiting_per_replica=self.max_waiting_per_replica,
            max_running_per_replica=self.max_running_per_replica,
        )

    def targets(self) -> Targets:
        """What latencies are held against."""
        policy = self.policy()
        return Targets(policy.ttft_seconds, policy.itl_seconds)

    def kube_settings(self, namespace: str) -> KubeSettings | None:
        """What to scale in a cluster, or None."""
        if self.advisory or self.kubernetes is None:
            return None
        target = parse_target(self.kubernetes, self.kubernetes_namespace or namespace)
        return KubeSettings(target, self.pod_port, self.pending_seconds)

    def by_pool(self) -> dict[str, PlannerConfig]:
        """One configuration per pool: its own settings over the common ones. Raises ConfigError."""
        if not self.pools:
            return {DEFAULT_POOL: self}
        common = self.model_dump(exclude={"pools"}, exclude_unset=True)
        found = {}
        for name, own in self.pools.items():
            settings = {str(key).replace("-", "_"): value for key, value in own.items()}
            shared = sorted(settings.keys() & _SHARED)
            if shared:
                raise ConfigError(f"pools.{name}: {shared[0]} belongs to all pools; move it to the top")
            try:
                found[name] = PlannerConfig.model_validate(common | settings)
            except ValidationError as error:
                raise ConfigError(f"pools.{name}: {_one_line(error)}") from error
        held = sum(pool.min_replicas * pool.gpus_per_replica for pool in found.values())
        if self.max_gpus is not None and held > self.max_gpus:
            raise ConfigError(
                f"the pools' min_replicas take {held} GPUs but max_gpus is {self.max_gpus}; change one of them"
            )
        _no_overlap(found)
        return found

    def limits(self) -> Limits:
        """The deadlines of a replica's life."""
        return Limits(
            start_seconds=self.start_seconds,
            drain_seconds=self.drain_seconds,
            terminate_seconds=self.terminate_seconds,
            poll_seconds=self.poll_seconds,
        )

    def launch_plan(self) -> LaunchPlan | None:
        """How to start replicas, or None in advisory mode."""
        if self.advisory or self.engine_command is None:
            return None
        return LaunchPlan(
            command=self.engine_command,
            ports=self.ports,
            log_dir=self.engine_log_dir,
            keep_on_exit=self.keep_replicas,
            exit_seconds=self.exit_drain_seconds,
            gpus=self.engine_gpus,
            gpus_per_replica=self.gpus_per_replica,
            fleet=self.proxy_admin or self.engine_command,
        )


_SHARED = {
    "pools",
    "max_gpus",
    "proxy_admin",
    "decision_log",
    "memory_file",
    "host",
    "port",
    "interval_seconds",
    "advisory",
}


def _no_overlap(pools: Mapping[str, PlannerConfig]) -> None:
    """Two pools must not scale one object, start on one port or watch one engine. Raises ConfigError."""
    taken: dict[str, str] = {}
    for name, pool in pools.items():
        local = [f"port {port}" for port in range(pool.ports[0], pool.ports[1] + 1)] if pool.engine_command else []
        gpus = [f"GPU {gpu}" for gpu in pool.engine_gpus]
        for thing in (*pool.engine, *local, *gpus, *filter(None, [pool.kubernetes])):
            if thing in taken:
                raise ConfigError(f"pools {taken[thing]} and {name} both have {thing}; give each its own")
            taken[thing] = name


def load_config(path: Path | None, flags: Mapping[str, Any]) -> PlannerConfig:
    """Merge the YAML file and the flags that were given (None = not given). Raises ConfigError."""
    settings = {} if path is None else _read_yaml(path)
    settings |= {key: value for key, value in flags.items() if value is not None and value != []}
    try:
        return PlannerConfig.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(_one_line(error)) from error


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; check the path given to --config") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{path} is not YAML{where}; write it as 'key: value' lines") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no settings; write it as 'key: value' lines")
    return {str(key).replace("-", "_"): value for key, value in content.items()}


def _one_line(error: ValidationError) -> str:
    first, more = error.errors()[0], error.error_count() - 1
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        said = f"unknown key {key!r}; the known ones are {', '.join(PlannerConfig.model_fields)}"
    else:
        text = first["msg"].removeprefix("Value error, ")
        got = f" (got {first['input']!r:.80})" if key and first["type"] != "value_error" else ""
        said = f"{key}: {text}{got}; change it" if got else f"{key}: {text}" if key else text
    return said.replace("\n", " ") + (f" (and {more} more mistakes)" if more else "")


def _gpu_names(text: str) -> list[str]:
    """An index, a range of them as in 0-7, or a name such as GPU-6f1c... of its own."""
    first, dash, last = text.partition("-")
    if dash and first.isdecimal() and last.isdecimal() and int(first) <= int(last) < int(first) + 1024:
        return [str(number) for number in range(int(first), int(last) + 1)]
    if not text.isdecimal() and not text.startswith(("GPU-", "MIG-")):
        raise ValueError(f"{text!r} is no GPU; write them as 0-7, as 0,1 or as GPU-... names")
    return [text]


def _url(text: str) -> str:
    remedy = f"{text!r} is not an http URL; write it as http://host:port"
    try:
        parts = urlsplit(text.strip())
        port = parts.port
    except ValueError as error:
        raise ValueError(remedy) from error
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0 or any(c.isspace() for c in text):
        raise ValueError(remedy)
    if parts.query or parts.fragment:
        raise ValueError(remedy)
    return text.strip().rstrip("/")


def _ports(text: str) -> tuple[int, int]:
    first, dash, last = text.partition("-")
    if not dash or not first.strip().isdecimal() or not last.strip().isdecimal():
        raise ValueError(f"{text!r} is not a range of ports; write it as 8100-8199")
    return int(first), int(last)
