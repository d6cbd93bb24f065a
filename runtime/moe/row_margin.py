"""How much more room is set aside for rows that travel than a step has needed."""

MARGIN = 1.25
"""Routing changes slowly, and a step done twice costs as much as a hundred with a percent of padding."""
