"""The chunks of a PNG file (W3C Recommendation, third edition)."""

PNG = b"\x89PNG\r\n\x1a\n"
# What the pixels need; all else (text, EXIF, colour profiles, times) is metadata.
_OF_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")


def bare_png(content: bytes) -> bytes:
    """The same image without metadata. A file that was cut stays cut."""
    kept, place = [PNG], len(PNG)
    while place + 8 <= len(content):
        length = int.from_bytes(content[place : place + 4], "big")
        end = place + 12 + length  # with the checksum
        if content[place + 4 : place + 8] in _OF_PIXELS:
            kept.append(content[place:end])
        place = end
    return b"".join(kept)
