"""What is text and what is not: bytes of files and streams, and strings that no file could hold."""


def decoded(raw: bytes | bytearray) -> str:
    """The text of a file or a stream: UTF-8, less a byte-order mark, every line ending in a line feed.

    Carriage returns, alone or before a line feed, become line feeds, so that a text is the same from wherever it was written and
    however it is read.

    Raises:
        UnicodeDecodeError: it is not UTF-8.
    """
    return raw.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")


def fault(text: str) -> str:
    """What keeps a text from being one, such as half a surrogate pair, which JSON can spell; "" of a text that is fine."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"has {text[error.start]!a} at place {error.start}, which is no character"
    return ""


def brief(value: object) -> str:
    """A value in an error: as Python writes it, its beginning if that is long, its type if that cannot be done."""
    try:
        written = repr(value)
    except (ValueError, RecursionError):  # thousands of digits, or of lists within each other
        return f"<{type(value).__name__}>"
    return written if len(written) <= 200 else f"{written[:200]}..."
