"""Number formats: the table of them, rounding, and the error of quantized tensors."""
