"""Durable jobs: the life cycle (`job.py`), the store interface (`store.py`) and the stores."""
