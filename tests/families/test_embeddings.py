"""Embeddings in the text encoders, compared with transformers' own enlarged tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support import TINY_BASE, TINY_SDXL, load_model_of, weights_of
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from fidelora import Recipe
from fidelora.accel.device import TORCH_DTYPES
from fidelora.errors import AdapterMismatchError
from fidelora.families.clip_tokenizer import CLIP_TOKENIZER
from fidelora.families.protocols import Embedding, Prompts, Size

SIZE = Size(64, 64)
TEXTS = ["a red myball on grass", "a myball myball_1 myball_2", "a MyBall, myball_1x", "a ball"]


def vectors(width: int, seed: int, tokens: int = 3) -> torch.Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))


def enlarged(
    kind: Any, folder: Path, rows: torch.Tensor, dtype: torch.dtype, names_from: Path
) -> tuple[Any, Any]:
    """Return a tokenizer and an encoder with the tokens of `myball`, made without Fidelora."""
    tokenizer = CLIPTokenizer.from_pretrained(names_from)
    names = ["myball", "myball_1", "myball_2"]
    assert tokenizer.add_tokens(names) == 3
    encoder = kind.from_pretrained(folder).to(dtype).eval()
    encoder.resize_token_embeddings(len(tokenizer))
    table = encoder.get_input_embeddings().weight.data
    for name, row in zip(names, rows, strict=True):
        table[tokenizer.convert_tokens_to_ids(name)] = row.to(dtype)
    return tokenizer, encoder


def ids_of(tokenizer: Any, text: str) -> torch.Tensor:
    ids: torch.Tensor = tokenizer(
        text, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    ).input_ids
    return ids


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.no_grad()
def test_sd15_states_are_those_of_an_enlarged_table(dtype):
    model = load_model_of(Recipe(prompt="", base_model=str(TINY_BASE), text_encoder_dtype=dtype))
    text: Any = model.text
    encoder = text.encoders["text_encoder"].encoder
    rows = vectors(encoder.config.hidden_size, 1)
    folder = TINY_BASE / "text_encoder"
    tokenizer, own = enlarged(CLIPTextModel, folder, rows, TORCH_DTYPES[dtype], CLIP_TOKENIZER)
    before = {name: value.clone() for name, value in weights_of(encoder).items()}
    plain = text.encode(Prompts(TEXTS[0]), SIZE, lambda _: "plain").positive.text
    with text.extended([Embedding("myball", {"text_encoder": rows})]):
        for prompt in TEXTS:
            states = text.encode(Prompts(prompt), SIZE, lambda _: "myball").positive.text
            assert torch.equal(states, own(ids_of(tokenizer, prompt))[0])
    again = text.encode(Prompts(TEXTS[0]), SIZE, lambda _: "again").positive.text
    assert torch.equal(again, plain)
    after = weights_of(encoder)
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@torch.no_grad()
def test_sdxl_states_and_pooled_are_those_of_enlarged_tables():
    """The pooled state is that of the largest token id, which may belong to the embedding."""
    model = load_model_of(Recipe(prompt="", model="sdxl", base_model=str(TINY_SDXL)))
    text: Any = model.text
    names = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    rows = {
        name: vectors(text.encoders[name].encoder.config.hidden_size, seed)
        for seed, name in enumerate(names)
    }
    tokenizers = (CLIP_TOKENIZER, TINY_SDXL / "tokenizer_2")
    own = {
        name: enlarged(kind, TINY_SDXL / name, rows[name], torch.float32, tokenizer)
        for (name, kind), tokenizer in zip(names.items(), tokenizers, strict=True)
    }
    with text.extended([Embedding("myball", rows)]):
        for prompt in TEXTS:
            made = text.encode(Prompts(prompt), SIZE, lambda _: "myball").positive
            outputs = [
                encoder(ids_of(tokenizer, prompt), output_hidden_states=True)
                for tokenizer, encoder in own.values()
            ]
            states = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
            assert torch.equal(made.text, states)
            assert torch.equal(made.added["text_embeds"], outputs[1].text_embeds)


def test_tokens_of_the_same_name_are_refused():
    text: Any = load_model_of(Recipe(prompt="", base_model=str(TINY_BASE))).text
    width = text.encoders["text_encoder"].encoder.config.hidden_size
    first = Embedding("a1", {"text_encoder": vectors(width, 1)})
    second = Embedding("a1_1", {"text_encoder": vectors(width, 2)})
    with (
        pytest.raises(AdapterMismatchError, match="already has a token"),
        text.extended([first, second]),
    ):
        pass
    assert "a1" not in text.encoders["text_encoder"].tokenizer.get_vocab()


def test_the_initial_vectors_are_those_of_the_words_and_of_stars():
    text: Any = load_model_of(Recipe(prompt="", base_model=str(TINY_BASE))).text
    encoder = text.encoders["text_encoder"]
    table = encoder.encoder.get_input_embeddings().weight
    ids = encoder.tokenizer.convert_tokens_to_ids(["red</w>", "star</w>", "*", "*"])
    found = text.initial_vectors("red star", 4)["text_encoder"]
    assert torch.equal(found, table[ids])
    assert torch.equal(text.initial_vectors("red star", 1)["text_encoder"], table[ids[:1]])
