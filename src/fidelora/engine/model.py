"""A base model in memory: its files found, checked and loaded, its parts on their device."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from accelerate.hooks import UserCpuOffloadHook
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTokenizer

from fidelora.accel import Offload
from fidelora.accel import compiled as fast
from fidelora.accel.device import TORCH_DTYPES
from fidelora.accel.packed import pack
from fidelora.accel.prepack import prepack
from fidelora.adapters.merge import MergedAdapters
from fidelora.adapters.targets import Targets
from fidelora.errors import BaseModelFilesError, BaseModelNotFoundError, RecipeError
from fidelora.families import Component, Family, all_families, get_family
from fidelora.families.clip import TextReader
from fidelora.families.sd.checkpoint import convert_vae, split_checkpoint
from fidelora.families.sd.text import Condition, Conditioning, conditioning_of
from fidelora.recipe import Recipe
from fidelora.safetensors_header import read_file_header
from fidelora.weights.locate import locate, weight_file_patterns
from fidelora.weights.strict import build_component, read_config, read_weights

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
        parts: by name; each in the dtype that its key says, but in `fast` UNet and VAE in the form that `fast.py` gives them.
            On the CPU, some modules of the UNet keep their weight in a form of their own (`AcceptsWeight`).
        conditioning: how it is told what to paint; has the text encoders with their tokenizers.
        targets: the weights that adapters can change.
        merged: the adapters that are merged into those weights right now.
        way: how `fast` is done; None in `exact`.
        upcasts_vae: whether the VAE is wider than its key says, because it would overflow.
    """

    key: BaseKey
    spec: Family
    device: torch.device
    parts: Mapping[str, nn.Module]
    conditioning: Conditioning
    targets: Targets
    merged: MergedAdapters
    hooks: list[UserCpuOffloadHook]
    way: fast.Way | None = None
    upcasts_vae: bool = False
    _warm: set[torch.Size] = field(default_factory=set)

    @property
    def size_bytes(self) -> int:
        """Of its weights."""
        return sum(weight.nbytes for part in self.parts.values() for weight in part.parameters())

    @property
    def unet(self) -> UNet2DConditionModel:
        """What predicts."""
        return cast(UNet2DConditionModel, self.parts["unet"])

    @property
    def vae(self) -> AutoencoderKL:
        """What decodes."""
        return cast(AutoencoderKL, self.parts["vae"])

    def for_unet(self, condition: Condition) -> Condition:
        """The same with its text in the UNet's dtype, which is another one only in `fast`."""
        return replace(condition, text=condition.text.to(self.unet.dtype))

    def predict(self, condition: Condition, latents: Tensor, t: Tensor) -> Tensor:
        """What the UNet says of `latents` [batch, 4, height / 8, width / 8] under this condition, in their dtype.

        Args:
            condition: `for_unet`; give the same one for all steps of an image, because the CPU projects a text once.
        """
        prediction = self.unet(
            latents.to(self.unet.dtype),
            t,
            encoder_hidden_states=condition.text,
            added_cond_kwargs=dict(condition.added)
            or None,  # the UNet casts these itself: a size has no room in 8 bits
            return_dict=False,
        )[0]
        return cast(Tensor, prediction.to(latents.dtype))

    def latents_shape(self, recipe: Recipe) -> torch.Size:
        """Of one image's latents: [1, 4, height / 8, width / 8]."""
        scale = 2 ** (
            len(self.vae.config.block_out_channels) - 1
        )  # the VAE halves the size after every block but the last
        return torch.Size(
            (1, self.unet.config.in_channels, recipe.height // scale, recipe.width // scale)
        )

    def warm(self, shape: torch.Size) -> None:
        """Have everything compiled that latents of this shape [batch, 4, height / 8, width / 8] need, if anything is compiled."""
        if self.way is fast.Way.COMPILED and shape not in self._warm:
            condition = self.for_unet(self.conditioning.blank(shape[0], self.device))
            self.predict(
                condition,
                torch.zeros(shape, device=self.device),
                torch.tensor(500, device=self.device),
            )
            self._warm.add(shape)

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
    spec = get_family(key.model)
    way = fast.way_on(device, offload) if key.fidelity == "fast" else None
    source = locate(key.base_model, spec.components, variant=key.variant, cache_dir=cache_dir)
    if source.is_file():
        layout = _layout(key, spec)
        configs = {
            component.name: read_config(layout / component.name / "config.json")
            for component in spec.components
        }
        weights = split_checkpoint(read_weights([source]), configs, spec, source.name)
    else:
        if key.config:
            raise RecipeError(
                f"{source} is a folder with configurations of its own; leave out config.",
                field="config",
            )
        layout = source
        _check_index(source, spec)
        configs = {
            component.name: read_config(source / component.name / "config.json")
            for component in spec.components
        }
        weights = {
            component.name: read_weights(
                _weight_files(source / component.name, component, key.variant)
            )
            for component in spec.components
            if not (key.vae and component.name == "vae")
        }
    if key.vae:
        configs["vae"], weights["vae"] = _other_vae(key, spec, configs["vae"], cache_dir)

    dtypes: dict[str, torch.dtype | None] = {
        one.name: TORCH_DTYPES[getattr(key, one.precision)] for one in spec.components
    }
    if way is fast.Way.PACKED:
        dtypes |= {"unet": None, "vae": None}  # packed right from the file
    parts: dict[str, nn.Module] = {}
    pristine: dict[str, dict[str, Tensor]] = {}
    for component in spec.components:
        name = component.name
        parts[name], pristine[name] = build_component(
            component, configs[name], weights.pop(name), dtypes[name]
        )
    unet, vae = cast(UNet2DConditionModel, parts["unet"]), cast(AutoencoderKL, parts["vae"])
    if unknown := [
        name for name in ("latents_mean", "latents_std") if vae.config.get(name) is not None
    ]:
        raise BaseModelFilesError(
            f"The VAE's configuration has {unknown[0]}, which {spec.title} has not; use another VAE."
        )
    if upcasts_vae := bool(
        spec.upcasts_vae and dtypes["vae"] == torch.float16 and vae.config.force_upcast
    ):
        vae.to(
            torch.float32
        )  # its weights stay rounded to float16, as those that the trainer's pipeline casts before it decodes
    in_place = way is fast.Way.PACKED or (
        way is None and device.type == "cpu" and offload == "none"
    )
    if way is fast.Way.PACKED:
        pack(unet, vae)
    elif in_place:  # not where a compiler would have to follow it
        prepack(unet)
    way_of_text = conditioning_of(spec)
    readers = {
        one.name: TextReader(
            load_tokenizer(layout / one.tokenizer, configs[one.name].get("vocab_size")),
            parts[one.name],
            device,
            way_of_text.encode,
        )
        for one in spec.text_encoders
    }
    targets = Targets(
        spec, parts, pristine
    )  # before offloading puts placeholders in the place of parameters
    hooks = (
        [] if in_place else place(parts, device, offload)
    )  # parameters without numbers cannot be moved
    if way is fast.Way.COMPILED:
        fast.compile_parts(unet, vae)
    return BaseModel(
        key,
        spec,
        device,
        parts,
        way_of_text(readers, unet),
        targets,
        MergedAdapters(targets),
        hooks,
        way,
        upcasts_vae,
    )


def expected_bytes(key: BaseKey, cache_dir: Path | None = None) -> int:
    """How much memory the weights of a base model will take at most; from the headers of its files.

    Raises:
        BaseModelError, WeightsFileError: as `load_base`.
    """
    spec = get_family(key.model)
    source = locate(key.base_model, spec.components, variant=key.variant, cache_dir=cache_dir)
    if source.is_file():
        sizes = {
            name: math.prod(info.shape) for name, info in read_file_header(source).tensors.items()
        }
        of_vae = next(part.checkpoint_prefix for part in spec.components if part.name == "vae")
    else:
        files = [
            (part.name, path)
            for part in spec.components
            if not (key.vae and part.name == "vae")
            for path in _weight_files(source / part.name, part, key.variant)
        ]
        if key.vae:
            files += [("vae", path) for path in _vae_files(key, spec, cache_dir)[1]]
        headers = ((part, read_file_header(path)) for part, path in files)
        sizes = {
            f"{part}.{name}": math.prod(info.shape)
            for part, header in headers
            for name, info in header.tensors.items()
        }
        of_vae = "vae."
    widest = max(
        TORCH_DTYPES[dtype].itemsize for dtype in (key.dtype, key.vae_dtype, key.text_encoder_dtype)
    )
    # A VAE that is made wider may be the widest part.
    vae = torch.float32.itemsize if spec.upcasts_vae else widest
    return sum(
        size * (max(vae, widest) if name.startswith(of_vae) else widest)
        for name, size in sizes.items()
    )


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
                raise BaseModelFilesError(
                    f"The base model has no {folder.name}/{name}; it is incomplete."
                )
    try:
        tokenizer = cast(
            CLIPTokenizer, CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        )
        sample = tokenizer(_KNOWN_TEXT).input_ids[1:-1]
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise BaseModelFilesError(
            f"The base model's {folder.name} cannot be read: {reason}."
        ) from error
    if len(tokenizer) != vocabulary or sample != _KNOWN_TOKENS:
        raise BaseModelFilesError(
            f"The base model's {folder.name} is not the one of its text encoder: it has {len(tokenizer)} tokens, not "
            f"{vocabulary}, or reads {_KNOWN_TEXT!r} in another way; its files are damaged or of another model."
        )
    return tokenizer


def _layout(key: BaseKey, spec: Family) -> Path:
    """Where a single-file checkpoint's configurations are."""
    if not key.config:
        return spec.layout
    folder = Path(key.config).expanduser()
    if not folder.is_dir():
        raise BaseModelNotFoundError(
            f"There is no folder with configurations at {key.config}; check the path."
        )
    return folder


def place(
    parts: dict[str, Any], device: torch.device, offload: Offload
) -> list[UserCpuOffloadHook]:
    """Put the parts, in the order of their work, on their device, or under hooks that bring them there when they work.

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
            for part in parts.values():
                _, hook = cpu_offload_with_hook(
                    part, device, prev_module_hook=hooks[-1] if hooks else None
                )
                hooks.append(hook)
        case "sequential":
            for part in parts.values():
                cpu_offload(part, device, state_dict=dict(part.named_parameters()))
    return hooks


def _check_index(folder: Path, spec: Family) -> None:
    """Refuse a folder that says it holds another kind of model."""
    index = folder / "model_index.json"
    if not index.is_file():
        missing = [
            component.name
            for component in spec.components
            if not (folder / component.name).is_dir()
        ]
        if missing:
            raise BaseModelFilesError(
                f"{folder} is not a diffusers folder: it has neither a model_index.json nor the folder {missing[0]}."
            )
        return
    parts = read_config(index)
    if (other := _family_of(parts)) not in (None, spec):
        assert other is not None
        raise BaseModelFilesError(
            f"{folder.name} is a base of {other.title}, not of {spec.title}: use it as model {other.id}."
        )
    wanted = {component.name for component in spec.components}
    for component in spec.components:
        entry = parts.get(component.name)
        class_name = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        if class_name != component.class_name:
            raise BaseModelFilesError(
                f"{folder.name} is a {parts.get('_class_name', 'model of unknown kind')} whose {component.name} is "
                f"{class_name or 'absent'}, where {spec.title} has a {component.class_name}."
            )
    if more := sorted(
        name for name in parts if name.startswith("text_encoder") and name not in wanted
    ):
        raise BaseModelFilesError(
            f"{folder.name} is a {parts.get('_class_name')} with {more[0]}, which {spec.title} has not."
        )


def _family_of(index: Mapping[str, Any]) -> Family | None:
    """The model family that has exactly the text encoders and the other parts of a `model_index.json`; None if none has."""
    for spec in all_families().values():
        wanted = {one.name: [one.library, one.class_name] for one in spec.components}
        found = {
            name: value
            for name, value in index.items()
            if name in wanted or name.startswith("text_encoder")
        }
        if found == wanted:
            return spec
    return None


def _weight_files(folder: Path, component: Component, variant: str) -> list[Path]:
    for pattern in weight_file_patterns(component, variant):
        if found := sorted(folder.glob(pattern)):
            _check_shards(found)
            return found
    wanted = weight_file_patterns(component, variant)[0]
    pickles = [
        path.name for suffix in (".bin", ".ckpt", ".pt") for path in folder.glob(f"*{suffix}")
    ]
    if pickles:
        raise BaseModelFilesError(
            f"The base model's {folder.name} has only {pickles[0]}, a pickle, which can run code when it is opened; "
            f"convert it to {wanted}."
        )
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    hint = (
        f" (there are: {', '.join(others)}; choose another variant to use them)" if others else ""
    )
    raise BaseModelFilesError(f"The base model has no {folder.name}/{wanted}{hint}.")


def _check_shards(paths: list[Path]) -> None:
    """Refuse shards of which some are missing or left over from another export."""
    numbers = [
        match.groups() for path in paths if (match := re.search(r"-(\d+)-of-(\d+)\.", path.name))
    ]
    expected = [(number, len(paths)) for number in range(1, len(paths) + 1)]
    if numbers and [(int(number), int(total)) for number, total in numbers] != expected:
        names = ", ".join(path.name for path in paths)
        raise BaseModelFilesError(
            f"The shards in {paths[0].parent.name} are not one complete set: {names}."
        )


def _other_vae(
    key: BaseKey, spec: Family, config: dict[str, Any], cache_dir: Path | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and weights of the VAE that replaces the base's own: a folder, a hub id, or a single file of either layout."""
    folder, files = _vae_files(key, spec, cache_dir)
    weights = read_weights(files)
    if folder is not None:
        return read_config(folder / "config.json"), weights
    is_ldm = any(name.endswith("decoder.mid.attn_1.q.weight") for name in weights)
    return config, convert_vae(weights, config) if is_ldm else weights


def _vae_files(
    key: BaseKey, spec: Family, cache_dir: Path | None
) -> tuple[Path | None, list[Path]]:
    """The folder of the VAE that replaces the base's own, unless it is a single file, and the files of its weights."""
    component = next(component for component in spec.components if component.name == "vae")
    source = locate(key.vae, [component], what="VAE", variant=key.variant, cache_dir=cache_dir)
    if not source.is_dir():
        return None, [source]
    folder = source if (source / "config.json").is_file() else source / "vae"
    return folder, _weight_files(folder, component, key.variant)
