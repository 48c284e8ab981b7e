"""What SentencePiece's interface does not tell of its model file, read from the file itself."""

from collections.abc import Iterator

# Fields of ModelProto and NormalizerSpec.
DENORMALIZER = 5
CHARACTER_MAP = 2


def has_denormalizer(model: bytes) -> bool:
    """Whether the serialised SentencePiece model rewrites decoded text: then a run is decoded
    whole.
    """
    specs = [value for field, value in _fields(model) if field == DENORMALIZER]
    return any(
        field == CHARACTER_MAP and len(value) > 0
        for spec in specs
        for field, value in _fields(spec)
    )


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """The length-delimited fields of a protobuf message; the others are passed over."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == 0:
            _, at = _varint(message, at)
        elif kind == 2:
            size, at = _varint(message, at)
            yield tag >> 3, message[at : at + size]
            at += size
        else:
            at += {1: 8, 5: 4}[kind]


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
