"""DeepseekV3 folders out, for transformers."""
