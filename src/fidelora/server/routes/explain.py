"""Explain: why a picture of another program differs from a sample of a training run."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, File, Form, Request, UploadFile
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool

from fidelora.api.explanations import ExplanationBody, ProgramName
from fidelora.atomic import make_folder, remove_folder
from fidelora.checks import MAX_PROMPT_CHARACTERS
from fidelora.errors import (
    BodyTooLargeError,
    FideloraError,
    QueueFullError,
    RequestError,
    RequestFieldError,
)
from fidelora.recipe import MAX_GUIDANCE, MAX_SEED, MAX_STEPS
from fidelora.server.context import ContextDep, ServerContext
from fidelora.server.middleware import MAX_IMAGE_BYTES
from fidelora.server.page.verification_progress import with_pauses
from fidelora.server.page.verifications import (
    find_run,
    read_contained_run,
    server_base_model,
    unpack_run,
)
from fidelora.server.problems import error_responses
from fidelora.server.public_texts import public_text
from fidelora.server.verifier import Outcome, random_id

router = APIRouter(prefix="/v1", tags=["inference"])

_STALE_S = 24 * 3600.0
"""Age in seconds at which folders that a killed process left behind are removed."""
_DISCONNECT_INTERVAL_S = 1.0  # seconds between two checks that the client is still connected
_EXPLAINED = (0, 1, 4)  # exit codes of `fidelora explain` with an explanation

Name = Annotated[str | None, Form(max_length=200)]


@router.post("/explain", responses=error_responses(429, 503, 507))
async def explain(
    request: Request,
    context: ContextDep,
    picture: Annotated[UploadFile, File(description="PNG, JPEG or WebP of another program.")],
    # Without None in its type, because OpenAPI's tools send only a plain binary field as a file.
    run: Annotated[
        UploadFile, File(description="Zip of the training run's folder; or set run_name.")
    ] = None,  # type: ignore[assignment]
    run_name: Annotated[
        str | None,
        Form(max_length=1000, description="Training run below FIDELORA_JOBS_PATH on the server."),
    ] = None,
    step: Annotated[
        int | None,
        Form(ge=0, le=10**9, description="By default the step of the picture's LoRA."),
    ] = None,
    index: Annotated[
        int | None,
        Form(ge=0, le=10**6, description="Sample to compare with; by default the most similar."),
    ] = None,
    program: Annotated[
        ProgramName | None, Form(description="Needed only if the file does not contain it.")
    ] = None,
    prompt: Annotated[str | None, Form(max_length=MAX_PROMPT_CHARACTERS)] = None,
    negative: Annotated[str | None, Form(max_length=MAX_PROMPT_CHARACTERS)] = None,
    steps: Annotated[int | None, Form(ge=1, le=MAX_STEPS)] = None,
    sampler: Name = None,
    scheduler: Name = None,
    guidance: Annotated[float | None, Form(ge=0, le=MAX_GUIDANCE, allow_inf_nan=False)] = None,
    seed: Annotated[int | None, Form(ge=0, le=MAX_SEED)] = None,
    clip_skip: Annotated[
        int | None,
        Form(ge=0, le=12, description="As the program counts; for ComfyUI without the minus sign."),
    ] = None,
) -> ExplanationBody:
    """Explain why a picture of another program differs from the trainer's sample.

    The response arrives when the explanation is finished, after about the time of 10 to 40 images.
    One picture is explained at a time. If the client disconnects, the work is stopped.
    """
    context.refuse_if_unavailable()
    packed: UploadFile | None = run
    if (packed is None) == (run_name is None):
        raise RequestFieldError("Send either run (a zip) or run_name.", loc=("run",))
    if context.verifier.busy:
        raise QueueFullError("Another picture or training run is being examined; try again later.")
    options = {
        "--step": step, "--index": index, "--program": program, "--prompt": prompt,
        "--steps": steps, "--sampler": sampler, "--scheduler": scheduler, "--guidance": guidance,
        "--seed": seed, "--negative": negative, "--clip-skip": clip_skip,
    }  # fmt: skip
    # One argument with "=", so that a text such as "--help" is not another option.
    arguments = [f"{name}={value}" for name, value in options.items() if value is not None]
    root = context.settings.data_dir.expanduser().absolute() / "explanations"
    workspace = root / random_id()
    try:
        folder, base_model, file = await run_in_threadpool(
            _prepare, context, root, workspace, picture, packed, run_name
        )
        found = await _explained(
            request, context, folder, file, base_model, workspace / "report", arguments
        )
        found.picture = Path(picture.filename or "picture").name[:200]
        return found
    finally:
        await run_in_threadpool(remove_folder, workspace)


def _prepare(
    context: ServerContext,
    root: Path,
    workspace: Path,
    picture: UploadFile,
    run: UploadFile | None,
    run_name: str | None,
) -> tuple[Path, str, Path]:
    """Store the uploads; return the run's folder, the server's base model, and the picture.

    Raises:
        RequestError: the training run cannot be used.
        BodyTooLargeError: a file is too large.
    """
    make_folder(workspace / "report")
    _remove_stale(root)
    file = workspace / "picture"
    _store(picture, file, MAX_IMAGE_BYTES)
    try:
        if run is not None:
            max_bytes = context.settings.job_max_mb * 2**20
            packed = workspace / "run.zip"
            _store(run, packed, max_bytes)
            folder, _ = unpack_run(packed, workspace / "run", max_bytes)
        else:
            folder = find_run(context.settings.jobs, run_name or "")
        found = read_contained_run(folder, context)
        return folder, server_base_model(found, context), file
    except BodyTooLargeError:
        raise
    except FideloraError as error:
        raise _refused(error, workspace) from error


def _store(upload: UploadFile, path: Path, max_bytes: int) -> None:
    if upload.size is not None and upload.size > max_bytes:
        raise BodyTooLargeError(
            f"{path.name} is too large; at most {max_bytes:,} bytes are allowed."
        )
    with path.open("xb") as file:
        shutil.copyfileobj(upload.file, file)


def _remove_stale(root: Path) -> None:
    before = time.time() - _STALE_S
    for entry in root.iterdir():
        try:
            if entry.stat().st_mtime < before:
                remove_folder(entry)
        except FileNotFoundError:  # removed in the meantime
            continue


async def _explained(
    request: Request,
    context: ServerContext,
    folder: Path,
    picture: Path,
    base_model: str,
    out: Path,
    options: Sequence[str],
) -> ExplanationBody:
    """Run `fidelora explain` and return its result.

    Raises:
        RequestError: the picture or the training run cannot be used.
        CancelledError: the client disconnected.
    """
    lines: list[str] = []
    code = None
    output = context.verifier.explain(
        random_id(), folder, picture, base_model, out, [*options, "--json"]
    )
    try:
        async for line in with_pauses(output, _DISCONNECT_INTERVAL_S):
            if isinstance(line, Outcome):
                code = line.code
            elif line is None:
                if await request.is_disconnected():
                    raise asyncio.CancelledError
            elif not line.startswith("progress: "):
                lines.append(line)
    except FideloraError as error:
        raise _refused(error, out.parent) from error
    if code in _EXPLAINED and "{" in lines:
        # The object is the last output, and its braces have lines of their own.
        text = "\n".join(lines[lines.index("{") :])
        try:
            return ExplanationBody.model_validate(json.loads(text)["pictures"][0])
        except (ValueError, KeyError, IndexError, ValidationError) as error:
            raise RequestError(
                "The output of fidelora explain cannot be read. This is a bug; please report it.",
                code="EXPLANATION_FAILED",
            ) from error
    message = next(
        (line for line in reversed(lines) if line), "fidelora explain ended without output."
    )
    raise _refused(RequestError(message.removeprefix("error: ")), out.parent)


def _refused(error: FideloraError, workspace: Path) -> RequestError:
    """Return an error without the paths of this server's folders."""
    message = str(error).replace(f"{workspace / 'run'}/", "").replace(f"{workspace}/", "")
    return RequestError(public_text(message), code="EXPLANATION_FAILED")
