"""All errors that Fidelora raises on purpose, in one class hierarchy.

The docstring of a class is its default message. This module does not depend on HTTP, exit codes or
logging: the command line and the server each translate errors in one function. `UsageError` and its
subclasses mean that the input has to change; all other errors mean that something else (a file, a
device, a disk) is missing, invalid or failing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fidelora.texts import listed, plain_message


class FideloraError(Exception):
    """The operation failed."""

    def __init__(self, message: str | None = None) -> None:
        text = message or " ".join((type(self).__doc__ or "").split())
        super().__init__(plain_message(text))


class UsageError(FideloraError):
    """The request is invalid; change it and try again."""


# --- recipes --------------------------------------------------------------------------------------


class RecipeError(UsageError):
    """A field of the recipe is missing or out of range."""

    def __init__(self, message: str | None = None, *, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class UnknownModelError(RecipeError):
    """The model does not exist; `fidelora models` lists all models."""


class UnknownSamplerError(RecipeError):
    """The model has no sampler with this name; `fidelora models` lists each model's samplers."""


# --- weights files --------------------------------------------------------------------------------


class WeightsFileError(FideloraError):
    """The file is not a valid .safetensors file."""


class PickleRefusedError(WeightsFileError):
    """The file is a Python pickle, which can run code when opened; convert it to .safetensors."""


class NonFiniteWeightsError(WeightsFileError):
    """The file has NaN or infinite weights, which break every image; use another checkpoint."""


# --- adapters -------------------------------------------------------------------------------------


class AdapterError(FideloraError):
    """The adapter cannot be used."""


class AdapterNotFoundError(AdapterError, UsageError):
    """The adapter file does not exist; check its path."""


class AdapterNameError(AdapterError, UsageError):
    """The adapter's name is invalid: give the path of a .safetensors file in the adapter folder."""


class UploadNameError(AdapterNameError):
    """The name is not valid for an upload: it must end with .safetensors and contain no folder."""


class AdapterFormatError(AdapterError):
    """The file is a valid .safetensors file, but not an adapter of a supported kind."""


class AdapterMismatchError(AdapterError):
    """The adapter does not fit the base model: some of its keys or shapes do not match."""


class AdapterConversionError(AdapterError):
    """The adapter cannot be written in the requested format."""


class AdapterChangedError(AdapterError):
    """The adapter's file has changed since the recipe was made; make a new recipe from the file."""


class AdaptersMissingError(AdapterError, UsageError):
    """Adapters that the image was made with are not available."""

    # `missing`: sha256 and name of each missing adapter. A hash is shortened or empty if the image
    # does not contain all of it.
    def __init__(
        self, message: str | None = None, *, missing: Sequence[tuple[str, str]] = ()
    ) -> None:
        self.missing = tuple(missing)
        named = listed(
            [
                f"{name or 'an adapter'} ({f'sha256 {sha256}' if sha256 else 'no hash'})"
                for sha256, name in missing
            ],
            10,
        )
        super().__init__(
            message
            or (
                f"Adapters that the image was made with are not available: {named}."
                if missing
                else None
            )
        )


class AdapterUrlRefusedError(AdapterError, UsageError):
    """The adapter's URL is not allowed on this server."""


class AdapterDownloadError(AdapterError):
    """The adapter could not be downloaded from its URL."""


class AdapterExistsError(AdapterError, UsageError):
    """Another adapter has this name; delete it first, or choose another name."""


class UploadQuotaError(AdapterError):
    """The disk space for uploads is used up; delete some LoRAs, or raise FIDELORA_UPLOADS_GB."""


class UploadNotFoundError(AdapterError, UsageError):
    """No uploaded LoRA has this name; only uploaded files can be deleted over HTTP."""


class AdapterInUseError(AdapterError, UsageError):
    """A request that has not ended needs this adapter; cancel the request or wait until it ends."""


# --- base models ----------------------------------------------------------------------------------


class BaseModelError(FideloraError):
    """The base model cannot be used."""


class BaseModelNotFoundError(BaseModelError, UsageError):
    """The base model was not found; check the path or the hub id."""


class BaseModelChangedError(BaseModelError):
    """The base model's weights differ from those of the recipe; use the base model of the image."""


class BaseModelFilesError(BaseModelError):
    """The base model's files are incomplete or of the wrong kind."""


class BaseModelWeightsError(BaseModelError):
    """The base model's weights do not fit its configuration.

    Missing weights are never filled with random numbers; use a complete checkpoint.
    """


# --- running --------------------------------------------------------------------------------------


class DeviceError(UsageError):
    """The requested device or precision is not available on this machine."""


class GenerationCancelled(FideloraError):
    """The generation was canceled before it was complete."""


