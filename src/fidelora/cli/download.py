"""`fidelora download`."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Annotated
from urllib.parse import unquote, urlsplit

import typer

from fidelora.adapters.tensor_names import MAX_ADAPTER_BYTES, modules_of
from fidelora.atomic import output_error, temporary_name
from fidelora.cli.console import fail, make_output_folder
from fidelora.cli.options import Debug
from fidelora.errors import (
    AdapterExistsError,
    RecipeError,
    UsageError,
)
from fidelora.families import all_families, get_family
from fidelora.loras.hub import HubFile
from fidelora.recipe import file_sha256
from fidelora.safetensors_header import read_file_header

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_TIMEOUT_S = 24 * 3600.0  # for one LoRA; long, because the user can interrupt the download


def download(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="Base model: a model family (sd15) or a hub id (owner/name, "
            "owner/name@revision). LoRA: hf:owner/name/file.safetensors or an https URL.",
            autocompletion=lambda: list(all_families()),
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            "--out",
            metavar="DIR",
            help="Folder for a LoRA, by default the current one. Base models stay in the cache "
            "folder of the hub (HF_HOME).",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Model family, if SOURCE is the hub id of a base model; by default sd15. It "
            "determines which files are downloaded.",
            autocompletion=lambda: list(all_families()),
        ),
    ] = None,
    variant: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="Variant of a base model's files, such as fp16; by default none."
        ),
    ] = "",
    quiet: Annotated[
        bool, typer.Option("-q", "--quiet", help="Print neither the path nor a progress bar.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Download a base model or a LoRA, check it, and print its path.

    Files in the hub's cache folder are not downloaded again. Private and gated repositories need
    HF_TOKEN.
    """
    if quiet:
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()
    is_lora = source.startswith("hf:") or _URL.match(source) is not None
    if is_lora and (variant or model):
        raise UsageError("--model and --variant apply to base models only; leave them out.")
    if not is_lora and out is not None:
        raise UsageError(
            "--output applies to LoRAs only; leave it out. Base models stay in the hub's cache "
            "folder."
        )
    path = (
        _fetch_lora(source, (out or Path()).expanduser())
        if is_lora
        else _fetch_base(source, model, variant)
    )
    if not quiet:
        typer.echo(path)


def _fetch_base(source: str, model: str | None, variant: str) -> Path:
    """Download a base model unless it is in the cache, and return its path."""
    from fidelora.weights.files import BaseFiles

    if source in all_families():
        if model not in (None, source):
            raise RecipeError(
                f"{source} is a model family itself; leave out --model {model}.", field="model"
            )
        family = get_family(source)
        source = family.base_model
    else:
        family = get_family(model or next(iter(all_families())))
    return BaseFiles.find(family, source, variant=variant).source


def _fetch_lora(source: str, folder: Path) -> Path:
    """Download a LoRA to a folder and return its path. A file with other contents is not replaced.

    Raises:
        AdapterError, WeightsFileError: the download failed, or the file is not an adapter.
        AdapterExistsError: the folder has another file with this name.
        OutputError: the file cannot be written.
    """
    target = folder / _file_name(source)
    make_output_folder(folder)
    temporary = folder / temporary_name()
    try:
        if source.startswith("hf:"):
            shutil.copyfile(HubFile.parse(source).fetch(None, MAX_ADAPTER_BYTES), temporary)
        else:
            _download_url(source, temporary)
        modules_of(read_file_header(temporary), target.name)
        if target.exists() and file_sha256(temporary) != file_sha256(target):
            raise AdapterExistsError(
                f"{target} exists and has other contents; delete it, or set another --output."
            )
        temporary.replace(target)
    except OSError as error:
        rest = "No unfinished file was left."
        raise output_error(f"{target} could not be written", error, rest) from error
    finally:
        temporary.unlink(missing_ok=True)
    return target


def _file_name(source: str) -> str:
    """Return the name of the file at a URL or on the hub.

    Raises:
        AdapterNameError: the path on the hub is not that of a .safetensors file.
    """
    if source.startswith("hf:"):
        return Path(HubFile.parse(source).file).name
    name = unquote(urlsplit(source).path).rsplit("/", 1)[-1]
    stem = re.sub(r"[^\w.+ -]", "_", name.removesuffix(".safetensors"))
    return f"{stem.lstrip('.') or 'lora'}.safetensors"


def _download_url(url: str, target: Path) -> None:
    try:
        import asyncio

        from huggingface_hub import get_token

        from fidelora.loras.download import DownloadRules
        from fidelora.loras.download import download as download_url
    except ModuleNotFoundError as error:
        fail(
            "Downloads from URLs need more packages; in the folder of Fidelora's repository, run: "
            f"pip install '.[server]' ({error.name} is missing)",
            1,
        )
    rules = DownloadRules(hosts=None, max_bytes=MAX_ADAPTER_BYTES, timeout_s=_TIMEOUT_S)
    asyncio.run(download_url(url, target, rules, token=get_token()))
