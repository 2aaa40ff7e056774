"""One module for each command: its parser, one call into the package, what it prints."""
