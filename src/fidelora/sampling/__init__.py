"""Sampling: noise, schedules, guidance, and the loop that all model families share."""
