"""The conversation of `edgekv chat` at a terminal."""
