"""A flow model: `python -m tools.miniature.train_flow --work DIR --vae DIR --minutes 60`.

Trains a small model of Z-Image's classes on the miniature's scenes: Qwen3 as the text encoder, with
a tokenizer trained on captions, and a transformer that predicts the velocity of a flow. The VAE is
the miniature's. The text encoder is first trained alone, like the miniature's. Uses one thread.
Run it again to resume.
"""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, ZImageTransformer2DModel
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tools.miniature import common, judge, world
from tools.miniature.train_unet import facts, held_out_scenes, latents_of, training_scenes
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

LATENT = world.SIZE // 8
SEED = 4
SCENES = 6_000
BATCH = 32
PRETRAINING_STEPS, PRETRAINING_BATCH = 400, 64
LEARNING_RATE = 1e-3
EMPTY = 0.1  # share of empty captions, for guidance
SHIFT = 3.0  # shift of Z-Image's schedule
GUIDANCE, STEPS = 4.0, 20  # of the pictures that are judged during training
EVALUATE_EVERY = 250
VOCABULARY = 512
_END, _START_TURN, _END_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
_TEMPLATE = "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}"
"""Chat template. It leaves out the names of the roles, so that almost all captions have at most 32
tokens with it: the transformer pads texts to multiples of 32."""

TRANSFORMER_CONFIG: dict[str, Any] = {
    "in_channels": 4,
    "dim": 192,
    "n_layers": 6,
    "n_refiner_layers": 1,
    "n_heads": 6,
    "n_kv_heads": 6,
    "cap_feat_dim": 96,
    "axes_dims": [8, 12, 12],
    "axes_lens": [1024, 128, 128],
}
TEXT_CONFIG: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 3,  # the family uses the states before the last layer
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 24,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}


def main() -> None:
    parser = common.parser(__doc__, minutes=60)
    parser.add_argument("--vae", type=Path, required=True, help="folder of the miniature's VAE")
    options = common.options(parser)
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    scenes = training_scenes(SCENES, SEED)
    tokenizer = make_tokenizer(scenes)
    text_encoder = Qwen3Model(Qwen3Config(**TEXT_CONFIG))
    transformer = ZImageTransformer2DModel(**TRANSFORMER_CONFIG)
    initialise(transformer)
    both = nn.ModuleDict({"text_encoder": text_encoder, "transformer": transformer})
    vae = AutoencoderKL.from_pretrained(options.vae).float().eval().requires_grad_(False)
    if not (options.work / "flow.pt").exists():
        pretrain_text_encoder(tokenizer, text_encoder, scenes)
    latents = latents_of(scenes, vae, options.work / "flow-latents.npy", SEED)
    run = common.Run(options, "flow", both, LEARNING_RATE)
    rng = np.random.default_rng([SEED, run.step])
    torch.manual_seed(SEED + run.step)
    while run.keep_going():
        chosen = rng.integers(0, len(scenes), BATCH)
        captions = [
            "" if rng.random() < EMPTY else world.caption(scenes[index], rng) for index in chosen
        ]
        clean = torch.from_numpy(latents[chosen].astype(np.float32))
        noise = torch.randn_like(clean)
        sigmas = shifted(torch.randn(BATCH).sigmoid())
        share = sigmas[:, None, None, None]
        with common.autocast():
            texts = embed(tokenizer, text_encoder, captions)
            velocity = predict(transformer, (1 - share) * clean + share * noise, sigmas, texts)
        run.learn(functional.mse_loss(velocity.float(), noise - clean))
        if run.step % EVALUATE_EVERY == 0:
            trained = {key: value.clone() for key, value in both.state_dict().items()}
            both.load_state_dict(run.averaged())
            sheet = options.work / f"flow-{run.step:06d}.png"
            found = evaluate(tokenizer, text_encoder, transformer, vae, sheet, count=16)
            both.load_state_dict(trained)
            print(f"step {run.step}: {json.dumps(found)}", flush=True)
    if run.is_finished:
        save(options.work / "flow", options.vae, tokenizer, text_encoder, transformer)
        found = evaluate(tokenizer, text_encoder, transformer, vae, options.work / "flow.png")
        print(json.dumps({"steps": run.step, "minutes": round(run.seconds / 60, 1), **found}))


def shifted(sigmas: Tensor) -> Tensor:
    """Return the sigmas (0..1) after the shift of the family's schedule."""
    return SHIFT * sigmas / (1 + (SHIFT - 1) * sigmas)


