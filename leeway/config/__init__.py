"""One TOML file configures a run; each part reads its own section of it.

    file ── load_document ──> document ── section(document, "learner", LearnerOptions) ──> frozen options
                 ▲
        --set key.path=value (TOML syntax; a bare word is a string)

Sections that several services need live here; the others live beside what reads them, as subclasses of `Options`.
Unknown keys, wrong types and values out of range are refused with file and key. Relative paths are taken from the
configuration file's own directory, so a run starts the same from anywhere.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast

import tomli_w
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo, model_validator

from leeway.errors import ConfigError
from leeway.types import SamplingParams

SECTIONS = (
    "run",
    "model",
    "task",
    "sampling",
    "network",
    "metrics",
    "evaluation",
    "replay_buffer",
    "inference_server",
    "learner",
    "supervisor",
)


class Options(BaseModel):
    """A section: immutable, and nothing but the named keys. Numbers are finite unless a field says otherwise."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def _from_config_directory(value: object, info: ValidationInfo) -> object:
    if not isinstance(value, (str, Path)):
        return value
    context: Mapping[str, Path] = info.context or {}
    return (context.get("directory", Path()) / Path(value).expanduser()).resolve()


ConfigPath = Annotated[Path, BeforeValidator(_from_config_directory)]
"""A path; relative ones start at the configuration file's directory."""


def _program(value: object, info: ValidationInfo) -> object:
    if not isinstance(value, (str, Path)):
        return value
    context: Mapping[str, Path] = info.context or {}
    # Links are kept: the interpreter of a virtual environment is often one, and knows by its own path where it is.
    return (context.get("directory", Path()) / Path(value).expanduser()).absolute()


ConfigProgram = Annotated[Path, BeforeValidator(_program)]
"""A program; relative ones start at the configuration file's directory."""

Address = Annotated[str, Field(pattern=r"^[^:\s]+:\d{1,5}$", description="host:port")]


class RunOptions(Options):
    """[run]: what is trained, for how long, how stale data may be."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$", description="names the run and its folder")
    directory: ConfigPath = Field(
        default=Path("runs"), description="folder that holds one folder per run", validate_default=True
    )
    steps: int = Field(ge=1, description="T: optimizer steps")
    groups_per_step: int = Field(ge=1, description="B: groups per optimizer step")
    members: int = Field(ge=1, description="trajectories per group")
    max_staleness: int = Field(
        ge=0, le=1000, description="S: largest staleness of a trained token, in steps; 0 is on-policy"
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="seeds task order, sampling and training")
    max_attempts: int = Field(default=5, ge=1, description="tickets a group may cost before it is a dead letter")
    drop_no_signal: bool = Field(
        default=False,
        description="drop groups whose rewards are all equal in the buffer; each step then has groups_per_step others",
    )

    @model_validator(mode="after")
    def _signal_needs_members(self) -> RunOptions:
        if self.drop_no_signal and self.members < 2:
            raise ValueError("drop_no_signal needs at least 2 members: the reward of one is always equal to itself")
        return self

    @property
    def run_directory(self) -> Path:
        return self.directory / self.name


class ModelOptions(Options):
    """[model]: the policy that the run starts from."""

    path: ConfigPath | None = Field(
        default=None, description="Hugging Face model directory, with its tokenizer; a rehearsal needs none"
    )

    @property
    def directory(self) -> Path:
        """`path`, for those who need it.

        Raises:
            ConfigError: it is not set.
        """
        if self.path is None:
            raise ConfigError("model.path: required, but not set; give a Hugging Face model directory")
        return self.path


class TaskOptions(Options):
    """[task]: what is asked and how answers are scored. Tasks come from a function or from JSONL files."""

    tasks: str | None = Field(default=None, description="module:function(split, count, seed) -> list of tasks")
    train_count: int = Field(default=4096, ge=1, description="training tasks to generate")
    heldout_count: int = Field(default=256, ge=0, description="held-out tasks to generate")
    train_file: ConfigPath | None = Field(default=None, description="JSONL of training tasks, each with a `prompt`")
    heldout_file: ConfigPath | None = Field(default=None, description="JSONL of held-out tasks")
    reward: str = Field(description="module:function(task, completion) -> float, sync or async")
    python_path: ConfigPath = Field(
        default=Path(), description="folder that `module` is imported from", validate_default=True
    )
    chat: bool = Field(default=False, description="render the prompt as a user message with the chat template")

    @model_validator(mode="after")
    def _one_source(self) -> TaskOptions:
        if (self.tasks is None) == (self.train_file is None):
            raise ValueError("set either `tasks` (a function) or `train_file` (JSONL)")
        return self


class SamplingOptions(Options):
    """[sampling]: how training trajectories are sampled and what is recorded."""

    temperature: float = Field(default=1.0, gt=0, le=10, description="logits are divided by it before sampling")
    max_tokens: int = Field(ge=1, description="most tokens per completion, end-of-sequence included")
    topk: int = Field(default=0, ge=0, le=20, description="K of the recorded top-K log-probs; 0 records none")
    routing: bool = Field(default=False, description="record MoE routing (for R3)")

    def params(self, stop_token_ids: Iterable[int]) -> SamplingParams:
        """The wire form; the seed is each trajectory's own."""
        return SamplingParams(
            temperature=self.temperature,
            max_tokens=self.max_tokens,
            stop_token_ids=tuple(stop_token_ids),
            topk=self.topk,
            routing=self.routing,
        )


