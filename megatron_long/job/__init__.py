"""What the processes of a job share: launch, signals, agreement before the start, output, watchdog, lock."""
