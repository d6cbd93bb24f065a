"""Differentiable steps of a model: one kernel each on a GPU, plain torch elsewhere."""
