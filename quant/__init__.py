"""Block formats: sizes, errors, writing."""
