"""Our own flags, recipes, and the rules that flags must keep."""
