"""Spellings of LoRAs for transformers: the table in the documentation, and the wrong family."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.support import (
    CHROMA_LORA,
    FLUX_LORA,
    KLEIN_LORA,
    LUMINA2_LORA,
    QWEN_LORA,
    WAN21_LORA,
    ZIMAGE_LORA,
    save_adapter,
)

from fidelora.adapters.read import Adapter, read_adapter
from fidelora.engine.adapter_family import check_family, default_targets, explain_mismatch
from fidelora.errors import AdapterMismatchError
from fidelora.families import all_families, get_family

PAGE = Path(__file__).parents[2] / "docs" / "models" / "adapter-formats.md"
LORAS = {
    "flux": FLUX_LORA, "chroma": CHROMA_LORA, "flux2_klein_4b": KLEIN_LORA, "zimage": ZIMAGE_LORA,
    "qwen_image": QWEN_LORA, "lumina2": LUMINA2_LORA, "wan21_1b": WAN21_LORA,
}  # fmt: skip
"""Golden LoRA of each family of transformers, by id."""

TITLES = {"flux": "FLUX.1, Flex.1", "wan21_1b": "Wan 2.1, Wan 2.2"}
"""Rows of the table that are not named like the family."""

AMBIGUOUS = {("chroma", "flux"), ("chroma", "flux_cfg"), ("chroma", "flex1")}
"""LoRAs whose modules in the first blocks exist in another family, with the same shapes."""


def documented_names(model: str) -> list[str]:
    """Return the names of modules in the row of a family."""
    title = TITLES.get(model, get_family(model).title)
    (row,) = re.findall(rf"^\| {re.escape(title)} \|(.+)\|$", PAGE.read_text(), re.MULTILINE)
    return re.findall(r"`([^`]+)`", row)


def adapter_of(model: str, names: list[str], path: Path, **metadata: str) -> Adapter:
    """Return a LoRA of rank 1 with the shapes of the family's default base."""
    targets = default_targets(model)
    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        found = targets.find_names(name)
        rows = sum(targets.by_name[one].weight.shape[0] for one in found)
        if not found:  # a share of the rows
            share = targets._names.find_share(name)
            assert share is not None
            found = (share.target,)
            rows = targets.by_name[share.target].weight.shape[0] // sum(share.sizes)
            rows *= share.sizes[share.index]
        down, up = ("lora_down", "lora_up") if name.startswith("lora_") else ("lora_A", "lora_B")
        columns = targets.by_name[found[0]].weight.shape[1]
        tensors[f"{name}.{down}.weight"] = torch.ones(1, columns)
        tensors[f"{name}.{up}.weight"] = torch.ones(rows, 1)
    return read_adapter(save_adapter(path, tensors, **metadata))


def trainer_names(model: str) -> list[str]:
    """Return the names of modules in the golden LoRA, as the trainer wrote them."""
    return sorted({key.split(".lora_")[0] for key in load_file(LORAS[model])})


@pytest.mark.parametrize("model", LORAS)
def test_every_documented_spelling_is_read(model, tmp_path):
    names = documented_names(model)
    assert len(set(names)) >= 3
    for number, name in enumerate(dict.fromkeys(names)):
        for start in ("", "base_model.model.") if "." in name else ("",):
            path = tmp_path / f"{number}{start}.safetensors"
            adapter = adapter_of(model, [start + name], path)
            assert default_targets(model).bind(adapter).deltas


@pytest.mark.parametrize("model", LORAS)
def test_the_first_spelling_is_that_of_the_trainer(model):
    assert documented_names(model)[0] in trainer_names(model)


def test_the_table_has_a_row_for_every_family_of_transformers():
    shown = [get_family(model) for model in (*LORAS, "wan22_14b_t2v")]
    for family in all_families().values():
        names = {part.name for part in family.parts}
        base_versions = {one for other in shown for one in other.adapter_base_versions}
        if "transformer" in names:
            assert set(family.adapter_base_versions) <= base_versions


@pytest.mark.parametrize("base", all_families())
@pytest.mark.parametrize("model", LORAS)
def test_the_error_for_a_lora_of_another_family_names_that_family(model, base, tmp_path):
    own, other = get_family(model), get_family(base)
    if own.adapter_base_versions == other.adapter_base_versions:
        pytest.skip("the same family")
    names, path = trainer_names(model), tmp_path / "a.safetensors"
    named = adapter_of(model, names, path, ss_base_model_version=own.adapter_base_versions[0])
    refused = rf"an adapter for {re.escape(own.title)}, but the base model is of family"
    plain = adapter_of(model, names, tmp_path / "b.safetensors")
    targets = default_targets(base)
    if (model, base) in AMBIGUOUS:
        targets.bind(plain)
        with pytest.raises(AdapterMismatchError, match=refused):
            check_family(named, other)
        return
    for adapter in (named, plain):
        with pytest.raises(AdapterMismatchError) as caught:
            targets.bind(adapter)
        message = str(explain_mismatch(adapter, other, caught.value))
        if adapter is named or model != "chroma":  # without metadata, it could be for FLUX.1
            assert re.search(refused, message)
