"""An engine that stays in memory between the commands of one user, in a process of its own."""

KEEP_VARIABLE = "FIDELORA_KEEP_ENGINE"
"""Environment variable: minutes for which an engine stays in memory after the last use.

With 0, commands do not use a resident engine.
"""
