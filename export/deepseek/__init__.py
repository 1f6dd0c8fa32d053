"""Writer of DeepseekV3 folders for transformers."""
