"""Settings of a server, from the environment and a `.env` file. The first names are those of the documented API."""

from __future__ import annotations

import os
import re
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from fidelora.accel import Offload
from fidelora.errors import SettingsError
from fidelora.families import all_families

_OURS = "FIDELORA_"


def _data_dir() -> Path:
    """Where programs keep data on this system: https://specifications.freedesktop.org/basedir-spec/."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "fidelora"


class Settings(BaseSettings):
    """Everything that can be set; see `docs/reference/settings.md`, which is made from the descriptions here."""

    model_config = SettingsConfigDict(
        env_file=".env",
        env_file_encoding="utf-8",
        extra="ignore",
        validate_by_name=True,
        frozen=True,
    )

    host: str = Field(
        "127.0.0.1",
        validation_alias="HOST",
        description="Address to listen on; one that others can reach needs an API key.",
    )
    port: int = Field(
        8000,
        ge=0,
        le=65535,
        validation_alias="PORT",
        description="Port to listen on; 0 takes a free one.",
    )
    base_url: str = Field(
        "",
        validation_alias="BASE_URL",
        description="Where clients reach the server, for the URLs in answers; by default the address it listens on.",
    )
    debug: bool = Field(False, validation_alias="DEBUG", description="Log everything.")
    device: str = Field(
        "auto",
        validation_alias="DEVICE",
        description="auto, cpu, cuda, cuda:N or mps; several with commas, one worker for each.",
    )
    offload_mode: Offload | None = Field(
        None,
        validation_alias="OFFLOAD_MODE",
        description="none, model or sequential: memory of the device against time.",
    )
    enable_cpu_offload: bool = Field(
        False,
        validation_alias="ENABLE_CPU_OFFLOAD",
        description="The old spelling of OFFLOAD_MODE=model; OFFLOAD_MODE wins.",
    )
    workflows_base_path: Path | None = Field(
        None,
        validation_alias="WORKFLOWS_BASE_PATH",
        description="The folder that LoRAs are named from; by default `loras` in the data folder.",
    )
    output_base_path: Path | None = Field(
        None,
        validation_alias="OUTPUT_BASE_PATH",
        description="The folder for images; by default `outputs` in the data folder.",
    )
    model_cache_dir: Path | None = Field(
        None,
        validation_alias="MODEL_CACHE_DIR",
        description="Where downloads of base models are kept; by default the hub's own cache.",
    )
    hf_token: SecretStr | None = Field(
        None, validation_alias="HF_TOKEN", description="For gated and private files on the hub."
    )
    inference_timeout_s: float = Field(
        3600,
        gt=0,
        validation_alias="INFERENCE_TIMEOUT",
        description="Seconds that one attempt at a request may take; then it is stopped and has failed.",
    )
    lora_cache_dir: Path | None = Field(
        None,
        validation_alias="LORA_DOWNLOAD_CACHE_DIR",
        description="The cache of LoRAs by content; by default `adapters` in the data folder.",
    )

    data_dir: Path = Field(
        default_factory=_data_dir,
        validation_alias="FIDELORA_DATA_DIR",
        description="Everything that the server keeps; by default `fidelora` in the user's data folder.",
    )
    base_model: str = Field(
        "",
        validation_alias="FIDELORA_BASE_MODEL",
        description="What models mean here: hub id, diffusers folder or .safetensors checkpoint; by default each model's own. "
        "A place alone is for sd15; `MODEL=PLACE`, several with commas, is for any: `sd15=/bases/a,sdxl=/bases/b.safetensors`. "
        "The first one is loaded when the server starts.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        validation_alias="FIDELORA_DTYPE",
        description="Precision of the images; auto is the usual one of the device.",
    )
    fidelity: Literal["exact", "fast"] = Field(
        "exact",
        validation_alias="FIDELORA_FIDELITY",
        description="What requests get that do not choose: exact, to the bit as in training, or fast, nearly so.",
    )
    batch_wait_s: float = Field(
        0,
        ge=0,
        le=60,
        validation_alias="FIDELORA_BATCH_WAIT",
        description="Seconds that a fast request waits for others to share its steps; 0 takes those that wait already.",
    )
    store_url: SecretStr = Field(
        SecretStr(""),
        validation_alias="FIDELORA_STORE_URL",
        description="SQLAlchemy URL of the jobs' database; by default an SQLite file in the data folder.",
    )
    queue_size: int = Field(
        10_000,
        ge=1,
        validation_alias="FIDELORA_QUEUE_SIZE",
        description="Requests that may wait; more are answered with 429.",
    )
    keep_days: float = Field(
        7,
        gt=0,
        validation_alias="FIDELORA_KEEP_DAYS",
        description="Days that a finished request and its images are kept.",
    )
    keep_requests: int = Field(
        10_000,
        ge=1,
        validation_alias="FIDELORA_KEEP_REQUESTS",
        description="Finished requests that are kept at most, with their images.",
    )
    lora_hosts: Annotated[frozenset[str], NoDecode] = Field(
        frozenset(),
        validation_alias="FIDELORA_LORA_HOSTS",
        description="Hosts that LoRAs may be fetched from, with commas, such as `huggingface.co,*.hf.co`; none by default.",
    )
    lora_max_mb: int = Field(
        2048,
        ge=1,
        validation_alias="FIDELORA_LORA_MAX_MB",
        description="Largest LoRA that is fetched or uploaded, in MiB.",
    )
    lora_timeout_s: float = Field(
        300,
        gt=0,
        validation_alias="FIDELORA_LORA_TIMEOUT",
        description="Seconds that fetching a LoRA may take in all.",
    )
    lora_cache_gb: float = Field(
        50,
        gt=0,
        validation_alias="FIDELORA_LORA_CACHE_GB",
        description="Disk space for LoRAs that are only in the cache, in GiB.",
    )
    bases_gb: float | None = Field(
        None,
        gt=0,
        validation_alias="FIDELORA_BASES_GB",
        description="Memory for loaded base models per worker, in GiB; by default one base model at a time.",
    )
    adapters_gb: float = Field(
        2,
        gt=0,
        validation_alias="FIDELORA_ADAPTERS_GB",
        description="Memory for loaded LoRAs per worker, in GiB.",
    )
    page: bool = Field(
        True,
        validation_alias="FIDELORA_PAGE",
        description="Whether there is a web page at `/`, if its packages are installed.",
    )
    jobs_path: Path | None = Field(
        None,
        validation_alias="FIDELORA_JOBS_PATH",
        description="The folder whose training jobs the web page may verify, for everybody who has a key; none by default.",
    )
    job_max_mb: int = Field(
        1024,
        ge=1,
        validation_alias="FIDELORA_JOB_MAX_MB",
        description="Largest zip of a training job that the web page takes, in MiB; unpacked it may be four times as large.",
    )
    step_timeout_s: float = Field(
        600,
        gt=0,
        validation_alias="FIDELORA_STEP_TIMEOUT",
        description="Seconds without a finished step after which a worker counts as hanging and is replaced.",
    )
    stop_grace_s: float = Field(
        30,
        ge=0,
        validation_alias="FIDELORA_STOP_GRACE",
        description="Seconds that running requests have to finish when the server is told to stop.",
    )
    log_format: Literal["auto", "json", "text"] = Field(
        "auto",
        validation_alias="FIDELORA_LOG_FORMAT",
        description="json, text, or auto: text on a terminal and json elsewhere.",
    )

    @field_validator("lora_hosts", mode="before")
    @classmethod
    def _hosts(cls, value: object) -> object:
        return (
            [host.strip().lower() for host in value.split(",") if host.strip()]
            if isinstance(value, str)
            else value
        )

    @field_validator("lora_hosts")
    @classmethod
    def _are_hosts(cls, value: frozenset[str]) -> frozenset[str]:
        if wrong := [host for host in value if not re.fullmatch(r"(\*\.)?[\w-]+(\.[\w-]+)*", host)]:
            raise ValueError(
                f"{wrong[0]!r} is no name of a host; write names such as huggingface.co or *.hf.co"
            )
        return value

    @field_validator("base_model")
    @classmethod
    def _say_each_base_once(cls, value: str) -> str:
        said = _bases(value)
        if not all(place for _, place in said):
            raise ValueError("a model has no place after its =")
        if len({model for model, _ in said}) < len(said):
            raise ValueError("a model has two places")
        return value

    @property
    def base_models(self) -> dict[str, str]:
        """What `base_model` says, by model id, in its order."""
        return dict(_bases(self.base_model))

    @property
    def offload(self) -> Offload:
        """How to save memory of the device."""
        return self.offload_mode or ("model" if self.enable_cpu_offload else "none")

    @property
    def devices(self) -> list[str]:
        """One worker runs on each."""
        return [name.strip() for name in self.device.split(",")]

    @property
    def loras(self) -> Path:
        """The folder that names of LoRAs are below of."""
        return (self.workflows_base_path or self.data_dir / "loras").expanduser().absolute()

    @property
    def jobs(self) -> Path | None:
        """The folder that the web page may verify jobs of."""
        return self.jobs_path.expanduser().absolute() if self.jobs_path else None

    @property
    def outputs(self) -> Path:
        """The folder for images."""
        return (self.output_base_path or self.data_dir / "outputs").expanduser().absolute()

    @property
    def adapters(self) -> Path:
        """The folder of LoRAs by content."""
        return (self.lora_cache_dir or self.data_dir / "adapters").expanduser().absolute()

    @property
    def database(self) -> str:
        """The URL of the jobs' database."""
        return (
            self.store_url.get_secret_value()
            or f"sqlite:///{self.data_dir.expanduser().absolute()}/jobs.sqlite"
        )


def _bases(text: str) -> list[tuple[str, str]]:
    """Models and their places. Only a comma before a model's name divides: others may be part of a path."""
    marks = [*re.finditer(rf"(?:^|,)({'|'.join(all_families())})=", text)]
    ends = [*(mark.start() for mark in marks), len(text)]
    alone = [(next(iter(all_families())), text[: ends[0]])] if ends[0] else []
    return alone + [
        (mark[1], text[mark.end() : end]) for mark, end in zip(marks, ends[1:], strict=True)
    ]


def read_settings(**given: Any) -> Settings:
    """Settings from the environment and `.env`; what is `given` and not None goes before both.

    Raises:
        SettingsError: a value is out of its range, or a name that begins with FIDELORA_ is no setting.
    """
    names = {str(field.validation_alias) for field in Settings.model_fields.values()}
    for name in os.environ:
        if name.startswith(_OURS) and name not in names:
            near = get_close_matches(name, names, 1)
            raise SettingsError(
                f"{name} is no setting of Fidelora's"
                + (f"; is {near[0]} meant?" if near else "; take it away.")
            )
    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[
            0
        ]  # what was given may be a secret
        raise SettingsError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}.") from error
