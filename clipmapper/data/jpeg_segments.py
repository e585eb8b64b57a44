"""The segments of a JPEG file (ITU-T T.81, annex B)."""

JPEG = b"\xff\xd8\xff"
# JFIF's and Adobe's, which say how colours are stored. Of the others (EXIF, profiles, previews) none is of
# the pixels.
_OF_PIXELS = (0xE0, 0xEE)
_COMMENT, _SCAN = 0xFE, 0xDA


def bare_jpeg(content: bytes) -> bytes:
    """The same image without metadata. A file that was cut stays cut."""
    kept, place = [content[:2]], 2
    while content[place : place + 1] == b"\xff" and place + 4 <= len(content):
        marker = content[place + 1]
        end = place + 2 + int.from_bytes(content[place + 2 : place + 4], "big")
        if marker == _SCAN or marker == 0xFF:
            break
        if not (0xE0 <= marker <= 0xEF or marker == _COMMENT) or marker in _OF_PIXELS:
            kept.append(content[place:end])
        place = end
    return b"".join([*kept, content[place:]])
