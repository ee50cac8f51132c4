"""Emphasis in prompts, as AUTOMATIC1111's web UI computes it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.support import TINY_BASE, TINY_SDXL, save_adapter

from fidelora import AdapterRef, Recipe
from fidelora.embedding_file import tokens_of
from fidelora.engine.engine import Engine
from fidelora.errors import RecipeError
from fidelora.families import get_family
from fidelora.families.clip import load_tokenizer
from fidelora.families.clip_chunks import MAX_CHUNKS, chunks_of, padded, weighted
from fidelora.families.emphasis import BREAK, Span, check_emphasis, spans_of
from fidelora.families.protocols import Guidance, Prompts, Size

SMALL: dict[str, Any] = {"base_model": str(TINY_BASE), "width": 64, "height": 64, "steps": 2}
UP, DOWN = 1.1, 1 / 1.1


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(base_budget_bytes=2**30)


@pytest.fixture(scope="module")
def encoder(engine) -> Any:
    engine.load(Recipe(prompt="", **SMALL))
    return engine._models.latest.text.encoders["text_encoder"]


@pytest.mark.parametrize(
    ("prompt", "spans"),
    [
        ("", [("", 1)]),
        ("a ball", [("a ball", 1)]),
        ("a (red) ball", [("a ", 1), ("red", UP), (" ball", 1)]),
        ("a [red] ball", [("a ", 1), ("red", DOWN), (" ball", 1)]),
        ("((red)) (ball:1.5)", [("red", UP * UP), (" ", 1), ("ball", 1.5)]),
        ("(a:2)(b:2)", [("ab", 2)]),
        ("(a (b:0.5):2)", [("a ", 2), ("b", 1)]),
        ("(a:-1.5) (b:+.5)", [("a", -1.5), (" ", 1), ("b", 0.5)]),
        (r"\(a\) \[b\] \\c \d", [(r"(a) [b] \c d", 1)]),
        ("(a", [("a", UP)]),
        ("[a (b", [("a ", DOWN), ("b", UP * DOWN)]),
        ("a) b]", [("a) b]", 1)]),
        ("a:1.2) b: c", [("a:1.2) b: c", 1)]),
        ("(a: 1.2)", [("a: 1.2", UP)]),
        ("a BREAK b", [("a", 1), BREAK, ("b", 1)]),
        ("(a BREAK b)", [("a", UP), ("BREAK", -UP), ("b", UP)]),
        ("BREAKFAST", [("BREAKFAST", 1)]),
    ],
)
def test_each_part_of_a_prompt_has_its_weight(prompt, spans):
    found = spans_of(prompt)
    assert [span.text for span in found] == [text for text, _ in spans]
    assert [span.weight for span in found] == pytest.approx([weight for _, weight in spans])
    assert all(isinstance(span, Span) for span in found)


@pytest.mark.parametrize(
    "prompt",
    [
        "[a [x] | b]",
        "[a:b:1e1]",
        "a [red:blue:0.5] ball",
        "[red:3]",
        "[(a:2):.5]",
        "[a|b] c",
        "a AND b",
        "(a:1.2.3)",
    ],
)
@pytest.mark.parametrize("name", ["prompt", "negative_prompt"])
def test_other_syntax_is_refused_only_with_emphasis(prompt, name):
    texts = {"prompt": "a", name: prompt}
    Recipe(**texts)
    with pytest.raises(RecipeError) as caught:
        Recipe(emphasis="original", **texts)
    assert caught.value.field == name


@pytest.mark.parametrize(
    "prompt", ["a BREAK b", "a: 5]", r"\[a:b:0.5\]", "(a|b)", "[a: b]", "BAND"]
)
def test_plain_text_is_accepted_with_emphasis(prompt):
    assert Recipe(prompt=prompt, emphasis="no_norm").prompt == prompt


@pytest.mark.timeout(60)
def test_a_prompt_of_brackets_and_digits_is_checked_quickly():
    """With a pattern that takes cubic time, this would take hours."""
    check_emphasis("negative_prompt", "[" * 90 + ":" + "1" * 9_000)
    with pytest.raises(RecipeError, match="more than 100 open brackets"):
        check_emphasis("negative_prompt", "[" * 3000 + ":" + "1" * 6999)
    with pytest.raises(RecipeError, match="more than 100 open brackets"):
        check_emphasis("negative_prompt", "(a" * 5000)


def test_recipes_contain_emphasis_only_if_it_is_used():
    plain = Recipe(prompt="(a)")
    assert "emphasis" not in plain.to_dict()
    weighted_recipe = Recipe(prompt="(a)", emphasis="original")
    assert weighted_recipe.digest != plain.digest
    assert Recipe.from_json(weighted_recipe.to_json()) == weighted_recipe
    values: list[Any] = ["A1111", None, True]
    for value in values:
        with pytest.raises(RecipeError, match="emphasis"):
            Recipe(prompt="a", emphasis=value)
    with pytest.raises(RecipeError, match="does not use emphasis"):
        Recipe(prompt="a", model="zimage", emphasis="original")


@pytest.mark.parametrize("prompt", ["(" * 200 + "a", "(a:1001)", "(a:" + "9" * 400 + ")"])
def test_weights_that_could_overflow_are_refused(prompt):
    with pytest.raises(RecipeError, match="weight"):
        Recipe(prompt=prompt, emphasis="original")
    assert Recipe(prompt="(a:1000)", emphasis="original").prompt == "(a:1000)"


def test_a_weight_of_the_whole_prompt_is_refused():
    """In A1111, it multiplies the guidance, also without AND."""
    for prompt in ("a ball :1.3", "ratio 16:9 "):
        with pytest.raises(RecipeError, match="weights the whole prompt"):
            Recipe(prompt=prompt, emphasis="original")
    assert Recipe(prompt="a", negative_prompt="ratio 16:9", emphasis="original").emphasis
    assert Recipe(prompt="ratio 16:9 (a:1.2)", emphasis="original").emphasis


def test_a_second_negative_prompt_is_refused_with_emphasis():
    given: dict[str, Any] = {"prompt": "a", "negative_prompt": "b", "model": "sdxl"}
    assert Recipe(**given, negative_prompt_2="b", emphasis="original").negative_prompt_2 is None
    with pytest.raises(RecipeError, match="second negative prompt"):
        Recipe(**given, negative_prompt_2="c", emphasis="original")


# --- chunks ---------------------------------------------------------------------------------------


def lengths(encoder, prompt: str) -> list[int]:
    return [len(chunk) for chunk in chunks_of(encoder.tokenizer, prompt, 75)]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", [0]),
        ("a " * 75, [75]),
        ("a " * 76, [75, 1]),
        ("a " * 60 + ", " + "a " * 20, [61, 20]),  # 14 tokens follow the comma
        ("a " * 55 + ", " + "a " * 25, [56, 25]),  # 19 tokens follow it
        ("a " * 54 + ", " + "a " * 25, [75, 5]),  # 20 tokens follow it
        ("a " * 75 + ", a", [75, 2]),
        ("a " * 75 + ", " + "a " * 80, [75, 75, 6]),  # this comma starts the chunk
        ("a BREAK b c", [1, 2]),
        ("BREAK a", [0, 1]),
        ("a BREAK", [1]),
        ("BREAK", [0]),
        ("a BREAK BREAK b", [1, 0, 1]),
    ],
)
def test_long_prompts_are_divided_at_commas_and_breaks(encoder, prompt, expected):
    assert lengths(encoder, prompt) == expected


def test_an_embedding_is_not_divided(encoder):
    vectors = torch.zeros(3, encoder.encoder.config.hidden_size)
    with encoder.extended([("sks", vectors)]):
        assert lengths(encoder, "a " * 73 + "sks sks_1 sks_2") == [73, 3]
        assert lengths(encoder, "a " * 72 + "sks sks_1 sks_2 sks sks_1 sks_2") == [75, 3]


def test_neighbouring_embeddings_are_two_words(encoder):
    width = encoder.encoder.config.hidden_size
    both = [("sks", torch.zeros(40, width)), ("toy", torch.zeros(40, width))]
    with encoder.extended(both):
        text = " ".join(token for word, _ in both for token in tokens_of(word, 40))
        assert lengths(encoder, text) == [40, 40]


def test_the_number_of_chunks_is_limited(encoder):
    assert len(lengths(encoder, "a " * 75 * MAX_CHUNKS)) == MAX_CHUNKS
    with pytest.raises(RecipeError, match="the maximum is 16"):
        lengths(encoder, "a " * (75 * MAX_CHUNKS + 1))


def test_long_prompts_take_the_space_of_several_in_the_cache(encoder, monkeypatch):
    monkeypatch.setattr("fidelora.families.clip._MAX_CACHED_CHUNKS", 3)
    for prompt in ("a", "b", "c BREAK d"):
        encoder.embed(prompt, (), "original")
    kept = [key[0] for key in encoder._cache]
    assert kept == ["b", "c BREAK d"]


def test_chunks_have_start_end_and_padding(encoder):
    (chunk,) = chunks_of(encoder.tokenizer, "a (red:1.5) ball", 75)
    ids, weights = padded(encoder.tokenizer, chunk, 77)
    plain = encoder.tokenizer("a red ball", padding="max_length", max_length=77).input_ids
    assert ids.tolist() == [plain]
    assert weights.tolist() == [[1, 1, 1.5, *[1] * 74]]


def test_the_padding_of_the_second_tokenizer_of_sdxl_is_used():
    part = get_family("sdxl").text_encoders[1]
    assert part.tokenizer is not None
    tokenizer = load_tokenizer(None, part.tokenizer, 49408)
    ids, _ = padded(tokenizer, chunks_of(tokenizer, "a ball", 75)[0], 77)
    assert ids.tolist() == [tokenizer("a ball", padding="max_length", max_length=77).input_ids]
    assert ids[0, 4:].tolist() == [0] * 73


# --- states ---------------------------------------------------------------------------------------


def test_states_are_weighted_and_their_mean_is_restored():
    states = torch.arange(1.0, 13).reshape(1, 4, 3)
    weights = torch.tensor([[1.0, 2.0, 0.5, 1.0]])
    expected = states.numpy() * np.array([1, 2, 0.5, 1])[None, :, None]
    assert weighted(states, weights, "no_norm").tolist() == expected.tolist()
    restored = expected * (6.5 / expected.mean())
    assert np.allclose(weighted(states, weights, "original"), restored, rtol=1e-6)
    assert weighted(states, weights, "ignore") is states
    assert weighted(states.half(), weights, "no_norm").dtype == torch.float32


def test_a_mean_of_zero_is_not_restored():
    states = torch.tensor([[[1.0, -1.0], [2.0, -2.0]]])
    weights = torch.tensor([[3.0, 0.5]])
    assert weighted(states, weights, "original").tolist() == [[[3, -3], [1, -1]]]


@pytest.mark.parametrize("emphasis", ["original", "no_norm", "ignore"])
def test_a_prompt_without_brackets_is_encoded_as_without_emphasis(encoder, emphasis):
    plain, other = encoder.encode("a red ball"), encoder.encode("a red ball", emphasis)
    assert torch.equal(plain.states, other.states)


def test_every_chunk_has_its_own_mean(encoder):
    both = encoder.encode("(a red:1.4) ball BREAK a [dog]", "original").states
    parts = [encoder.encode(one, "original").states for one in ("(a red:1.4) ball", "a [dog]")]
    assert torch.equal(both, torch.cat(parts, 1))
    assert both.shape[1] == 2 * 77


def pixels_of(engine: Engine, **fields: Any) -> Any:
    return engine.generate(Recipe(**{"prompt": "a (red:1.5) ball", **SMALL, **fields})).pixels


@pytest.mark.parametrize(
    "model",
    [{}, {"model": "sdxl", "base_model": str(TINY_SDXL)}, {"fidelity": "fast"}],
    ids=["sd15", "sdxl", "fast"],
)
def test_emphasis_changes_images(engine, model):
    weighted_image = pixels_of(engine, emphasis="original", **model)
    assert not np.array_equal(weighted_image, pixels_of(engine, emphasis="ignore", **model))
    plain = pixels_of(engine, prompt="a red ball", **model)
    assert np.array_equal(plain, pixels_of(engine, emphasis="ignore", **model))


def test_prompts_of_different_lengths_are_evaluated_separately(engine):
    """The UNet is called once for each length: 77 tokens and 154, or two rows of 154."""
    long, short = "a red ball BREAK a dog", "bad"
    seen = []
    engine.load(Recipe(prompt="", **SMALL))
    denoiser: Any = engine._models.latest.denoiser
    unet = denoiser._unet

    class Spy(SimpleNamespace):
        dtype = unet.dtype

        def __call__(
            self, latents: Any, t: Any, *, encoder_hidden_states: Any, **others: Any
        ) -> Any:
            seen.append((latents.shape[0], encoder_hidden_states.shape[1]))
            return unet(latents, t, encoder_hidden_states=encoder_hidden_states, **others)

    denoiser._unet = Spy()
    try:
        pixels_of(engine, prompt=long, negative_prompt=short, emphasis="original", steps=1)
        pixels_of(engine, prompt=long, negative_prompt=long, emphasis="original", steps=1)
    finally:
        denoiser._unet = unet
    assert seen == [(1, 77), (1, 154), (2, 154)]


@torch.no_grad()
def test_each_row_of_a_batch_has_its_own_prompt(engine):
    """The rows of 77 tokens are not consecutive, so grouping by length changes the order."""
    engine.load(Recipe(prompt="", **SMALL))
    model: Any = engine._models.latest
    size, guidance = Size(64, 64), Guidance(7.0)
    prompts = [Prompts(text, "bad", emphasis="original") for text in ("a BREAK b", "a (b:1.4)")]
    encoded = [model.text.encode(one, size, lambda _part: ()) for one in prompts]
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    timestep = torch.tensor(500)
    together = model.denoiser.prepare(encoded, guidance, size, torch.float32)(latents, timestep)
    for index, one in enumerate(encoded):
        alone = model.denoiser.prepare([one], guidance, size, torch.float32)
        expected = alone(latents[index : index + 1], timestep)
        assert torch.allclose(together[index : index + 1], expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together[0], together[1], rtol=1e-2)


def test_an_embedding_can_be_weighted(engine, encoder, tmp_path):
    vectors = torch.full((1, encoder.encoder.config.hidden_size), 0.1)
    ref = AdapterRef.from_file(save_adapter(tmp_path / "sks.safetensors", {"emb_params": vectors}))
    images = [
        pixels_of(engine, prompt=f"a {text}", adapters=(ref,), emphasis="original")
        for text in (ref.word, f"({ref.word}:1.5)")
    ]
    assert not np.array_equal(*images)
