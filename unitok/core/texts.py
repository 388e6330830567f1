"""Text that comes from outside."""

from unitok.core.errors import UserError


def check_unicode(text: str, name: str) -> None:
    """UserError for text that is no Unicode, as of bytes that were not UTF-8; `name` says what it is."""
    if not isinstance(text, str):
        raise UserError(f"{name} {str(text)[:80]!r} is no text but of type {type(text).__name__}; give a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        shown = text[:80].encode("ascii", "backslashreplace").decode()
        raise UserError(
            f"{name} {shown!r}: what stands at character {error.start + 1} is no text; give it in UTF-8"
        ) from error
