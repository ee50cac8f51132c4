"""CLIP text encoders: tokenizer, encoder, and a cache of prompt embeddings."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer

from fidelora.embedding_file import tokens_of
from fidelora.errors import AdapterMismatchError, BaseModelFilesError
from fidelora.families.clip_chunks import chunks_of, padded, weighted
from fidelora.families.emphasis import Emphasis
from fidelora.families.spec import Tokenizer

_MAX_CACHED_CHUNKS = 128
"""Number of encoded chunks of 77 tokens to keep per text encoder; each takes about 0.25 MB. A
prompt without emphasis is one chunk."""

_MAX_EXTENDED_TOKENIZERS = 4
"""Number of tokenizers with added embedding tokens to keep; copying a tokenizer takes 0.3 s."""

RunEncoder = Callable[[Any, Tensor], tuple[Tensor, Tensor | None]]
"""Function that runs an encoder on token ids [1, 77], and returns hidden states [1, 77, width] and
a projection [1, width]."""

_VOCABULARY = 49408
"""Size of CLIP's vocabulary in tokens."""

_TEST_PROMPT = "a photo of a cat"
_TEST_TOKENS = [320, 1125, 539, 320, 2368]
"""The tokens of `_TEST_PROMPT` in CLIP's vocabulary."""


@dataclass(frozen=True)
class PromptEmbedding:
    """Embedding of a prompt by one text encoder.

    Attributes:
        states: hidden states [1, 77, width]; with emphasis, a multiple of 77 tokens.
        cut: the end of the prompt that exceeds 77 tokens and has no effect; empty if all fits.
        pooled: pooled embedding [1, width]; with emphasis, that of the first chunk; None if the
            encoder has none.
    """

    states: Tensor
    cut: str
    pooled: Tensor | None = None


