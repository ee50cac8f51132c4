"""Files that several machines share: a common folder, or a bucket of an object store."""
