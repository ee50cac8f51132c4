"""The engine: same recipe, same pixels, whatever happened in between."""

from __future__ import annotations

import platform
import random
import threading
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.support import (
    LOKR,
    LORA,
    LORA_CONV,
    TINY_BASE,
    change_weights,
    copy_base,
    expected_bytes_of,
    load_model_of,
    save_adapter,
)

from fidelora import AdapterRef, Engine, Progress, Recipe
from fidelora.accel.device import processor_name, read_processor_name
from fidelora.engine.binding import bind, with_adapters
from fidelora.errors import (
    AdapterChangedError,
    AdapterMismatchError,
    AdapterNotFoundError,
    BaseModelChangedError,
    DeviceError,
    EngineBusyError,
    GenerationCancelled,
    MemoryExhaustedError,
    NumericsError,
    RecipeError,
)
from fidelora.families import get_family
from fidelora.families.clip import ClipEncoder
from fidelora.sampling.noise import legacy_randn

SMALL: dict[str, Any] = {"base_model": str(TINY_BASE), "width": 64, "height": 64, "steps": 3}


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(device="cpu")


def pixels(engine: Engine, recipe: Recipe) -> bytes:
    return engine.generate(recipe).pixels.tobytes()


def test_a_recipe_gives_the_same_pixels_in_any_order_of_recipes(engine):
    lora, conv, lokr = (AdapterRef.from_file(path) for path in (LORA, LORA_CONV, LOKR))
    recipes = [
        Recipe(prompt="a red ball", **SMALL),
        Recipe(prompt="a red ball", adapters=(lora,), **SMALL),
        Recipe(prompt="a red ball", adapters=(lora, conv), adapter_mode="live", **SMALL),
        Recipe(
            prompt="a blue ball",
            adapters=(replace(lokr, multiplier=-0.5), conv),
            sampler="euler_a",
            **SMALL,
        ),
        Recipe(
            prompt="a red ball", adapters=(lokr,), adapter_mode="live", guidance_scale=1, **SMALL
        ),
        Recipe(
            prompt="", adapters=(replace(lora, multiplier=0.0),), sampler="heun", seed=3, **SMALL
        ),
    ]
    first = [pixels(engine, recipe) for recipe in recipes]
    assert len(set(first)) == len(recipes)
    order = list(range(len(recipes))) * 3
    random.Random(1).shuffle(order)
    for index in order:
        assert pixels(engine, recipes[index]) == first[index]
    alone = Engine(device="cpu")
    assert [pixels(alone, recipe) for recipe in reversed(recipes)] == first[::-1]


def test_multiplier_0_equals_the_base_model_merged_and_live(engine):
    base = Recipe(prompt="a ball", **SMALL)
    off = (AdapterRef.from_file(LORA, 0.0),)
    expected = pixels(engine, base)
    assert pixels(engine, replace(base, adapters=off)) == expected
    assert pixels(engine, replace(base, adapters=off, adapter_mode="live")) == expected


@pytest.mark.parametrize("path", [LORA, LORA_CONV, LOKR], ids=lambda path: path.stem)
def test_merged_and_live_images_differ_only_by_rounding(engine, path):
    recipe = Recipe(prompt="a ball", adapters=(AdapterRef.from_file(path, 0.7),), **SMALL)
    merged = engine.generate(recipe).pixels.astype(int)
    live = engine.generate(replace(recipe, adapter_mode="live")).pixels.astype(int)
    base = engine.generate(replace(recipe, adapters=())).pixels.astype(int)
    assert np.abs(merged - live).max() <= 1
    assert np.abs(merged - base).max() > 5


@pytest.mark.parametrize("mode", ["merged", "live"])
def test_several_adapters_add_up(engine, mode):
    """Two halves of an adapter equal the whole up to rounding; no adapter overwrites another."""
    for path in (LORA, LOKR):
        whole, half = AdapterRef.from_file(path, 1.0), AdapterRef.from_file(path, 0.5)
        recipe = Recipe(prompt="a ball", adapters=(whole,), adapter_mode=mode, **SMALL)
        one = engine.generate(recipe).pixels.astype(int)
        two = engine.generate(replace(recipe, adapters=(half, half))).pixels.astype(int)
        assert np.abs(one - two).max() <= 1


