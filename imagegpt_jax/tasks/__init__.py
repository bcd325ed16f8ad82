"""One module per training stage; all have the same names, which `imagegpt_jax.training.loop` calls."""
