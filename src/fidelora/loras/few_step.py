"""Known few-step LoRAs, and the settings that their authors recommend. Does not import torch.

Such a LoRA is trained by distillation for one sampler with a few steps and little or no guidance.
With other settings, its images are blurred or oversaturated. Nothing is changed automatically: the
command line proposes the settings.

Sources, read in November 2026: the model cards https://huggingface.co/ByteDance/Hyper-SD,
https://huggingface.co/ByteDance/SDXL-Lightning, https://huggingface.co/tianweiy/DMD2,
https://huggingface.co/latent-consistency/lcm-lora-sdv1-5 (and lcm-lora-sdxl),
https://huggingface.co/h1t/TCD-SD15-LoRA (and TCD-SDXL-LoRA). The cards disable guidance with 0;
here, 1 is proposed, which disables it as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from fidelora.recipe import Recipe
from fidelora.sampling.spacings import TimestepSpacing

_SIMILAR: Mapping[TimestepSpacing, TimestepSpacing] = {"sgm_uniform": "trailing"}
"""Timestep spacings that are accepted in place of a recommended one, because the two differ little.
Authors recommend `sgm_uniform` for ComfyUI and `trailing` for diffusers."""


@dataclass(frozen=True)
class FewStepSettings:
    """Recommended settings of a few-step LoRA.

    Attributes:
        steps: the proposed number. The authors recommend `min_steps` to `max_steps`.
        guidance_scale: the proposed value. The authors recommend values up to `max_guidance`.
        eta: None if the sampler has no eta that can be set.
    """

    sampler: str
    steps: int
    min_steps: int
    max_steps: int
    guidance_scale: float = 1.0
    max_guidance: float = 1.0
    timestep_spacing: TimestepSpacing = "default"
    eta: float | None = None

    def match(self, recipe: Recipe) -> bool:
        """Return True if the recipe has recommended settings. Any `eta` is accepted."""
        # All values up to 1 disable guidance, so they are the same setting.
        min_guidance = 0.0 if self.guidance_scale == 1 else self.guidance_scale
        return (
            recipe.sampler == self.sampler
            and _SIMILAR.get(recipe.timestep_spacing, recipe.timestep_spacing)
            == self.timestep_spacing
            and self.min_steps <= recipe.steps <= self.max_steps
            and min_guidance <= recipe.guidance_scale <= self.max_guidance
        )

    def options(self) -> str:
        """Return the options of `fidelora generate` for these settings."""
        words = [f"--sampler {self.sampler}"]
        if self.timestep_spacing != "default":
            words.append(f"--spacing {self.timestep_spacing}")
        words += [f"--steps {self.steps}", f"--guidance {self.guidance_scale:g}"]
        if self.eta is not None:
            words.append(f"--eta {self.eta:g}")
        return " ".join(words)


@dataclass(frozen=True)
class FewStepLora:
    """A published few-step LoRA.

    Attributes:
        name: file name without suffix, as published. Files that are published as
            `pytorch_lora_weights` are listed by the name of their repository, to which users
            usually rename them.
        model: the model family.
        sha256: hash of the published file, from the Git LFS pointer in its repository; empty if
            the pointer could not be read.
    """

    name: str
    model: str
    settings: FewStepSettings
    sha256: str = ""


def _fixed(sampler: str, steps: int, spacing: TimestepSpacing) -> FewStepSettings:
    """Return the settings of a LoRA for one number of steps, without guidance."""
    return FewStepSettings(sampler, steps, steps, steps, timestep_spacing=spacing)


def _with_guidance(steps: int) -> FewStepSettings:
    """Return the settings of a CFG-preserved LoRA of Hyper-SD."""
    return FewStepSettings("ddim", steps, steps, steps, 5.0, 8.0, "trailing")


_UNIFIED = FewStepSettings("tcd", 1, 1, 8, eta=1.0)
_LCM = FewStepSettings("lcm", 4, 2, 8, max_guidance=2.0)
_TCD = FewStepSettings("tcd", 4, 2, 50, eta=0.3)
# The card passes the timesteps 999, 749, 499, 249, which `trailing` chooses for 4 steps. LCM's own
# timesteps differ from those of the distillation.
_DMD2 = _fixed("lcm", 4, "trailing")

FEW_STEP_LORAS: tuple[FewStepLora, ...] = (
    FewStepLora(
        "Hyper-SD15-1step-lora", "sd15", _UNIFIED,
        "a04fd9a535c1e56d38f7590ee72a13fd5ca0409853b4fff021e5a9482cf1ca3b",
    ),
    FewStepLora(
        "Hyper-SD15-2steps-lora", "sd15", _fixed("ddim", 2, "trailing"),
        "2f26dcc1d883feb07557a552315baae2ca2a04ac08556b08a355a244547e8c3a",
    ),
    FewStepLora(
        "Hyper-SD15-4steps-lora", "sd15", _fixed("ddim", 4, "trailing"),
        "c5dd058616461ed5053e2b14eec4dbe3fa0eea3b13688642f6d6c80ea2ba5958",
    ),
    FewStepLora(
        "Hyper-SD15-8steps-lora", "sd15", _fixed("ddim", 8, "trailing"),
        "91fc3186236e956d64dbb4357f2e120c69b968b78af7d2db9884a5ca74d3cd13",
    ),
    FewStepLora(
        "Hyper-SD15-8steps-CFG-lora", "sd15", _with_guidance(8),
        "f6123d5b950d5250ab6c33600e27f4dcf71b3099ebf888685e01e9e8117ce482",
    ),
    FewStepLora(
        "Hyper-SD15-12steps-CFG-lora", "sd15", _with_guidance(12),
        "64b98437383537cd968fda6f87a05c33160ece9c79ff4757949a1e212ff78361",
    ),
    FewStepLora(
        "Hyper-SDXL-1step-lora", "sdxl", _UNIFIED,
        "c912df184c5116792d2c604d26c6bc2aa916685f4a793755255cda1c43a3c78a",
    ),
    FewStepLora(
        "Hyper-SDXL-2steps-lora", "sdxl", _fixed("ddim", 2, "trailing"),
        "69b25c0187ced301c3603c599c0bc509ac99b8ac34db89a2aecc3d5f77a35187",
    ),
    FewStepLora(
        "Hyper-SDXL-4steps-lora", "sdxl", _fixed("ddim", 4, "trailing"),
        "12f81a27d00a751a40d68fd15597091896c5a90f3bd632fb6c475607cbdad76e",
    ),
    FewStepLora(
        "Hyper-SDXL-8steps-lora", "sdxl", _fixed("ddim", 8, "trailing"),
        "ca689190e8c46038550384b5675488526cfe5a40d35f82b27acb75c100f417c1",
    ),
    FewStepLora(
        "Hyper-SDXL-8steps-CFG-lora", "sdxl", _with_guidance(8),
        "55b51334c85061afff5eff7c550b61963c8b8607a5868bbe4f26db49374719b1",
    ),
    FewStepLora(
        "Hyper-SDXL-12steps-CFG-lora", "sdxl", _with_guidance(12),
        "0b97f447b5878323a28fbe7c51ba7acebd21f4d77552ba77b04b11c8911825b6",
    ),
    FewStepLora(
        "sdxl_lightning_2step_lora", "sdxl", _fixed("euler", 2, "trailing"),
        "04fafc778385b24144498a8247498ae4fb7a69f702ea0566bdce2845a31fcc43",
    ),
    FewStepLora(
        "sdxl_lightning_4step_lora", "sdxl", _fixed("euler", 4, "trailing"),
        "bf56cf2657efb15e465d81402ed481d1e11c4677e4bcce1bc11fe71ad8506b79",
    ),
    FewStepLora(
        "sdxl_lightning_8step_lora", "sdxl", _fixed("euler", 8, "trailing"),
        "5aa30d94cdf7950a8b53a693682650ee061eddb128c5435a8f88defea73b2ac6",
    ),
    FewStepLora(
        "lcm-lora-sdv1-5", "sd15", _LCM,
        "8f90d840e075ff588a58e22c6586e2ae9a6f7922996ee6649a7f01072333afe4",
    ),
    FewStepLora("lcm-lora-sdxl", "sdxl", _LCM),
    FewStepLora(
        "TCD-SD15-LoRA", "sd15", _TCD,
        "eaecb24a1cda4411eab67275b1d991071216ac93693e8fa0c9226c9df0386232",
    ),
    FewStepLora(
        "TCD-SDXL-LoRA", "sdxl", _TCD,
        "2c777bc60abf41d3eb0fe405d23d73c280a020eea5adf97a82a141592c33feba",
    ),
    FewStepLora(
        "dmd2_sdxl_4step_lora", "sdxl", _DMD2,
        "a374289e9446d7f14d2037c4b3770756b7b52c292142a691377c3c755010a1bb",
    ),
    FewStepLora(
        "dmd2_sdxl_4step_lora_fp16", "sdxl", _DMD2,
        "b3d9173815a4b595991c3a7a0e0e63ad821080f314a0b2a3cc31ecd7fcf2cbb8",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Recognised:
    """A few-step LoRA that was recognised.

    Attributes:
        by: `sha256` or `name`. Only the hash is certain: any file can have the name.
    """

    lora: FewStepLora
    by: str


def recognise_few_step_lora(name: str, sha256: str) -> Recognised | None:
    """Return the known few-step LoRA with this sha256, else with this file name; None if unknown.

    Args:
        name: file name without suffix. Upper case, `-`, `_`, spaces and a copy's number at the end
            (` (1)`) make no difference.
    """
    for lora in FEW_STEP_LORAS:
        if lora.sha256 and lora.sha256 == sha256:
            return Recognised(lora, "sha256")
    for lora in FEW_STEP_LORAS:
        if _plain(lora.name) == _plain(name):
            return Recognised(lora, "name")
    return None


def proposals(recipe: Recipe) -> Iterator[str]:
    """Yield a sentence for each few-step LoRA whose recommended settings the recipe does not use.

    LoRAs with multiplier 0 and LoRAs of another model family are skipped.
    """
    for adapter in recipe.adapters:
        found = recognise_few_step_lora(adapter.name, adapter.sha256)
        if found is None or found.lora.model != recipe.model or adapter.multiplier == 0:
            continue
        if not found.lora.settings.match(recipe):
            yield f"{proposal(adapter.name, found)}. Nothing was changed."


def proposal(name: str, found: Recognised) -> str:
    """Return the recommended options of the LoRA `name` as one phrase."""
    of = "a few-step LoRA" if found.by == "sha256" else "a few-step LoRA according to its file name"
    return f"{name} is {of} ({found.lora.name}); recommended: {found.lora.settings.options()}"


def _plain(name: str) -> str:
    return re.sub(r"[-_ ]+", "", re.sub(r" ?\(\d+\)$", "", name)).lower()
