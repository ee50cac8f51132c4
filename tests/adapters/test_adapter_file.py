"""Adapter files are opened and hashed once, and changes in between are harmless or detected."""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.support import GOLDEN_JOBS, LOKR, LORA, LORA_CONV, SDXL_DORA, TINY_BASE

from fidelora import AdapterRef, Engine, Recipe, adapter_file
from fidelora.adapter_file import EMPTY_SHA256, AdapterFile
from fidelora.adapters.library import AdapterLibrary
from fidelora.adapters.read import read_adapter
from fidelora.adapters.tensor_names import noise_of_adapter, noise_of_file
from fidelora.engine.examine import examine_adapter
from fidelora.errors import AdapterChangedError, AdapterNotFoundError, WeightsFileError
from fidelora.families import get_family
from fidelora.loras.cache import AdapterCache
from fidelora.recipe import file_sha256
from fidelora.training.plan import plan_samples
from fidelora.training.run_folder import read_run
from fidelora.weights.content import ContentHashes
from fidelora.weights.files import BaseFiles

SMALL: dict[str, Any] = {"base_model": str(TINY_BASE), "width": 64, "height": 64, "steps": 1}


class Log:
    """Names of files opened for reading, and number of hashed bytes, while it is active."""

    def __init__(self) -> None:
        self.active = False
        self.opened: list[str] = []
        self.hashed_bytes = 0

    def audit(self, event: str, args: tuple[Any, ...]) -> None:
        if self.active and event == "open" and not str(args[1]).startswith(("w", "a", "x")):
            self.opened.append(Path(str(args[0])).name)

    def clear(self) -> None:
        self.opened, self.hashed_bytes = [], 0

    def opens_of(self, path: Path) -> int:
        return self.opened.count(path.name)


LOG = Log()
sys.addaudithook(LOG.audit)  # cannot be removed


class CountingSha256:
    """Replacement of `hashlib.sha256` that counts the bytes."""

    def __init__(self, content: bytes = b"") -> None:
        self._digest = hashlib.new("sha256")
        self.update(content)

    def update(self, content: bytes) -> None:
        LOG.hashed_bytes += len(content)
        self._digest.update(content)

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


@pytest.fixture
def log(monkeypatch) -> Iterator[Log]:
    # The hashes of the base model are remembered from here on; hashing it would be counted.
    ContentHashes().sha256_of(BaseFiles.find(get_family("sd15"), str(TINY_BASE)))
    file_digest = hashlib.file_digest

    def counting_file_digest(file: Any, name: Any) -> Any:
        LOG.hashed_bytes += os.fstat(file.fileno()).st_size
        return file_digest(file, "sha256")

    monkeypatch.setattr(hashlib, "sha256", CountingSha256)
    monkeypatch.setattr(hashlib, "file_digest", counting_file_digest)
    LOG.clear()
    LOG.active = True
    yield LOG
    LOG.active = False


@pytest.fixture
def lora(tmp_path) -> Path:
    """A LoRA file with a unique name."""
    return Path(shutil.copyfile(LORA, tmp_path / "a_lora.safetensors"))


@pytest.fixture
def other_bytes(lora) -> Callable[[], None]:
    """Return a function that overwrites the file in place: same size, other bytes."""

    def overwrite() -> None:
        content = bytearray(lora.read_bytes())
        content[-1] ^= 1
        lora.write_bytes(content)

    return overwrite