def test_live_lora_and_lokr_add_up_like_merged_ones(engine):
    refs = (AdapterRef.from_file(LORA, 0.5), AdapterRef.from_file(LOKR, 0.5))
    recipe = Recipe(prompt="a ball", adapters=refs, **SMALL)
    merged = engine.generate(recipe).pixels.astype(int)
    live = engine.generate(replace(recipe, adapter_mode="live")).pixels.astype(int)
    assert np.abs(merged - live).max() <= 1


@pytest.mark.parametrize("sampler", get_family("sd15").samplers)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_every_sampler_makes_an_image_and_counts_its_steps(engine, sampler, steps):
    reports: list[Progress] = []
    recipe = Recipe(prompt="a ball", sampler=sampler, **{**SMALL, "steps": steps})
    image = engine.generate(recipe, reports.append)
    assert image.pixels.shape == (64, 64, 3)
    assert image.pixels.std() > 0
    counted = [report.step for report in reports]
    assert counted == sorted(counted)
    assert set(counted) == set(range(1, steps + 1))
    assert reports[-1].seconds_left == 0
    assert pixels(engine, recipe) == image.pixels.tobytes()


def test_the_maximum_number_of_steps_works(engine):
    assert engine.generate(Recipe(prompt="a ball", **{**SMALL, "steps": 150})).pixels.std() > 0


def test_samplers_give_different_pictures(engine):
    made = {
        name: engine.generate(
            Recipe(prompt="a ball", sampler=name, **{**SMALL, "steps": 6})
        ).pixels.astype(int)
        for name in get_family("sd15").samplers
    }
    # Ancestral Euler is DDPM in other variables: with the same draws both agree up to rounding,
    # which depends on the processor.
    assert np.abs(made["ddpm"] - made.pop("euler_a")).max() <= 1
    assert len({image.tobytes() for image in made.values()}) == len(made)


@pytest.mark.parametrize("guidance", [0.0, 0.5, 1.0])
def test_without_guidance_the_negative_prompt_has_no_effect(engine, guidance):
    recipe = Recipe(prompt="a ball", guidance_scale=guidance, **SMALL)
    assert pixels(engine, recipe) == pixels(engine, replace(recipe, negative_prompt="blurry"))


def test_with_guidance_the_negative_prompt_has_an_effect(engine):
    recipe = Recipe(prompt="a ball", guidance_scale=1.01, **SMALL)
    assert pixels(engine, recipe) != pixels(
        engine, replace(recipe, guidance_scale=5.0, negative_prompt="blurry")
    )


