"""Samples of a training run through a running server, compared with the trainer's."""
