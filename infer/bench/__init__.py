"""The `bench` command: how fast, of how fast it could be, beside what others make of it."""