class ClipEncoder:
    """A CLIP text encoder with its tokenizer and a cache of recent prompt embeddings.

    Consecutive images usually have the same negative prompt, and often the same prompt. The cache
    does not change images: cached embeddings equal newly computed ones in every bit.

    Args:
        device: device of the encoder.
        run_encoder: `last_state`, `penultimate_state` or `pooled_output`.
    """

    def __init__(
        self,
        tokenizer: CLIPTokenizer,
        encoder: Any,
        device: torch.device,
        run_encoder: RunEncoder,
    ) -> None:
        self.tokenizer = tokenizer
        self.encoder = encoder
        self._device = device
        self._run_encoder = run_encoder
        self._cache: OrderedDict[Hashable, PromptEmbedding] = OrderedDict()
        self._extended: OrderedDict[Hashable, CLIPTokenizer] = OrderedDict()

    def with_runner(self, run_encoder: RunEncoder) -> ClipEncoder:
        """Return an encoder of the same model and tokenizer that uses other hidden states."""
        return ClipEncoder(self.tokenizer, self.encoder, self._device, run_encoder)

    def run(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return hidden states and projection for token ids [1, 77]."""
        return self._run_encoder(self.encoder, ids.to(self._device))

    @property
    def length(self) -> int:
        """Number of tokens of every prompt, padding included."""
        return int(self.encoder.config.max_position_embeddings)

    def embed(
        self, prompt: str, adapter_key: Hashable, emphasis: Emphasis = "none"
    ) -> PromptEmbedding:
        """Return the embedding of `prompt`, computed unless it is in the cache.

        Args:
            adapter_key: key that changes with the adapters applied to the encoder, embeddings
                included.
        """
        # The last bits of an embedding depend on the number of threads.
        key = (prompt, emphasis, adapter_key, torch.get_num_threads())
        if key not in self._cache:
            self._cache[key] = self.encode(prompt, emphasis)
            while sum(map(_chunks_in, self._cache.values())) > _MAX_CACHED_CHUNKS:
                self._cache.popitem(last=False)
        self._cache.move_to_end(key)
        return self._cache[key]

    def encode(self, prompt: str, emphasis: Emphasis = "none") -> PromptEmbedding:
        """Return the embedding of `prompt`.

        Without emphasis, the prompt is padded or truncated to 77 tokens. Clip skip, word weights
        and attention masks are not used. Prompts are encoded one at a time, as in the trainer: a
        batch of two can differ in the last bit.

        With emphasis, a long prompt is divided into chunks of 77 tokens, which are encoded one by
        one. `pooled` is that of the first chunk, without weights.
        """
        if emphasis == "none":
            ids, cut = _tokens(self.tokenizer, prompt, self.length)
            states, pooled = self._run_encoder(self.encoder, ids.to(self._device))
            return PromptEmbedding(states, cut, pooled)
        encoded = []
        for chunk in chunks_of(self.tokenizer, prompt, self.length - 2):
            ids, weights = padded(self.tokenizer, chunk, self.length)
            states, pooled = self._run_encoder(self.encoder, ids.to(self._device))
            encoded.append((weighted(states, weights.to(self._device), emphasis), pooled))
        return PromptEmbedding(torch.cat([states for states, _ in encoded], 1), "", encoded[0][1])

    @contextmanager
    def extended(self, embeddings: Sequence[tuple[str, Tensor]]) -> Iterator[None]:
        """Add the tokens of embeddings to the vocabulary until the block ends.

        The trainer enlarges the table of token embeddings. Here, hooks replace rows of the table's
        output instead, which gives the same bits and leaves the table unchanged.

        Args:
            embeddings: word and vectors [tokens, width] of each embedding, in order.

        Raises:
            AdapterMismatchError: a token exists already.
        """
        plain = self.tokenizer
        added = tuple((word, len(vectors)) for word, vectors in embeddings)
        if added not in self._extended:
            self._extended[added] = _extended_tokenizer(plain, added)
            if len(self._extended) > _MAX_EXTENDED_TOKENIZERS:
                self._extended.popitem(last=False)
        self._extended.move_to_end(added)
        tokenizer = self._extended[added]
        names = [token for word, count in added for token in tokens_of(word, count)]
        ids = cast("list[int]", tokenizer.convert_tokens_to_ids(names))
        vectors = torch.cat([vectors for _, vectors in embeddings])
        hooks = _TableHooks(dict(zip(ids, vectors, strict=True)))
        table = self.encoder.get_input_embeddings()
        handles = [
            table.register_forward_pre_hook(hooks.before),
            table.register_forward_hook(hooks.after),
        ]
        self.tokenizer = tokenizer
        try:
            yield
        finally:
            self.tokenizer = plain
            for handle in handles:
                handle.remove()

    def initial_vectors(self, words: str, tokens: int) -> Tensor:
        """Return the vectors from which the trainer starts an embedding, [tokens, width].

        They are the vectors of the tokens of `words`, truncated or padded to `tokens` tokens. The
        padding is the token `*`, not the token that the text `*` is encoded to (`*</w>`, which
        marks the end of a word).
        """
        padding = cast(int, self.tokenizer.convert_tokens_to_ids("*"))
        ids = [*self.tokenizer(words).input_ids[1:-1], *[padding] * tokens]
        table = self.encoder.get_input_embeddings()
        vectors: Tensor = table(torch.tensor(ids[:tokens], device=self._device))
        return vectors.cpu()


class _TableHooks:
    """Hooks on a table of token embeddings that replace the rows of some tokens.

    Args:
        rows: row [width] by token.
    """

    def __init__(self, rows: Mapping[int, Tensor]) -> None:
        self._rows = rows
        self._ids = torch.empty(0)

    def before(self, table: nn.Embedding, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        """Replace new tokens, which the table does not have, by token 0."""
        (self._ids,) = inputs
        return (self._ids.where(self._ids < table.num_embeddings, 0),)

    def after(self, table: nn.Embedding, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Return the output [batch, tokens, width] with the rows of the new tokens."""
        output, ids = output.clone(), self._ids.to(output.device)
        for token, row in self._rows.items():
            output[ids == token] = row.to(output)
        return output


def last_state(encoder: Any, ids: Tensor) -> tuple[Tensor, None]:
    """Return the encoder's last hidden states after its final norm."""
    return encoder(ids)[0], None


def penultimate_state(encoder: Any, ids: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the hidden states before the last layer, without the final norm, and the projection.

    The projection is None if the encoder has none.
    """
    output = encoder(ids, output_hidden_states=True)
    return output.hidden_states[-2], getattr(output, "text_embeds", None)


def pooled_output(encoder: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the hidden states after the final norm, and the state of the end token [1, width]."""
    output = encoder(ids)
    return output[0], output.pooler_output


def load_tokenizer(folder: Path | None, spec: Tokenizer, vocabulary: int | None) -> CLIPTokenizer:
    """Load CLIP's tokenizer and check that it works.

    transformers accepts an empty vocabulary or missing merges without an error.

    Args:
        folder: tokenizer folder of the base model; None loads the bundled tokenizer.
        vocabulary: the number of tokens that the text encoder has embeddings for.

    Raises:
        BaseModelFilesError: the tokenizer is incomplete, or is not CLIP's.
    """
    options = dict(spec.options) if folder is None else {}
    if folder is None:
        assert spec.bundled is not None, "CLIP's tokenizer is bundled"
        folder = spec.bundled
    name = spec.folder
    if not (folder / "tokenizer.json").is_file():
        for file in ("vocab.json", "merges.txt"):
            if not (folder / file).is_file():
                raise BaseModelFilesError(
                    f"The base model has no {name}/{file}; download it again."
                )
    try:
        loaded = CLIPTokenizer.from_pretrained(folder, local_files_only=True, **options)
        tokenizer = cast(CLIPTokenizer, loaded)
        tokens = tokenizer(_TEST_PROMPT).input_ids[1:-1]
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise BaseModelFilesError(
            f"The base model's {name} cannot be read: {reason}. Download it again."
        ) from error
    # Small models for tests have a vocabulary of their own.
    is_wrong = vocabulary == _VOCABULARY and tokens != _TEST_TOKENS
    if len(tokenizer) != vocabulary or is_wrong:
        raise BaseModelFilesError(
            f"The base model's {name} does not belong to its text encoder: it has "
            f"{len(tokenizer)} tokens instead of {vocabulary}, or tokenises {_TEST_PROMPT!r} "
            "differently. The files are damaged or belong to another model; download them again."
        )
    return tokenizer


def _extended_tokenizer(
    tokenizer: CLIPTokenizer, added: Sequence[tuple[str, int]]
) -> CLIPTokenizer:
    """Return a copy of a tokenizer with the tokens of embeddings.

    Args:
        added: word and number of tokens of each embedding.

    Raises:
        AdapterMismatchError: a token exists already.
    """
    extended = copy.deepcopy(tokenizer)
    for word, count in added:
        if extended.add_tokens(tokens_of(word, count)) != count:
            raise AdapterMismatchError(
                f"The embedding {word} cannot be used, because another embedding or the base "
                "model's tokenizer already has a token of the same name."
            )
    return extended


def _chunks_in(embedding: PromptEmbedding) -> int:
    """Return the number of chunks of 77 tokens."""
    return embedding.states.shape[1] // 77


def _tokens(tokenizer: CLIPTokenizer, prompt: str, length: int) -> tuple[Tensor, str]:
    """Return the prompt's tokens [1, length], and the end of the prompt that did not fit."""
    ids = tokenizer(
        prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    return ids, _cut(tokenizer, prompt, length)


def _cut(tokenizer: CLIPTokenizer, prompt: str, length: int) -> str:
    """Return the end of `prompt` that truncation removes.

    Args:
        length: number of tokens that remain, including the start and end tokens.
    """
    offsets = tokenizer(prompt, return_offsets_mapping=True, verbose=False).offset_mapping
    if len(offsets) <= length:
        return ""
    start, _ = offsets[length - 1]  # the first removed token; the end token takes its position
    return prompt[start:].strip()
