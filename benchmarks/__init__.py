"""Speed, measured side by side. Each file is a command: `python -m benchmarks.inference`."""
