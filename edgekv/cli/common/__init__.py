"""Options, progress and tables that every command shares."""
