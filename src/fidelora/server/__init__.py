"""The HTTP server. `app.py` puts it together, `routes/` has the endpoints, `problems.py` turns errors into answers."""
