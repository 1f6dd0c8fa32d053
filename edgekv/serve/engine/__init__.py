"""The engine's process: requests side by side over one model, with the rows of earlier prompts at hand."""
