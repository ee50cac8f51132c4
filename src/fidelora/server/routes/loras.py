"""LoRAs as a resource: list, upload, delete."""

from __future__ import annotations

from bisect import bisect_right
from pathlib import PurePosixPath
from typing import Annotated

from fastapi import APIRouter, File, Form, Path, Query, Response, UploadFile
from starlette.convertors import StringConvertor, register_url_convertor

from fidelora.api import LoraBody, LoraList
from fidelora.errors import AdapterInUseError
from fidelora.loras.describe import describe_adapter
from fidelora.loras.folder import UPLOADS, adapter_names, adapter_path
from fidelora.server.access import Caller
from fidelora.server.context import CallerDep, ContextDep, ServerContext
from fidelora.server.lora_fit import fit_of_file
from fidelora.server.problems import error_responses
from fidelora.server.public_texts import public_text


class _UploadConvertor(StringConvertor):
    """Path parameter that may contain slashes but, unlike Starlette's `path`, is not empty.

    An empty one would match `/v1/loras/`, which is redirected to `/v1/loras`.
    """

    regex = ".+"


register_url_convertor("upload", _UploadConvertor())
router = APIRouter(prefix="/v1/loras", tags=["loras"])


@router.get("", responses=error_responses())
def list_loras(
    context: ContextDep,
    caller: CallerDep,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    cursor: Annotated[
        str | None,
        Query(min_length=1, max_length=4096, description="`next_cursor` of the previous page."),
    ] = None,
) -> LoraList:
    """List the LoRA files that requests can use, sorted by path.

    Uploads of other API keys are listed for admin keys only.
    """
    names = adapter_names(context.settings.loras, owner=caller.visible_owner)
    start = bisect_right(names, cursor) if cursor is not None else 0
    page = names[start : start + limit]
    has_more = start + limit < len(names)
    return LoraList(
        loras=[_lora_body(name, context, caller) for name in page],
        next_cursor=page[-1] if has_more else None,
    )


@router.post(
    "",
    status_code=201,
    responses=error_responses(409, 503, 507)
    | {200: {"model": LoraBody, "description": "The same file exists under this name already"}},
)
def upload_lora(
    context: ContextDep,
    caller: CallerDep,
    response: Response,
    file: Annotated[UploadFile, File(description="The .safetensors file.")],
    name: Annotated[
        str | None,
        Form(
            max_length=200, description="Name of the stored file; by default the file's own name."
        ),
    ] = None,
) -> LoraBody:
    """Upload a LoRA. Requests refer to it by the `path` in the response.

    Only requests with the same API key, or with an admin key, can use it.
    """
    context.refuse_if_stopping()
    path, is_new = context.uploads.add(file.file, name or file.filename or "", caller.owner)
    if not is_new:
        response.status_code = 200
    return _lora_body(path, context, caller)


@router.delete("/{name:upload}", status_code=204, responses=error_responses(404, 409))
def delete_lora(
    name: Annotated[
        str,
        Path(max_length=250, description="`path` of the upload, or the name of one of your own."),
    ],
    context: ContextDep,
    caller: CallerDep,
) -> None:
    """Delete an uploaded LoRA. Other files in the folder cannot be deleted over HTTP.

    Uploads of other API keys can be deleted with admin keys only.
    """
    path = context.uploads.find(name, caller.owner, is_admin=caller.is_admin)
    sha256 = context.cache.sha256_of(path)
    if context.store.needs_adapter(sha256):
        raise AdapterInUseError
    context.uploads.remove(path)
    context.cache.path(sha256).unlink(missing_ok=True)


def _lora_body(name: str, context: ServerContext, caller: Caller) -> LoraBody:
    path = adapter_path(context.settings.loras, name, owner=caller.visible_owner)
    summary = describe_adapter(path)
    fit = fit_of_file(path, context.configured_models)
    problems = [*summary.problems, *filter(None, [fit.problem])]
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
        models=list(fit.models),
        problems=[public_text(problem) for problem in problems],
    )