class MemoryExhaustedError(FideloraError):
    """The device ran out of memory.

    Use a smaller size, a narrower dtype (bfloat16), or offloading (model, then sequential).
    """


class EngineBusyError(UsageError):
    """The engine was called from `on_step`; call it after the image is finished."""


class NumericsError(FideloraError):
    """The model produced NaN, so there is no image."""


class OutputError(FideloraError):
    """The image could not be written."""


class StorageError(OutputError):
    """The server's disk or folder cannot be written to at the moment."""


class StorageFullError(StorageError):
    """The disk is full; free some space and try again."""


class ImageFormatError(OutputError, UsageError):
    """The file name's suffix is not a supported image format; use .png, .jpg, .webp or .mp4."""


class ImageRecordError(FideloraError):
    """The image does not contain a Fidelora recipe."""


# --- training runs --------------------------------------------------------------------------------


class TrainingRunError(UsageError):
    """The folder is not a readable AI Toolkit training run."""


class NothingToCheckError(TrainingRunError):
    """The training run has no samples whose weights exist, so there is nothing to check."""


# --- requests -------------------------------------------------------------------------------------


class PromptSyntaxError(UsageError):
    """The prompt uses AUTOMATIC1111 syntax that is not supported."""


class RequestError(UsageError):
    """The request cannot be carried out."""

    def __init__(
        self,
        message: str | None = None,
        *,
        code: str = "BAD_REQUEST",
        details: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.details = dict(details or {})


class RequestFieldError(RequestError):
    """A field of the request has a value that the model does not support."""

    # `loc`: path of the field in the request, as in pydantic: ("prompts", 0, "seed").
    def __init__(self, message: str | None = None, *, loc: tuple[str | int, ...] = ()) -> None:
        super().__init__(message)
        self.loc = loc


# --- the server -----------------------------------------------------------------------------------


class SettingsError(UsageError):
    """A setting has an invalid value."""


class BodyTooLargeError(UsageError):
    """The body of the request is too large."""


class ServerStoppingError(FideloraError):
    """The server is stopping and accepts no more requests; send the request again in a moment."""


class ServerNotReadyError(FideloraError):
    """The server cannot make images, because none of its workers can start."""


class ApiKeyError(UsageError):
    """The API key is missing or invalid.

    Send `Authorization: Bearer` with a key from `fidelora keys add`.
    """


class ServerFailedError(FideloraError):
    """The server stopped because of an internal error; see its log, and report the error."""


class PeerNotAllowedError(UsageError):
    """The server has no API keys, so it accepts only calls from its own machine.

    Create a key with `fidelora keys add`.
    """


class AdminKeyRequiredError(UsageError):
    """The key is not an admin key; `fidelora keys admin NAME` makes it one."""


class ImageNotFoundError(UsageError):
    """The image does not exist; the result of a successful request lists its images."""


class StreamsFullError(FideloraError):
    """The server has too many open event streams; read the status instead, or try again later."""


class ImageGoneError(FideloraError):
    """The file of this image was removed or changed on the server's disk."""


# --- the client -----------------------------------------------------------------------------------


class ApiError(FideloraError):
    """The server returned an error."""

    # `status`: HTTP status, 0 if there was no response. `code`: error code for programs, such as
    # LORA_NOT_FOUND; empty if the response had none.
    def __init__(
        self,
        message: str | None = None,
        *,
        status: int = 0,
        code: str = "",
        details: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.details = dict(details or {})


class ApiUnavailableError(ApiError):
    """The server cannot be reached or is overloaded; the same request may succeed later."""


class ClientTimeoutError(FideloraError):
    """The request did not end in time; it continues on the server."""


class RequestFailedError(FideloraError):
    """The request failed on the server."""

    # `code`: error code for programs, such as TIMEOUT; empty if the server returned none.
    def __init__(self, message: str | None = None, *, code: str = "") -> None:
        super().__init__(message)
        self.code = code


class RequestCanceledError(FideloraError):
    """The request was canceled before it was complete."""


# --- jobs -----------------------------------------------------------------------------------------


class JobError(FideloraError):
    """The job does not allow this change."""


class JobNotFoundError(JobError, UsageError):
    """The request (job) does not exist; it may have expired."""


class LeaseLostError(JobError):
    """Another worker has claimed the job, or it has ended; this worker's report was ignored."""


class CursorError(JobError, UsageError):
    """The cursor does not belong to this list; begin again without it."""


class QueueFullError(JobError):
    """The queue is full; try again later."""


class IdempotencyConflictError(JobError, UsageError):
    """Another request used this idempotency key; use a new key for a new request."""


class JobStoreError(JobError):
    """The job store cannot be used."""
