"""Text from a model: prompts and conversations, the trainer's model with what it has seen kept, and what is taken of its logits."""
