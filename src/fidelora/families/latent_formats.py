"""Linear fits from latents to colours, for previews without the decoder.

Each row belongs to one latent channel: the red, green and blue (-1..1) that one unit of the channel
adds.
"""

Colours = tuple[tuple[float, float, float], ...]

# https://discuss.huggingface.co/t/decoding-latents-to-rgb-without-upscaling/23204
SD15: Colours = (
    (0.298, 0.207, 0.208), (0.187, 0.286, 0.173), (-0.158, 0.189, 0.264), (-0.184, -0.271, -0.473),
)  # fmt: skip

# `latent_rgb_factors` of SDXL in https://github.com/comfyanonymous/ComfyUI, comfy/latent_formats.py
SDXL: Colours = (
    (0.3651, 0.4232, 0.4341), (-0.2533, -0.0042, 0.1068),
    (0.1076, 0.1111, -0.0362), (-0.3165, -0.2492, -0.2188),
)  # fmt: skip
