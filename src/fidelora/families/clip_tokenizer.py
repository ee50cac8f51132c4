"""CLIP's tokenizer, which this package contains as a part of the miniature base model.

All text encoders of Stable Diffusion 1.5 and SDXL have this vocabulary.
"""

from pathlib import Path

CLIP_TOKENIZER = Path(__file__).parents[1] / "miniature" / "tokenizer"
