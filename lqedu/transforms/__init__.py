"""Moving the difficulty before rounding, with the model's function unchanged: scale, clip, rotate, reorder."""
