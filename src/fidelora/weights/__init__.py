"""Find, check and strictly load the files of a base model."""
