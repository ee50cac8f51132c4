"""Every error that Fidelora raises on purpose, in one tree.

The docstring of a class is its default message. Nothing here knows HTTP, exit codes or logging: each edge (command line,
server) translates the tree once. Errors under `WrongUseError` mean that the request itself has to change; all others mean that
something outside the request (a file, a device, a disk) is not what it has to be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def some(names: Sequence[str], most: int = 3) -> str:
    """The first names of a list, for a message: `a, b, c and 12 more`."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


class FideloraError(Exception):
    """Fidelora could not do what was asked."""

    def __init__(self, message: str | None = None) -> None:
        text = message or " ".join((type(self).__doc__ or "").split())
        # Names from files go into messages, and messages go to terminals: nothing unprintable passes.
        super().__init__(
            "".join(
                character if character.isprintable() else repr(character)[1:-1]
                for character in text
            )
        )


class WrongUseError(FideloraError):
    """The request cannot be carried out as it is written; change it and try again."""


# --- recipes -----------------------------------------------------------------------------------------------------------


class RecipeError(WrongUseError):
    """A field of the recipe is missing or out of its range."""

    def __init__(self, message: str | None = None, *, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class UnknownModelError(RecipeError):
    """There is no model of this id; `fidelora models` lists those there are."""


class UnknownSamplerError(RecipeError):
    """There is no sampler of this name for this model; `fidelora models` lists those there are."""


# --- files of weights --------------------------------------------------------------------------------------------------


class WeightsFileError(FideloraError):
    """The file is not a sound .safetensors file."""


class PickleRefusedError(WeightsFileError):
    """The file is a Python pickle, which can run code when it is opened; convert it to .safetensors and use that."""


class NonFiniteWeightsError(WeightsFileError):
    """The file holds NaN or infinite weights, so every image made with it would be broken; use another checkpoint."""


# --- adapters ----------------------------------------------------------------------------------------------------------


class AdapterError(FideloraError):
    """The adapter cannot be used."""


class AdapterNotFoundError(AdapterError, WrongUseError):
    """There is no adapter file at this place; check the path."""


class AdapterPlaceError(AdapterError, WrongUseError):
    """The name of the adapter leads out of the folder of adapters, or to no adapter file."""


class AdapterFormatError(AdapterError):
    """The file is a sound .safetensors file but not an adapter of a kind that can be applied."""


class AdapterMismatchError(AdapterError):
    """The adapter does not fit the base model: some of its keys or shapes match nothing there."""


class AdapterChangedError(AdapterError):
    """The adapter's file has other bytes now than when the recipe was made; make a new recipe from the file."""


class AdaptersMissingError(AdapterError, WrongUseError):
    """Adapters that the image was made with are not here."""

    # `missing`: sha256 and name of each; a hash may be the beginning of one, or empty, if the image has no more.
    def __init__(
        self, message: str | None = None, *, missing: Sequence[tuple[str, str]] = ()
    ) -> None:
        self.missing = tuple(missing)
        named = some(
            [
                f"{name or 'an adapter'} ({f'sha256 {sha256}' if sha256 else 'no hash'})"
                for sha256, name in missing
            ],
            10,
        )
        super().__init__(
            message
            or (
                f"Adapters that the image was made with are not here: {named}." if missing else None
            )
        )


class AdapterUrlRefusedError(AdapterError, WrongUseError):
    """The URL of the adapter may not be used here."""


class AdapterDownloadError(AdapterError):
    """The adapter could not be fetched from its URL."""


class AdapterExistsError(AdapterError, WrongUseError):
    """There is another adapter of this name already; delete it first, or choose another name."""


class UploadNotFoundError(AdapterError, WrongUseError):
    """There is no uploaded LoRA of this name; files that were put there in other ways are not deleted over HTTP."""


class AdapterInUseError(AdapterError, WrongUseError):
    """A request that has not ended needs this adapter; cancel it, or wait until it is done."""


# --- base models -------------------------------------------------------------------------------------------------------


class BaseModelError(FideloraError):
    """The base model cannot be used."""


class BaseModelNotFoundError(BaseModelError, WrongUseError):
    """There is no base model at this place; check the path or the hub id."""


class BaseModelFilesError(BaseModelError):
    """The base model's files are incomplete or not of the kind that was asked for."""


class BaseModelWeightsError(BaseModelError):
    """The base model's weights do not fit its configuration, and filling gaps with random numbers is not an option."""


# --- running -----------------------------------------------------------------------------------------------------------


class DeviceError(WrongUseError):
    """The device or precision that was asked for is not available on this machine."""


class GenerationCancelled(FideloraError):
    """The generation was cancelled before it was done."""


class MemoryExhaustedError(FideloraError):
    """The device ran out of memory; use a smaller size, a narrower dtype (bfloat16), or offloading (model, then sequential)."""


class EngineBusyError(WrongUseError):
    """The engine is making an image, and was asked for another one from inside it (from `on_step`); ask after it."""


class NumericsError(FideloraError):
    """The model produced NaN, so there is no image."""


class OutputError(FideloraError):
    """The image could not be written."""


class ImageFormatError(OutputError, WrongUseError):
    """The name ends in no image format that is written here; use .png, .jpg or .webp."""


class ImageRecordError(FideloraError):
    """The image carries no recipe of Fidelora's."""


# --- training jobs -----------------------------------------------------------------------------------------------------


class JobFolderError(WrongUseError):
    """The folder is not an AI Toolkit training job that can be read."""


class NothingToCheckError(JobFolderError):
    """The job has no previews whose weights are there, so there is nothing to check."""


# --- requests ----------------------------------------------------------------------------------------------------------


class PromptSyntaxError(WrongUseError):
    """The prompt says something in AUTOMATIC1111's notation that cannot be done here."""


class RequestError(WrongUseError):
    """The request asks for something that cannot be done."""

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
    """A field of the request has a value that the model does not know."""

    def __init__(self, message: str | None = None, *, place: tuple[str | int, ...] = ()) -> None:
        super().__init__(message)
        self.place = place


# --- the server --------------------------------------------------------------------------------------------------------


class SettingsError(WrongUseError):
    """A setting has a value that it cannot have."""


class BodyTooLargeError(WrongUseError):
    """The body of the request is too large."""


class ServerStoppingError(FideloraError):
    """The server is about to stop and takes no more requests; send it again in a moment."""


class ApiKeyError(WrongUseError):
    """The API key is missing or not known here; send `Authorization: Bearer` with a key that `fidelora keys add` made."""


class ImageNotFoundError(WrongUseError):
    """The request has no such image; it has those that its result lists, once it has succeeded."""


class ImageGoneError(FideloraError):
    """The file of this image was removed or changed on the server's disk."""


# --- the client --------------------------------------------------------------------------------------------------------


class ApiError(FideloraError):
    """The server answered with an error."""

    # `status` of HTTP, 0 if there was no answer; `code` for programs, such as LORA_NOT_FOUND, empty if the answer had none.
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
    """The server cannot be reached, or has no time: the same request may succeed later."""


class ClientTimeoutError(FideloraError):
    """The request was not done in time; it goes on at the server."""


class RequestFailedError(FideloraError):
    """The request failed at the server."""

    # `code` is for programs, such as TIMEOUT; empty if the server has none.
    def __init__(self, message: str | None = None, *, code: str = "") -> None:
        super().__init__(message)
        self.code = code


class RequestCanceledError(FideloraError):
    """The request was canceled before it was done."""


# --- jobs --------------------------------------------------------------------------------------------------------------


class JobError(FideloraError):
    """The job cannot be changed in this way."""


class JobNotFoundError(JobError, WrongUseError):
    """There is no request (job) of this id; it may have been removed after its time."""


class LeaseLostError(JobError):
    """Another worker has the job now, or it has ended; what this one reports does not count any more."""


class CursorError(JobError, WrongUseError):
    """The cursor is none of this list's; begin again without it."""


class QueueFullError(JobError):
    """The queue is full; try again later."""


class IdempotencyConflictError(JobError, WrongUseError):
    """Another request was made under this idempotency key; use a new key for a new request."""


class JobStoreError(JobError):
    """The store of jobs cannot be used."""
