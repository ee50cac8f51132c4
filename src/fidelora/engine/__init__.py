"""The engine: one recipe in, one image out. `engine.py` is the way in, `denoise.py` the algorithm."""
