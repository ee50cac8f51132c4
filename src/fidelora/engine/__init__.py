"""The engine, which makes images from recipes; `engine.py` is its entry point."""
