"""Base models from folders, single files and the hub's cache, without missing or extra weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tests.families.ldm import as_ldm_checkpoint, as_ldm_vae
from tests.support import (
    LORA,
    TINY_BASE,
    change_weights,
    copy_base,
    load_model_of,
    read_json,
    weights_of,
)

from fidelora import Recipe
from fidelora.engine.model import LoadedModel, ModelKey, load_model
from fidelora.errors import (
    BaseModelFilesError,
    BaseModelNotFoundError,
    BaseModelWeightsError,
    NonFiniteWeightsError,
    PickleRefusedError,
    RecipeError,
    WeightsFileError,
)
from fidelora.families import get_family
from fidelora.families.sd.text import SDText

TEXT_ENCODER = Path("text_encoder/model.safetensors")
UNET = Path("unet/diffusion_pytorch_model.safetensors")
VAE = Path("vae/diffusion_pytorch_model.safetensors")


def load(base: Path | str, **fields: str) -> LoadedModel:
    recipe = Recipe(prompt="", base_model=str(base), **fields)  # type: ignore[arg-type]
    return load_model_of(recipe)


def all_weights(base: LoadedModel) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{name}": tensor
        for part, module in base.parts.items()
        for name, tensor in weights_of(module).items()
    }


def same(left: LoadedModel, right: LoadedModel) -> bool:
    one, other = all_weights(left), all_weights(right)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_every_weight_has_the_values_of_the_file():
    base = load(TINY_BASE)
    stored = safetensors.torch.load_file(TINY_BASE / UNET)
    assert {
        name: tuple(tensor.shape) for name, tensor in base.parts["unet"].state_dict().items()
    } == {name: tuple(tensor.shape) for name, tensor in stored.items()}
    assert all(
        torch.equal(tensor, stored[name].float())
        for name, tensor in weights_of(base.parts["unet"]).items()
    )
    assert not any(parameter.requires_grad for parameter in base.parts["unet"].parameters())
    assert not base.parts["unet"].training


def test_each_part_has_its_own_dtype():
    base = load(TINY_BASE, dtype="bfloat16", vae_dtype="float32", text_encoder_dtype="float16")
    expected = {"unet": torch.bfloat16, "vae": torch.float32, "text_encoder": torch.float16}
    assert {name: next(part.parameters()).dtype for name, part in base.parts.items()} == expected


@pytest.mark.parametrize(
    ("part", "name"),
    [
        (TEXT_ENCODER, "text_model.encoder.layers.1.mlp.fc1.weight"),
        (UNET, "mid_block.attentions.0.proj_in.weight"),
        (VAE, "decoder.conv_out.bias"),
    ],
)
def test_a_missing_weight_is_an_error_that_names_it(tmp_path, part, name):
    base = copy_base(tmp_path)
    change_weights(
        base / part, lambda tensors: {key: value for key, value in tensors.items() if key != name}
    )
    with pytest.raises(
        BaseModelWeightsError,
        match=f"{part.parent}: 1 weights are missing \\({name.removeprefix('text_model.')}\\)",
    ):
        load(base)


def test_an_unexpected_weight_is_named(tmp_path):
    base = copy_base(tmp_path)
    change_weights(base / UNET, lambda tensors: tensors | {"extra.weight": torch.zeros(2)})
    with pytest.raises(
        BaseModelWeightsError, match=r"unet: 1 weights are unknown \(extra\.weight\)"
    ):
        load(base)


def test_a_weight_of_another_shape_is_named_with_both_shapes(tmp_path):
    base = copy_base(tmp_path)
    change_weights(base / UNET, lambda tensors: tensors | {"conv_in.bias": torch.zeros(3)})
    with pytest.raises(BaseModelWeightsError, match=r"conv_in\.bias \[3\], not \[16\]"):
        load(base)


def test_a_text_encoder_with_unknown_names_is_refused(tmp_path):
    """transformers itself would initialise all of these weights at random and continue."""
    base = copy_base(tmp_path)
    change_weights(
        base / TEXT_ENCODER,
        lambda tensors: {f"transformer.{name}": tensor for name, tensor in tensors.items()},
    )
    with pytest.raises(
        BaseModelWeightsError, match=r"52 weights are missing .* 52 weights are unknown"
    ):
        load(base)


def test_text_encoder_names_with_and_without_text_model_are_equal(tmp_path):
    base = copy_base(tmp_path)
    change_weights(
        base / TEXT_ENCODER,
        lambda tensors: {name.removeprefix("text_model."): t for name, t in tensors.items()},
    )
    assert same(load(base), load(TINY_BASE))


def test_position_ids_of_old_files_are_checked_and_skipped(tmp_path):
    base = copy_base(tmp_path)
    key = "text_model.embeddings.position_ids"
    change_weights(base / TEXT_ENCODER, lambda tensors: tensors | {key: torch.arange(77)[None]})
    assert same(load(base), load(TINY_BASE))
    change_weights(
        base / TEXT_ENCODER, lambda tensors: tensors | {key: torch.zeros(1, 77, dtype=torch.int64)}
    )
    with pytest.raises(BaseModelWeightsError, match="position ids"):
        load(base)


def test_the_old_names_of_the_vaes_attention_are_supported(tmp_path):
    """The published files of Stable Diffusion 1.5 use these names."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(tensors):
        renamed = {}
        for name, tensor in tensors.items():
            for new, before in old.items():
                name = name.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
            renamed[name] = tensor
        return renamed

    base = copy_base(tmp_path)
    change_weights(base / VAE, rename)
    assert any(".query." in name for name in safetensors.torch.load_file(base / VAE))
    assert same(load(base), load(TINY_BASE))


