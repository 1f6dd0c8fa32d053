"""Models of the Hugging Face Hub: `hf:OWNER/NAME[:QUANT or FILE]`."""
