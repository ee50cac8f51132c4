"""LoRAs as a resource: list, upload, delete."""

from __future__ import annotations

from bisect import bisect_right
from pathlib import PurePosixPath
from typing import Annotated

from fastapi import APIRouter, File, Form, Path, Query, Response, UploadFile

from fidelora.api import LoraBody, LoraList
from fidelora.errors import AdapterInUseError
from fidelora.loras.describe import describe_adapter
from fidelora.loras.folder import UPLOADS, adapter_names, adapter_path, add_upload, upload_path
from fidelora.server.context import ContextDep, ServerContext
from fidelora.server.problems import error_responses

router = APIRouter(prefix="/v1/loras", tags=["loras"])


@router.get("", responses=error_responses())
def list_loras(
    context: ContextDep,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    cursor: Annotated[
        str | None,
        Query(min_length=1, max_length=4096, description="`next_cursor` of the previous page."),
    ] = None,
) -> LoraList:
    """List the LoRA files that requests can use, sorted by path."""
    names = adapter_names(context.settings.loras)
    start = bisect_right(names, cursor) if cursor is not None else 0
    page = names[start : start + limit]
    has_more = start + limit < len(names)
    return LoraList(
        loras=[_lora_body(name, context) for name in page],
        next_cursor=page[-1] if has_more else None,
    )


@router.post(
    "",
    status_code=201,
    responses=error_responses(409, 503)
    | {200: {"model": LoraBody, "description": "The same file exists under this name already"}},
)
def upload_lora(
    context: ContextDep,
    response: Response,
    file: Annotated[UploadFile, File(description="The .safetensors file.")],
    name: Annotated[
        str | None,
        Form(
            max_length=200, description="Name of the stored file; by default the file's own name."
        ),
    ] = None,
) -> LoraBody:
    """Upload a LoRA. Requests refer to it by the `path` in the response."""
    context.refuse_if_stopping()
    path, is_new = add_upload(context.settings.loras, file.file, name or file.filename or "")
    if not is_new:
        response.status_code = 200
    return _lora_body(path, context)


@router.delete("/{name}", status_code=204, responses=error_responses(404, 409))
def delete_lora(name: Annotated[str, Path(max_length=200)], context: ContextDep) -> None:
    """Delete an uploaded LoRA. Other files in the folder cannot be deleted over HTTP."""
    path = upload_path(context.settings.loras, name.removeprefix(f"{UPLOADS}/"))
    sha256 = context.cache.sha256_of(path)
    if context.store.needs_adapter(sha256):
        raise AdapterInUseError
    path.unlink(missing_ok=True)
    context.cache.path(sha256).unlink(missing_ok=True)


def _lora_body(name: str, context: ServerContext) -> LoraBody:
    path = adapter_path(context.settings.loras, name)
    summary = describe_adapter(path)
    return LoraBody(
        path=name,
        sha256=context.cache.sha256_of(path),
        type=summary.kind,
        ranks=list(summary.ranks),
        modules=summary.modules,
        tokens=summary.tokens,
        dtypes=list(summary.dtypes),
        text_encoder=summary.text_encoder,
        size_bytes=summary.size_bytes,
        trigger=summary.trigger,
        step=summary.step,
        epoch=summary.epoch,
        base=summary.base,
        trainer=summary.trainer,
        uploaded=PurePosixPath(name).parts[0] == UPLOADS,
        problems=list(summary.problems),
    )
