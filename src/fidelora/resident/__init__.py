"""An engine that stays in memory between the commands of one user, in a process of its own."""

KEEP_VARIABLE = "FIDELORA_KEEP_ENGINE"
"""Variable with the minutes that a command keeps an engine; 0 never uses a resident engine."""
