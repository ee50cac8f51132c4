"""Training runs of AI Toolkit: reading their folders and replaying and checking their samples."""
