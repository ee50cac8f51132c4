"""Explanations of why a picture from another program differs from the trainer's sample."""
