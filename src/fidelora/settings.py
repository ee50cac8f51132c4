"""Server settings, from the environment and a `.env` file.

Names without the prefix FIDELORA_ are those of `ai-toolkit-inference`. Each of these settings also
has a name with the prefix, which takes precedence.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from fidelora.accel import Offload
from fidelora.environment import either, foreign_variables, ignored_variables, names_of
from fidelora.errors import SettingsError
from fidelora.families import all_families
from fidelora.families.emphasis import Emphasis
from fidelora.field_sentences import field_sentence
from fidelora.recipe_fields import Quantization
from fidelora.resident import KEEP_VARIABLE
from fidelora.storage.bucket import bucket_and_prefix


def _data_dir() -> Path:
    """Return the user's data folder: https://specifications.freedesktop.org/basedir-spec/."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "fidelora"


class Settings(BaseSettings):
    """All settings. `docs/reference/settings.md` is generated from the descriptions here."""

    model_config = SettingsConfigDict(
        env_file=".env",
        env_file_encoding="utf-8",
        env_ignore_empty=True,
        extra="ignore",
        validate_by_name=True,
        frozen=True,
    )

    host: str = Field(
        "127.0.0.1",
        validation_alias=either("HOST"),
        description="Address to listen on. If other machines can reach it, an API key is required.",
    )
    port: int = Field(
        8000,
        ge=0,
        le=65535,
        validation_alias=either("PORT"),
        description="Port to listen on; 0 selects a free one.",
    )
    base_url: str = Field(
        "",
        validation_alias=either("BASE_URL"),
        description=(
            "URL at which clients reach the server, for the URLs in responses; "
            "by default the address it listens on."
        ),
    )
    debug: bool = Field(False, validation_alias=either("DEBUG"), description="Log at debug level.")
    device: str = Field(
        "auto",
        validation_alias=either("DEVICE"),
        description=(
            "auto, cpu, cuda, cuda:N or mps; "
            "a comma-separated list starts one worker for each device. `none` starts no workers: "
            "other machines make the images with `fidelora worker`."
        ),
    )
    offload_mode: Offload | None = Field(
        None,
        validation_alias=either("OFFLOAD_MODE"),
        description="none, model or sequential; offloading saves device memory but is slower.",
    )
    enable_cpu_offload: bool = Field(
        False,
        validation_alias=either("ENABLE_CPU_OFFLOAD"),
        description="Older name for OFFLOAD_MODE=model; OFFLOAD_MODE takes precedence.",
    )
    workflows_base_path: Path | None = Field(
        None,
        validation_alias=either("WORKFLOWS_BASE_PATH"),
        description="Folder with LoRAs for requests; by default `loras` in the data folder.",
    )
    output_base_path: Path | None = Field(
        None,
        validation_alias=either("OUTPUT_BASE_PATH"),
        description="Folder for images; by default `outputs` in the data folder.",
    )
    model_cache_dir: Path | None = Field(
        None,
        validation_alias=either("MODEL_CACHE_DIR"),
        description="Cache folder for downloaded base models; by default Hugging Face's own.",
    )
    hf_token: SecretStr | None = Field(
        None,
        validation_alias=either("HF_TOKEN"),
        description="Access token for gated and private files on the Hugging Face Hub.",
    )
    inference_timeout_s: float = Field(
        3600,
        gt=0,
        validation_alias=either("INFERENCE_TIMEOUT"),
        description="Seconds that an attempt at a request may take before it is stopped and fails.",
    )
    lora_cache_dir: Path | None = Field(
        None,
        validation_alias=either("LORA_DOWNLOAD_CACHE_DIR"),
        description=(
            "Cache folder for LoRAs, whose files are named by sha256; by default `adapters` in the "
            "data folder."
        ),
    )

    object_store: str = Field(
        "",
        validation_alias="FIDELORA_OBJECT_STORE",
        description=(
            "Bucket of an S3-compatible object store for images and LoRAs, such as "
            "`s3://bucket/prefix`, in place of folders that all machines share. Endpoint and "
            "credentials come from the usual variables, such as `AWS_ENDPOINT_URL`, "
            "`AWS_REGION`, `AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY`."
        ),
    )
    data_dir: Path = Field(
        default_factory=_data_dir,
        validation_alias="FIDELORA_DATA_DIR",
        description=(
            "Folder for all data of the server; by default `fidelora` in the user's data folder."
        ),
    )
    base_model: str = Field(
        "",
        validation_alias="FIDELORA_BASE_MODEL",
        description=(
            "Base models: hub id, diffusers folder or .safetensors checkpoint; by default each "
            "model's own. A base without a model name is for sd15. A comma-separated list of "
            "`MODEL=BASE` sets several: `sd15=/bases/a,sdxl=/bases/b.safetensors`. "
            "The first one is loaded when the server starts."
        ),
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        validation_alias="FIDELORA_DTYPE",
        description="Data type of the models; auto selects the usual one for the device.",
    )
    fidelity: Literal["exact", "fast"] = Field(
        "exact",
        validation_alias="FIDELORA_FIDELITY",
        description=(
            "Default fidelity of requests: exact (bit-identical to training) or fast "
            "(nearly identical)."
        ),
    )
    quantization: Quantization = Field(
        "none",
        validation_alias="FIDELORA_QUANTIZATION",
        description=(
            "`qfloat8` or `float8`: store the weights of the denoiser in float8, as AI Toolkit "
            "does with `model.quantize`, for the models that it quantises. LoRAs are then not "
            "merged."
        ),
    )
    text_encoder_quantization: Quantization = Field(
        "none",
        validation_alias="FIDELORA_TEXT_ENCODER_QUANTIZATION",
        description="`qfloat8` or `float8`: the same for the weights of the text encoders.",
    )
    training_adapter: str = Field(
        "",
        validation_alias="FIDELORA_TRAINING_ADAPTER",
        description=(
            "`MODEL=FILE`, separated by commas: the training adapter with which the LoRAs of a "
            "model were trained (`zimage_turbo=FILE`), to reproduce the trainer's samples to the "
            "bit."
        ),
    )
    batch_wait_s: float = Field(
        0,
        ge=0,
        le=60,
        validation_alias="FIDELORA_BATCH_WAIT",
        description=(
            "Seconds that a fast request waits for others to form a batch; "
            "0 batches only requests that are queued already."
        ),
    )
    store_url: SecretStr = Field(
        SecretStr(""),
        validation_alias="FIDELORA_STORE_URL",
        description=(
            "URL of the job database, such as `postgresql://user:password@host/fidelora`; by "
            "default an SQLite file in the data folder. Servers that use the same PostgreSQL "
            "database share requests, API keys and logins."
        ),
    )
    worker_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        validation_alias="FIDELORA_WORKER_PORT",
        description=(
            "Port on which `fidelora worker` serves `/health`, `/ready` and `/metrics`, at the "
            "address in `HOST` and without API keys; 0 selects a free one; none by default."
        ),
    )
    queue_size: int = Field(
        10_000,
        ge=1,
        validation_alias="FIDELORA_QUEUE_SIZE",
        description="Maximum number of queued requests; further ones are rejected with 429.",
    )
    keep_days: float = Field(
        7,
        gt=0,
        validation_alias="FIDELORA_KEEP_DAYS",
        description="Days to keep a finished request and its images.",
    )
    keep_requests: int = Field(
        10_000,
        ge=1,
        validation_alias="FIDELORA_KEEP_REQUESTS",
        description="Maximum number of finished requests to keep with their images.",
    )
    lora_hosts: Annotated[frozenset[str], NoDecode] = Field(
        frozenset(),
        validation_alias="FIDELORA_LORA_HOSTS",
        description=(
            "Comma-separated hosts that LoRAs may be downloaded from, "
            "such as `huggingface.co,*.hf.co`; none by default."
        ),
    )
    lora_max_mb: int = Field(
        2048,
        ge=1,
        validation_alias="FIDELORA_LORA_MAX_MB",
        description="Largest LoRA to download or upload, in MiB.",
    )
    lora_timeout_s: float = Field(
        300,
        gt=0,
        validation_alias="FIDELORA_LORA_TIMEOUT",
        description="Seconds that the download of a LoRA may take in total.",
    )
    lora_cache_gb: float = Field(
        50,
        gt=0,
        validation_alias="FIDELORA_LORA_CACHE_GB",
        description=(
            "Disk space for cached LoRAs, such as downloads, in GiB. A cached file that shares its "
            "disk space with another file (a hard link) does not count."
        ),
    )
    uploads_gb: float = Field(
        50,
        gt=0,
        validation_alias="FIDELORA_UPLOADS_GB",
        description="Disk space for uploaded LoRAs, in GiB; further uploads are refused with 507.",
    )
    uploads_per_key_gb: float | None = Field(
        None,
        gt=0,
        validation_alias="FIDELORA_UPLOADS_PER_KEY_GB",
        description="Disk space for each API key's uploaded LoRAs, in GiB; unlimited by default.",
    )
    bases_gb: float | None = Field(
        None,
        gt=0,
        validation_alias="FIDELORA_BASES_GB",
        description=(
            "Memory for loaded base models per worker, in GiB; by default one base model at a time."
        ),
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
        description="Serve the web page at `/` if its packages are installed.",
    )
    jobs_path: Path | None = Field(
        None,
        validation_alias="FIDELORA_JOBS_PATH",
        description=(
            "Folder with training runs that the web page may verify and `POST /v1/explain` may "
            "use; none by default. Every client with an API key has access to it."
        ),
    )
    job_max_mb: int = Field(
        1024,
        ge=1,
        validation_alias="FIDELORA_JOB_MAX_MB",
        description=(
            "Largest zip of a training run that the server accepts, in MiB; "
            "its content may be four times as large."
        ),
    )
    max_pixels: int = Field(
        2048 * 2048,
        ge=64 * 64,
        validation_alias="FIDELORA_MAX_PIXELS",
        description=(
            "Maximum width times height of an image; larger ones are refused. The default is "
            "2048 x 2048."
        ),
    )
    max_video_pixels: int = Field(
        2**27,
        ge=64 * 64,
        validation_alias="FIDELORA_MAX_VIDEO_PIXELS",
        description=(
            "Maximum width times height times frames of a video; larger ones are refused. The "
            "default, 134,217,728, allows 145 frames of 1280 x 720 pixels."
        ),
    )
    step_timeout_s: float = Field(
        600,
        gt=0,
        validation_alias="FIDELORA_STEP_TIMEOUT",
        description=(
            "Seconds without a finished step after which a worker is considered hung "
            "and is replaced. The first step, the decoding of images, and every step of a request "
            "whose earlier steps were slow may take up to three times as long."
        ),
    )
    stop_grace_s: float = Field(
        30,
        ge=0,
        validation_alias="FIDELORA_STOP_GRACE",
        description="Seconds that running requests have to finish when the server stops.",
    )
    model_aliases: str = Field(
        "",
        validation_alias="FIDELORA_MODEL_ALIASES",
        description=(
            "Other names of models, for clients of OpenAI's API that send a fixed name: a "
            "comma-separated list of `NAME=MODEL`, such as `dall-e-3=sd15,gpt-image-1=sdxl`."
        ),
    )
    emphasis: Emphasis = Field(
        "none",
        validation_alias="FIDELORA_EMPHASIS",
        description=(
            "Weighting of words in brackets in requests to AUTOMATIC1111's API that do not set "
            "`override_settings.emphasis`: none refuses weights such as `(word:1.2)`; original, "
            "no_norm and ignore compute them as the web UI does with these settings."
        ),
    )
    cors_origins: Annotated[frozenset[str], NoDecode] = Field(
        frozenset(),
        validation_alias="FIDELORA_CORS_ORIGINS",
        description=(
            "Origins of web pages that may call this server from a browser, separated by commas, "
            "such as `https://chat.example`. `*` allows all, on servers with API keys only."
        ),
    )
    report_file_paths: bool = Field(
        True,
        validation_alias="FIDELORA_REPORT_FILE_PATHS",
        description=(
            "Report the full path of each image on the server as `file_path` in results, as "
            "ai-toolkit-inference does; if false, only the name of the file."
        ),
    )
    log_format: Literal["auto", "json", "text"] = Field(
        "auto",
        validation_alias="FIDELORA_LOG_FORMAT",
        description="json, text, or auto: text on a terminal and json elsewhere.",
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Return the sources of values: arguments, then variables that are meant for Fidelora.

        The environment and `.env` are one source, in which the environment takes precedence.
        Otherwise `HOST` in the environment would take precedence over `FIDELORA_HOST` in `.env`.
        """
        assert isinstance(env_settings, EnvSettingsSource)
        variables = _variables(settings_cls)
        foreign = foreign_variables(variables)
        env_settings.env_vars = {
            name: value for name, value in variables.items() if name not in foreign
        }
        return init_settings, env_settings

    @field_validator("base_url")
    @classmethod
    def _check_base_url(cls, value: str) -> str:
        if value and foreign_variables({"BASE_URL": value}):
            raise ValueError("it is not a URL; write http:// or https:// and the server's name")
        return value

    @field_validator("object_store")
    @classmethod
    def _check_object_store(cls, value: str) -> str:
        if value:
            try:
                bucket_and_prefix(value)
            except SettingsError as error:
                raise ValueError(str(error).removesuffix(".")) from None
        return value

    @field_validator("lora_hosts", mode="before")
    @classmethod
    def _split_hosts(cls, value: object) -> object:
        return (
            [host.strip().lower() for host in value.split(",") if host.strip()]
            if isinstance(value, str)
            else value
        )

    @field_validator("lora_hosts")
    @classmethod
    def _check_hosts(cls, value: frozenset[str]) -> frozenset[str]:
        if invalid := [
            host for host in value if not re.fullmatch(r"(\*\.)?[\w-]+(\.[\w-]+)*", host)
        ]:
            raise ValueError(
                f"{invalid[0]!r} is not a hostname; use names such as huggingface.co or *.hf.co"
            )
        return value

    @field_validator("cors_origins", mode="before")
    @classmethod
    def _split_origins(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        return frozenset(one.strip().rstrip("/") for one in value.split(",") if one.strip())

    @field_validator("cors_origins")
    @classmethod
    def _check_origins(cls, value: frozenset[str]) -> frozenset[str]:
        for origin in value:
            if origin != "*" and not re.fullmatch(r"https?://[^/\s?#]+", origin):
                raise ValueError(f"{origin!r} is not an origin; write https://chat.example, or *")
        return value

    @field_validator("base_model")
    @classmethod
    def _check_base_models(cls, value: str) -> str:
        bases = _parse_base_models(value)
        if not all(base for _, base in bases):
            raise ValueError("a model has no base after its =; write MODEL=BASE")
        if len({model for model, _ in bases}) < len(bases):
            raise ValueError("a model has two bases; name each model once")
        return value

    @field_validator("training_adapter")
    @classmethod
    def _check_training_adapters(cls, value: str) -> str:
        families = all_families()
        for model, file in _parse_base_models(value, unnamed=""):
            known = [one for one, spec in families.items() if "training_adapters" in spec.uses]
            if not file or model not in known:
                raise ValueError(
                    f"write MODEL=FILE; models with a training adapter: {', '.join(known)}"
                )
        return value

    @field_validator("model_aliases")
    @classmethod
    def _check_model_aliases(cls, value: str) -> str:
        for name, model in _parse_model_aliases(value):
            if not name or model not in all_families():
                raise ValueError(
                    f"{name}={model} is not NAME=MODEL; MODEL must be one of "
                    f"{', '.join(all_families())}"
                )
        return value

    @property
    def aliases_of_models(self) -> dict[str, str]:
        """The models in `model_aliases`, by the other name."""
        return dict(_parse_model_aliases(self.model_aliases))

    @property
    def base_models(self) -> dict[str, str]:
        """The bases in `base_model`, by model id, in the given order."""
        return dict(_parse_base_models(self.base_model))

    @property
    def training_adapters(self) -> dict[str, Path]:
        """The files in `training_adapter`, by model id."""
        pairs = _parse_base_models(self.training_adapter, unnamed="")
        return {model: Path(file).expanduser().absolute() for model, file in pairs}

    @property
    def offload(self) -> Offload:
        """Offload mode, from `offload_mode` or its older name."""
        return self.offload_mode or ("model" if self.enable_cpu_offload else "none")

    @property
    def devices(self) -> list[str]:
        """Devices; each runs one worker."""
        names = [name.strip() for name in self.device.split(",")]
        return [] if self.device.strip().lower() == "none" else names

    @property
    def loras(self) -> Path:
        """Folder with the LoRAs that requests can name."""
        return (self.workflows_base_path or self.data_dir / "loras").expanduser().absolute()

    @property
    def jobs(self) -> Path | None:
        """Folder with training runs that the web page may verify."""
        return self.jobs_path.expanduser().absolute() if self.jobs_path else None

    @property
    def outputs(self) -> Path:
        """Folder for images."""
        return (self.output_base_path or self.data_dir / "outputs").expanduser().absolute()

    @property
    def adapters(self) -> Path:
        """Cache folder for LoRAs, whose files are named by their sha256."""
        return (self.lora_cache_dir or self.data_dir / "adapters").expanduser().absolute()

    @property
    def database(self) -> str:
        """URL of the job database."""
        return (
            self.store_url.get_secret_value()
            or f"sqlite:///{self.data_dir.expanduser().absolute()}/jobs.sqlite"
        )

    @property
    def can_share_database(self) -> bool:
        """True if several servers can use the job database, so their common state is in it."""
        return self.database.partition(":")[0].partition("+")[0] in ("postgres", "postgresql")


def _parse_model_aliases(text: str) -> list[tuple[str, str]]:
    pairs = (one.partition("=") for one in text.split(",") if one.strip())
    return [(name.strip(), model.strip()) for name, _, model in pairs]


def _parse_base_models(text: str, unnamed: str | None = None) -> list[tuple[str, str]]:
    """Return (model id, base) pairs.

    Only a comma before `MODEL=` separates entries, as other commas may be part of a path.

    Args:
        unnamed: model id of an entry without `MODEL=`; by default the first family's.
    """
    marks = [*re.finditer(rf"(?:^|,)({'|'.join(all_families())})=", text)]
    ends = [*(mark.start() for mark in marks), len(text)]
    default = next(iter(all_families())) if unnamed is None else unnamed
    first = [(default, text[: ends[0]])] if ends[0] else []
    return first + [
        (mark[1], text[mark.end() : end]) for mark, end in zip(marks, ends[1:], strict=True)
    ]


def setting_warnings() -> list[str]:
    """Return a sentence for each variable, in the environment or `.env`, that has no effect."""
    names = [*map(names_of, Settings.model_fields.values()), (KEEP_VARIABLE,)]
    return ignored_variables(_variables(Settings), names)


def _variables(settings: type[BaseSettings]) -> dict[str, str | None]:
    """Return the variables of `.env` and of the environment, by name in lower case."""
    return {**DotEnvSettingsSource(settings).env_vars, **EnvSettingsSource(settings).env_vars}


def read_settings(options: Mapping[str, str] | None = None, /, **overrides: Any) -> Settings:
    """Return the settings from the environment and `.env`.

    Args:
        options: command-line options that set `overrides`, by field name, for error messages.
        overrides: values by field name, which take precedence over both unless they are None.

    Raises:
        SettingsError: a value is not valid.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    try:
        return Settings(**given)
    except ValidationError as error:
        # The input is left out because it may be a secret.
        first = error.errors(include_url=False, include_input=False)[0]
        source = _source_of(str(first["loc"][0]), given, options or {})
        raise SettingsError(f"Invalid value for {source}: {field_sentence(first)}") from error


def _source_of(name: str, given: Mapping[str, Any], options: Mapping[str, str]) -> str:
    """Return the option or the variable that set a value, with the file if it is in `.env`.

    Args:
        name: name of the field, or of a variable that sets it.
    """
    field, names = next(
        (field, names_of(info))
        for field, info in Settings.model_fields.items()
        if name == field or name in names_of(info)
    )
    if field in given:
        return f"'{options[field]}'" if field in options else field
    environment = EnvSettingsSource(Settings).env_vars
    in_file = DotEnvSettingsSource(Settings).env_vars
    for variable in names:
        if environment.get(variable.lower()):
            return variable
        if in_file.get(variable.lower()):
            return f"{variable} in .env"
    return names[0]
