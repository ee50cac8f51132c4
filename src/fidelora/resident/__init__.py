"""An engine that stays in memory between the commands of one user, in a process of its own."""