@pytest.mark.parametrize("mode", ["merged", "live"])
def test_the_engine_opens_and_hashes_a_file_once(log, lora, mode):
    ref = AdapterRef.from_file(lora)
    recipe = Recipe(prompt="a ball", adapters=(ref,), adapter_mode=mode, **SMALL)
    engine = Engine(device="cpu")
    engine.generate(recipe)
    engine.generate(replace(recipe, seed=7))
    assert (log.opens_of(lora), log.hashed_bytes // lora.stat().st_size) == (1, 1)


def test_the_command_line_opens_and_hashes_a_file_once(log, lora, monkeypatch, tmp_path):
    from typer.testing import CliRunner

    from fidelora.cli import app

    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(
        app,
        ["generate", "a ball", "--lora", f"{lora}:0.5", "--base-model", str(TINY_BASE),
         "--width", "64", "--height", "64", "--steps", "1", "--device", "cpu"],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert (log.opens_of(lora), log.hashed_bytes // lora.stat().st_size) == (1, 1)


@pytest.mark.parametrize("source", [LORA, LOKR, SDXL_DORA])
def test_examining_a_file_opens_and_hashes_it_once(log, tmp_path, source):
    path = Path(shutil.copyfile(source, tmp_path / "examined.safetensors"))
    assert examine_adapter(path).usable
    assert (log.opens_of(path), log.hashed_bytes // path.stat().st_size) == (1, 1)


def test_the_cache_opens_a_new_file_once(log, lora, tmp_path):
    cache = AdapterCache(tmp_path / "cache", 10**9)
    ref = cache.add(lora, "a")
    assert (log.opens_of(lora), log.hashed_bytes) == (1, lora.stat().st_size)
    with cache.temporary() as temporary:
        shutil.copyfile(LORA_CONV, temporary)
        cache.adopt(temporary, file_sha256(LORA_CONV), "b")
    assert ref.sha256 == file_sha256(LORA)


def test_a_worker_opens_a_file_of_the_cache_once(log, lora, tmp_path):
    ref = AdapterRef(AdapterCache(tmp_path / "cache", 10**9).add(lora, "a").sha256)
    log.clear()
    AdapterLibrary(folder=tmp_path / "cache").get(ref)
    assert (log.opened, log.hashed_bytes) == (
        [f"{ref.sha256}.safetensors"],
        lora.stat().st_size,
    )


def test_all_samples_of_a_step_open_its_checkpoint_once(log, tmp_path):
    run = read_run(Path(shutil.copytree(GOLDEN_JOBS / "prompts", tmp_path / "prompts")))
    step = max(run.checkpoints)
    log.clear()
    samples = plan_samples(run, step, base_model=str(TINY_BASE))
    assert len(samples) > 1
    library = AdapterLibrary()
    for sample in samples:
        for ref in sample.recipe.adapters:
            library.get(ref)
    assert log.opens_of(run.checkpoints[step]) == 1


def test_the_kept_bytes_are_those_that_were_hashed(lora, other_bytes):
    ref = AdapterRef.from_file(lora)
    other_bytes()
    assert AdapterLibrary().get(ref).sha256 == ref.sha256 == file_sha256(LORA)
    with pytest.raises(AdapterChangedError, match="has changed: its sha256 is"):
        AdapterLibrary().get(ref)  # the first call has taken the kept bytes


def test_a_removed_file_is_read_from_the_kept_bytes(lora):
    ref = AdapterRef.from_file(lora)
    lora.unlink()
    assert AdapterLibrary().get(ref).sha256 == ref.sha256
    with pytest.raises(AdapterNotFoundError):
        AdapterLibrary().get(ref)


def test_content_that_was_taken_is_read_and_checked_again(lora, other_bytes):
    file = AdapterFile.open(lora)
    first = file.take_content()
    assert not file.keeps_content
    assert file.take_content() == first
    other_bytes()
    with pytest.raises(AdapterChangedError):
        file.take_content()


@pytest.mark.parametrize("stored", [None, EMPTY_SHA256.upper(), "x" * 64, "ab"])
def test_the_hash_of_the_tensors_is_computed(tmp_path, stored):
    path = tmp_path / "a.safetensors"
    metadata = {} if stored is None else {"sshs_model_hash": stored}
    save_file({"x": torch.arange(3.0)}, path, metadata)
    file = AdapterFile.open(path)
    assert file.tensors_sha256 == ""
    file.take_content()
    assert file.tensors_sha256 == hashlib.sha256(torch.arange(3.0).numpy().tobytes()).hexdigest()


def test_the_hash_of_the_tensors_in_the_metadata_is_used(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "a.safetensors", {"sshs_model_hash": "AB" * 32})
    file = AdapterFile.open(tmp_path / "a.safetensors")
    file.take_content()
    assert file.tensors_sha256 == "ab" * 32


def test_images_contain_the_hash_of_the_tensors(lora):
    engine = Engine()
    recipe = Recipe(prompt="a ball", adapters=(AdapterRef.from_file(lora),), **SMALL)
    content = lora.read_bytes()
    of_tensors = hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
    for _ in range(2):  # also for an adapter that is in memory already
        assert f'Lora hashes: "a_lora: {of_tensors[:12]}"' in engine.generate(recipe).parameters


def test_a_reference_with_another_hash_does_not_use_the_kept_bytes(lora):
    ref = replace(AdapterRef.from_file(lora), sha256=file_sha256(LORA_CONV), path=LORA_CONV)
    assert AdapterLibrary().get(ref).sha256 == file_sha256(LORA_CONV)
    assert noise_of_adapter(ref) == noise_of_file(LORA_CONV)


def test_contents_beyond_the_budget_are_not_kept(lora, monkeypatch):
    monkeypatch.setattr(adapter_file, "MAX_KEPT_BYTES", lora.stat().st_size)
    monkeypatch.setattr(adapter_file, "_kept", type(adapter_file._kept)())
    first = AdapterRef.from_file(lora)
    second = AdapterRef.from_file(lora)
    assert first.file is not None
    assert second.file is not None
    assert (first.file.keeps_content, second.file.keeps_content) == (True, False)
    assert second.sha256 == first.sha256
    AdapterLibrary().get(first)
    third = AdapterRef.from_file(lora)
    assert third.file is not None
    assert third.file.keeps_content
    assert AdapterLibrary().get(second).sha256 == second.sha256


def test_an_adapter_in_memory_needs_no_kept_bytes(lora):
    library = AdapterLibrary()
    library.add(lora)
    ref = AdapterRef.from_file(lora)
    library.get(ref)
    assert ref.file is not None
    assert not ref.file.keeps_content


def test_a_reference_is_pickled_without_its_file(lora):
    ref = AdapterRef.from_file(lora)
    copied = pickle.loads(pickle.dumps(ref))
    assert copied == ref
    assert (copied.path, copied.file) == (ref.path, None)
    assert len(pickle.dumps(ref)) < 1000
    assert "file" not in Recipe(prompt="", adapters=(ref,)).to_dict()["adapters"][0]
    assert "AdapterFile" not in repr(ref)


def test_a_file_that_changes_while_it_is_read_is_refused(lora, other_bytes):
    def append(_header: Any) -> None:
        with lora.open("ab") as file:
            file.write(b"more")

    for keep in ("always", "never"):
        with pytest.raises(WeightsFileError, match="changed while it was read"):
            AdapterFile.open(lora, check=append, keep=keep)
        shutil.copyfile(LORA, lora)

    def change_header(_header: Any) -> None:
        content = lora.read_bytes()
        lora.write_bytes(content[:8] + content[8:].replace(b"F32", b"I32", 1))

    with pytest.raises(WeightsFileError, match="changed while it was read"):
        AdapterFile.open(lora, check=change_header)


def test_a_read_adapter_has_the_hash_of_its_bytes(lora):
    assert read_adapter(lora).sha256 == AdapterFile.open(lora, keep="never").sha256
    assert read_adapter(AdapterFile.open(lora)).sha256 == file_sha256(lora)
