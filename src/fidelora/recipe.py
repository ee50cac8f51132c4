"""The recipe: everything that defines an image, and nothing else.

It does not contain the device, the offload mode, paths of adapter files or the name of the output
file. A recipe is complete as soon as it is created: for fields that the caller leaves out, the
constructor uses the defaults of the model family, so other code need not check for missing fields.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from fidelora.adapter_file import AdapterFile
from fidelora.checks import MAX_PROMPT_CHARACTERS, check_choice, check_range, check_text, shown
from fidelora.embedding_file import embedding_word
from fidelora.errors import RecipeError, UnknownSamplerError, WeightsFileError
from fidelora.families import Family, get_family
from fidelora.families.emphasis import Emphasis, check_emphasis
from fidelora.families.sampler_options import check_sampler_options
from fidelora.sampling.spacings import TimestepSpacing

Dtype = Literal["float32", "bfloat16", "float16"]
Noise = Literal["modern", "legacy"]
AdapterMode = Literal["merged", "live"]
Prediction = Literal["epsilon", "v_prediction"]
Fidelity = Literal["exact", "fast"]

MIN_SIZE, MAX_SIZE = 64, 4096
MAX_STEPS = 150
MAX_GUIDANCE = 100.0
MAX_MULTIPLIER = 5.0  # the trainer samples concept sliders at -5 to 5
MAX_ALPHA = 1e6
MAX_SEED = 2**63 - 1

FORMAT = 2
"""Version of the JSON form, increased when the meaning of a field changes. Format 1 had no
`base_sha256` and contained the paths of local files."""


_ADAPTER_FIELDS = frozenset({"adapters", "history"})

_OPTIONAL: Mapping[str, Any] = {
    "negative_prompt": "",
    "negative_prompt_2": None,
    "guidance_rescale": 0.0,
    "emphasis": "none",
    "prediction": "epsilon",
    "noise": "modern",
}
"""Default values of fields that only some families use (`Family.uses`). The other families reject
any other value."""

_OMITTED_DEFAULTS: Mapping[str, Any] = {
    "negative_prompt_2": None,
    "guidance_rescale": 0.0,
    "emphasis": "none",
    "timestep_spacing": "default",
    "eta": None,
    "history": (),
}
"""Default values of fields that older recipes do not contain. The JSON form omits a field that has
its default value, so that the digests of older recipes stay valid."""


LOCATIONS: tuple[str, ...] = ("base_model", "variant", "config", "vae")
"""Fields that locate the files of the base model. All except `variant` may be local paths, which
the JSON form shortens (`short_name`)."""

_SHA256 = re.compile(r"[0-9a-f]{64}")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


def short_name(location: str) -> str:
    """Return the last component of a path, or a hub id or name of a bundled model unchanged."""
    is_file = location.lower().endswith(".safetensors")
    if _HUB_ID.fullmatch(location) and not location.startswith(".") and not is_file:
        return location
    return re.split(r"[/\\]", location.rstrip("/\\"))[-1]


class _FromModel:
    """Default of a field that is filled in from the model family."""

    def __repr__(self) -> str:
        return "the model's default"


FROM_MODEL: Any = _FromModel()


def replace_trigger(prompt: str, trigger: str) -> str:
    """Replace `[trigger]` and `[name]` in `prompt` by `trigger`, as the trainer does.

    The prompt is returned unchanged if `trigger` is empty or the prompt has no placeholder.

    Raises:
        RecipeError: the result would be longer than a prompt may be.
    """
    if not trigger:
        return prompt
    # Checked before the replacement: a long trigger in many places would take gigabytes.
    counts = {placeholder: prompt.count(placeholder) for placeholder in ("[name]", "[trigger]")}
    length = len(prompt) + sum(
        count * (len(trigger) - len(placeholder)) for placeholder, count in counts.items()
    )
    if length > MAX_PROMPT_CHARACTERS and any(counts.values()):
        raise RecipeError(
            f"With the trigger word in {sum(counts.values()):,} places, the prompt has {length:,} "
            f"characters; the maximum is {MAX_PROMPT_CHARACTERS:,}.",
            field="prompt",
        )
    return prompt.replace("[name]", trigger).replace("[trigger]", trigger)


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file in hex.

    Raises:
        WeightsFileError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise WeightsFileError(f"{path} cannot be read: {error.strerror or error}.") from error


@dataclass(frozen=True)
class AdapterRef:
    """Reference to an adapter (LoRA, LoKr, ...) in a recipe, with its multiplier.

    Attributes:
        sha256: hash of the file in hex. It identifies the adapter; the path does not.
        multiplier: strength of the adapter, -5..5; 0 disables the adapter.
        alpha: alpha of a DoRA, which its file does not contain; the scale is alpha / rank. None
            sets the scale to 1.
        name: name that is shown to users; not part of the identity.
        path: last known path of the file; not part of the identity and not in the JSON form.
        file: content that `from_file` hashed; not part of the identity and not in the JSON form.
        word: word that stands for an embedding in prompts; None for adapters of other kinds. The
            multiplier of an embedding is always 1.
    """

    sha256: str
    multiplier: float = 1.0
    name: str = field(default="", compare=False)
    path: Path | None = field(default=None, compare=False, repr=False)
    alpha: float | None = None
    file: AdapterFile | None = field(default=None, compare=False, repr=False)
    word: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.sha256, str) or not _SHA256.fullmatch(self.sha256):
            raise RecipeError(
                "An adapter's sha256 must be 64 hexadecimal digits in lower case.", field="adapters"
            )
        check_text("name", self.name)
        check_range("multiplier", self.multiplier, -MAX_MULTIPLIER, MAX_MULTIPLIER)
        if self.alpha is not None:
            check_range("alpha", self.alpha, 0.0, MAX_ALPHA)
            # Alpha 0 means that alpha equals the rank, as in the trainer.
            object.__setattr__(self, "alpha", float(self.alpha) or None)
        if self.path is not None:
            object.__setattr__(self, "path", Path(self.path))
        if self.word is not None:
            check_text("word", self.word)
            if not self.word.strip():
                raise RecipeError(
                    "The word of an embedding is empty; set it to the word that stands for the "
                    "embedding in prompts.",
                    field="adapters",
                )
            if self.multiplier != 1:
                raise RecipeError(
                    f"{self.word} is an embedding, which has no strength; set its multiplier to 1 "
                    f"instead of {self.multiplier:g}, or leave the embedding out.",
                    field="adapters",
                )
        # `+ 0.0` turns -0.0 into 0.0. The two are equal, but their JSON forms differ.
        object.__setattr__(self, "multiplier", float(self.multiplier) + 0.0)

    @classmethod
    def from_file(cls, path: str | Path, multiplier: float = 1.0) -> AdapterRef:
        """Return a reference to the current content of the file at `path`.

        The header is checked before the rest is read. The file is opened and hashed once. Its
        content stays in memory for the engine if it fits in the budget (`MAX_KEPT_BYTES`).

        Raises:
            AdapterNotFoundError: the file does not exist.
            WeightsFileError: the file is not a valid .safetensors file, or cannot be read.
            RecipeError: the multiplier is out of range.
        """
        path = Path(path).expanduser()
        file = AdapterFile.open(path, keep="within_budget")
        # The name is written into images and must be valid text. A file name may be invalid.
        name = path.stem.encode("utf-8", "replace").decode()
        word = embedding_word(file.header, path.name)
        return cls(file.sha256, multiplier, name=name, path=file.path, file=file, word=word)


@dataclass(frozen=True, kw_only=True, eq=False)
class Recipe:
    """Everything that defines one image. Equal recipes define the same image.

    `base_sha256` identifies the base model by the content of its weight files. If it is set,
    `base_model`, `variant`, `config` and `vae` serve only to locate the files.

    Attributes:
        prompt: text to encode, with `[trigger]` already replaced.
        negative_prompt: text that guidance steers away from; unused without guidance.
        negative_prompt_2: negative prompt of the second text encoder, for families with two; None
            uses `negative_prompt`. The two differ in the trainer's samples if the flag `--n` is
            set, which changes only the first one.
        emphasis: syntax of the prompts. `none` treats brackets as text. `original`, `no_norm` and
            `ignore` are modes of AUTOMATIC1111's web UI (see `Emphasis`): they parse brackets, and
            encode long prompts in chunks instead of truncating them.
        model: id of the model family.
        base_model: hub id (`owner/name`, `owner/name@revision`), diffusers folder or single
            .safetensors file. The JSON form shortens paths in this field, `config` and `vae` to
            their last component.
        base_sha256: content hash of the base model (`ContentHashes.sha256_of`); may be empty. The
            engine adds it to the recipe of the finished image. If the hash is given, the engine
            rejects a base model with another hash.
        variant: variant of the weight files in a diffusers folder: `fp16` for
            `*.fp16.safetensors`, empty for files without a variant.
        config: folder in the diffusers layout with the configurations for a single-file checkpoint;
            empty for those of the family.
        vae: hub id, folder or file of a VAE that replaces the base model's; empty for no
            replacement.
        width, height: pixels, 64..4096, rounded down to a multiple of the family's divisor; by
            default the size that the base model was trained at.
        steps: 1..150; some samplers have a lower maximum.
        guidance_scale: 0..100; values up to 1 disable guidance.
        guidance_rescale: 0..1; share of the guided prediction that is rescaled to the standard
            deviation of the prediction for the prompt, to avoid overexposure.
        seed: 0..2**63-1.
        sampler: one of the family's samplers.
        timestep_spacing: rule by which the sampler's timesteps are chosen. `default` is the
            trainer's rule. Few-step LoRAs need `trailing` (as in diffusers) or `sgm_uniform` (SGM
            Uniform of ComfyUI and Forge), which only some samplers support.
        eta: 0..1; strength of the noise that the sampler adds in each step (`gamma` in the paper of
            TCD). None uses the default of the sampler. Only for samplers with this option.
        prediction: quantity that the denoiser was trained to predict.
        adapters: adapters, in the order in which they are applied.
        adapter_mode: `merged` adds the adapters to the weights; `live` applies them at each call
            and leaves the weights unchanged. The trainer merges if all samples of a training run
            share one multiplier. The results of the two modes differ by rounding errors.
        history: adapters that the trainer merged into the base model and subtracted again for
            earlier rounds of samples, in order. Each time, the rounded weights change a little.
            Only for merged adapters in `exact`.
        noise: algorithm that draws half-precision noise on the CPU: `modern` is that of
            torch >= 2.12, `legacy` that of torch <= 2.11. In float32, both give the same noise.
        dtype: dtype of the denoiser and the latents.
        vae_dtype, text_encoder_dtype: dtypes of the VAE and the text encoders; by default `dtype`.
        fidelity: `exact` reproduces the trainer's images bit for bit. `fast` computes in the
            fastest way on the device: adapters are merged, and the denoiser and decoder may use
            another precision. The noise, sampler, latents and text encoding are as in `exact`.

    Raises:
        RecipeError: a field is out of range or not supported by the model family.
    """

    prompt: str
    negative_prompt: str = ""
    negative_prompt_2: str | None = None
    emphasis: Emphasis = "none"
    model: str = "sd15"
    base_model: str = FROM_MODEL
    base_sha256: str = ""
    variant: str = ""
    config: str = ""
    vae: str = ""
    width: int = FROM_MODEL
    height: int = FROM_MODEL
    steps: int = FROM_MODEL
    guidance_scale: float = FROM_MODEL
    guidance_rescale: float = 0.0
    seed: int = FROM_MODEL
    sampler: str = FROM_MODEL
    timestep_spacing: TimestepSpacing = "default"
    eta: float | None = None
    prediction: Prediction = "epsilon"
    adapters: tuple[AdapterRef, ...] = ()
    adapter_mode: AdapterMode = "merged"
    history: tuple[AdapterRef, ...] = ()
    noise: Noise = "modern"
    dtype: Dtype = "float32"
    vae_dtype: Dtype = FROM_MODEL
    text_encoder_dtype: Dtype = FROM_MODEL
    fidelity: Fidelity = "exact"

    def __post_init__(self) -> None:
        check_text("model", self.model)
        spec = get_family(self.model)
        self._fill_in(base_model=spec.base_model)
        check_text("base_model", self.base_model)
        self._fill_in(
            width=spec.size_of(self.base_model),
            height=spec.size_of(self.base_model),
            steps=spec.default_steps,
            guidance_scale=spec.default_guidance_scale,
            seed=spec.default_seed,
            sampler=spec.default_sampler,
            vae_dtype=self.dtype,
            text_encoder_dtype=self.dtype,
        )
        self._check(spec)
        for name in ("width", "height"):
            size = getattr(self, name)
            object.__setattr__(self, name, size - size % spec.resolution_divisor)
        for name in ("guidance_scale", "guidance_rescale"):
            # `+ 0.0` turns -0.0 into 0.0, as in `AdapterRef`.
            object.__setattr__(self, name, float(getattr(self, name)) + 0.0)
        if self.eta is not None:
            default = spec.samplers[self.sampler].eta
            object.__setattr__(self, "eta", None if self.eta == default else float(self.eta) + 0.0)
        if self.negative_prompt_2 == self.negative_prompt:
            object.__setattr__(self, "negative_prompt_2", None)
        object.__setattr__(self, "base_model", spec.canonical_base(self.base_model))
        for name in _ADAPTER_FIELDS:
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def _fill_in(self, **defaults: object) -> None:
        for name, value in defaults.items():
            if getattr(self, name) is FROM_MODEL:
                object.__setattr__(self, name, value)

    def _check(self, spec: Family) -> None:
        for name in ("prompt", "negative_prompt", *LOCATIONS, "base_sha256", "sampler"):
            check_text(name, getattr(self, name))
        if self.base_sha256 and not _SHA256.fullmatch(self.base_sha256):
            raise RecipeError(
                "base_sha256 must be 64 hexadecimal digits in lower case.", field="base_sha256"
            )
        check_range("width", self.width, MIN_SIZE, MAX_SIZE, whole=True)
        check_range("height", self.height, MIN_SIZE, MAX_SIZE, whole=True)
        check_range("guidance_scale", self.guidance_scale, 0.0, MAX_GUIDANCE)
        check_range("guidance_rescale", self.guidance_rescale, 0.0, 1.0)
        if self.negative_prompt_2 is not None:
            check_text("negative_prompt_2", self.negative_prompt_2)
        check_range("seed", self.seed, 0, MAX_SEED, whole=True)
        if self.sampler not in spec.samplers:
            known = ", ".join(spec.samplers)
            raise UnknownSamplerError(
                f"The sampler {self.sampler!r} is not supported for {spec.id}; use one of {known}.",
                field="sampler",
            )
        check_range(
            "steps",
            self.steps,
            1,
            min(MAX_STEPS, spec.samplers[self.sampler].max_steps),
            whole=True,
        )
        for name, choices in (
            ("emphasis", Emphasis),
            ("timestep_spacing", TimestepSpacing),
            ("prediction", Prediction),
            ("adapter_mode", AdapterMode),
            ("noise", Noise),
            ("dtype", Dtype),
            ("vae_dtype", Dtype),
            ("text_encoder_dtype", Dtype),
            ("fidelity", Fidelity),
        ):
            check_choice(name, getattr(self, name), get_args(choices))
        check_sampler_options(spec, self.sampler, self.timestep_spacing, self.eta)
        for name, default in _OPTIONAL.items():
            if name not in spec.uses and getattr(self, name) != default:
                raise RecipeError(f"{spec.title} does not use {name}; leave it out.", field=name)
        if self.emphasis != "none":
            if self.negative_prompt_2 not in (None, self.negative_prompt):
                raise RecipeError(
                    "Emphasis does not support a second negative prompt, which could have another "
                    "number of parts; leave negative_prompt_2 out, or set emphasis to none.",
                    field="negative_prompt_2",
                )
            for name in ("prompt", "negative_prompt"):
                check_emphasis(name, getattr(self, name))
        if self.fidelity == "fast" and self.adapter_mode == "live":
            raise RecipeError(
                "Fidelity fast always merges adapters; use adapter_mode merged, or fidelity exact.",
                field="adapter_mode",
            )
        for name in _ADAPTER_FIELDS:
            refs = getattr(self, name)
            if isinstance(refs, list | tuple) and all(isinstance(ref, AdapterRef) for ref in refs):
                continue
            raise RecipeError(
                f"{name} must be a tuple of AdapterRef; create each with "
                "AdapterRef.from_file(path).",
                field=name,
            )
        self._check_embeddings(spec)
        if self.history and (self.fidelity, self.adapter_mode) != ("exact", "merged"):
            raise RecipeError(
                "history needs fidelity exact and adapter_mode merged; leave history out.",
                field="history",
            )

    def _check_embeddings(self, spec: Family) -> None:
        words = [ref.word.lower() for ref in self.files if ref.word is not None]
        if words and not spec.supports_embeddings:
            raise RecipeError(
                f"{spec.title} does not support embeddings; leave out {words[0]}.", field="adapters"
            )
        if any(ref.word is not None for ref in self.history):
            raise RecipeError(
                "history has an embedding, but an embedding changes no weights; leave it out.",
                field="history",
            )
        if twice := next((word for word in words if words.count(word) > 1), None):
            raise RecipeError(
                f"Two embeddings have the word {twice}; leave one of them out.", field="adapters"
            )

    @property
    def files(self) -> tuple[AdapterRef, ...]:
        """All adapters whose files are needed, including those of `history`."""
        return (*self.history, *self.adapters)

    def to_json(self) -> str:
        """Return the whole recipe as JSON on one line, with short names instead of paths."""
        return json.dumps(self.to_dict(), ensure_ascii=False)

    def to_dict(self, *, paths: bool = False) -> dict[str, Any]:
        """Return the whole recipe as JSON-ready data, which `from_dict` reads.

        Args:
            paths: True keeps the full paths in `base_model`, `config` and `vae`, for stores on
                this machine. By default paths are shortened, because recipes are shared with
                images.
        """
        plain: dict[str, Any] = {"format": FORMAT}
        for entry in fields(self):
            plain[entry.name] = getattr(self, entry.name)
        if not paths:
            plain |= {name: short_name(plain[name]) for name in LOCATIONS}
        for name, default in _OMITTED_DEFAULTS.items():
            if plain[name] == default:
                del plain[name]
        for field_name in _ADAPTER_FIELDS & plain.keys():
            plain[field_name] = [
                {"sha256": ref.sha256, "multiplier": ref.multiplier, "name": ref.name}
                | ({} if ref.alpha is None else {"alpha": ref.alpha})
                | ({} if ref.word is None else {"word": ref.word})
                for ref in plain[field_name]
            ]
        return plain

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Read a recipe that `to_json` wrote, in this version or an older one.

        Raises:
            RecipeError: the text is not JSON, or a field is missing, unknown or out of range.
        """
        try:
            plain = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RecipeError("The recipe is not JSON.") from error
        return cls.from_dict(plain)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Recipe:
        """Read a recipe that `to_dict` wrote, in this version or an older one.

        Missing fields are errors, except for fields that older versions did not write.

        Raises:
            RecipeError: a field is missing, unknown or out of range.
        """
        if not isinstance(plain, Mapping):
            raise RecipeError("A recipe must be a JSON object.")
        # Recipes written before `fidelity` existed are exact.
        values = {"fidelity": "exact", **_OMITTED_DEFAULTS, **plain}
        version = values.pop("format", None)
        if type(version) is not int or not 1 <= version <= FORMAT:
            raise RecipeError(
                f"This version of Fidelora reads recipes of the formats 1 to {FORMAT}, "
                f"but the recipe's format is {shown(version)}.",
                field="format",
            )
        if version == 1:
            values.setdefault("base_sha256", "")
        known = {entry.name for entry in fields(cls)}
        if missing := sorted(known - values.keys()):
            raise RecipeError(f"The recipe lacks {', '.join(missing)}.", field=missing[0])
        if unknown := sorted(map(str, values.keys() - known)):
            raise RecipeError(
                f"The recipe has unknown fields: {', '.join(unknown)}.", field=unknown[0]
            )
        for name in _ADAPTER_FIELDS & plain.keys():
            values[name] = _read_refs(name, values[name])
        return cls(**values)

    @property
    def digest(self) -> str:
        """Sha256 in hex of the fields that define the image.

        Equal recipes have the same digest on every machine. If `base_sha256` is empty, the location
        of the base model is hashed instead, as in format 1.
        """
        canonical = json.dumps(
            self._identity(), sort_keys=True, separators=(",", ":"), ensure_ascii=True
        )
        return hashlib.sha256(canonical.encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self.digest)

    def _identity(self) -> dict[str, Any]:
        """Return the fields that define the image as JSON-ready data."""
        plain = self.to_dict(paths=True)
        for name in _ADAPTER_FIELDS & plain.keys():
            for adapter in plain[name]:
                del adapter["name"]
        if self.fidelity == "exact":
            del plain["fidelity"]  # keeps the digests of recipes from before `fidelity` existed
        if self.base_sha256:
            for name in LOCATIONS:
                del plain[name]
        else:
            del plain["base_sha256"]
            plain["format"] = 1
        return plain


def _read_refs(name: str, plain: object) -> tuple[AdapterRef, ...]:
    # A path is not allowed: a received recipe must not refer to files on this machine.
    parts = {"sha256", "multiplier", "name"}
    if not isinstance(plain, list) or not all(
        isinstance(ref, Mapping) and ref.keys() - {"alpha", "word"} == parts for ref in plain
    ):
        raise RecipeError(
            f"{name} must be a list of objects with sha256, multiplier and name.", field=name
        )
    return tuple(AdapterRef(**ref) for ref in plain)


def may_share_batch(first: Recipe, second: Recipe) -> bool:
    """Return True if both recipes are `fast` and differ only in prompts and seed.

    Images in `exact` never share a batch, because their last bits depend on the batch size.
    """
    return first.fidelity == "fast" and differ_in_prompts_and_seed(first, second)


def differ_in_prompts_and_seed(first: Recipe, second: Recipe) -> bool:
    """Return True if two recipes are equal except for their prompts and seeds, if at all."""
    own = ("prompt", "negative_prompt", "negative_prompt_2", "seed")
    return replace(second, **{name: getattr(first, name) for name in own}) == first
