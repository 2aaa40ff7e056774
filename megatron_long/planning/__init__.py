"""What a run will take before it is started: memory, time, layouts; and what this machine offers."""