def make_tokenizer(scenes: list[world.Scene]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on captions, with the chat template that Qwen3 needs."""
    rng = np.random.default_rng(SEED)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[_END, _START_TURN, _END_TURN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator((world.caption(scene, rng) for scene in scenes), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=_END, pad_token=_END, model_max_length=1024
    )
    tokenizer.chat_template = _TEMPLATE
    return tokenizer


def embed(
    tokenizer: PreTrainedTokenizerFast, text_encoder: Qwen3Model, captions: list[str]
) -> list[Tensor]:
    """Return the states of each caption, [tokens, width], as the family computes them.

    The padding follows the text, so it does not change the states of the text.
    """
    ids = [
        torch.tensor(tokenizer(f"{_START_TURN}{caption}{_END_TURN}").input_ids)
        for caption in captions
    ]
    padded = pad_sequence(ids, batch_first=True)
    states = text_encoder(padded, output_hidden_states=True, use_cache=False).hidden_states[-2]
    return [row[: len(one)] for row, one in zip(states, ids, strict=True)]


def predict(
    transformer: ZImageTransformer2DModel, noisy: Tensor, sigmas: Tensor, texts: list[Tensor]
) -> Tensor:
    """Return the velocity from data to noise, [n, 4, height / 8, width / 8]."""
    frames = list(noisy.unsqueeze(2).unbind(0))
    predicted = transformer(frames, 1 - sigmas, texts, return_dict=False)[0]
    return -torch.stack(predicted).squeeze(2)


def pretrain_text_encoder(
    tokenizer: PreTrainedTokenizerFast, text_encoder: Qwen3Model, scenes: list[world.Scene]
) -> None:
    """Train the text encoder to predict every property of the scene from its mean state."""
    known = [facts(scene) for scene in scenes]
    answers = [sorted({one[question] for one in known}) for question in range(len(known[0]))]
    heads = nn.ModuleList(
        nn.Linear(TEXT_CONFIG["hidden_size"], len(possible)) for possible in answers
    )
    optimizer = torch.optim.AdamW(
        [*text_encoder.parameters(), *heads.parameters()], 2e-3, weight_decay=0.01
    )
    rng = np.random.default_rng(SEED)
    for step in range(1, PRETRAINING_STEPS + 1):
        chosen = rng.integers(0, len(scenes), PRETRAINING_BATCH)
        captions = [world.caption(scenes[index], rng) for index in chosen]
        read = torch.stack([one.mean(dim=0) for one in embed(tokenizer, text_encoder, captions)])
        loss, right = torch.zeros(()), []
        for question, (head, possible) in enumerate(zip(heads, answers, strict=True)):
            logits = head(read)
            targets = torch.tensor([possible.index(known[index][question]) for index in chosen])
            loss = loss + functional.cross_entropy(logits, targets)
            right.append((logits.argmax(dim=1) == targets).float().mean().item())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            shares = ", ".join(f"{share:.0%}" for share in right)
            print(f"text encoder, step {step}: {shares}", flush=True)


def initialise(transformer: ZImageTransformer2DModel) -> None:
    """Initialise the weights that PyTorch's defaults do not suit.

    The modulation ignores the timestep at first, with gates of 0.5 before their tanh. The final
    layers return zeros. The padding tokens are small random vectors.
    """
    for block in [*transformer.noise_refiner, *transformer.layers]:
        linear = block.adaLN_modulation[0]
        nn.init.zeros_(linear.weight)
        with torch.no_grad():
            scale, gate = torch.zeros_like(linear.bias).chunk(4)[:2]
            linear.bias.copy_(torch.cat([scale, gate + 0.5, scale, gate + 0.5]))
    for final in transformer.all_final_layer.values():
        nn.init.zeros_(final.linear.weight)
        nn.init.zeros_(final.linear.bias)
    for pad in (transformer.x_pad_token, transformer.cap_pad_token):
        nn.init.normal_(pad, std=0.02)


@torch.no_grad()
def sample(
    transformer: ZImageTransformer2DModel, texts: list[Tensor], noise: Tensor, steps: int = STEPS
) -> Tensor:
    """Return latents [n, 4, height / 8, width / 8], by the schedule and guidance of the family.

    Args:
        texts: states of n captions, then those of n empty ones.
        noise: standard normal noise of the same shape as the latents.
    """
    latents = noise
    sigmas = [*shifted(torch.linspace(1, 1 / steps, steps)).tolist(), 0.0]
    for sigma, following in pairwise(sigmas):
        both = latents.repeat(2, 1, 1, 1)
        predicted = predict(transformer, both, torch.full((len(both),), sigma), texts)
        positive, negative = predicted.float().chunk(2)
        velocity = positive + (GUIDANCE - 1) * (positive - negative)
        latents = latents + (following - sigma) * velocity
    return latents


@torch.no_grad()
def evaluate(
    tokenizer: PreTrainedTokenizerFast,
    text_encoder: Qwen3Model,
    transformer: ZImageTransformer2DModel,
    vae: AutoencoderKL,
    sheet: Path,
    count: int = 64,
) -> dict[str, float]:
    """Return the fractions of held-out prompts whose pictures have the right properties.

    Writes the pictures to `sheet`.
    """
    scenes = held_out_scenes(count, SEED + 1)
    rng = np.random.default_rng(SEED + 1)
    captions = [world.caption(scene, rng) for scene in scenes]
    noise = torch.randn((count, 4, LATENT, LATENT), generator=torch.Generator().manual_seed(SEED))
    with common.autocast():
        texts = embed(tokenizer, text_encoder, captions + [""] * count)
        latents = sample(transformer, texts, noise)
    pixels = np.concatenate(
        [
            common.to_pixels(vae.decode(part / vae.config.scaling_factor).sample)
            for part in latents.split(8)
        ]
    )
    rows = pixels.reshape(-1, 8, *pixels.shape[1:])
    Image.fromarray(np.concatenate([np.concatenate(list(row), axis=1) for row in rows])).save(sheet)
    scores = [judge.score(image, scene) for image, scene in zip(pixels, scenes, strict=True)]
    return {
        name: sum(getattr(one, name) for one in scores) / count
        for name in ("shape", "colour", "background")
    }


def save(
    folder: Path,
    vae: Path,
    tokenizer: PreTrainedTokenizerFast,
    text_encoder: Qwen3Model,
    transformer: ZImageTransformer2DModel,
) -> None:
    """Write a diffusers folder with weights in float16."""
    text_encoder.half().save_pretrained(folder / "text_encoder")
    transformer.half().save_pretrained(folder / "transformer")
    tokenizer.save_pretrained(folder / "tokenizer")
    shutil.copytree(vae, folder / "vae", dirs_exist_ok=True)
    index = {
        "_class_name": "ZImagePipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen3Model"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "ZImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    text_encoder.float()
    transformer.float()


if __name__ == "__main__":
    main()
