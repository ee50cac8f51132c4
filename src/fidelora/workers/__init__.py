"""Work on jobs: claim one, make its images, report."""
