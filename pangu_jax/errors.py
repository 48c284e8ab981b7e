"""The errors users see. Each carries one line that names the thing and the fix."""


class PanguError(ValueError):
    """Something given to pangu_jax cannot be used; the message is one line for the user."""


class ConfigError(PanguError):
    """A model configuration or layout that is malformed, inconsistent or not supported."""


class CheckpointError(PanguError):
    """A checkpoint that is damaged, incomplete, unsafe or not of a supported model."""


class InputError(PanguError):
    """A prompt, sampling setting or command-line value that cannot be used."""
