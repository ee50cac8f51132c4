"""A base model in memory: its files found, checked and loaded, its parts on their device."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from accelerate.hooks import UserCpuOffloadHook
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from fidelora.adapters.merge import MergedAdapters
from fidelora.adapters.targets import Targets
from fidelora.engine import Offload, fast
from fidelora.engine.device import TORCH_DTYPES
from fidelora.engine.locate import locate, weight_file_patterns
from fidelora.engine.packed import pack
from fidelora.engine.single_file import convert_vae, split_checkpoint
from fidelora.engine.text import EncodedTexts
from fidelora.engine.weights import build_component, read_config, read_weights
from fidelora.errors import BaseModelFilesError, BaseModelNotFoundError, RecipeError
from fidelora.models import Component, ModelSpec, model_spec
from fidelora.recipe import Recipe
from fidelora.weights_file import read_header_of

_KNOWN_TEXT = "a photo of a cat"
_KNOWN_TOKENS = [320, 1125, 539, 320, 2368]
"""What CLIP's tokenizer makes of it."""


class BaseKey(NamedTuple):
    """What tells one loaded base model from another."""

    model: str
    base_model: str
    variant: str
    config: str
    vae: str
    dtype: str
    vae_dtype: str
    text_encoder_dtype: str
    fidelity: str

    @classmethod
    def of(cls, recipe: Recipe) -> BaseKey:
        """The base model that `recipe` needs."""
        return cls(*(getattr(recipe, name) for name in cls._fields))