def test_a_sharded_model_equals_a_single_file(tmp_path):
    base = copy_base(tmp_path)
    tensors = safetensors.torch.load((base / UNET).read_bytes())
    names = sorted(tensors)
    for number, chosen in enumerate((names[:100], names[100:]), start=1):
        shard = {name: tensors[name] for name in chosen}
        safetensors.torch.save_file(
            shard, base / f"unet/diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        )
    (base / UNET).unlink()
    assert same(load(base), load(TINY_BASE))
    (base / "unet/diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(BaseModelFilesError, match=r"has no unet/.*-00002-of-00002\.safetensors"):
        load(base)


@pytest.mark.parametrize(
    "names",
    [
        ["00001-of-00003", "00002-of-00002"],
        ["00001-of-00002", "00003-of-00002"],
        ["00001-of-00002", "00002-of-00002", "00003-of-00002"],
    ],
)
def test_shards_of_different_exports_are_refused(tmp_path, names):
    base = copy_base(tmp_path)
    tensors = safetensors.torch.load((base / UNET).read_bytes())
    for number, name in enumerate(names):
        chosen = {key: tensors[key] for key in sorted(tensors)[number :: len(names)]}
        safetensors.torch.save_file(
            chosen, base / f"unet/diffusion_pytorch_model-{name}.safetensors"
        )
    (base / UNET).unlink()
    with pytest.raises(BaseModelFilesError, match="not one complete set"):
        load(base)


def test_a_weight_in_two_shards_is_refused(tmp_path):
    base = copy_base(tmp_path)
    tensors = safetensors.torch.load((base / UNET).read_bytes())
    for number in (1, 2):
        safetensors.torch.save_file(
            tensors, base / f"unet/diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        )
    (base / UNET).unlink()
    with pytest.raises(BaseModelFilesError, match="are in another shard, too"):
        load(base)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_weights_are_refused(tmp_path, dtype):
    base = copy_base(tmp_path)
    change_weights(
        base / UNET,
        lambda tensors: tensors | {"conv_in.weight": tensors["conv_in.weight"].to(dtype)},
    )
    with pytest.raises(
        BaseModelWeightsError,
        match=r"unet: 1 weights are quantised, which is not supported \(conv_in\.weight\)",
    ):
        load(base)


def test_nan_in_the_base_is_named(tmp_path):
    base = copy_base(tmp_path)
    change_weights(
        base / VAE,
        lambda tensors: tensors | {"decoder.conv_out.bias": torch.full((3,), float("nan"))},
    )
    with pytest.raises(
        NonFiniteWeightsError,
        match=r"1 weights of the base model's vae are NaN or infinite \(decoder\.conv_out\.bias\)",
    ):
        load(base)


def test_a_weight_under_both_spellings_is_refused(tmp_path):
    base = copy_base(tmp_path)
    name = "final_layer_norm.bias"
    change_weights(base / TEXT_ENCODER, lambda tensors: tensors | {name: torch.zeros(32)})
    with pytest.raises(BaseModelWeightsError, match=f"text_encoder are both {name}"):
        load(base)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("merges.txt", "#version: 0.2\n"),
        ("vocab.json", "{}"),
        ("vocab.json", "{"),
        ("merges.txt", "\0"),
    ],
)
def test_a_broken_tokenizer_is_refused(tmp_path, name, content):
    base = copy_base(tmp_path)
    (base / "tokenizer" / name).write_text(content)
    with pytest.raises(BaseModelFilesError, match="tokenizer"):
        load(base)


@pytest.mark.parametrize(
    "change", [{"num_attention_heads": 5}, {"hidden_size": "wide"}, {"max_position_embeddings": -1}]
)
def test_an_invalid_model_configuration_raises_a_typed_error(tmp_path, change):
    base = copy_base(tmp_path)
    path = base / "text_encoder" / "config.json"
    path.write_text(json.dumps(read_json(path) | change))
    with pytest.raises(BaseModelFilesError, match="does not describe a CLIPTextModel") as raised:
        load(base)
    assert "\n" not in str(raised.value)


def test_config_for_a_folder_with_its_own_configuration_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="its own configurations"):
        load(TINY_BASE, config=str(TINY_BASE))
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(as_ldm_checkpoint(TINY_BASE), path)
    with pytest.raises(BaseModelNotFoundError, match=r"configuration folder .* does not exist"):
        load(path, config=str(tmp_path / "none"))


