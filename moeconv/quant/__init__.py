"""Casts between quantised and plain weights."""

# What `--dtype` takes: its name in config.json, and the safetensors dtype of the weights.
PLAIN = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
FP8 = "fp8"
