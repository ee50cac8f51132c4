"""Workers: claim jobs, make their images, and store the results."""