def test_the_variant_is_chosen_and_never_guessed(tmp_path):
    base = copy_base(tmp_path)
    for path in (TEXT_ENCODER, UNET, VAE):
        (base / path).rename(base / path.with_suffix(".fp16.safetensors"))
    assert same(load(base, variant="fp16"), load(TINY_BASE))
    with pytest.raises(
        BaseModelFilesError, match=r"found: model\.fp16\.safetensors; change the variant"
    ):
        load(base)


def test_a_vae_is_loaded_from_a_folder_a_file_and_an_ldm_file(tmp_path):
    base = copy_base(tmp_path)
    change_weights(
        base / VAE, lambda tensors: {name: tensor * 0.5 for name, tensor in tensors.items()}
    )
    expected = load(base)
    ldm = tmp_path / "vae-ldm.safetensors"
    safetensors.torch.save_file(as_ldm_vae(safetensors.torch.load_file(base / VAE)), ldm)
    for vae in (base / "vae", base, base / VAE, ldm):
        replaced = load(TINY_BASE, vae=str(vae))
        assert same(replaced, expected), vae
        assert not same(replaced, load(TINY_BASE))


def test_a_single_file_checkpoint_equals_its_folder(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(as_ldm_checkpoint(TINY_BASE), path)
    assert same(load(path, config=str(TINY_BASE)), load(TINY_BASE))


def test_training_state_in_a_checkpoint_is_ignored(tmp_path):
    path = tmp_path / "model.safetensors"
    left = {
        "betas": torch.zeros(1000),
        "denoiser.sigmas": torch.zeros(1000),
        "model_ema.diffusion_modelout2bias": torch.zeros(4),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
    }
    safetensors.torch.save_file(as_ldm_checkpoint(TINY_BASE) | left, path)
    assert same(load(path, config=str(TINY_BASE)), load(TINY_BASE))


@pytest.mark.parametrize(
    "key",
    [
        "model.diffusion_model.input_blocks.0.0.extra",
        "first_stage_model.decoder.extra.weight",
        "control_model.x",
        "foo",
    ],
)
def test_an_unused_weight_of_a_checkpoint_is_named(tmp_path, key):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(as_ldm_checkpoint(TINY_BASE) | {key: torch.zeros(2)}, path)
    with pytest.raises(BaseModelWeightsError, match=key.replace(".", r"\.").removeprefix("model")):
        load(path, config=str(TINY_BASE))


def test_a_weight_missing_from_a_checkpoint_is_named(tmp_path):
    path = tmp_path / "model.safetensors"
    checkpoint = as_ldm_checkpoint(TINY_BASE)
    del checkpoint["cond_stage_model.transformer.text_model.encoder.layers.2.mlp.fc2.bias"]
    safetensors.torch.save_file(checkpoint, path)
    with pytest.raises(
        BaseModelWeightsError,
        match=r"text_encoder: 1 weights are missing \(encoder\.layers\.2\.mlp\.fc2\.bias\)",
    ):
        load(path, config=str(TINY_BASE))


def test_bundled_configurations_are_used_without_a_network(tmp_path):
    """The tiny checkpoint does not have the sizes of Stable Diffusion 1.5, so it is refused."""
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(as_ldm_checkpoint(TINY_BASE), path)
    with pytest.raises(BaseModelWeightsError, match="weights that the model does not use"):
        load(path)


def test_bundled_configurations_are_those_of_stable_diffusion_1_5():
    """Published parameter counts: 859,520,964 + 123,060,480 + 83,653,863."""
    from accelerate import init_empty_weights

    from fidelora.weights.configs import read_config
    from fidelora.weights.strict import _construct

    spec = get_family("sd15")
    counts = {}
    for part in spec.parts:
        with init_empty_weights():
            module = _construct(part, read_config(spec.layout / part.name / "config.json"))
        counts[part.name] = sum(parameter.numel() for parameter in module.parameters())
    assert counts == {"unet": 859_520_964, "text_encoder": 123_060_480, "vae": 83_653_863}


def test_a_folder_without_a_tokenizer_uses_the_bundled_one(tmp_path):
    assert not (TINY_BASE / "tokenizer").exists()
    own = load(copy_base(tmp_path)).text
    bundled = load(TINY_BASE).text
    assert isinstance(own, SDText)
    assert isinstance(bundled, SDText)
    prompt = "a naïve café, 3 (red) balls"
    tokens = [text.encoders["text_encoder"].tokenizer(prompt).input_ids for text in (own, bundled)]
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (
            "conditioner.embedders.1.model.ln_final.weight",
            "a checkpoint of Stable Diffusion XL, not of .*: use it as model sdxl",
        ),
        ("conditioner.embedders.0.model.ln_final.weight", "the refiner of Stable Diffusion XL"),
        ("cond_stage_model.model.ln_final.weight", "a checkpoint of Stable Diffusion 2"),
        ("transformer.wte.weight", "the layout of its keys is unknown"),
    ],
)
def test_a_checkpoint_of_another_kind_is_recognised(tmp_path, key, message):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({key: torch.zeros(2)}, path)
    with pytest.raises(BaseModelFilesError, match=message):
        load(path)


