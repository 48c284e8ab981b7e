"""The `plan` command: what generation would need of a machine that is not here."""
