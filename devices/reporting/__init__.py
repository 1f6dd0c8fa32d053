"""Device reports: schema, tables, charts, comparison page."""
