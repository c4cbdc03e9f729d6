"""Files: canonical bit packing and the model file."""
