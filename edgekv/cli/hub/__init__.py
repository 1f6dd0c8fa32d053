"""Commands for models of the Hugging Face Hub."""
