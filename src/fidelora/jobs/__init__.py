"""Jobs that last: what a job is (`job.py`), what a store of jobs promises (`store.py`), and the stores."""