class NetworkOptions(Options):
    """[network]: where services listen. Port 0 lets `leeway run` pick a free one."""

    replay_buffer: Address = "127.0.0.1:7401"
    policy: Address = "127.0.0.1:7402"
    inference_servers: tuple[Address, ...] = Field(
        default=("127.0.0.1:7403", "127.0.0.1:7404"),
        strict=False,
        description="where the inference servers listen; `leeway run` starts one for each",
    )
    insecure: bool = Field(default=False, description="listen beyond loopback without certificates")
    certificate: ConfigPath | None = Field(default=None, description="PEM certificate of this service (mutual TLS)")
    key: ConfigPath | None = Field(default=None, description="PEM private key of the certificate")
    authority: ConfigPath | None = Field(default=None, description="PEM certificate of the authority of all services")
    weights: Literal["auto", "zmq", "grpc", "collective"] = Field(
        default="auto",
        description="how weights travel: ZeroMQ on one host, gRPC beyond; auto picks by address; collective broadcasts "
        "them to all servers at once over torch.distributed (gloo), unencrypted, with gRPC where that fails",
    )


class MetricsOptions(Options):
    """[metrics]: Prometheus ports; 0 lets `leeway run` pick a free one."""

    host: str = Field(default="127.0.0.1", description="interface that the ports are opened on")
    replay_buffer: int = Field(default=9401, ge=0, le=65535, description="port of the replay buffer")
    learner: int = Field(default=9402, ge=0, le=65535, description="port of the learner")
    inference_servers: tuple[Annotated[int, Field(ge=0, le=65535)], ...] = Field(
        default=(9403, 9404), strict=False, description="ports of the inference servers, in the order of the network's"
    )


class EvaluationOptions(Options):
    """[evaluation]: held-out accuracy, sampled at the training temperature from one pinned version."""

    every_steps: int = Field(
        default=50, ge=0, description="steps between evaluations; 0 evaluates only at start and end"
    )
    tasks: int = Field(default=256, ge=0, description="held-out tasks per evaluation; 0 turns evaluation off")
    members: int = Field(default=8, ge=1, description="samples per held-out task")


@dataclass(frozen=True, slots=True)
class Document:
    """A parsed configuration file with its overrides applied."""

    path: Path
    values: Mapping[str, Any]


OptionsT = TypeVar("OptionsT", bound=Options)


def load_document(path: Path, overrides: Sequence[str] = ()) -> Document:
    """Read a TOML file and apply `section.key=value` overrides.

    Raises:
        ConfigError: the file cannot be read or parsed, a section is unknown, an override is malformed.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the configuration: {error.strerror}; check the path") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    for override in overrides:
        _apply_override(values, override)
    unknown = [name for name in values if name not in SECTIONS]
    if unknown:
        raise ConfigError(f"{path}: unknown section [{unknown[0]}]; known are {', '.join(SECTIONS)}")
    return Document(path.resolve(), values)


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or len(parts) < 2 or not all(parts):
        raise ConfigError(f"--set {override}: write section.key=value, for example run.steps=10")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    table: dict[str, Any] = values
    for part in parts[:-1]:
        inner: Any = table.setdefault(part, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {override}: {part} is a value, not a section")
        table = cast("dict[str, Any]", inner)
    table[parts[-1]] = value


def section(document: Document, name: str, options: type[OptionsT]) -> OptionsT:
    """Validate one section.

    Raises:
        ConfigError: naming file, key, what is wrong with it and what was given.
    """
    try:
        return options.model_validate(document.values.get(name, {}), context={"directory": document.path.parent})
    except ValidationError as error:
        raise ConfigError(_explain(document.path, name, error)) from error


def _explain(path: Path, name: str, error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    key = ".".join([name, *(str(part) for part in first["loc"])])
    message = first["msg"]
    if first["type"] == "extra_forbidden":
        message = "unknown key; remove it or correct its spelling"
    elif first["type"] == "missing":
        message = "required, but not set"
    elif first["type"] == "value_error":
        message = first["msg"].removeprefix("Value error, ")
    else:
        message = f"{message[0].lower()}{message[1:]}, but is {first['input']!r}"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{path}: {key}: {message}{more}"


def write_document(path: Path, sections: Mapping[str, Options]) -> None:
    """Save resolved options as TOML that `load_document` reads back; unset optional keys are left out."""
    values = {name: options.model_dump(mode="json", exclude_none=True) for name, options in sections.items()}
    path.write_text(tomli_w.dumps(values), encoding="utf-8")
