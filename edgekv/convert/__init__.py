"""Conversion of a model from GQA to MLA: the target shape, the fit of each layer, the loss."""
