"""Models that begin with drawn weights: what they are, their first weights, and the files of their checkpoints."""
