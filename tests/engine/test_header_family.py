"""Families that an adapter fits, by its header alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.support import GOLDEN_JOBS, LORA, MINIATURE_LORA, save_adapter
from tools.module_shapes import shapes_text

from fidelora.engine.header_family import SHAPES_FILE, HeaderFit, fit_header
from fidelora.families import all_families
from fidelora.safetensors_header import read_file_header

GOLDENS = {
    "bf16_save_f32": "sd15", "chroma_lora_f32": "chroma", "flux_bf16_save_f32": "flux",
    "klein_lokr": "flux2_klein_4b", "lumina2_lora_f32": "lumina2",
    "qwen_lora_f32": "qwen_image", "wan21_lora_f32": "wan21_1b", "xl_dora": "sdxl",
    "zimage_lokr": "zimage",
}  # fmt: skip


def fit(path: Path, *models: str) -> HeaderFit:
    return fit_header(read_file_header(path), path.name, models or list(all_families()))


def lora(path: Path, **modules: tuple[int, int]) -> Path:
    """Write a LoRA without metadata; `modules` maps names to rows and columns."""
    tensors = {}
    for name, (rows, columns) in modules.items():
        tensors[f"{name}.lora_down.weight"] = torch.zeros(2, columns)
        tensors[f"{name}.lora_up.weight"] = torch.zeros(rows, 2)
    return save_adapter(path, tensors)


def test_the_table_is_that_of_the_families():
    assert SHAPES_FILE.read_text(encoding="utf-8") == shapes_text()


@pytest.mark.parametrize(("run", "model"), GOLDENS.items())
def test_each_golden_lora_fits_its_own_family(run, model):
    path = GOLDEN_JOBS / run / f"{run}.safetensors"
    assert model in fit(path).models
    other = "sd15" if model != "sd15" else "sdxl"
    found = fit(path, other)
    assert found.models == ()
    assert f"`--base-model {model}=BASE`" in found.problem
    assert fit(path, other, model).models == (model,)


def test_metadata_names_the_family_of_a_smaller_base():
    assert fit(MINIATURE_LORA, "sd15", "sdxl").models == ("sd15",)
    assert fit(LORA, "sd15").problem == ""


def test_shapes_decide_between_families_with_the_same_names(tmp_path):
    name = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    wide = lora(tmp_path / "wide.safetensors", **{name: (640, 2048)})
    assert fit(wide, "sd15", "sdxl").models == ("sdxl",)
    assert "--base-model sdxl=BASE" in fit(wide, "sd15").problem
    # Neither has this shape, so it may be for a base model of another size.
    small = lora(tmp_path / "small.safetensors", **{name: (64, 32)})
    assert fit(small, "sd15").models == ("sd15",)


def test_a_lora_without_a_supported_family_is_refused_by_name(tmp_path):
    name = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    older = lora(tmp_path / "older.safetensors", **{name: (640, 1024)})
    assert "an adapter for Stable Diffusion 2, which is not supported" in fit(older).problem
    unknown = lora(tmp_path / "unknown.safetensors", lora_unet_nothing=(8, 8))
    assert "`fidelora inspect`" in fit(unknown, "sd15").problem


def test_the_family_of_an_embedding_is_named():
    path = GOLDEN_JOBS / "embed" / "zrkk.safetensors"
    assert fit(path, "sd15").models == ("sd15",)
    assert fit(path, "sdxl").problem.startswith("It is an embedding for Stable Diffusion 1.5")


def test_the_header_is_read_without_torch():
    code = (
        "import sys; from pathlib import Path\n"
        "from fidelora.engine.header_family import fit_header\n"
        "from fidelora.safetensors_header import read_file_header\n"
        "path = Path(sys.argv[1])\n"
        "assert fit_header(read_file_header(path), path.name, ['sd15']).models == ('sd15',)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(LORA)], check=True)