@dataclass(eq=False)
class BaseModel:
    """A loaded base model.

    Attributes:
        device: where its parts compute.
        tokenizer, text_encoder, unet, vae: the parts; each in the dtype that its key says, but in `fast` UNet and VAE in the
            form that `fast.py` gives them.
        targets: the weights that adapters can change.
        merged: the adapters that are merged into those weights right now.
        way: how `fast` is done; None in `exact`.
        texts: prompts that were encoded before.
    """

    key: BaseKey
    spec: ModelSpec
    device: torch.device
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    targets: Targets
    merged: MergedAdapters
    hooks: list[UserCpuOffloadHook]
    way: fast.Way | None = None
    texts: EncodedTexts = field(default_factory=EncodedTexts)
    _warm: set[torch.Size] = field(default_factory=set)

    @property
    def size_bytes(self) -> int:
        """Of its weights."""
        parts = (self.text_encoder, self.unet, self.vae)
        return sum(weight.nbytes for part in parts for weight in part.parameters())

    def predict(self, text: Tensor, latents: Tensor, t: Tensor) -> Tensor:
        """What the UNet says of `latents` [batch, 4, height / 8, width / 8] with `text` [batch, 77, width], in their dtype."""
        dtype = self.unet.dtype  # other than the latents' only in `fast`
        prediction = self.unet(latents.to(dtype), t, encoder_hidden_states=text.to(dtype), return_dict=False)[0]
        return cast(Tensor, prediction.to(latents.dtype))

    def latents_shape(self, recipe: Recipe) -> torch.Size:
        """Of one image's latents: [1, 4, height / 8, width / 8]."""
        scale = 2 ** (len(self.vae.config.block_out_channels) - 1)  # the VAE halves the size after every block but the last
        return torch.Size((1, self.unet.config.in_channels, recipe.height // scale, recipe.width // scale))

    def warm(self, shape: torch.Size) -> None:
        """Have everything compiled that latents of this shape [batch, 4, height / 8, width / 8] need, if anything is compiled."""
        if self.way is fast.Way.COMPILED and shape not in self._warm:
            text = torch.zeros(shape[0], *self._text_shape, device=self.device)
            self.predict(text, torch.zeros(shape, device=self.device), torch.tensor(500, device=self.device))
            self._warm.add(shape)

    @property
    def _text_shape(self) -> tuple[int, int]:
        config = self.text_encoder.config
        return config.max_position_embeddings, config.hidden_size

    def rest(self) -> None:
        """With offloading by part: bring every part back to the CPU, so that adapters are always merged in one place."""
        for hook in self.hooks:
            hook.offload()


def load_base(
    key: BaseKey,
    device: torch.device,
    *,
    offload: Offload = "none",
    cache_dir: Path | None = None,
) -> BaseModel:
    """Load the base model that `key` names; weights that adapters can change get their numbers by its `merged.apply`.

    Args:
        key: which, and in which precision.
        device: where it computes.
        offload: `none` keeps all parts there; `model` only the part at work; `sequential` only the layer at work.
        cache_dir: where downloads of the hub are kept, if not in its usual place.

    Raises:
        BaseModelError, WeightsFileError: what is wrong with its files, and where.
        DeviceError: `fast` is not to be had on this device, or not with offloading.
    """
    spec = model_spec(key.model)
    way = fast.way_on(device, offload) if key.fidelity == "fast" else None
    source = locate(key.base_model, spec.components, variant=key.variant, cache_dir=cache_dir)
    if source.is_file():
        layout = _layout(key, spec)
        configs = {component.name: read_config(layout / component.name / "config.json") for component in spec.components}
        weights = split_checkpoint(read_weights([source]), configs, source.name)
    else:
        if key.config:
            raise RecipeError(f"{source} is a folder with configurations of its own; leave out config.", field="config")
        layout = source
        _check_index(source, spec)
        configs = {component.name: read_config(source / component.name / "config.json") for component in spec.components}
        weights = {
            component.name: read_weights(_weight_files(source / component.name, component, key.variant))
            for component in spec.components
            if not (key.vae and component.name == "vae")
        }
    if key.vae:
        configs["vae"], weights["vae"] = _other_vae(key, spec, configs["vae"], cache_dir)

    wanted = {"unet": key.dtype, "vae": key.vae_dtype, "text_encoder": key.text_encoder_dtype}
    dtypes: dict[str, torch.dtype | None] = {name: TORCH_DTYPES[dtype] for name, dtype in wanted.items()}
    if way is fast.Way.PACKED:
        dtypes |= {"unet": None, "vae": None}  # packed right from the file
    parts: dict[str, nn.Module] = {}
    pristine: dict[str, dict[str, Tensor]] = {}
    for component in spec.components:
        name = component.name
        parts[name], pristine[name] = build_component(component, configs[name], weights.pop(name), dtypes[name])
    unet, vae = cast(UNet2DConditionModel, parts["unet"]), cast(AutoencoderKL, parts["vae"])
    if way is fast.Way.PACKED:
        pack(unet, vae)
    tokenizer = load_tokenizer(layout / "tokenizer", configs["text_encoder"].get("vocab_size"))
    targets = Targets(spec, parts, pristine)  # before offloading puts placeholders in the place of parameters
    # What is packed is where it belongs, and parameters without numbers cannot be moved.
    hooks = [] if way is fast.Way.PACKED else place(parts, device, offload)
    if way is fast.Way.COMPILED:
        fast.compile_parts(unet, vae)
    text_encoder = cast(CLIPTextModel, parts["text_encoder"])
    return BaseModel(key, spec, device, tokenizer, text_encoder, unet, vae, targets, MergedAdapters(targets), hooks, way)


def expected_bytes(key: BaseKey, cache_dir: Path | None = None) -> int:
    """How much memory the weights of a base model will take at most; from the headers of its files.

    Raises:
        BaseModelError, WeightsFileError: as `load_base`.
    """
    spec = model_spec(key.model)
    source = locate(key.base_model, spec.components, variant=key.variant, cache_dir=cache_dir)
    paths = [source]
    if not source.is_file():
        paths = [path for part in spec.components for path in _weight_files(source / part.name, part, key.variant)]
    numbers = sum(math.prod(info.shape) for path in paths for info in read_header_of(path).tensors.values())
    return numbers * max(TORCH_DTYPES[dtype].itemsize for dtype in (key.dtype, key.vae_dtype, key.text_encoder_dtype))


def load_tokenizer(folder: Path, vocabulary: int | None) -> CLIPTokenizer:
    """The tokenizer in `folder`, seen to work: the library goes on with an empty vocabulary, or without merges, and says nothing.

    Args:
        vocabulary: how many tokens the text encoder knows.

    Raises:
        BaseModelFilesError: it is incomplete, or not CLIP's.
    """
    if not (folder / "tokenizer.json").is_file():
        for name in ("vocab.json", "merges.txt"):
            if not (folder / name).is_file():
                raise BaseModelFilesError(f"The base model has no tokenizer/{name}; it is incomplete.")
    try:
        tokenizer = cast(CLIPTokenizer, CLIPTokenizer.from_pretrained(folder, local_files_only=True))
        sample = tokenizer(_KNOWN_TEXT).input_ids[1:-1]
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise BaseModelFilesError(f"The base model's tokenizer cannot be read: {reason}.") from error
    if len(tokenizer) != vocabulary or sample != _KNOWN_TOKENS:
        raise BaseModelFilesError(
            f"The base model's tokenizer is not the one of its text encoder: it has {len(tokenizer)} tokens, not {vocabulary}, or "
            f"reads {_KNOWN_TEXT!r} in another way; its files are damaged or of another model."
        )
    return tokenizer


def _layout(key: BaseKey, spec: ModelSpec) -> Path:
    """Where a single-file checkpoint's configurations are."""
    if not key.config:
        return spec.layout
    folder = Path(key.config).expanduser()
    if not folder.is_dir():
        raise BaseModelNotFoundError(f"There is no folder with configurations at {key.config}; check the path.")
    return folder


def place(parts: dict[str, Any], device: torch.device, offload: Offload) -> list[UserCpuOffloadHook]:
    """Put the parts on their device, or under hooks that bring them there when they work.

    `sequential` keeps the numbers in the very parameters that the parts had before, so what adapters write there takes effect.

    Returns:
        the hooks that can send a part back to the CPU.
    """
    hooks: list[UserCpuOffloadHook] = []
    match offload:
        case "none":
            for part in parts.values():
                part.to(device)
        case "model":
            for name in ("text_encoder", "unet", "vae"):  # in the order of their work
                _, hook = cpu_offload_with_hook(parts[name], device, prev_module_hook=hooks[-1] if hooks else None)
                hooks.append(hook)
        case "sequential":
            for part in parts.values():
                cpu_offload(part, device, state_dict=dict(part.named_parameters()))
    return hooks


def _check_index(folder: Path, spec: ModelSpec) -> None:
    """Refuse a folder that says it holds another kind of model."""
    index = folder / "model_index.json"
    if not index.is_file():
        missing = [component.name for component in spec.components if not (folder / component.name).is_dir()]
        if missing:
            raise BaseModelFilesError(
                f"{folder} is not a diffusers folder: it has neither a model_index.json nor the folder {missing[0]}."
            )
        return
    parts = read_config(index)
    for component in spec.components:
        entry = parts.get(component.name)
        class_name = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        if class_name != component.class_name:
            raise BaseModelFilesError(
                f"{folder.name} is a {parts.get('_class_name', 'model of unknown kind')} whose {component.name} is "
                f"{class_name or 'absent'}, where {spec.title} has a {component.class_name}."
            )
    if "text_encoder_2" in parts:
        raise BaseModelFilesError(f"{folder.name} is a {parts.get('_class_name')} with two text encoders, not {spec.title}.")


def _weight_files(folder: Path, component: Component, variant: str) -> list[Path]:
    for pattern in weight_file_patterns(component, variant):
        if found := sorted(folder.glob(pattern)):
            _check_shards(found)
            return found
    wanted = weight_file_patterns(component, variant)[0]
    pickles = [path.name for suffix in (".bin", ".ckpt", ".pt") for path in folder.glob(f"*{suffix}")]
    if pickles:
        raise BaseModelFilesError(
            f"The base model's {folder.name} has only {pickles[0]}, a pickle, which can run code when it is opened; "
            f"convert it to {wanted}."
        )
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    hint = f" (there are: {', '.join(others)}; choose another variant to use them)" if others else ""
    raise BaseModelFilesError(f"The base model has no {folder.name}/{wanted}{hint}.")


def _check_shards(paths: list[Path]) -> None:
    """Refuse shards of which some are missing or left over from another export."""
    numbers = [match.groups() for path in paths if (match := re.search(r"-(\d+)-of-(\d+)\.", path.name))]
    expected = [(number, len(paths)) for number in range(1, len(paths) + 1)]
    if numbers and [(int(number), int(total)) for number, total in numbers] != expected:
        names = ", ".join(path.name for path in paths)
        raise BaseModelFilesError(f"The shards in {paths[0].parent.name} are not one complete set: {names}.")


def _other_vae(
    key: BaseKey, spec: ModelSpec, config: dict[str, Any], cache_dir: Path | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and weights of the VAE that replaces the base's own: a folder, a hub id, or a single file of either layout."""
    component = next(component for component in spec.components if component.name == "vae")
    source = locate(key.vae, [component], what="VAE", variant=key.variant, cache_dir=cache_dir)
    if source.is_dir():
        folder = source if (source / "config.json").is_file() else source / "vae"
        return read_config(folder / "config.json"), read_weights(_weight_files(folder, component, key.variant))
    weights = read_weights([source])
    is_ldm = any(name.endswith("decoder.mid.attn_1.q.weight") for name in weights)
    return config, convert_vae(weights, config) if is_ldm else weights
