"""Image files with the recipe inside: written and read."""
