"""The HTTP server: `app.py` assembles it, `routes/` has the endpoints, `problems.py` the errors."""