def test_v_prediction_gives_a_different_picture(engine):
    recipe = Recipe(prompt="a ball", **SMALL)
    assert pixels(engine, recipe) != pixels(engine, replace(recipe, prediction="v_prediction"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_close_and_its_noise_modes_differ(engine, dtype):
    recipe = Recipe(
        prompt="a ball",
        dtype=dtype,
        vae_dtype="float32",
        text_encoder_dtype="float32",
        sampler="euler_a",
        **SMALL,
    )
    modern = engine.generate(recipe).pixels
    wide = engine.generate(replace(recipe, dtype="float32")).pixels
    assert np.abs(modern.astype(int) - wide.astype(int)).mean() < 10
    assert modern.tobytes() != pixels(engine, replace(recipe, noise="legacy"))


@pytest.mark.parametrize(("sampler", "draws_per_step"), [("euler_a", 1), ("ddim", 0)])
def test_legacy_noise_applies_to_the_samplers_draws_too(
    engine, monkeypatch, sampler, draws_per_step
):
    drawn: list[torch.dtype] = []

    def counted(shape, generator, dtype):
        drawn.append(dtype)
        return legacy_randn(shape, generator, dtype)

    monkeypatch.setattr("fidelora.sampling.noise.legacy_randn", counted)
    recipe = Recipe(prompt="a ball", dtype="bfloat16", noise="legacy", sampler=sampler, **SMALL)
    engine.generate(recipe)
    assert drawn == [torch.bfloat16] * (1 + draws_per_step * recipe.steps)


def test_in_float32_both_noise_modes_are_equal(engine):
    recipe = Recipe(prompt="a ball", sampler="ddpm", **SMALL)
    assert pixels(engine, recipe) == pixels(engine, replace(recipe, noise="legacy"))


def test_the_truncated_end_of_a_prompt_is_quoted(engine):
    long = "ball " * 75 + "Über-Katze, at Night"
    image = engine.generate(Recipe(prompt=long, negative_prompt="x " * 90, **SMALL))
    assert image.warnings == (
        "The end of the negative prompt exceeds 77 tokens and has no effect: "
        f'"{" ".join(["x"] * 15)}".',
        'The end of the prompt exceeds 77 tokens and has no effect: "Über-Katze, at Night".',
    )
    assert image.pixels.tobytes() == pixels(
        engine, Recipe(prompt="ball " * 75, negative_prompt="x " * 75, **SMALL)
    )


def test_a_prompt_of_maximum_length_has_no_warning(engine):
    assert engine.generate(Recipe(prompt="ball " * 75, **SMALL)).warnings == ()


@pytest.mark.parametrize("mode", ["merged", "live"])
def test_a_cancelled_generation_does_not_affect_later_images(engine, mode):
    recipe = Recipe(
        prompt="a ball", adapters=(AdapterRef.from_file(LORA),), adapter_mode=mode, **SMALL
    )
    base = replace(recipe, adapters=())
    expected = pixels(engine, recipe), pixels(engine, base)
    seen: list[int] = []

    def cancel(progress: Progress) -> None:
        seen.append(progress.step)
        if progress.step == 2:
            raise GenerationCancelled

    with pytest.raises(GenerationCancelled):
        engine.generate(recipe, cancel)
    assert seen == [1, 2]
    assert (pixels(engine, recipe), pixels(engine, base)) == expected


def test_a_mismatched_adapter_does_not_affect_later_images(engine, tmp_path):
    from tests.support import save_adapter

    good = Recipe(prompt="a ball", adapters=(AdapterRef.from_file(LORA),), **SMALL)
    expected = pixels(engine, good)
    tensors = {
        "lora_unet_none.lora_down.weight": torch.zeros(1, 4),
        "lora_unet_none.lora_up.weight": torch.zeros(4, 1),
    }
    bad = AdapterRef.from_file(save_adapter(tmp_path / "bad.safetensors", tensors))
    with pytest.raises(AdapterMismatchError):
        engine.generate(replace(good, adapters=(*good.adapters, bad)))
    assert pixels(engine, good) == expected


def test_an_overwritten_adapter_file_is_detected(tmp_path):
    engine = Engine(device="cpu")
    path = tmp_path / "lora.safetensors"
    path.write_bytes(LORA.read_bytes())
    old = Recipe(prompt="a ball", adapters=(AdapterRef.from_file(path),), **SMALL)
    before = pixels(engine, old)
    path.write_bytes(LORA_CONV.read_bytes())
    new = replace(old, adapters=(AdapterRef.from_file(path),))
    assert pixels(engine, new) == pixels(
        engine, replace(old, adapters=(AdapterRef.from_file(LORA_CONV),))
    )
    assert pixels(engine, old) == before  # still in memory under its hash
    with pytest.raises(AdapterChangedError, match="has changed: its sha256 is"):
        Engine(device="cpu").generate(old)


def test_a_recipe_from_json_finds_its_adapter_in_the_library():
    engine = Engine(device="cpu")
    recipe = Recipe(prompt="a ball", adapters=(AdapterRef.from_file(LORA),), **SMALL)
    read_back = Recipe.from_dict(recipe.to_dict(paths=True))
    with pytest.raises(AdapterNotFoundError, match=r"engine\.adapters\.add"):
        engine.generate(read_back)
    assert engine.adapters.add(LORA) == recipe.adapters[0]
    assert pixels(engine, read_back) == pixels(engine, recipe)


def test_adapters_beyond_the_budget_are_read_again(tmp_path):
    from fidelora.adapters.library import AdapterLibrary

    library = AdapterLibrary(budget_bytes=1)
    first, second = library.add(LORA), library.add(LORA_CONV)
    one = library.get(first)
    assert library.get(first) is one
    assert library.get(second) is not one
    assert library.get(first) is not one
    assert library.get(first).sha256 == one.sha256


def test_calls_from_several_threads_run_one_at_a_time(engine):
    recipes = [
        Recipe(prompt="a ball", adapters=(AdapterRef.from_file(path),), **SMALL)
        for path in (LORA, LOKR)
    ] * 3
    expected = [pixels(engine, recipe) for recipe in recipes]
    results: dict[int, bytes] = {}

    def work(index: int) -> None:
        results[index] = pixels(engine, recipes[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(recipes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[index] for index in range(len(recipes))] == expected


def test_jitter_changes_half_precision_slightly_alone_and_in_a_batch(engine):
    half: dict[str, Any] = dict.fromkeys(("dtype", "vae_dtype", "text_encoder_dtype"), "bfloat16")
    recipes = [
        Recipe(prompt=prompt, seed=seed, **SMALL, **half) for seed, prompt in [(1, "a"), (2, "b c")]
    ]
    plain = [engine.generate(recipe).pixels.astype(int) for recipe in recipes]
    alone = [engine.generate(recipe, jitter=5).pixels.astype(int) for recipe in recipes]
    batch = [image.pixels.astype(int) for image in engine.generate_jittered(recipes, 5)]
    for index in range(2):
        assert 0 < abs(alone[index] - plain[index]).mean() < 3
        assert abs(batch[index] - plain[index]).mean() < 3
        assert abs(batch[index] - batch[1 - index]).mean() > 10
    assert engine.max_jittered_batch(recipes[0]) > 1 == engine.max_batch(recipes[0])


@pytest.mark.parametrize("other", [{"steps": 4}, {"width": 80}, {"dtype": "float32"}])
def test_jittered_images_that_cannot_share_a_batch_are_refused(engine, other):
    first = Recipe(prompt="", **SMALL | {"dtype": "bfloat16"})
    with pytest.raises(RecipeError, match="one by one"):
        engine.generate_jittered([replace(first, **other), first], 0)


def test_the_least_recently_used_base_model_is_evicted(tmp_path):
    other = str(copy_base(tmp_path))
    engine = Engine(device="cpu")
    first = Recipe(prompt="a ball", **SMALL)
    second = replace(first, base_model=other)
    assert pixels(engine, first) == pixels(engine, second)
    assert [key.base_model for key in engine._models.models] == [other]


def test_base_models_stay_loaded_within_the_budget(tmp_path):
    bases = [str(copy_base(tmp_path / name)) for name in "abc"]
    recipes = [Recipe(prompt="a ball", **{**SMALL, "base_model": base}) for base in bases]
    one = load_model_of(recipes[0]).size_bytes
    assert expected_bytes_of(recipes[0]) == one
    engine = Engine(device="cpu", base_budget_bytes=2 * one)
    for recipe in (recipes[0], recipes[1], recipes[0], recipes[2]):
        engine.load(recipe)
    assert [key.base_model for key in engine._models.models] == [bases[0], bases[2]]

    small = Engine(device="cpu", base_budget_bytes=2 * one - 1)
    for recipe in recipes[:2]:
        small.load(recipe)
    assert [key.base_model for key in small._models.models] == [bases[1]]


def test_an_image_names_its_base_model_by_content(tmp_path):
    engine = Engine(device="cpu")
    first = engine.generate(Recipe(prompt="a ball", **SMALL)).recipe
    copy = replace(first, base_model=str(copy_base(tmp_path)), base_sha256="")
    assert engine.generate(copy).recipe == first
    assert engine.generate(first).recipe == first
    with pytest.raises(
        BaseModelChangedError, match=f"sha256 abababababab, but .*{first.base_sha256[:12]}"
    ):
        engine.generate(replace(first, base_sha256="ab" * 32))


def test_an_overwritten_base_is_not_used_for_a_recipe_of_the_old_one(tmp_path):
    base = copy_base(tmp_path)
    engine = Engine(device="cpu")
    old = engine.generate(Recipe(prompt="a ball", **{**SMALL, "base_model": str(base)})).recipe
    change_weights(
        base / "vae" / "diffusion_pytorch_model.safetensors",
        lambda tensors: {name: tensor * 1.1 for name, tensor in tensors.items()},
    )
    with pytest.raises(BaseModelChangedError):
        engine.generate(old)
    new = engine.generate(replace(old, base_sha256="")).recipe
    assert new.base_sha256 not in ("", old.base_sha256)
    assert engine.generate(new).recipe == new


@pytest.mark.parametrize(
    ("dtype", "advice"),
    [("float16", "use bfloat16 or float32"), ("float32", "try it without adapters")],
)
def test_nan_is_an_error_and_not_a_black_image(tmp_path, dtype, advice):
    """The weights are finite, but their products overflow."""
    base = copy_base(tmp_path)
    huge = 6e4 if dtype == "float16" else 1e38

    def enlarge(tensors):
        return {
            name: torch.full_like(t.float(), huge) if name.startswith("decoder.conv_in") else t
            for name, t in tensors.items()
        }

    change_weights(base / "vae" / "diffusion_pytorch_model.safetensors", enlarge)
    with pytest.raises(NumericsError, match=f"NaN.*{advice}"):
        Engine(device="cpu").generate(
            Recipe(prompt="a ball", dtype=dtype, **{**SMALL, "base_model": str(base)})
        )


def test_an_overwritten_base_model_is_loaded_again(tmp_path):
    base = copy_base(tmp_path)
    engine = Engine(device="cpu")
    recipe = Recipe(prompt="a ball", **{**SMALL, "base_model": str(base)})
    before = pixels(engine, recipe)
    change_weights(
        base / "unet" / "diffusion_pytorch_model.safetensors",
        lambda tensors: tensors | {"conv_out.bias": tensors["conv_out.bias"] + 1},
    )
    assert pixels(engine, recipe) != before


def test_the_callers_autocast_has_no_effect(engine):
    recipe = Recipe(prompt="a ball", **SMALL)
    expected = pixels(engine, recipe)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert pixels(engine, recipe) == expected


def test_generating_inside_on_step_is_refused(engine):
    recipe = Recipe(prompt="a ball", **SMALL)
    expected = pixels(engine, recipe)
    with pytest.raises(EngineBusyError, match="was called from `on_step`"):
        engine.generate(recipe, lambda _: engine.load(recipe))
    assert pixels(engine, recipe) == expected


def test_the_configuration_folder_is_part_of_the_recipe():
    recipe = Recipe(prompt="a ball", **SMALL)
    assert replace(recipe, config="elsewhere").digest != recipe.digest


def test_an_adapter_is_found_by_its_hash(tmp_path):
    from fidelora.adapters.library import AdapterLibrary

    library = AdapterLibrary(budget_bytes=1)
    known = library.add(LORA)
    library.add(LORA_CONV)  # the first is out of memory now
    for stale in (tmp_path / "gone.safetensors", LORA_CONV):
        assert library.get(replace(known, path=stale)).sha256 == known.sha256
        library.get(AdapterRef.from_file(LORA_CONV))


def test_a_path_given_later_is_remembered(tmp_path):
    from fidelora.adapters.library import AdapterLibrary

    library = AdapterLibrary(budget_bytes=1)
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    for path in (first, second):
        path.write_bytes(LORA.read_bytes())
    library.add(first)
    known = library.add(second)  # from memory, without a look at the file
    first.unlink()
    library.add(LORA_CONV)
    assert library.get(AdapterRef(known.sha256)).sha256 == known.sha256


def test_a_changed_file_is_reported_even_with_a_folder_of_hashes(tmp_path):
    from fidelora.adapters.library import AdapterLibrary

    path = tmp_path / "lora.safetensors"
    path.write_bytes(LORA.read_bytes())
    ref = replace(AdapterRef.from_file(path), file=None)
    path.write_bytes(LORA_CONV.read_bytes())
    with pytest.raises(AdapterChangedError):
        AdapterLibrary(folder=tmp_path / "none").get(ref)


def test_running_out_of_memory_raises_a_typed_error(engine, monkeypatch):
    def no_memory(*args, **kwargs):
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"
        )

    monkeypatch.setattr("fidelora.engine.engine.sample", no_memory)
    with pytest.raises(MemoryExhaustedError, match="smaller size"):
        engine.generate(Recipe(prompt="a ball", **SMALL))


def test_loading_reports_the_seconds_of_each_phase(engine, monkeypatch):
    seconds = [0.0]

    def taking(spent: float, run: Callable[..., Any]) -> Callable[..., Any]:
        def run_and_wait(*args: Any) -> Any:
            seconds[0] += spent
            return run(*args)

        return run_and_wait

    module = "fidelora.engine.engine"
    clock = SimpleNamespace(monotonic=lambda: seconds[0])
    monkeypatch.setattr("fidelora.engine.phase_clock.time", clock)
    monkeypatch.setattr(f"{module}.bind", taking(5, bind))
    monkeypatch.setattr(f"{module}.with_adapters", taking(2, with_adapters))
    recipe = Recipe(prompt="a ball", adapters=(AdapterRef.from_file(LORA),), **SMALL)
    assert engine.load(recipe) == {"load": 0.0, "read": 5.0, "adapters": 2.0}
    made = engine.generate(recipe).seconds
    assert {phase: made[phase] for phase in ("load", "read", "adapters")} == engine.load(recipe)


def test_progress_and_timings_are_reported(engine):
    image = engine.generate(Recipe(prompt="a ball", **SMALL))
    assert list(image.seconds) == ["load", "read", "adapters", "text", "denoise", "decode"]
    assert {
        "fidelora",
        "torch",
        "diffusers",
        "transformers",
        "device",
        "cpu_capability",
        "threads",
    } == set(image.environment)
    assert image.environment["device"] == f"cpu ({processor_name()})"


@pytest.mark.parametrize(
    ("information", "name"),
    [
        (
            "vendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 17\n"
            "model name\t: AMD EPYC\n\nprocessor\t: 1\n",
            "AMD EPYC (by AuthenticAMD, family 25, model 17)",
        ),
        ("processor\t: 0\nCPU implementer\t: 0x41\n", f"{platform.machine()} (details unknown)"),
    ],
)
def test_the_environment_includes_the_processors_maker(information, name, tmp_path):
    """Intel and AMD processors give different bits with the same instructions."""
    (tmp_path / "cpuinfo").write_text(information)
    assert read_processor_name(tmp_path / "cpuinfo") == name


@pytest.mark.parametrize(
    ("device", "offload", "message"),
    [
        ("cuda:99" if torch.cuda.is_available() else "cuda", "none", "CUDA"),
        ("tpu", "none", "The device 'tpu' is not supported"),
        ("meta", "none", "not supported"),
        ("cpu", "model", "Use offload none"),
        ("cpu", "sequential", "Use offload none"),
        ("cpu", "some", "mode 'some' does not exist"),
    ],
)
def test_a_missing_device_is_refused(device, offload, message):
    with pytest.raises(DeviceError, match=message):
        Engine(device=device, offload=offload)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("offload", ["none", "model", "sequential"])
def test_cuda_images_are_close_to_cpu_images(engine, offload):
    recipe = Recipe(prompt="a ball", adapters=(AdapterRef.from_file(LORA),), **SMALL)
    on_cuda = Engine(device="cuda", offload=offload)
    for mode in ("merged", "live"):
        one = replace(recipe, adapter_mode=mode)
        difference = np.abs(
            on_cuda.generate(one).pixels.astype(int) - engine.generate(one).pixels.astype(int)
        )
        assert difference.mean() < 1
    assert on_cuda.auto_dtype in ("bfloat16", "float16")


def count_encodings(monkeypatch):
    """Return a list that collects the texts that are actually encoded from now on."""
    seen: list[str] = []

    def counted(self, prompt, emphasis="none"):
        seen.append(prompt)
        return encode(self, prompt, emphasis)

    encode = ClipEncoder.encode
    monkeypatch.setattr(ClipEncoder, "encode", counted)
    return seen


def test_a_text_is_encoded_once_for_each_state_of_the_encoder(monkeypatch, tmp_path):
    seen = count_encodings(monkeypatch)
    name = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    torch.manual_seed(1)
    of_text = save_adapter(
        tmp_path / "text.safetensors",
        {
            f"{name}.lora_down.weight": torch.randn(2, 32),
            f"{name}.lora_up.weight": torch.randn(64, 2),
        },
    )
    plain = Recipe(
        prompt="a ball",
        negative_prompt="bad",
        base_model=str(TINY_BASE),
        width=64,
        height=64,
        steps=2,
    )
    with_text = replace(plain, adapters=(AdapterRef.from_file(of_text),))
    recipes = [
        plain,
        replace(plain, seed=1),
        replace(plain, adapters=(AdapterRef.from_file(LORA),)),  # of the UNet alone
        replace(plain, prompt="a box"),
        with_text,
        replace(with_text, seed=1),
        replace(with_text, adapters=(AdapterRef.from_file(of_text, 0.5),)),
        replace(with_text, adapter_mode="live"),
        plain,
    ]
    engine = Engine(device="cpu")
    pixels = [engine.generate(recipe).pixels for recipe in recipes]
    assert seen == ["bad", "a ball", "a box"] + ["bad", "a ball"] * 3
    for recipe, image in zip(recipes, pixels, strict=True):
        assert np.array_equal(Engine(device="cpu").generate(recipe).pixels, image)
    assert not np.array_equal(pixels[0], pixels[4])


def test_the_number_of_cached_texts_is_limited(monkeypatch):
    seen = count_encodings(monkeypatch)
    monkeypatch.setattr("fidelora.families.clip._MAX_CACHED_CHUNKS", 2)
    engine = Engine(device="cpu")
    base = Recipe(
        prompt="", base_model=str(TINY_BASE), width=64, height=64, steps=1, guidance_scale=1.0
    )
    for prompt in ("one", "two", "one", "three", "one", "two"):
        engine.generate(replace(base, prompt=prompt))
    assert seen == ["one", "two", "three", "two"]
