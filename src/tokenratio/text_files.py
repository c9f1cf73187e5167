"""Bytes of a file as text: UTF-8, or a message that says where it is not."""

import codecs

from tokenratio.errors import TokenRatioError

_WIDE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)


def decode_utf8(data: bytes, name: str) -> str:
    """The text of a file in UTF-8, without a byte order mark.

    Raises:
        TokenRatioError: it is not UTF-8; names byte and line.
    """
    refuse_utf16(data, name)
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        skipped = len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0
        line = error.object.count(b"\n", 0, error.start) + 1
        raise TokenRatioError(
            f"{name}: not UTF-8: byte 0x{error.object[error.start]:02x} at offset "
            f"{error.start + skipped}, line {line}. Save the file as UTF-8."
        ) from error


def refuse_utf16(data: bytes, name: str) -> None:
    """Refuse a text in UTF-16 or UTF-32, by its byte order mark or the zeros in its first bytes."""
    head = data[:4]
    if head.startswith(_WIDE) or (0 in head[:2] and head[:2] != b"\0\0"):
        raise TokenRatioError(
            f"{name}: UTF-16 or UTF-32, not UTF-8. Save the file as UTF-8, for example with "
            "`iconv -f UTF-16 -t UTF-8`."
        )
