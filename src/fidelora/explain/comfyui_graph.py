"""Read the graph of nodes that ComfyUI stores in pictures. Does not import torch.

The graph is followed backwards from the node that writes the picture. Values are found by the names
of inputs, not by the types of nodes, so many custom nodes are read without being listed here.

Source: https://github.com/comfyanonymous/ComfyUI, `nodes.py`, and the documentation of the custom
nodes that are named below.
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from fidelora.explain.reading import Reading, UsedLora, UsedModel, stem
from fidelora.images.a1111_prompt import tags_in

_MAX_DEPTH = 200
"""Longest chain of nodes that is followed; a graph that is not damaged has no cycles."""

_MAX_VISITS = 20_000
"""Number of inputs and lists of LoRAs that are read in one graph. Graphs of real workflows need a
few hundred; a damaged or hostile graph with cycles could need 2 to the power of `_MAX_DEPTH`."""
_MAX_TEXT_CHARACTERS = 2**20
"""Longest text that nodes concatenate; nodes that refer to each other could double it each time."""
_TOO_COMPLEX = "The picture's graph of nodes is damaged or too complex, and is not read."

_Node = Mapping[str, Any]

_PATCHES = {
    "FreeU": "FreeU",
    "FreeU_V2": "FreeU",
    "PerturbedAttentionGuidance": "perturbed-attention guidance",
    "SelfAttentionGuidance": "self-attention guidance",
    "HyperTile": "HyperTile",
    "TomePatchModel": "token merging",
    "PatchModelAddDownscale": "Kohya's deep shrink",
    "DynamicThresholdingFull": "dynamic thresholding",
    "DynamicThresholdingSimple": "dynamic thresholding",
    "ControlNetApply": "ControlNet",
    "ControlNetApplyAdvanced": "ControlNet",
    "IPAdapter": "IP-Adapter",
    "IPAdapterAdvanced": "IP-Adapter",
    "ConditioningCombine": "combined prompts",
    "ConditioningConcat": "joined prompts",
    "ConditioningAverage": "averaged prompts",
    "ConditioningSetArea": "regional prompts",
    "ConditioningSetMask": "regional prompts",
    "ConditioningSetTimestepRange": "prompts for a part of the steps",
    "VAEEncode": "img2img",
    "VAEEncodeForInpaint": "inpainting",
    "LatentUpscale": "an upscaled latent image",
    "LatentUpscaleBy": "an upscaled latent image",
}
"""Name of the feature by class of node, for features that are not simulated."""
_RESIZES = ("ImageUpscaleWithModel", "UltimateSDUpscale", "ImageScale", "ImageScaleBy")
"""Classes of nodes that resize a picture."""
_SAMPLER_INPUTS = ({"steps", "cfg", "sampler_name"}, {"sampler", "sigmas"})
"""Sets of input names; a node that has all names of one set is a sampler."""
_INTERPRETATIONS = {
    "comfy": "comfyui", "A1111": "original", "comfy++": None, "compel": None, "down_weight": None,
}  # fmt: skip
"""Rule by `weight_interpretation` of the node BNK_CLIPTextEncodeAdvanced; None if it is unknown."""
_NUMBERED_LORA = re.compile(r"lora_(?:name_)?(\d{1,4})")


class _TooComplexError(Exception):
    """The graph exceeds `_MAX_VISITS` or `_MAX_TEXT_CHARACTERS`."""


@dataclass
class _Found:
    """Values that are collected while the graph is followed."""

    model: dict[str, float] = field(default_factory=dict)
    """Strength in the denoiser by name of the LoRA."""
    text: dict[str, float] = field(default_factory=dict)
    base_model: str = ""
    vae: str = ""
    clip_skip: int | None = None
    dtype: str | None = None
    rescale: float | None = None
    emphasis: str | None = "comfyui"
    unsupported: list[str] = field(default_factory=list)

    def add_feature(self, feature: str) -> None:
        """Add a feature that is not simulated."""
        sentence = f"The picture was made with {feature}, which is not simulated."
        if sentence not in self.unsupported:
            self.unsupported.append(sentence)


def read_graph(graph: Mapping[str, Any]) -> Reading | None:
    """Return the settings in a graph in ComfyUI's API format; None without a sampler node.

    The reading of a graph that is too complex contains only a sentence about it.

    Args:
        graph: nodes by id, each with `class_type` and `inputs`. An input is a value, or a pair of a
            node's id and the number of its output.
    """
    reader = _Graph(graph)
    sampler = reader.find_sampler()
    try:
        return None if sampler is None else reader.read(sampler)
    except _TooComplexError:
        return Reading("ComfyUI", unsupported=(_TOO_COMPLEX,))


class _Graph:
    def __init__(self, graph: Mapping[str, Any]) -> None:
        self._nodes: dict[str, _Node] = {
            str(key): node
            for key, node in graph.items()
            if isinstance(node, Mapping) and isinstance(node.get("inputs"), Mapping)
        }
        self._visits = 0

    def find_sampler(self) -> _Node | None:
        """Return the node that sampled last before the picture was written."""
        ends = [
            node
            for node in self._nodes.values()
            if "images" in node["inputs"] and _class(node).startswith(("Save", "Preview"))
        ] or [node for node in self._nodes.values() if "images" in node["inputs"]]
        seen: set[int] = set()  # nodes without a sampler behind them
        for end in ends:
            for node in self._behind(end, seen):
                if self._samples(node):
                    return node
        return next((node for node in self._nodes.values() if self._samples(node)), None)

    def read(self, sampler: _Node) -> Reading:
        """Return the settings of the picture that a sampler made."""
        found = _Found()
        if any(_class(node) in _RESIZES for node in self._nodes.values()):
            found.add_feature("a picture that was resized after sampling")
        guider = self._linked(sampler, "guider") or {"inputs": {}}
        for holder in (sampler, guider):
            self._follow(holder, "model", found, in_text=False)
        positive = self._first(("positive", "conditioning"), sampler, guider)
        negative = self._first(("negative",), sampler, guider)
        prompt = self._prompt(positive, "positive", found)
        negative_prompt = self._prompt(negative, "negative", found)
        latent = self._first(("latent_image", "latent", "samples"), sampler)
        size = self._latent(latent, found)
        for node in self._nodes.values():
            if "vae_name" in node["inputs"] and not found.vae:
                found.vae = _text(node["inputs"]["vae_name"])
        sigmas = self._linked(sampler, "sigmas") or {"inputs": {}}
        chosen = self._linked(sampler, "sampler") or {"inputs": {}}
        noise = self._linked(sampler, "noise") or {"inputs": {}}

        def value(*names: str, kind: type = float) -> Any:
            for holder in (sampler, guider, sigmas, chosen, noise):
                for name in names:
                    if name in holder["inputs"]:
                        result = self._value(holder["inputs"][name], kind)
                        if result is not None:
                            return result
            return None

        denoise = value("denoise")
        if denoise is not None and denoise < 1:
            found.add_feature("a denoising strength below 1")
        if self._value(sampler["inputs"].get("start_at_step", 0), int) or (
            (value("end_at_step", kind=int) or 10_000) < (value("steps", kind=int) or 0)
        ):
            found.add_feature("a part of the steps")
        names = [*found.model, *(name for name in found.text if name not in found.model)]
        seed = value("seed", "noise_seed", kind=int)
        guidance = value("cfg")
        if guidance is None and _class(guider) == "BasicGuider":
            guidance = 1.0
        return Reading(
            program="ComfyUI",
            prompt=prompt,
            negative_prompt=negative_prompt,
            steps=value("steps", kind=int),
            guidance_scale=guidance,
            guidance_rescale=found.rescale,
            seed=seed,
            width=size.get("width"),
            height=size.get("height"),
            sampler=value("sampler_name", kind=str) or _sampler_of(_class(chosen)),
            scheduler=value("scheduler", kind=str) or _scheduler_of(_class(sigmas)),
            emphasis=found.emphasis,
            clip_skip=found.clip_skip,
            noise_source="cpu",
            batch=size.get("batch_size"),
            index=size.get("batch_index"),
            loras=tuple(
                UsedLora(name, found.model.get(name, 0.0), found.text.get(name, 0.0))
                for name in names
            ),
            base_model=UsedModel(stem(found.base_model)),
            vae=UsedModel(stem(found.vae)),
            dtype=found.dtype,
            unsupported=tuple(found.unsupported),
        )

    # --- models ---------------------------------------------------------------------------------

    def _follow(self, node: _Node, name: str, found: _Found, *, in_text: bool) -> None:
        """Collect the LoRAs, the base model and the patches of a chain of models or encoders."""
        strengths: dict[str, float] = {}
        link = node["inputs"].get(name)
        if in_text and self._node(link) is None:
            link = [self._id(node), 0]  # a node that encodes prompts with its own text encoder
        for _ in range(_MAX_DEPTH):
            current = self._node(link)
            if current is None:
                break
            inputs = current["inputs"]
            if feature := _PATCHES.get(_class(current)):
                found.add_feature(feature)
            for lora, model, text in self._loras(current):
                strength = text if in_text else model
                if strength:
                    strengths[lora] = strengths.get(lora, 0.0) + strength
            if "stop_at_clip_layer" in inputs and in_text and found.clip_skip is None:
                found.clip_skip = -(self._value(inputs["stop_at_clip_layer"], int) or -1)
            if "clip_skip" in inputs and in_text and found.clip_skip is None:
                found.clip_skip = abs(self._value(inputs["clip_skip"], int) or 1)
            if _class(current) == "RescaleCFG":
                found.rescale = self._value(inputs.get("multiplier"), float)
            if not in_text:
                for key in ("ckpt_name", "unet_name", "base_ckpt_name", "model_name"):
                    found.base_model = found.base_model or _text(inputs.get(key))
                weight_dtype = _text(inputs.get("weight_dtype"))
                if weight_dtype.startswith("fp8"):
                    found.add_feature("weights in fp8")
            following = ("clip", "model") if in_text else ("model",)
            link = next(
                (
                    inputs[key]
                    for key in (*following, "basic_pipe", "pipe", "source")
                    if self._node(inputs.get(key)) is not None
                ),
                None,
            )
        # Both prompts usually have the same chain of encoders, whose LoRAs count once.
        (found.text if in_text else found.model).update(strengths)

    def _loras(self, node: _Node, depth: int = 0) -> Iterator[tuple[str, float, float]]:
        """Yield the name, denoiser strength and text encoder strength of each LoRA of a node."""
        self._count_visit()
        if depth > _MAX_DEPTH:
            return
        inputs = node["inputs"]

        def number(*names: str, default: float = 1.0) -> float:
            values = (self._value(inputs[name], float) for name in names if name in inputs)
            return next((value for value in values if value is not None), default)

        # Several nodes get their LoRAs from nodes that make a list ("stack") of them.
        for key in ("lora_stack", "optional_lora_stack", "lora_stack_opt"):
            if (stack := self._node(inputs.get(key))) is not None:
                yield from self._loras(stack, depth + 1)
        only_model = "ModelOnly" in _class(node)
        if "lora_name" in inputs:
            model = number("strength_model", "lora_model_strength", "model_strength", "strength")
            text = number("strength_clip", "lora_clip_strength", "clip_strength", default=model)
            name = inputs["lora_name"]
            if isinstance(name, Mapping):  # pythongosssss' node adds a preview to the name
                name = name.get("content")
            if _text(name) not in ("", "None"):
                yield stem(_text(name)), model, 0.0 if only_model else text
        for key, value in inputs.items():
            # "Power Lora Loader" of rgthree: objects with `on`, `lora` and `strength`.
            if isinstance(value, Mapping) and isinstance(value.get("lora"), str):
                if value.get("on", True):
                    model = _float(value.get("strength"), 1.0)
                    text = _float(value.get("strengthTwo"), model)
                    yield stem(value["lora"]), model, text
            elif (match := _NUMBERED_LORA.fullmatch(key)) and isinstance(value, str):
                yield from self._numbered(match[1], value, inputs, number)
        # "Lora Manager": a list of objects.
        listed = inputs.get("loras")
        listed = listed.get("__value__") if isinstance(listed, Mapping) else listed
        for one in listed if isinstance(listed, list) else ():
            if not isinstance(one, Mapping) or not isinstance(one.get("name"), str):
                continue
            if one.get("active", True):
                model = _float(one.get("strength"), 1.0)
                yield stem(one["name"]), model, _float(one.get("clipStrength"), model)
        # Nodes that read tags such as <lora:name:0.8>.
        if _class(node) in ("LoraTagLoader", "LoRA Tag Loader") and "text" in inputs:
            for network, arguments in tags_in(self._value(inputs["text"], str) or "")[1]:
                name, *rest = arguments.split(":")
                if network == "lora":
                    model = _float(rest[0] if rest else 1.0, 1.0)
                    yield stem(name), model, _float(rest[1] if len(rest) > 1 else model, model)

    def _numbered(
        self, index: str, value: str, inputs: Mapping[str, Any], number: Any
    ) -> Iterator[tuple[str, float, float]]:
        """Yield one LoRA of a node with numbered inputs (Efficiency, Comfyroll, rgthree)."""
        is_off = _text(inputs.get(f"switch_{index}", "On")) == "Off"
        if is_off or value in ("", "None"):
            return
        if int(index) > int(self._value(inputs.get("lora_count", 50), int) or 50):
            return
        plain = (f"lora_wt_{index}", f"strength_{index}", f"lora_strength_{index}")
        is_simple = _text(inputs.get("input_mode")) == "simple"
        advanced = () if is_simple else (f"model_str_{index}", f"model_weight_{index}")
        model = number(*advanced, f"strength_model_{index}", *plain)
        text = number(
            *(() if is_simple else (f"clip_str_{index}", f"clip_weight_{index}")),
            f"strength_clip_{index}",
            default=model,
        )
        yield stem(value), model, text

    # --- prompts and latents --------------------------------------------------------------------

    def _prompt(self, link: Any, role: str, found: _Found) -> str | None:
        """Return the text of a conditioning, and collect the encoders behind it.

        Args:
            role: `positive` or `negative`; the input of nodes that encode both prompts.
        """
        for _ in range(_MAX_DEPTH):
            node = self._node(link)
            if node is None:
                return None
            inputs = node["inputs"]
            if feature := _PATCHES.get(_class(node)):
                found.add_feature(feature)
            names = ("text", "text_g", "text_l", "prompt", role)
            for name in names:
                if name in inputs and (name != role or isinstance(inputs[name], str)):
                    self._follow(node, "clip", found, in_text=True)
                    self._read_encoder(node, found)
                    return self._value(inputs[name], str) or ""
            links = ("conditioning", "conditioning_1", "conditioning_to", role)
            link = next(
                (inputs[name] for name in links if self._node(inputs.get(name)) is not None), None
            )
        return None

    def _read_encoder(self, node: _Node, found: _Found) -> None:
        interpretation = node["inputs"].get("weight_interpretation")
        if isinstance(interpretation, str):
            found.emphasis = _INTERPRETATIONS.get(interpretation)
        parser = node["inputs"].get("parser")  # "smZ CLIPTextEncode"
        if isinstance(parser, str):
            found.emphasis = {"A1111": "original", "comfy": "comfyui"}.get(parser)

    def _latent(self, link: Any, found: _Found) -> dict[str, int]:
        """Return width, height, batch size and position in the batch of the initial latents."""
        size: dict[str, int] = {}
        for _ in range(_MAX_DEPTH):
            node = self._node(link)
            if node is None:
                return size
            inputs = node["inputs"]
            if feature := _PATCHES.get(_class(node)):
                found.add_feature(feature)
            for key, names in (
                ("width", ("width", "empty_latent_width", "width_override")),
                ("height", ("height", "empty_latent_height", "height_override")),
                ("batch_size", ("batch_size",)),
                ("batch_index", ("batch_index",)),
            ):
                for name in names:
                    number = self._value(inputs.get(name), int)
                    if number is not None and (number or key.startswith("batch")):
                        size.setdefault(key, number)
            link = inputs.get("samples") or inputs.get("latent")
        return size

    # --- links ----------------------------------------------------------------------------------

    def _node(self, link: Any) -> _Node | None:
        """Return the node that an input is linked to; None if it is a value."""
        if isinstance(link, list) and len(link) == 2 and not isinstance(link[0], list | Mapping):
            return self._nodes.get(str(link[0]))
        return None

    def _id(self, node: _Node) -> str:
        return next(key for key, other in self._nodes.items() if other is node)

    def _linked(self, node: _Node, name: str) -> _Node | None:
        return self._node(node["inputs"].get(name))

    def _first(self, names: tuple[str, ...], *nodes: _Node) -> Any:
        return next(
            (node["inputs"][name] for node in nodes for name in names if name in node["inputs"]),
            None,
        )

    def _value(self, given: Any, kind: type, depth: int = 0) -> Any:
        """Return an input as the type `kind`; follow a link to the node that has the value."""
        self._count_visit()
        node = self._node(given)
        if node is None:
            return _typed(given, kind)
        if depth > _MAX_DEPTH:
            return None
        inputs = node["inputs"]
        if kind is str:
            return self._joined(inputs, depth)
        likely = ("value", "seed", "noise_seed", "int", "float", "number", "Value")
        for name in (*likely, *inputs):
            if name in inputs and (value := self._value(inputs[name], kind, depth + 1)) is not None:
                return value
        return None

    def _joined(self, inputs: Mapping[str, Any], depth: int) -> str | None:
        """Return the text of a node that contains, passes on or concatenates texts."""
        delimiter = _text(inputs.get("delimiter")) if "delimiter" in inputs else ""
        parts: list[str] = []
        characters = 0
        for name, given in inputs.items():
            if name in ("delimiter", "action", "tidy_tags", "clean_whitespace", "operation"):
                continue
            if text := self._value(given, str, depth + 1):
                parts.append(text)
                characters += len(text) + len(delimiter)
            if characters > _MAX_TEXT_CHARACTERS:
                raise _TooComplexError
        return delimiter.join(parts) if parts else None

    def _count_visit(self) -> None:
        """Count a step through the graph.

        Raises:
            _TooComplexError: there were too many steps.
        """
        self._visits += 1
        if self._visits > _MAX_VISITS:
            raise _TooComplexError

    def _samples(self, node: _Node) -> bool:
        return any(names <= node["inputs"].keys() for names in _SAMPLER_INPUTS)

    def _behind(self, node: _Node, seen: set[int]) -> Iterator[_Node]:
        """Yield a node and those that it depends on, the nearest first, without those in `seen`.

        Nodes that are yielded are added to `seen`.
        """
        queue = deque([node])
        while queue:
            current = queue.popleft()
            if id(current) in seen:
                continue
            seen.add(id(current))
            yield current
            queue += [
                linked
                for given in current["inputs"].values()
                if (linked := self._node(given)) is not None
            ]


def _class(node: _Node) -> str:
    return _text(node.get("class_type"))


def _sampler_of(node_class: str) -> str | None:
    """Return the sampler that nodes such as `SamplerEulerAncestral` stand for."""
    known = {
        "SamplerEulerAncestral": "euler_ancestral",
        "SamplerLMS": "lms",
        "SamplerDPMPP_2S_Ancestral": "dpmpp_2s_ancestral",
    }
    return known.get(node_class)


def _scheduler_of(node_class: str) -> str | None:
    known = {"KarrasScheduler": "karras", "ExponentialScheduler": "exponential"}
    return known.get(node_class)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _typed(value: Any, kind: type) -> Any:
    if kind is str:
        return value if isinstance(value, str) else None
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value) if kind is float else int(value)
        return number if math.isfinite(number) else None
    except (ValueError, OverflowError):
        return None


def _float(value: Any, default: float) -> float:
    number = _typed(value, float)
    return default if number is None else float(number)
