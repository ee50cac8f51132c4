"""The files of a base model: found, checked, and loaded strictly."""
