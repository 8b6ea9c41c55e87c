"""FlowerTune on a tiny Llama."""