def test_an_adapter_given_as_base_model_is_recognised():
    with pytest.raises(BaseModelFilesError, match="it is an adapter"):
        load(LORA)


@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".pt", ".pth"])
def test_a_file_with_a_pickle_extension_is_refused(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"anything")
    with pytest.raises(PickleRefusedError, match="can run code when it is opened"):
        load(path)


def test_a_folder_with_only_pickles_is_refused(tmp_path):
    base = copy_base(tmp_path)
    (base / UNET).rename(base / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(
        BaseModelFilesError, match=r"unet has only diffusion_pytorch_model\.bin, a pickle"
    ):
        load(base)


def test_a_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    with pytest.raises(BaseModelFilesError, match="neither a diffusers folder nor"):
        load(path)


def test_a_truncated_part_is_refused(tmp_path):
    base = copy_base(tmp_path)
    content = (base / UNET).read_bytes()
    (base / UNET).write_bytes(content[: len(content) // 2])
    with pytest.raises(WeightsFileError, match="truncated"):
        load(base)


@pytest.mark.parametrize(
    "missing",
    ["unet/config.json", "tokenizer/vocab.json", "tokenizer/merges.txt", "vae"],
)
def test_the_error_for_an_incomplete_folder_names_what_is_missing(tmp_path, missing):
    base = copy_base(tmp_path)
    path = base / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(
        BaseModelFilesError, match=f"{missing}|vae/config.json|tokenizer/vocab.json"
    ):
        load(base)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(BaseModelFilesError, match="is not a diffusers folder"):
        load(tmp_path)


def test_a_folder_of_another_family_is_recognised(tmp_path):
    base = copy_base(tmp_path)
    index = read_json(base / "model_index.json")
    index |= {
        "_class_name": "StableDiffusionXLPipeline",
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    }
    (base / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(
        BaseModelFilesError,
        match=r"a base model of Stable Diffusion XL, not of .*; use it with model sdxl",
    ):
        load(base)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_an_invalid_configuration_file_is_an_error(tmp_path, content):
    base = copy_base(tmp_path)
    (base / "unet/config.json").write_text(content)
    with pytest.raises(BaseModelFilesError, match=r"unet/config\.json"):
        load(base)


@pytest.mark.parametrize("place", ["nowhere/at/all", "x" * 300, "a\0b"])
def test_a_path_that_does_not_exist_is_refused(place):
    with pytest.raises(BaseModelNotFoundError, match="was not found on this machine"):
        load(place)


@pytest.mark.parametrize(
    "place",
    ["./nowhere", "../nowhere", "~/nowhere", "folder/absent.safetensors", "a/b.ckpt", "folder/"],
)
def test_the_hub_is_not_asked_for_a_missing_path(monkeypatch, place):
    monkeypatch.setattr("fidelora.weights.locate.snapshot_download", lambda *_, **__: 1 / 0)
    with pytest.raises(
        BaseModelNotFoundError, match=f"The base model {place} was not found on this"
    ):
        load(place)


def test_the_error_for_a_missing_vae_mentions_the_vae():
    with pytest.raises(BaseModelNotFoundError, match="The VAE nowhere/at/all was not found"):
        load(TINY_BASE, vae="nowhere/at/all")


def test_the_hub_cache_is_used_when_offline(tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(TINY_BASE, repository / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    recipe = Recipe(prompt="", base_model="someone/tiny")
    key = ModelKey.of(recipe)
    base = load_model(key, key.find_files(tmp_path), torch.device("cpu"))
    base.merged.apply([])
    assert same(base, load(TINY_BASE))


@pytest.mark.parametrize("name", ["someone/absent", "someone/absent@v2"])
def test_offline_a_hub_id_that_is_not_cached_is_an_error(tmp_path, monkeypatch, name):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BaseModelNotFoundError, match="someone/absent is neither a folder on this"):
        ModelKey.of(Recipe(prompt="", base_model=name)).find_files(tmp_path)


@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_offloading_preserves_every_bit_and_supports_adapters(offload):
    """Offload from the CPU to the CPU: the hooks treat the modules as they do on a device."""
    from fidelora.adapters.live import live_adapters
    from fidelora.adapters.read import read_adapter

    plain = load(TINY_BASE)
    key = ModelKey.of(Recipe(prompt="", base_model=str(TINY_BASE)))
    offloaded = load_model(key, key.find_files(), torch.device("cpu"), offload=offload)
    assert len(offloaded.hooks) == (3 if offload == "model" else 0)
    inputs = (torch.randn(2, 4, 8, 8), torch.tensor(7), torch.randn(2, 77, 32))
    adapter = read_adapter(LORA)

    def outputs(base: LoadedModel, *, live: bool) -> torch.Tensor:
        bound = [(base.targets.bind(adapter), 0.5)]
        base.offload_parts()
        base.merged.apply([] if live else bound)
        with torch.no_grad(), live_adapters(base.targets, bound if live else []):
            output: torch.Tensor = base.parts["unet"](*inputs, return_dict=False)[0]
        return output

    for live in (False, True):
        assert torch.equal(outputs(plain, live=live), outputs(offloaded, live=live))
    vaes: list[Any] = [plain.parts["vae"], offloaded.parts["vae"]]
    one, other = (vae.decode(torch.ones(1, 4, 8, 8), return_dict=False)[0] for vae in vaes)
    assert torch.equal(one, other)
    ids = torch.zeros(1, 77, dtype=torch.int64)
    assert torch.equal(plain.parts["text_encoder"](ids)[0], offloaded.parts["text_encoder"](ids)[0])
