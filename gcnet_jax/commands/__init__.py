"""The commands of `python -m gcnet_jax`: their flags, what they call, and what they print."""
