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

# `Flux.latent_rgb_factors` in the same file; FLUX.1's VAE is also that of other families.
FLUX1: Colours = (
    (-0.0346, 0.0244, 0.0681), (0.0034, 0.0210, 0.0687), (0.0275, -0.0668, -0.0433),
    (-0.0174, 0.0160, 0.0617), (0.0859, 0.0721, 0.0329), (0.0004, 0.0383, 0.0115),
    (0.0405, 0.0861, 0.0915), (-0.0236, -0.0185, -0.0259), (-0.0245, 0.0250, 0.1180),
    (0.1008, 0.0755, -0.0421), (-0.0515, 0.0201, 0.0011), (0.0428, -0.0012, -0.0036),
    (0.0817, 0.0765, 0.0749), (-0.1264, -0.0522, -0.1103), (-0.0280, -0.0881, -0.0499),
    (-0.1262, -0.0982, -0.0778),
)  # fmt: skip

# Linear fit of the VAE of Wan 2.1, whose latents Qwen-Image uses. Source:
# `Wan21.latent_rgb_factors` in https://github.com/comfyanonymous/ComfyUI, comfy/latent_formats.py
WAN21 = (
    (-0.1299, -0.1692, 0.2932), (0.0671, 0.0406, 0.0442), (0.3568, 0.2548, 0.1747),
    (0.0372, 0.2344, 0.1420), (0.0313, 0.0189, -0.0328), (0.0296, -0.0956, -0.0665),
    (-0.3477, -0.4059, -0.2925), (0.0166, 0.1902, 0.1975), (-0.0412, 0.0267, -0.1364),
    (-0.1293, 0.0740, 0.1636), (0.0680, 0.3019, 0.1128), (0.0032, 0.0581, 0.0639),
    (-0.1251, 0.0927, 0.1699), (0.0060, -0.0633, 0.0005), (0.3477, 0.2275, 0.2950),
    (0.1984, 0.0913, 0.1861),
)  # fmt: skip
