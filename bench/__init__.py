"""Speed and memory: python -m bench kernel, memory or step."""
