"""From GQA to MLA: what to keep, what to fold, what it loses."""
